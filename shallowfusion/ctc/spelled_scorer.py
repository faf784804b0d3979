"""CTC prefix scores of texts that are written in tokens and said in other labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shallowfusion.ctc.label_spelling import FRESH, UNSAYABLE, LabelSpelling, Written
from shallowfusion.ctc.prefix_scores import END, NOTHING, PrefixScoresProtocol

__all__ = ["SpelledPrefixScorer"]

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]
Labels = tuple[int, ...]


class Wanted(NamedTuple):
    """A candidate: its row, the labels it adds, what is then written, and the labels of a word in the making."""

    row: int
    labels: Labels
    written: Written
    ahead: Labels = ()


@dataclass
class Paths:
    """What is known of one utterance: its rows, and within a step the rows and scores of labels that follow them.

    Args:
        written: of each row that the search has.
        lent: what each row was given for a word in the making, nats.
        size: rows of the prefix scores, those of the search first.
        scores: by row and label.
        rows: the row that continues a row with a label.
    """

    written: list[Written]
    lent: list[float]
    size: int
    scores: dict[tuple[int, int], float] = field(default_factory=dict)
    rows: dict[tuple[int, int], int] = field(default_factory=dict)


class SpelledPrefixScorer:
    """A `CandidateScorer`: a token scores what its labels score, appended one by one to what the row has said.

    The increment is log psi(text + token) - log psi(text) of the texts in labels (see `PrefixScoresProtocol`), 0 for a
    token that adds none, -inf for one that cannot be said. Where labels wait for the end of a word, the text so far is
    scored as if the word ended here, and the next token gives that back. Along a finished text the parts sum to its CTC
    log-prob.

    Price: prefix scores of the distinct labels of a step's candidates, level by level: two calls for each label of the
    longest, and one row of the prefix scores for each distinct beginning.

    Args:
        scores: fresh, of the batch that is searched.
        spelling: of the tokens.
        end_id: the token that ends a text.
        weight: of the increments.
        broken: bool [utterances], the CTC model said NaN; increments are NaN there.
    """

    name = "ctc"

    def __init__(
        self,
        scores: PrefixScoresProtocol,
        spelling: LabelSpelling,
        end_id: int,
        weight: float,
        broken: npt.NDArray[np.bool_],
    ) -> None:
        self.weight = weight
        self._scores, self._spelling, self._end_id = scores, spelling, end_id
        self._broken = broken
        self._paths = [Paths([FRESH], [0.0], 1) for _ in broken]

    def increments(self, lanes: Int64Array, tokens: Int64Array) -> Float64Array:
        wanted = [self._wanted(paths, *pair) for paths, *pair in zip(self._paths, lanes, tokens, strict=True)]
        self._climb(wanted)
        found = np.zeros(tokens.shape)
        for utterance, (paths, listed) in enumerate(zip(self._paths, wanted, strict=True)):
            for place, own in enumerate(listed):
                total = _total(paths, own.row, own.labels) - paths.lent[own.row]
                found[utterance, place] = total + _lent(paths, own)
        found[self._broken] = np.nan
        return found

    def follow(self, parents: Int64Array, tokens: Int64Array) -> None:
        wanted = [self._wanted(paths, *pair) for paths, *pair in zip(self._paths, parents, tokens, strict=True)]
        self._climb(wanted)
        rows, last = np.zeros(tokens.shape, dtype=np.int64), np.full(tokens.shape, NOTHING)
        for utterance, (paths, listed) in enumerate(zip(self._paths, wanted, strict=True)):
            for place, own in enumerate(listed):
                rows[utterance, place], last[utterance, place] = _last_step(paths, own.row, own.labels)
        self._scores.follow(rows, last)
        self._paths = [
            Paths([own.written for own in listed], [_lent(paths, own) for own in listed], len(listed))
            for paths, listed in zip(self._paths, wanted, strict=True)
        ]

    def keep(self, order: Sequence[int]) -> None:
        self._scores.keep(order)
        self._paths = [self._paths[place] for place in order]
        self._broken = self._broken[list(order)]

    def _wanted(self, paths: Paths, lanes: Int64Array, tokens: Int64Array) -> list[Wanted]:
        """Of each candidate; where there is none, one without labels."""
        found = []
        for lane, token in zip(lanes.tolist(), tokens.tolist(), strict=True):
            row = max(lane, 0)
            written = paths.written[row]
            if lane < 0 or token < 0:
                found.append(Wanted(row, (), written, self._spelling.ahead(written)))
            elif token == self._end_id:
                found.append(Wanted(row, (*self._spelling.ahead(written), END), FRESH))
            else:
                labels, after = self._spelling.spell(written, token)
                found.append(Wanted(row, labels, after, self._spelling.ahead(after)))
        return found

    def _climb(self, wanted: Sequence[Sequence[Wanted]]) -> None:
        """Score the labels of all candidates, those after the same beginning once, one label deeper each time."""
        fronts = [{(own.row, own.labels + ahead) for own in listed for ahead in {(), own.ahead}} for listed in wanted]
        fronts = [{(row, labels) for row, labels in front if _is_sayable(labels)} for front in fronts]
        while any(fronts):
            new = [
                sorted({(row, labels[0]) for row, labels in front} - paths.scores.keys())
                for paths, front in zip(self._paths, fronts, strict=True)
            ]
            if any(new):
                found = self._scores.scores(*_padded(new))
                for paths, pairs, own in zip(self._paths, new, found.tolist(), strict=True):
                    paths.scores.update(zip(pairs, own))  # noqa: B905 - padded to the longest
            onward = [
                {(row, labels) for row, labels in front if len(labels) > 1 and paths.scores[row, labels[0]] > -np.inf}
                for paths, front in zip(self._paths, fronts, strict=True)
            ]
            self._add_rows([{(row, labels[0]) for row, labels in front} for front in onward])
            fronts = [
                {(paths.rows[row, labels[0]], labels[1:]) for row, labels in front}
                for paths, front in zip(self._paths, onward, strict=True)
            ]

    def _add_rows(self, wanted: Sequence[set[tuple[int, int]]]) -> None:
        """Rows that continue rows with a label, behind those that are there."""
        new = [sorted(own - paths.rows.keys()) for paths, own in zip(self._paths, wanted, strict=True)]
        if not any(new):
            return
        old = [[(row, NOTHING) for row in range(paths.size)] for paths in self._paths]
        self._scores.follow(*_padded([[*kept, *pairs] for kept, pairs in zip(old, new, strict=True)]))
        for paths, pairs in zip(self._paths, new, strict=True):
            paths.rows.update({pair: paths.size + place for place, pair in enumerate(pairs)})
            paths.size += len(pairs)


def _is_sayable(labels: Labels) -> bool:
    return bool(labels) and UNSAYABLE not in labels


def _total(paths: Paths, row: int, labels: Labels) -> float:
    if UNSAYABLE in labels:
        return -np.inf
    total = 0.0
    for place, label in enumerate(labels):
        total += paths.scores[row, label]
        if total == -np.inf:
            return total
        if place + 1 < len(labels):
            row = paths.rows[row, label]
    return total


def _lent(paths: Paths, own: Wanted) -> float:
    """What the word in the making scores beside the labels before it; 0 where it could only be another word."""
    if not own.ahead or UNSAYABLE in own.ahead:
        return 0.0
    said = _total(paths, own.row, own.labels)
    ahead = _total(paths, own.row, own.labels + own.ahead)
    return ahead - said if ahead > -np.inf else 0.0


def _last_step(paths: Paths, row: int, labels: Labels) -> tuple[int, int]:
    """The row that has said all labels but the last, and the last; the end where they are impossible."""
    if _total(paths, row, labels) == -np.inf:
        return row, END
    for label in labels[:-1]:
        row = paths.rows[row, label]
    return row, labels[-1] if labels else NOTHING


def _padded(pairs: Sequence[Sequence[tuple[int, int]]]) -> tuple[Int64Array, Int64Array]:
    """Rows and labels, [utterances, longest]; row 0 and no label where there are fewer."""
    width = max(map(len, pairs))
    filled = np.array([[*own, *[(0, NOTHING)] * (width - len(own))] for own in pairs], dtype=np.int64)
    return filled[:, :, 0], filled[:, :, 1]
