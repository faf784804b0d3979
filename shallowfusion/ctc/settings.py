"""What a CTC search works on and what the caller may choose: small frozen records, checked when made."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from shallowfusion.checks import integer
from shallowfusion.config import require
from shallowfusion.errors import InvalidArgumentError, VocabularyError
from shallowfusion.ngrams.table import WordTableProtocol

__all__ = ["CtcAlphabet", "CtcLanguage", "CtcOptions", "Piece"]

Merge = Literal["logsumexp", "max"]
Places = Literal["prefixes", "paths"]
Times = Literal["best", "last"]
Backend = Literal["auto", "native", "device"]
HotwordForm = Literal["phrases", "words"]
Hotwords = Mapping[str, float] | Sequence[str | tuple[str, float]] | str
MAX_BEAM = 1_000_000
MAX_WORD_SETS = 32
LARGEST_WEIGHT = 100.0  # nats of a phrase: the search multiplies by its exponential
WORD_START = "▁"  # sentencepiece's mark of a word's first piece


class Piece(NamedTuple):
    """What a label adds: its text, whether it closes the word before it, whether it closes its own word."""

    text: str
    begins_word: bool
    ends_word: bool


@dataclass(frozen=True)
class CtcAlphabet:
    """The labels of a CTC model.

    Words are told apart by a `delimiter` label or by labels that start with `word_start`; with neither, a text is its
    labels side by side. With words, runs of delimiters count as one and those at both ends do not show in the text.

    Args:
        labels: text of each label; that of the blank is not looked at.
        blank: index of the blank.
        delimiter: index of the label between words, None = none.
        word_start: how labels that begin a word are marked, for instance "▁"; None = they are not. A label that ends
            with the mark too is a word of its own.

    Raises:
        InvalidArgumentError: no labels, or an index outside them.
        VocabularyError: a label is no text that UTF-8 can hold.
    """

    labels: tuple[str, ...]
    blank: int = 0
    delimiter: int | None = None
    word_start: str | None = None

    def __post_init__(self) -> None:
        require(len(self.labels) > 0, "labels must hold the text of at least one label, got none.")
        for number, label in enumerate(self.labels):
            try:
                label.encode()
            except (AttributeError, UnicodeEncodeError):
                raise VocabularyError(f"labels[{number}] must be text that UTF-8 can hold, got {label!r}.") from None
        integer("blank", self.blank, 0, len(self.labels) - 1)
        if self.delimiter is not None:
            integer("delimiter", self.delimiter, 0, len(self.labels) - 1)
            require(self.delimiter != self.blank, f"delimiter and blank must differ, both are {self.blank}.")
        require(self.word_start is None or self.word_start != "", "word_start must be None or a mark, got ''.")

    @property
    def has_words(self) -> bool:
        return self.delimiter is not None or self.word_start is not None

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """What each label adds; nothing for the blank."""
        return tuple(self._piece(number, label) for number, label in enumerate(self.labels))

    def _piece(self, number: int, label: str) -> Piece:
        if number == self.blank:
            return Piece("", False, False)
        if number == self.delimiter:
            return Piece("", True, False)
        mark = self.word_start
        if mark is None or not label.startswith(mark):
            return Piece(label, False, False)
        rest = label[len(mark) :]
        ends = rest.endswith(mark)
        return Piece(rest[: -len(mark)] if ends else rest, True, ends)

    @cached_property
    def is_ambiguous(self) -> bool:
        """Whether different labels may spell the same text."""
        texts = [piece.text for number, piece in enumerate(self.pieces) if number not in (self.blank, self.delimiter)]
        return len(set(texts)) < len(texts) or "" in texts or not is_uniquely_decodable(texts)


def is_uniquely_decodable(texts: Collection[str]) -> bool:
    """Whether no two sequences of texts, none of them empty, are the same side by side.

    Source: Sardinas and Patterson 1953.
    """
    ordered = sorted(set(texts))
    codes = set(ordered)
    seen: set[str] = set()
    rests = {text[n:] for text in ordered for n in range(1, len(text)) if text[:n] in codes}
    while rests:
        if rests & codes:
            return False
        seen |= rests
        found = {rest[n:] for rest in rests for n in range(1, len(rest)) if rest[:n] in codes}
        for rest in rests:
            at = bisect_left(ordered, rest)
            while at < len(ordered) and ordered[at].startswith(rest):
                found.add(ordered[at][len(rest) :])
                at += 1
        rests = found - seen
    return True


@dataclass(frozen=True, eq=False)
class CtcLanguage:
    """An n-gram model and how it reads the text.

    Args:
        table: the model; one that is no `NgramTable` is asked in Python, a word and state at a time.
        unit: "words": scored when a word is closed; "labels": scored with each new label, whose text is the word of the
            table (the delimiter's is `delimiter_word`).
        words: the known words, None = all of the table. Others are scored as the table does, plus `unknown_word`.
        unknown_word: nats, added to the log-prob of a closed word that is not known, weighted like it.
        unknown_prefix: nats, not weighted: ranks prefixes while the word they spell is no beginning of a known one.
            Beyond six characters it grows with the length. It is gone once the word is closed.
        score_boundary: start after <s> and score </s> at the end.
        score_empty_word: a text that ends with a delimiter is charged an unknown word more, as pyctcdecode does. Of
            equal texts with and without one the best says which; with times="last", the one whose times are shown.
        delimiter_word: the delimiter in a table of labels.
        prefixes: several sets of known words, up to 32, each with its own `unknown_prefix`, whose sum ranks, in place
            of `words` and `unknown_prefix`; a word in none of them is not known.
    """

    table: WordTableProtocol
    unit: Literal["words", "labels"] = "words"
    words: Collection[str] | None = None
    unknown_word: float = -10.0 * math.log(10.0)
    unknown_prefix: float = -10.0
    score_boundary: bool = True
    score_empty_word: bool = False
    delimiter_word: str = "<space>"
    prefixes: tuple[tuple[Collection[str], float], ...] = ()

    def __post_init__(self) -> None:
        require(
            len(self.prefixes) <= MAX_WORD_SETS and all(math.isfinite(nats) for _, nats in self.prefixes),
            f"prefixes must be at most {MAX_WORD_SETS} sets of words with finite nats, got {len(self.prefixes)}.",
        )
        require(self.unit in ("words", "labels"), f"unit must be 'words' or 'labels', got {self.unit!r}.")
        for name in ("unknown_word", "unknown_prefix"):
            value = getattr(self, name)
            require(math.isfinite(value), f"{name} must be finite, got {value!r}; 0 switches it off.")

    @property
    def start_state(self) -> int:
        return self.table.start_state if self.score_boundary else self.table.null_state


@dataclass(frozen=True)
class CtcOptions:
    """What a CTC search maximises, and what it leaves out.

    The defaults prune by `beam_size` only.

    Args:
        beam_size: prefixes kept after each frame.
        merge: "logsumexp" sums the alignments of a prefix, "max" keeps the best one (Viterbi).
        lm_weight: of the language model's log-probs.
        word_bonus: nats per closed word.
        length_bonus: nats per label.
        hotwords: words and phrases to favour: {"Fallot": 4.0} in nats each time one is said, or texts alone, which
            get `hotword_weight` each; negative weights make a phrase less likely. While one is being spelled, its
            spelled part ranks as its share of the weight, a loan that no total holds.
        hotword_weight: nats.
        hotword_form: "phrases": a phrase counts when its words follow each other; "words": each word of `hotwords`
            counts by itself and gets `hotword_weight`, as in pyctcdecode.
        hotwords_inside_words: phrases count inside longer words too ("art" in "heart"), not only as whole words.
        token_min_log_prob: labels below it, the blank included, are left out of a frame unless they are its best.
        top_labels: so many labels of a frame, the blank counted, are looked at.
        beam_margin: nats; prefixes that lie more below the best are dropped, in the final list as well.
        blank_skip: a frame whose blank has at least this probability counts as blank alone.
        places: what takes a place in the beam: a prefix, or each of its two "paths" (ending in blank, ending in its
            label), as in pyctcdecode.
        history_words: of paths that agree in that many last words, in the word being spelled and in their ending, only
            the best stays; 0 = off.
        merge_texts: whether paths of different labels but equal text and ending become one after each frame; False
            keeps them apart until the end.
        times: of labels and words: "best": of the best alignment; "last": of the lowest-ranked path of each frame that
            joined the others, as pyctcdecode has them (of equal texts of different labels, of the likeliest).
        backend: the search that `CTCDecoder.decode` uses: "native" (C++, CPU), "device" (torch, where the scores are,
            see `DeviceCtcSearch`) or "auto": on the device for tensors that are on one, if it can search what is asked.

    Raises:
        InvalidArgumentError: a value outside its range.
    """

    beam_size: int = 100
    merge: Merge = "logsumexp"
    lm_weight: float = 0.5
    word_bonus: float = 0.0
    length_bonus: float = 0.0
    hotwords: Hotwords = ()
    hotword_weight: float = 4.0
    hotword_form: HotwordForm = "phrases"
    hotwords_inside_words: bool = False
    token_min_log_prob: float | None = None
    top_labels: int | None = None
    beam_margin: float | None = None
    blank_skip: float | None = None
    places: Places = "prefixes"
    history_words: int = 0
    merge_texts: bool = True
    times: Times = "best"
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        integer("beam_size", self.beam_size, 1, MAX_BEAM)
        integer("history_words", self.history_words, 0, MAX_BEAM)
        if self.top_labels is not None:
            integer("top_labels", self.top_labels, 1, MAX_BEAM)
        require(self.merge in ("logsumexp", "max"), f"merge must be 'logsumexp' or 'max', got {self.merge!r}.")
        require(self.places in ("prefixes", "paths"), f"places must be 'prefixes' or 'paths', got {self.places!r}.")
        require(
            self.backend in ("auto", "native", "device"),
            f"backend must be 'auto', 'native' or 'device', got {self.backend!r}.",
        )
        require(self.times in ("best", "last"), f"times must be 'best' or 'last', got {self.times!r}.")
        require(isinstance(self.merge_texts, bool), f"merge_texts must be True or False, got {self.merge_texts!r}.")
        for name in ("lm_weight", "word_bonus", "length_bonus", "hotword_weight"):
            value = getattr(self, name)
            require(_is_number(value) and math.isfinite(value), f"{name} must be a finite number, got {value!r}.")
        margin, skip, lowest = self.beam_margin, self.blank_skip, self.token_min_log_prob
        require(
            margin is None or (_is_number(margin) and margin >= 0),
            f"beam_margin must be nats >= 0 or None, got {margin!r}; 10 is customary.",
        )
        require(
            skip is None or (_is_number(skip) and 0 < skip <= 1),
            f"blank_skip must be a probability in (0, 1] or None, got {skip!r}; 0.95 is customary.",
        )
        require(
            lowest is None or (_is_number(lowest) and not math.isnan(lowest)),
            f"token_min_log_prob must be nats or None, got {lowest!r}; -5 is customary.",
        )
        self._check_hotwords()

    def _check_hotwords(self) -> None:
        form, inside = self.hotword_form, self.hotwords_inside_words
        require(form in ("phrases", "words"), f"hotword_form must be 'phrases' or 'words', got {form!r}.")
        require(isinstance(inside, bool), f"hotwords_inside_words must be True or False, got {inside!r}.")
        given: Any = [self.hotwords] if isinstance(self.hotwords, str) else self.hotwords
        given = given.items() if isinstance(given, Mapping) else given
        try:
            entries = tuple(entry if isinstance(entry, str) else _weighted(*entry) for entry in given)
        except TypeError:
            raise InvalidArgumentError(
                f"hotwords must be texts or a mapping of text to weight, got {self.hotwords!r}."
            ) from None
        require(
            form == "phrases" or not (inside or any(not isinstance(entry, str) for entry in entries)),
            'with hotword_form="words" hotwords are whole words that share hotword_weight; give them without weights.',
        )
        for text, weight in map(self._pair, entries if form == "phrases" else ()):
            require(bool(text.strip()), f"hotwords must be texts, got {text!r}.")
            require(
                abs(weight) <= LARGEST_WEIGHT,
                f"the weight of {text!r} among the hotwords must be from {-LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g} "
                f"nats, got {weight:g}; 4 is customary.",
            )
        object.__setattr__(self, "hotwords", entries)

    def _pair(self, entry: str | tuple[str, float]) -> tuple[str, float]:
        return (entry, self.hotword_weight) if isinstance(entry, str) else entry

    @property
    def weighted_hotwords(self) -> dict[str, float]:
        """Phrases and their weights in nats; empty without hotwords."""
        return dict(map(self._pair, self.hotwords))

    @property
    def hotword_list(self) -> tuple[str, ...]:
        """With hotword_form="words", the single words of all hotwords, each once."""
        phrases = self.weighted_hotwords if self.hotword_form == "words" else {}
        return tuple(dict.fromkeys(word for phrase in phrases for word in phrase.split()))


def _weighted(text: str, weight: float) -> tuple[str, float]:
    require(isinstance(text, str), f"hotwords must be texts, got {text!r}.")
    require(
        _is_number(weight) and math.isfinite(weight),
        f"the weight of {text!r} among the hotwords must be finite (nats for saying it), got {weight!r}.",
    )
    return text, float(weight)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
