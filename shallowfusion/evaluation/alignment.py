"""Word alignment of a hypothesis with its reference, and edit distances of many texts at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = ["Edit", "EditCounts", "align", "edit_counts", "pairwise_edits"]

EditKind = Literal["equal", "substitute", "delete", "insert"]
IntArray = npt.NDArray[Any]

# Bits of a cell of the move table: which last steps lead to its cost. Neither bit set is the diagonal.
DELETE, INSERT = 1, 2


@dataclass(frozen=True)
class Edit:
    """One step of an alignment.

    Args:
        kind: "equal" and "substitute" use a word of both sides, "delete" of the reference, "insert" of the hypothesis.
        reference: position of the reference word; for "insert" of the word it stands before.
        hypothesis: position of the hypothesis word; for "delete" of the word it would stand before.
    """

    kind: EditKind
    reference: int
    hypothesis: int


@dataclass(frozen=True)
class EditCounts:
    """How many units of a pair are right, replaced, missing and added."""

    correct: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> tuple[Edit, ...]:
    """The alignment with the fewest errors, among those the one with the most correct words, gaps as late as possible.

    Substitutions, deletions and insertions cost one each (METHODS 10.1). Price: reference x hypothesis bytes.
    """
    same = _shared(reference, hypothesis)
    _, moves = _table(reference[same:], hypothesis[same:], with_moves=True)
    assert moves is not None
    at, to = len(reference), len(hypothesis)
    steps: list[Edit] = []
    while at > same or to > same:
        move = moves[at - same, to - same]
        if move & DELETE:
            at -= 1
            steps.append(Edit("delete", at, to))
        elif move & INSERT:
            to -= 1
            steps.append(Edit("insert", at, to))
        else:
            at, to = at - 1, to - 1
            steps.append(Edit("equal" if reference[at] == hypothesis[to] else "substitute", at, to))
    return (*(Edit("equal", i, i) for i in range(same)), *reversed(steps))


def edit_counts(reference: Sequence[str], hypothesis: Sequence[str]) -> EditCounts:
    """Counts of `align`'s alignment without making it: memory grows with the hypothesis alone."""
    before = _shared(reference, hypothesis)
    own, theirs = reference[before:], hypothesis[before:]
    after = _shared(own[::-1], theirs[::-1])
    own, theirs = own[: len(own) - after], theirs[: len(theirs) - after]
    cost, _ = _table(own, theirs, with_moves=False)
    errors, substitutions = divmod(cost, _unit(own, theirs))
    gaps = errors - substitutions
    deletions = (gaps + len(own) - len(theirs)) // 2
    return EditCounts(len(reference) - deletions - substitutions, substitutions, deletions, gaps - deletions)


def pairwise_edits(sequences: Sequence[Sequence[str]]) -> npt.NDArray[np.int32]:
    """Edit distance of every pair, int32 [sequences, sequences]. Price: sequences squared x longest squared."""
    count, longest = len(sequences), max((len(sequence) for sequence in sequences), default=0)
    ids = _ids(*sequences)
    padded = np.full((count, longest), -1, dtype=np.int32)
    for i, own in enumerate(ids):
        padded[i, : len(own)] = own
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    columns = np.arange(longest + 1, dtype=np.int32)
    costs = np.broadcast_to(columns, (count, count, longest + 1)).copy()
    found = np.zeros((count, count), dtype=np.int32)
    found[lengths == 0] = lengths
    for row in range(longest):
        wrong = padded[:, None, row, None] != padded[None, :, :]
        base = np.minimum(costs[:, :, :-1] + wrong, costs[:, :, 1:] + 1)
        costs[:, :, 0] = row + 1
        costs[:, :, 1:] = base
        costs = np.minimum.accumulate(costs - columns, axis=2) + columns
        ending = np.flatnonzero(lengths == row + 1)
        found[ending] = costs[ending[:, None], np.arange(count)[None, :], lengths[None, :]]
    return found


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """Words both begin with; some best alignment pairs them, so no table is needed there."""
    count = 0
    for word, same in zip(one, other, strict=False):
        if word != same:
            break
        count += 1
    return count


def _unit(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Cost of one error; one more for a substitution breaks ties and never adds up to an error."""
    return len(reference) + len(hypothesis) + 1


def _table(
    reference: Sequence[str], hypothesis: Sequence[str], with_moves: bool
) -> tuple[int, npt.NDArray[np.uint8] | None]:
    """Least cost of the whole pair and, on demand, the last steps that reach each cell, uint8 [n + 1, m + 1]."""
    unit = _unit(reference, hypothesis)
    own, theirs = _ids(reference, hypothesis)
    columns = np.arange(len(theirs) + 1, dtype=np.int64) * unit
    costs = columns.copy()
    moves = np.zeros((len(own) + 1, len(theirs) + 1), dtype=np.uint8) if with_moves else None
    if moves is not None:
        moves[0, 1:] = INSERT
    for row, word in enumerate(own, start=1):
        previous = costs
        costs = previous + unit
        np.minimum(costs[1:], previous[:-1] + np.where(theirs == word, 0, unit + 1), out=costs[1:])
        costs = np.minimum.accumulate(costs - columns) + columns
        if moves is not None:
            moves[row] = DELETE * (costs == previous + unit)
            moves[row, 1:] |= (INSERT * (costs[1:] == costs[:-1] + unit)).astype(np.uint8)
    return int(costs[-1]), moves


def _ids(*sequences: Sequence[str]) -> list[IntArray]:
    """Words as numbers that are equal where the words are."""
    known: dict[str, int] = {}
    return [
        np.array([known.setdefault(word, len(known)) for word in sequence], dtype=np.int64) for sequence in sequences
    ]
