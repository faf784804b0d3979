"""Beam search of CTC or ASG models over a lexicon of spellings, or over labels; keeps alignments as flashlight does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shallowfusion import _native
from shallowfusion.checks import integer
from shallowfusion.config import require
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.ngrams.table import NgramTableProtocol

__all__ = [
    "LexiconOptions",
    "LexiconResult",
    "LexiconSearch",
    "LexiconSearchProtocol",
    "LexiconWords",
    "packed_repeats",
]

Float32Array = npt.NDArray[np.float32]
MOST = 1_000_000


@dataclass(frozen=True)
class LexiconOptions:
    """What the search maximises, and what it leaves out. Scores are nats.

    Args:
        beam_size: alignments kept after each frame.
        top_labels: labels looked at in each frame, None = all; with a lexicon, blank and repeats are possible anyway.
        beam_margin: alignments that lie more below the best are dropped.
        lm_weight: of the language model's log-probs.
        lm_scale: times nats is the unit of those; 1 / log(10) gives base 10. Matters beside the weight only where words
            share a spelling.
        word_score: added for each word of the lexicon.
        unknown_score: added for a word outside it, -inf = there are none.
        silence_score: added for each frame of silence.
        log_add: alignments that meet are summed, else the best one stays.
    """

    beam_size: int = 50
    top_labels: int | None = None
    beam_margin: float = 50.0
    lm_weight: float = 0.0
    lm_scale: float = 1.0
    word_score: float = 0.0
    unknown_score: float = -math.inf
    silence_score: float = 0.0
    log_add: bool = False

    def __post_init__(self) -> None:
        integer("beam_size", self.beam_size, 1, MOST)
        if self.top_labels is not None:
            integer("top_labels", self.top_labels, 1, MOST)
        require(self.beam_margin >= 0, f"beam_margin must be nats >= 0, got {self.beam_margin!r}.")
        for name in ("lm_weight", "lm_scale", "word_score", "silence_score"):
            value = getattr(self, name)
            require(math.isfinite(value), f"{name} must be finite, got {value!r}.")
        require(self.unknown_score < math.inf, f"unknown_score must be nats or -inf, got {self.unknown_score!r}.")


@dataclass(frozen=True, eq=False)
class LexiconWords:
    """The words of a search and what a language model calls them.

    Args:
        spellings: of each word, any number of label sequences; None = no lexicon, the labels are the words.
        ids: the word of the table for each word, or for each label without a lexicon.
        unknown: the word said for one outside the lexicon.
    """

    spellings: Sequence[Sequence[Sequence[int]]] | None
    ids: Sequence[int]
    unknown: int = 0


@dataclass(frozen=True, eq=False)
class LexiconResult:
    """One hypothesis.

    Args:
        score: what hypotheses are ranked by, nats.
        labels: int32 [frames + 2], the label of each frame between two of silence; before the end [frames + 1].
        words: int32 [words].
    """

    score: float
    labels: npt.NDArray[np.int32]
    words: npt.NDArray[np.int32]


class LexiconSearchProtocol(Protocol):
    """Finds the words whose best alignment (or sum of alignments, see `log_add`) scores best.

        score = sum of frame scores + lm_weight * log P(words, end) + word_score * words + silence_score * silent frames

    While a word is spelled, the language model's largest score of a word that may come of it, without history, stands
    in for its own; words of one spelling stand there with the sum of their probabilities. Alignments that agree in
    words, place in the lexicon, last label and whether it was a blank are one. A search that ends inside a word in
    every alignment keeps them.

    Transitions make it a search of the ASG criterion: there is no blank, each frame but the first adds the transition
    from the label of the frame before (silence or a label), a label that goes on is the same one, and words say a
    repeated label by labels that stand for repeats (`packed_repeats`).

    Price per frame: O(beam_size * min(top_labels, children) * log) and one look-up per new word history. Memory: 12
    bytes per alignment and frame.

    Source: flashlight-text's decoder, whose scores it reproduces.
    """

    def step(self, emissions: npt.ArrayLike) -> None:
        """Go on by float32 [frames, labels], log-probs or any scores to be added."""
        ...

    def end(self) -> None:
        """Close the sentence."""
        ...

    def results(self) -> list[LexiconResult]:
        """All hypotheses, best first."""
        ...


class LexiconSearch:
    """The C++ search of one utterance; see `LexiconSearchProtocol`.

    Args:
        num_labels: of the emissions.
        blank, silence: labels; silence stands between words and fills the frames there. With transitions blank is None.
        words: the lexicon.
        options: see `LexiconOptions`.
        table: of words, None = no language model.
        transitions: float32 [labels, labels] of an ASG model, added where the row's label stands in the frame after the
            column's; -inf forbids. None = CTC.

    Raises:
        InvalidArgumentError: labels or words out of range, transitions of another shape, NaN or inf, or beside a blank.
    """

    def __init__(
        self,
        num_labels: int,
        blank: int | None,
        silence: int,
        words: LexiconWords,
        options: LexiconOptions | None = None,
        table: NgramTableProtocol | None = None,
        transitions: npt.ArrayLike | None = None,
    ) -> None:
        self.num_labels = num_labels
        self._transitions = checked_transitions(transitions, num_labels, blank)
        self._rules = search_rules(num_labels, blank, silence, options or LexiconOptions())
        self._words, self._table = words, table
        self._trie = None
        if words.spellings is not None:
            self._trie = _native.SpellingTrie(
                spellings=scored_spellings(words, table, self._rules["lm_scale"]),
                num_labels=num_labels,
                num_words=len(words.ids),
            )
        self._native = self._made()

    def again(self) -> LexiconSearch:
        """A search for another utterance with the same lexicon, which is not built again."""
        other = object.__new__(LexiconSearch)
        other.__dict__.update(self.__dict__)
        other._native = other._made()
        return other

    def step(self, emissions: npt.ArrayLike) -> None:
        self._native.step(emissions=checked_emissions(emissions, self.num_labels))

    def end(self) -> None:
        self._native.end()

    def results(self) -> list[LexiconResult]:
        return [
            LexiconResult(score, np.array(labels, dtype=np.int32), np.array(words, dtype=np.int32))
            for score, labels, words in self._native.results()
        ]

    def _made(self) -> Any:
        table: Any = None if self._table is None else getattr(self._table, "native", None)
        require(
            self._table is None or table is not None,
            f"the table must be an NgramTable, got {type(self._table).__name__}.",
        )
        return _native.LexiconSearch(
            **self._rules,
            trie=self._trie,
            unknown_word=self._words.unknown,
            table=table,
            ids=[int(i) for i in self._words.ids],
            transitions=self._transitions,
        )


def packed_repeats(spelling: Sequence[int], repeats: Sequence[int]) -> list[int]:
    """A spelling in which labels that stand for repeats say what an ASG model cannot say twice.

    Args:
        spelling: labels.
        repeats: the label for one more, for two more, ... of the label before; "l l" becomes "l 1". Longer runs begin
            again: with one such label "l l l" becomes "l 1 l".

    Source: flashlight-text's `pack_replabels`.
    """
    packed: list[int] = []
    for label, run in itertools.groupby(spelling):
        left = len(list(run))
        while left > 0:
            more = min(left - 1, len(repeats))
            packed += [int(label), *([int(repeats[more - 1])] if more else [])]
            left -= 1 + more
    return packed


def search_rules(num_labels: int, blank: int | None, silence: int, options: LexiconOptions) -> dict[str, Any]:
    """Checked numbers of a search; the blank is -1 where there is none."""
    integer("num_labels", num_labels, 1, MOST)
    return {
        "num_labels": num_labels,
        "blank": -1 if blank is None else integer("blank", blank, 0, num_labels - 1),
        "silence": integer("silence", silence, 0, num_labels - 1),
        "beam_size": options.beam_size,
        "top_labels": min(options.top_labels or num_labels, num_labels),
        "beam_margin": float(options.beam_margin),
        "lm_weight": float(options.lm_weight),
        "lm_scale": float(options.lm_scale),
        "word_score": float(options.word_score),
        "unknown_score": float(options.unknown_score),
        "silence_score": float(options.silence_score),
        "log_add": bool(options.log_add),
    }


def scored_spellings(
    words: LexiconWords, table: NgramTableProtocol | None, scale: float
) -> list[tuple[int, list[int], float]]:
    """Every spelling with its word and what the language model says of the word at the start of a sentence."""
    assert words.spellings is not None
    scores = np.zeros(len(words.spellings))
    if table is not None and len(scores):
        starts = np.full(len(scores), table.start_state)
        scores = table.score(starts, np.asarray(words.ids)[: len(scores)])[0].astype(np.float64) * scale
    return [
        (word, [int(label) for label in spelling], float(scores[word]))
        for word, own in enumerate(words.spellings)
        for spelling in own
    ]


def checked_transitions(transitions: npt.ArrayLike | None, num_labels: int, blank: int | None) -> Float32Array | None:
    """float32 [labels, labels], below inf.

    Raises:
        InvalidArgumentError: another shape, NaN or inf, or a blank as well as transitions, or neither.
    """
    if transitions is None:
        require(blank is not None, "blank must be a label, got None; only a search with transitions has none.")
        return None
    require(blank is None, f"blank must be None with transitions, got {blank!r}; the ASG criterion has no blank.")
    array = np.ascontiguousarray(transitions, dtype=np.float32)
    if array.shape != (num_labels, num_labels):
        raise InvalidArgumentError(f"transitions must be [{num_labels}, {num_labels}], got {list(array.shape)}.")
    require(bool((array < np.inf).all()), "transitions must be nats below inf (-inf forbids), got NaN or inf.")
    return array


def checked_emissions(emissions: npt.ArrayLike, num_labels: int) -> Float32Array:
    """float32 [frames, labels] without NaN.

    Raises:
        InvalidArgumentError: another shape, or NaN.
    """
    array = np.ascontiguousarray(emissions, dtype=np.float32)
    if array.ndim != 2 or array.shape[1] != num_labels:
        raise InvalidArgumentError(f"emissions must be [frames, {num_labels}], got {list(array.shape)}.")
    require(not np.isnan(array).any(), "emissions must not hold NaN; the acoustic model overflowed.")
    return array
