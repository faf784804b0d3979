"""What the device search keeps of each prefix's text: where its phrases stand, and the word being spelled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shallowfusion.ctc.device_lexicon import DeviceLexicon
from shallowfusion.ctc.hotwords import phrase_patterns
from shallowfusion.ctc.search import merges_texts
from shallowfusion.ctc.settings import CtcAlphabet, CtcLanguage, CtcOptions
from shallowfusion.phrases.automaton import PhraseAutomaton, PhraseAutomatonProtocol
from shallowfusion.phrases.device_tables import DevicePhraseTable
from shallowfusion.phrases.label_arcs import label_arcs

__all__ = ["PhraseTracker", "SpellingTracker", "TextTracker", "WordTracker", "trackers_of"]

OPEN, BEGUN, AFTER_END = 1, 2, 4  # a word is being spelled; the text is not empty; the last label ended its word
BEGINS, ENDS, HAS_TEXT = 1, 2, 4  # of labels
CLOSES, SAYS_SPACE = 8, 16  # a label ends the word before it; it stands behind a space
FLAGS = 8
MOST_CHARACTERS = 4095  # of a word, counted
USUAL_WORD = 6  # characters; longer unknown words cost more
HASH_FACTOR = 6364136223846793005
HASHES = 2**61


class TextTracker(Protocol):
    """Something that follows texts: an integer per prefix, its site, says where it stands.

    Price: some 15 launches a frame, whatever the batch, and nothing synchronises.
    """

    @property
    def start(self) -> int:
        """The site of the empty text."""
        ...

    def extended(self, sites: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """float64 nats that labels gain for good behind texts, int64 sites after them; all of one shape."""
        ...

    def held(self, sites: Tensor) -> Tensor:
        """float64 nats that rank a text and are in no total."""
        ...

    def ending(self, sites: Tensor) -> Tensor:
        """float64 nats that the end of the utterance adds."""
        ...


class TextFlags:
    """Where words begin and end, for the flags of a site and those of a label.

    Args:
        alphabet: the labels.
    """

    def __init__(self, alphabet: CtcAlphabet, device: torch.device) -> None:
        kinds = [
            BEGINS * piece.begins_word + ENDS * piece.ends_word + HAS_TEXT * (piece.text != "")
            for piece in alphabet.pieces
        ]
        after = [moved_flags(flags, kind) for flags in range(FLAGS) for kind in range(FLAGS)]
        self._kinds = torch.tensor(kinds, dtype=torch.int64, device=device)
        self._after = torch.tensor(after, dtype=torch.int64, device=device)

    def moved(self, sites: Tensor, labels: Tensor) -> Tensor:
        """Flags after labels, with `CLOSES` and `SAYS_SPACE`."""
        return self._after[(sites % FLAGS) * FLAGS + self._kinds[labels]]


def moved_flags(flags: int, kind: int) -> int:
    """The flags of a site after a label of a kind."""
    parts = bool(kind & BEGINS or flags & AFTER_END)
    has_text, is_open, is_begun = bool(kind & HAS_TEXT), bool(flags & OPEN), bool(flags & BEGUN)
    closes = is_open and parts
    says_space = is_begun and has_text and (parts or not is_open)
    return (
        OPEN * ((is_open and not closes) or has_text)
        + BEGUN * (is_begun or has_text)
        + AFTER_END * bool(kind & ENDS)
        + CLOSES * closes
        + SAYS_SPACE * says_space
    )


class PhraseTracker:
    """Hotwords that are phrases, through the automaton of their bytes; a site is its state with the flags of the text.

    Args:
        alphabet: the labels.
        automaton: of the bytes of texts, see `phrase_patterns`.
    """

    def __init__(self, alphabet: CtcAlphabet, automaton: PhraseAutomatonProtocol, device: torch.device) -> None:
        arcs = label_arcs(automaton, [piece.text.encode() for piece in alphabet.pieces])
        self.table = DevicePhraseTable(arcs, device)
        everywhere = np.arange(arcs.num_states)
        gains, after = automaton.say(everywhere, np.full_like(everywhere, ord(" ")))
        self._space_gains = torch.from_numpy(gains + arcs.closing).to(device)  # a space ends every word
        self._after_space = torch.from_numpy(after).to(device)
        self._flags = TextFlags(alphabet, device)

    @property
    def start(self) -> int:
        return self.table.start_state * FLAGS

    def extended(self, sites: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        flags, states = self._flags.moved(sites, labels), sites // FLAGS
        says_space = flags >= SAYS_SPACE
        gains, after = self.table.look(torch.where(says_space, self._after_space[states], states), labels)
        gains = gains + self._space_gains[states].masked_fill(~says_space, 0.0)
        return gains, after * FLAGS + flags % FLAGS

    def held(self, sites: Tensor) -> Tensor:
        return self.table.held[sites // FLAGS]

    def ending(self, sites: Tensor) -> Tensor:
        return self.table.closing[sites // FLAGS]


class WordTracker:
    """The word being spelled: a node of a lexicon, its characters so far, and the flags of the text.

    A closed word gains what the lexicon gives its node. While it is spelled it ranks as its share of the shortest
    hotword that it may become, or as what beginnings of no known word cost.

    Args:
        alphabet: the labels.
        lexicon: of hotwords and of the words of a language model.
    """

    def __init__(self, alphabet: CtcAlphabet, lexicon: DeviceLexicon, device: torch.device) -> None:
        self.lexicon = lexicon
        lengths = [len(piece.text) for piece in alphabet.pieces]
        self._lengths = torch.tensor(lengths, dtype=torch.int64, device=device)
        self._flags = TextFlags(alphabet, device)

    @property
    def start(self) -> int:
        return 0

    def extended(self, sites: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        flags, words = self._flags.moved(sites, labels), sites // FLAGS
        closes = flags & CLOSES > 0
        gains = self.lexicon.gains[words // (MOST_CHARACTERS + 1)].masked_fill(~closes, 0.0)
        words = words.masked_fill(closes, 0)
        nodes = self.lexicon.table.look(words // (MOST_CHARACTERS + 1), labels)[1]
        characters = (words % (MOST_CHARACTERS + 1) + self._lengths[labels]).clamp_(max=MOST_CHARACTERS)
        return gains, (nodes * (MOST_CHARACTERS + 1) + characters) * FLAGS + flags % FLAGS

    def closed(self, sites: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """bool, whether labels close a word, and int64, what the language model calls it."""
        return self._flags.moved(sites, labels) & CLOSES > 0, self.open_words(sites)

    def open_words(self, sites: Tensor) -> Tensor:
        """int64, the words being spelled as the language model calls them."""
        return self.lexicon.language_words[sites // (FLAGS * (MOST_CHARACTERS + 1))]

    def is_open(self, sites: Tensor) -> Tensor:
        return sites & OPEN > 0

    def held(self, sites: Tensor) -> Tensor:
        words = sites // FLAGS
        nodes, characters = words // (MOST_CHARACTERS + 1), words % (MOST_CHARACTERS + 1)
        of_hotwords = self.lexicon.shares[nodes] * characters
        unknown = self.lexicon.unknown[nodes] * (characters.clamp(min=USUAL_WORD).double() / USUAL_WORD)
        return (of_hotwords + unknown).masked_fill(sites & OPEN == 0, 0.0)

    def ending(self, sites: Tensor) -> Tensor:
        return self.lexicon.gains[sites // (FLAGS * (MOST_CHARACTERS + 1))].masked_fill(sites & OPEN == 0, 0.0)


class SpellingTracker:
    """A text itself, by a hash of 61 bits of its letters and the flags of the site; nothing is gained.

    Two texts of one utterance are taken for one with a probability as in `Beam`, eight times that.

    Args:
        alphabet: the labels.
    """

    def __init__(self, alphabet: CtcAlphabet, device: torch.device) -> None:
        factors, sums = zip(*(appended(piece.text) for piece in alphabet.pieces), strict=True)
        self._factors = torch.tensor(factors, dtype=torch.int64, device=device)
        self._sums = torch.tensor(sums, dtype=torch.int64, device=device)
        self._space = appended(" ")
        self._flags = TextFlags(alphabet, device)

    @property
    def start(self) -> int:
        return 0

    def extended(self, sites: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        flags, texts = self._flags.moved(sites, labels), sites >> 3
        factor, more = self._space
        texts = torch.where(flags >= SAYS_SPACE, texts * factor + more, texts)
        texts = texts * self._factors[labels] + self._sums[labels]
        return texts.new_zeros((), dtype=torch.float64), texts * FLAGS + flags % FLAGS

    def held(self, sites: Tensor) -> Tensor:
        return sites.new_zeros((), dtype=torch.float64)

    def ending(self, sites: Tensor) -> Tensor:
        return self.held(sites)

    def texts(self, sites: Tensor) -> Tensor:
        """int64, equal where texts are."""
        return sites >> 3

    def open_texts(self, sites: Tensor) -> Tensor:
        """int64, equal where texts are and a word is being spelled in both or in none."""
        return sites & ~(BEGUN | AFTER_END)


def appended(text: str) -> tuple[int, int]:
    """What a hash is multiplied by and then added to when a text is said, both below 2^61."""
    factor, total = 1, 0
    for letter in text:
        mixed = (ord(letter) + 1) * 0x9E3779B97F4A7C15 % 2**64
        factor, total = factor * HASH_FACTOR % HASHES, (total * HASH_FACTOR + (mixed ^ (mixed >> 29))) % HASHES
    return factor, total


def trackers_of(
    alphabet: CtcAlphabet,
    options: CtcOptions,
    language: CtcLanguage | None,
    device: torch.device,
    phrases: PhraseAutomatonProtocol | None = None,
) -> Sequence[TextTracker]:
    """What these settings need to know of texts; words last.

    Args:
        phrases: the automaton of their hotwords, None = it is made here.
    """
    found: list[TextTracker] = []
    patterns = phrase_patterns(alphabet, options) if phrases is None else None
    if patterns is not None:
        phrases = PhraseAutomaton(patterns)
    if phrases is not None:
        found.append(PhraseTracker(alphabet, phrases, device))
    if merges_texts(alphabet, options, language):
        found.append(SpellingTracker(alphabet, device))
    is_of_words = language is not None and language.unit == "words"
    if options.hotword_list or options.word_bonus != 0 or is_of_words:
        found.append(WordTracker(alphabet, DeviceLexicon(alphabet, options, language, device), device))
    return found
