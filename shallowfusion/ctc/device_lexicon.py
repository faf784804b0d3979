"""Words letter by letter for the device search: hotwords counted one by one, and those of a language model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shallowfusion.ctc.search import known_words, word_prefixes
from shallowfusion.ctc.settings import CtcAlphabet, CtcLanguage, CtcOptions
from shallowfusion.phrases.device_tables import DevicePhraseTable
from shallowfusion.phrases.label_arcs import LabelArcs

__all__ = ["DeviceLexicon"]

ROOT, OUTSIDE = 0, 1  # no word begun; a word that no word of the lexicon begins with


@dataclass
class Node:
    """A beginning of words: the one it is, the sets that know one it may become, the shortest hotword among them."""

    language_word: int = -1
    is_known: bool = False
    known: int = 0
    is_hotword: bool = False
    shortest: int = 0


class DeviceLexicon:
    """Beginnings of words as nodes, and what each is worth.

    Price: see `DevicePhraseTable`. Making it takes some 5 microseconds for each letter of the words.

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
        nodes = beginnings(options, words)
        self.table = DevicePhraseTable(spelling_arcs(list(nodes), alphabet), device)
        found = [Node(), Node(), *list(nodes.values())[1:]]
        weight, bonus = options.hotword_weight, options.word_bonus
        unknown_id = -1 if words is None else words.table.model.unknown_word
        unknown_word = 0.0 if words is None else options.lm_weight * words.unknown_word
        prefixes = [] if words is None else word_prefixes(words)

        def tensor(values: list[float] | list[int]) -> Tensor:
            dtype = torch.float64 if isinstance(values[0], float) else torch.int64
            return torch.tensor(values, dtype=dtype, device=device)

        self.gains = tensor(
            [float(bonus + weight * node.is_hotword + unknown_word * (not node.is_known)) for node in found]
        )
        self.shares = tensor([weight / node.shortest if node.shortest else 0.0 for node in found])
        self.unknown = tensor(
            [
                float(sum(nats for bit, nats in enumerate(prefixes) if not node.known >> bit & 1 and not node.shortest))
                for node in found
            ]
        )
        self.language_words = tensor([node.language_word if node.language_word >= 0 else unknown_id for node in found])


def beginnings(options: CtcOptions, language: CtcLanguage | None) -> dict[str, Node]:
    """Every beginning of a word, the empty one first."""
    nodes: dict[str, Node] = {"": Node()}
    for word in options.hotword_list:
        for length in range(1, len(word) + 1):
            node = nodes.setdefault(word[:length], Node())
            node.shortest = min(node.shortest or len(word), len(word))
        nodes[word].is_hotword = True
    for word, number, known in [] if language is None else known_words(language):
        for length in range(1, len(word) + 1):
            nodes.setdefault(word[:length], Node()).known |= known
        nodes[word].language_word, nodes[word].is_known = number, known != 0
    return nodes


def spelling_arcs(nodes: list[str], alphabet: CtcAlphabet) -> LabelArcs:
    """From beginnings by labels to beginnings; everything else leads outside. Node i is the state i + 1, "" is 0."""
    states = {text: place + 1 for place, text in enumerate(nodes)} | {"": ROOT}
    labels: dict[str, list[int]] = {}
    for label, piece in enumerate(alphabet.pieces):
        if piece.text:
            labels.setdefault(piece.text, []).append(label)
    num_states, num_labels = len(nodes) + 1, len(alphabet.pieces)
    lengths = sorted({len(text) for text in labels})
    found = [
        (states[text[:-length]] * num_labels + label, state)
        for text, state in states.items()
        for length in lengths
        if length <= len(text)
        for label in labels.get(text[-length:], ())
    ]
    arcs = np.array(sorted(found), np.int64).reshape(-1, 2)
    is_silent: npt.NDArray[np.bool_] = np.array([piece.text == "" for piece in alphabet.pieces])
    return LabelArcs(
        keys=arcs[:, 0].copy(), after=arcs[:, 1].copy(), gains=np.zeros(len(arcs)),
        default_rows=np.zeros(num_states, np.int64), default_after=np.full((2, num_labels), OUTSIDE),
        default_gains=np.zeros((2, num_labels)), closing=np.zeros(num_states), held=np.zeros(num_states),
        closes=np.zeros(num_labels, np.bool_), is_silent=is_silent, start_state=ROOT,
    )  # fmt: skip
