"""CTC prefix scores: what a CTC model says of the next label of every live row of a label-synchronous search."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shallowfusion import _native
from shallowfusion.checks import integer, integer_array
from shallowfusion.config import require
from shallowfusion.ctc.results import frames_of

__all__ = ["END", "NOTHING", "PrefixScores", "PrefixScoresProtocol", "prefix_bytes"]

END = -1
NOTHING = -2
IMPOSSIBLE_BELOW = math.log(1e-260)

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]


class PrefixScoresProtocol(Protocol):
    """Scores labels after the prefixes of a batch of searches, at first one row per utterance: the empty prefix.

    For a prefix g and h = g followed by label c, with gamma_n and gamma_b the probability that the first t frames say
    the prefix and end in its last label or in blank (METHODS 1.8):

        phi_t        = gamma_b(g, t-1) + (0 if last(g) == c else gamma_n(g, t-1))
        gamma_n(h,t) = (gamma_n(h, t-1) + phi_t) * P_t(c)
        gamma_b(h,t) = (gamma_b(h, t-1) + gamma_n(h, t-1)) * P_t(blank)
        psi(h)       = sum_t phi_t * P_t(c),  psi(g, end) = gamma_n(g, T) + gamma_b(g, T)

    A score is log psi(h) - log psi(g): along a text the scores sum to its CTC log-probability. A label can be a label,
    `END` or, for what CTC knows nothing of, `NOTHING`: it scores 0 and leaves the prefix as it is.

    With a `delimiter` (the label between words), a text is its words: delimiters before the first and after the last
    are silence. Alignments may say any number of them there; between two words they say one. To a prefix that is empty
    or ends in a delimiter another adds nothing and scores 0. The end counts all alignments of the words, whether the
    prefix has said a delimiter after the last one or not, so it may score above 0.

    Numbers are float64 relative to psi of their row, so they do not underflow with the length of the text; a label
    that is less likely than e^-598 after a prefix is impossible (-inf), and so is everything after it.

    With a `margin`, a row forgets frames at both of its ends that hold at most exp(-margin) of psi(g) in all. Then no
    psi is ever too large, and that of a text is too small by at most 2 exp(-margin) times the sum of the psi of its
    prefixes: a text of n labels that is D nats less likely than its first label is right to 2 n exp(D - margin).

    Price: `scores` reads the frames of a row once per candidate (a multiplication and an addition each), `follow` three
    times per row. Memory per utterance: 4 bytes per frame and label, 8 per frame for each label ever asked for, and
    16 per frame for each row, which rows of the same prefix share.
    """

    def scores(self, rows: object, labels: object) -> Float64Array:
        """Scores of candidates.

        Args:
            rows: integers [utterances, candidates], rows of their own utterance; anything beside NOTHING.
            labels: integers likewise.

        Returns:
            Nats, [utterances, candidates].

        Raises:
            InvalidArgumentError: another shape, a row or a label that is not there, or the blank.
        """
        ...

    def follow(self, parents: object, labels: object) -> None:
        """Row k of utterance u now continues its old row parents[u, k] with labels[u, k]; both [utterances, rows].

        After END a row is over: everything is impossible there.

        Raises:
            InvalidArgumentError: as above.
        """
        ...

    def keep(self, order: Sequence[int]) -> None:
        """Drop utterances: place i of the new batch holds what was at place order[i].

        Raises:
            InvalidArgumentError: a place that is not there, or twice.
        """
        ...


def prefix_bytes(frames: int, labels: int, rows: int) -> int:
    """The most that `PrefixScores` of one utterance take once every label was asked for, as the Protocol's price says.

    Args:
        rows: with different prefixes, at a time.
    """
    return frames * ((4 + 8) * labels + 8) + 16 * (frames + 1) * rows


@dataclass(frozen=True)
class PrefixFrames:
    """Checked arguments of prefix scores: float32 [utterances, frames, labels], counts int64 [utterances]."""

    log_probs: npt.NDArray[np.float32]
    counts: Int64Array
    blank: int
    delimiter: int
    cut: float

    @classmethod
    def check(
        cls, log_probs: object, lengths: object, blank: int, delimiter: int | None, margin: float | None
    ) -> PrefixFrames:
        """Border checks that both classes share; without a delimiter it is -1.

        Raises:
            InvalidArgumentError: no log-probabilities, lengths that do not fit, a blank, delimiter or margin outside
                its range.
        """
        shape: tuple[Any, ...] = getattr(log_probs, "shape", ())
        frames = frames_of(log_probs, lengths, None, shape[2] if len(shape) == 3 else 1)
        array = np.ascontiguousarray(frames.log_probs, dtype=np.float32)
        integer("blank", blank, 0, array.shape[2] - 1)
        if delimiter is not None:
            integer("delimiter", delimiter, 0, array.shape[2] - 1)
            require(delimiter != blank, f"delimiter and blank must differ, both are {blank}.")
        require(
            margin is None or (math.isfinite(margin) and margin >= 3),
            f"margin must be nats >= 3 or None, got {margin!r}; 300 keeps every text that matters exact.",
        )
        for utterance, count in enumerate(frames.counts.tolist()):
            require(
                bool((array[utterance, :count] < 1e-3).all()),
                f"log_probs of utterance {utterance} are NaN or above 0, so they are no log-probabilities; "
                "apply log_softmax.",
            )
        cut = 0.0 if margin is None else math.exp(-margin)
        return cls(array, frames.counts, blank, -1 if delimiter is None else delimiter, cut)


def checked_labels(rows: object, labels: object, num_utterances: int) -> tuple[Int64Array, Int64Array]:
    """Rows and labels of one call as arrays of the same shape."""
    own = integer_array("rows", rows, (num_utterances, None))
    return own, integer_array("labels", labels, own.shape)


class PrefixScores:
    """`PrefixScoresProtocol` in C++.

    Args:
        log_probs: float [utterances, frames, labels], array or tensor, nats; float32 inside.
        lengths: frames of each utterance, None = all. Later frames are not read.
        blank: index of the blank.
        delimiter: index of the label between words; None = all labels are text.
        margin: nats, None = exact.
        threads: utterances scored at a time, None = all cores.

    Raises:
        InvalidArgumentError: as the arguments' border checks say.
    """

    def __init__(
        self,
        log_probs: object,
        lengths: object = None,
        *,
        blank: int = 0,
        delimiter: int | None = None,
        margin: float | None = None,
        threads: int | None = None,
    ) -> None:
        frames = PrefixFrames.check(log_probs, lengths, blank, delimiter, margin)
        workers = (os.cpu_count() or 1) if threads is None else integer("threads", threads, 1, 1024)
        self._native = _native.CtcPrefixScores(
            log_probs=frames.log_probs,
            counts=frames.counts,
            blank=blank,
            delimiter=frames.delimiter,
            cut=frames.cut,
            threads=workers,
        )

    @property
    def num_bytes(self) -> int:
        """Memory that frames and rows take now."""
        return self._native.num_bytes

    def scores(self, rows: object, labels: object) -> Float64Array:
        own_rows, own_labels = checked_labels(rows, labels, self._native.num_utterances)
        return self._native.scores(rows=np.where(own_labels == NOTHING, -1, own_rows), labels=own_labels)

    def follow(self, parents: object, labels: object) -> None:
        own_rows, own_labels = checked_labels(parents, labels, self._native.num_utterances)
        self._native.follow(rows=own_rows, labels=own_labels)

    def keep(self, order: Sequence[int]) -> None:
        self._native.keep(order=integer_array("order", list(order), (None,)))
