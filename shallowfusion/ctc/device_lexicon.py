"""Words letter by letter for the device search: hotwords counted one by one, and those of a language model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from shallowfusion.ctc.search import known_words, word_prefixes
from shallowfusion.ctc.settings import CtcAlphabet, CtcLanguage, CtcOptions
from shallowfusion.phrases.device_tables import DevicePhraseTable
from shallowfusion.phrases.label_arcs import label_arcs

__all__ = ["DeviceLexicon", "WordTree"]

ROOT, OUTSIDE = 0, 1  # no word begun; a word that no word of the lexicon begins with
LETTERS = 2**21  # more than Unicode has

Float32Array = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]


class WordTree:
    """The beginnings of words as nodes, `WalkedProtocol` over letters, where nothing is gained.

    Price: making it takes O(letters * log(words)).

    Args:
        words: in any order, none of them empty.

    Attributes:
        ends: int64 [words], the node of each.
        parents: int64 [nodes], that of the root and of the outside is the root.
    """

    def __init__(self, words: Sequence[str]) -> None:
        lengths = np.array([len(word) for word in words], np.int64)
        letters = np.frombuffer("".join(words).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
        first = np.cumsum(lengths) - lengths
        self.ends = np.full(len(words), ROOT, np.int64)
        levels: list[Int64Array] = []
        count = 2
        for depth in range(int(lengths.max(initial=0))):
            live = np.flatnonzero(lengths > depth)
            pairs = self.ends[live] * LETTERS + letters[first[live] + depth]
            known, places = np.unique(pairs, return_inverse=True)
            self.ends[live] = count + places
            levels.append(known)
            count += len(known)
        self._pairs = np.concatenate([np.zeros(0, np.int64), *levels])  # of nodes 2, 3, ..., ascending
        self.parents = np.concatenate([np.zeros(2, np.int64), self._pairs // LETTERS])

    @property
    def start_state(self) -> int:
        return ROOT

    @property
    def shared_state(self) -> int:
        return OUTSIDE

    def turns(self) -> tuple[Int64Array, Int64Array, npt.NDArray[np.int32]]:
        fallbacks = np.full(len(self.parents), OUTSIDE)
        fallbacks[ROOT] = ROOT
        counts = np.bincount(self._pairs // LETTERS, minlength=len(fallbacks))
        letters = (self._pairs % LETTERS)[counts[ROOT] :].astype(np.int32)
        counts[ROOT] = 0
        return fallbacks, np.append(0, np.cumsum(counts)), letters

    def say(self, states: npt.ArrayLike, tokens: npt.ArrayLike) -> tuple[Doubles, Int64Array]:
        wanted = np.asarray(states, np.int64) * LETTERS + np.asarray(tokens, np.int64)
        places = np.searchsorted(self._pairs, wanted)
        is_there = np.append(self._pairs, -1)[places] == wanted
        return np.zeros(len(wanted)), np.where(is_there, places + 2, OUTSIDE)

    def ends_words(self, tokens: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        return np.zeros(len(np.asarray(tokens)), np.bool_)

    def closing(self, states: npt.ArrayLike) -> Float32Array:
        return np.zeros(len(np.asarray(states)), np.float32)

    def held(self, states: npt.ArrayLike) -> Float32Array:
        return self.closing(states)

    def handed_up(self, values: Int64Array, combine: np.ufunc, start: int) -> Int64Array:
        """int64 [nodes]: the values of all words that begin so, combined."""
        found = np.full(len(self.parents), start, np.int64)
        nodes, live = self.ends.copy(), np.arange(len(values))
        while len(live):
            combine.at(found, nodes[live], values[live])
            nodes[live] = self.parents[nodes[live]]
            live = live[nodes[live] != ROOT]
        return found


class DeviceLexicon:
    """Beginnings of words as nodes, and what each is worth.

    Price: see `DevicePhraseTable`. A lexicon of 200,000 words takes about a second to make.

    Args:
        alphabet: the labels.
        options: `hotword_list`, `hotword_weight`, `word_bonus` and `lm_weight` count.
        language: a model of words, None = none; one of labels is not looked at.

    Attributes:
        table: from a node by a label to a node.
        gains: float64 [nodes], of closing the word.
        shares: float64 [nodes], of each letter of a hotword being spelled.
        unknown: float64 [nodes], of beginnings of no known word, to rank.
        language_words: int64 [nodes], what the language model calls them.
    """

    def __init__(
        self, alphabet: CtcAlphabet, options: CtcOptions, language: CtcLanguage | None, device: torch.device
    ) -> None:
        words = language if language is not None and language.unit == "words" else None
        entries = [] if words is None else known_words(words)
        hotwords = options.hotword_list
        tree = WordTree([*hotwords, *(word for word, _, _ in entries)])
        labels = [[ord(letter) for letter in piece.text] for piece in alphabet.pieces]
        self.table = DevicePhraseTable(label_arcs(tree, labels), device)
        count, largest = len(tree.parents), np.iinfo(np.int64).max
        known = np.array([0] * len(hotwords) + [sets for _, _, sets in entries], np.int64)
        lengths = np.array([len(word) for word in hotwords] + [largest] * len(entries), np.int64)
        sets, shortest = tree.handed_up(known, np.bitwise_or, 0), tree.handed_up(lengths, np.minimum, largest)
        may_be_hotword = shortest < largest
        gains = np.full(count, options.word_bonus, np.float64)
        gains[tree.ends[: len(hotwords)]] += options.hotword_weight
        unknown, names = np.zeros(count), np.zeros(count, np.int64)
        if words is not None:
            is_known = np.zeros(count, np.bool_)
            is_known[tree.ends[known > 0]] = True
            gains += np.where(is_known, 0.0, options.lm_weight * words.unknown_word)
            for number, nats in enumerate(word_prefixes(words)):
                unknown += np.where(sets >> number & 1, 0.0, nats)
            names[:] = words.table.model.unknown_word
            names[tree.ends[len(hotwords) :]] = [number for _, number, _ in entries]
        self.gains = torch.from_numpy(gains).to(device)
        self.shares = torch.from_numpy(np.where(may_be_hotword, options.hotword_weight / shortest, 0.0)).to(device)
        self.unknown = torch.from_numpy(np.where(may_be_hotword, 0.0, unknown)).to(device)
        self.language_words = torch.from_numpy(names).to(device)
