"""The readable twin of the CTC prefix scores: log domain, one row and one frame at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shallowfusion.checks import integer_array
from shallowfusion.config import require
from shallowfusion.ctc.prefix_scores import (
    END,
    IMPOSSIBLE_BELOW,
    NOTHING,
    Float64Array,
    PrefixFrames,
    checked_labels,
)

__all__ = ["ReferencePrefixScores"]

NEVER = -math.inf


@dataclass(frozen=True, eq=False)
class Row:
    """Log-probs [frames + 1] of having said the prefix after so many frames; `blank` counts endings in blank only.

    `log_end` is that of the text if the prefix ends in a delimiter: it is that of the prefix without it.
    """

    last_label: int | None
    log_psi: float
    any: Float64Array
    blank: Float64Array
    log_end: float | None = None


class ReferencePrefixScores:
    """`PrefixScoresProtocol` in Python; arguments as of `PrefixScores`."""

    def __init__(
        self,
        log_probs: object,
        lengths: object = None,
        *,
        blank: int = 0,
        delimiter: int | None = None,
        margin: float | None = None,
    ) -> None:
        frames = PrefixFrames.check(log_probs, lengths, blank, delimiter, margin)
        self.blank = blank
        self.delimiter = delimiter
        self.log_cut = math.log(frames.cut) if frames.cut else NEVER
        pairs = zip(frames.log_probs.astype(np.float64), frames.counts.tolist(), strict=True)
        self.log_probs = [own[:count] for own, count in pairs]
        self.num_labels = frames.log_probs.shape[2]
        self.rows = [[self._empty(own)] for own in self.log_probs]

    def scores(self, rows: object, labels: object) -> Float64Array:
        own_rows, own_labels = self._checked(rows, labels)
        found = np.zeros(own_rows.shape)
        for utterance, place in np.ndindex(*own_rows.shape):
            label = int(own_labels[utterance, place])
            if label != NOTHING:
                row = self.rows[utterance][own_rows[utterance, place]]
                found[utterance, place] = self._score(row, self.log_probs[utterance], label)
        return found

    def follow(self, parents: object, labels: object) -> None:
        own_rows, own_labels = self._checked(parents, labels)
        require(bool((own_rows >= 0).all()), "a row must continue a row.")
        self.rows = [
            [self._extended(old[row], frames, label) for row, label in zip(chosen, own, strict=True)]
            for old, frames, chosen, own in zip(
                self.rows, self.log_probs, own_rows.tolist(), own_labels.tolist(), strict=True
            )
        ]

    def keep(self, order: Sequence[int]) -> None:
        places = integer_array("order", list(order), (None,)).tolist()
        is_fine = len(set(places)) == len(places) and all(0 <= place < len(self.rows) for place in places)
        require(is_fine, "order must hold places of the batch, each at most once.")
        self.rows = [self.rows[place] for place in places]
        self.log_probs = [self.log_probs[place] for place in places]

    def _checked(self, rows: object, labels: object) -> tuple[np.ndarray, np.ndarray]:
        own_rows, own_labels = checked_labels(rows, labels, len(self.rows))
        is_label = (own_labels >= NOTHING) & (own_labels < self.num_labels) & (own_labels != self.blank)
        require(bool(is_label.all()), "labels must be labels but the blank, -1 for the end or -2 for nothing.")
        limits = np.array([len(rows) for rows in self.rows])[:, None]
        is_row = ((own_rows >= 0) & (own_rows < limits)) | (own_labels == NOTHING)
        require(bool(is_row.all()), "rows must be live rows.")
        return own_rows, own_labels

    def _empty(self, frames: Float64Array) -> Row:
        silent = np.concatenate([[0.0], np.cumsum(self._silences(frames))])
        silent[silent <= self.log_cut] = NEVER
        return Row(None, 0.0, silent, silent)

    def _silences(self, frames: Float64Array) -> Float64Array:
        """Log-prob of what may be said before the first and after the last word without adding, [frames]."""
        silent: Float64Array = frames[:, self.blank]
        return silent if self.delimiter is None else np.logaddexp(silent, frames[:, self.delimiter])

    def _adds_nothing(self, row: Row, label: int) -> bool:
        return self.delimiter is not None and label == self.delimiter and row.last_label in (None, self.delimiter)

    def _entries(self, row: Row, frames: Float64Array, label: int) -> Float64Array:
        """Log-prob that the label is said for the first time at each frame, [frames]."""
        before = row.blank if label == row.last_label else row.any
        entries: Float64Array = before[:-1] + frames[:, label]
        return entries

    def _score(self, row: Row, frames: Float64Array, label: int) -> float:
        if row.log_psi == NEVER:
            return NEVER
        if self._adds_nothing(row, label):
            return 0.0
        mass = (
            self._ending(row, frames)
            if label == END
            else np.logaddexp.reduce(self._entries(row, frames, label), initial=NEVER)
        )
        score = float(mass) - row.log_psi
        return score if score >= IMPOSSIBLE_BELOW else NEVER

    def _ending(self, row: Row, frames: Float64Array) -> float:
        """Log-prob of all alignments that end with the prefix, or with delimiters after it."""
        if row.log_end is not None:
            return row.log_end
        whole = float(row.any[-1])
        if self.delimiter is None or row.last_label is None:
            return whole
        after, silent = NEVER, self._silences(frames)
        for t in range(len(frames)):
            after = float(np.logaddexp(after + silent[t], row.any[t] + frames[t, self.delimiter]))
        return float(np.logaddexp(whole, after))

    def _extended(self, row: Row, frames: Float64Array, label: int) -> Row:
        if label == NOTHING or (row.log_psi != NEVER and self._adds_nothing(row, label)):
            return row
        never = np.full(len(frames) + 1, NEVER)
        score = NEVER if label == END else self._score(row, frames, label)
        if score == NEVER:
            return Row(None, NEVER, never, never)
        log_psi = row.log_psi + score
        threshold = log_psi + self.log_cut
        entries = self._entries(row, frames, label)
        entries[np.logaddexp.accumulate(entries) <= threshold] = NEVER
        to_come = np.append(np.logaddexp.accumulate(entries[::-1])[::-1], NEVER)
        in_label, in_blank = never.copy(), never.copy()
        for t in range(len(frames)):
            in_label[t + 1] = np.logaddexp(in_label[t] + frames[t, label], entries[t])
            in_blank[t + 1] = np.logaddexp(in_blank[t], in_label[t]) + frames[t, self.blank]
            has_begun = np.isfinite(entries[: t + 1]).any()
            if has_begun and np.logaddexp(np.logaddexp(in_label[t + 1], in_blank[t + 1]), to_come[t + 1]) <= threshold:
                in_label[t + 1] = in_blank[t + 1] = NEVER
                break
        log_end = self._ending(row, frames) if label == self.delimiter else None
        return Row(label, log_psi, np.logaddexp(in_label, in_blank), in_blank, log_end)
