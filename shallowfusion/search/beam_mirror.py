"""The host's side of a device-driven search: it replays what the device recorded, checks it and owns the n-best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shallowfusion import _native
from shallowfusion.checks import BeamShape, integer
from shallowfusion.config import BeamSettings, require
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.search.beam_state import FinishedHypothesis, NativeBeams, utterance_number

__all__ = ["BeamMirror", "BeamMirrorProtocol", "MirrorShape"]


@dataclass(frozen=True)
class MirrorShape:
    """The checked numbers a mirror is made from."""

    num_utterances: int
    num_candidates: int
    num_parts: int

    @classmethod
    def check(cls, settings: BeamSettings, num_utterances: int, num_candidates: int, num_parts: int) -> MirrorShape:
        """Check the sizes of a mirror and the settings of its beams.

        Raises:
            InvalidArgumentError: a size is out of range, or the settings recombine.
        """
        shape = BeamShape.check(settings, num_utterances, num_parts)
        require(
            settings.recombination == "none",
            f"a device-driven search does not recombine, got {settings.recombination!r}; use the host-driven one.",
        )
        count = integer("num_candidates", num_candidates, 1, 2**20)
        return cls(shape.num_utterances, count, shape.num_parts)


class BeamMirrorProtocol(Protocol):
    """A `BeamState` that is fed from the ring of a device-driven search instead of being asked what to do.

    Every record holds the candidates of one utterance's step and a 64-bit hash of all that the device decided so far,
    lane by lane and step by step. The mirror decides again from the same candidates and compares: a bit more or less
    anywhere, another order, a lost or repeated step give another hash. Cost: that of `BeamState.advance` and a few
    nanoseconds a lane; memory: that of `BeamState`.

    Args (of the classes):
        settings: without recombination.
        num_utterances: searched; further records of an entry belong to padding and must be idle.
        num_candidates: of each record.
        num_parts: sources whose log-probs are kept per token.
    """

    @property
    def num_steps(self) -> int:
        """Ring entries replayed."""
        ...

    def replay(self, entry: npt.NDArray[np.int32]) -> None:
        """Take the next entry of the ring, int32 [utterances, words] as `kernels/beam_advance_arrays.py` lays it out.

        Raises:
            DivergenceError: the entry is of another step, or the device decided otherwise than the host does.
            InvalidArgumentError: an array of another shape or dtype, or candidates that cannot be.
        """
        ...

    def force_finish(self, utterance: int) -> None:
        """End an utterance now, whatever the device still says of it; see `BeamState.force_finish`."""
        ...

    def results(self, utterance: int, n_best: int) -> list[FinishedHypothesis]:
        """Up to `n_best` finished hypotheses, best key first; see `BeamState.results`."""
        ...

    def is_done(self, utterance: int) -> bool: ...

    def saw_nan(self, utterance: int) -> bool:
        """Whether a row of the utterance was flagged in any step."""
        ...

    def hash(self, utterance: int) -> int:
        """Of everything decided so far, 0 to 2^64 - 1; 0 before the first step."""
        ...


class BeamMirror(NativeBeams[_native.BeamMirror]):
    """The C++ mirror; see `BeamMirrorProtocol`. May be shared by threads; `replay` runs without the GIL."""

    def __init__(self, settings: BeamSettings, num_utterances: int, num_candidates: int, num_parts: int) -> None:
        shape = MirrorShape.check(settings, num_utterances, num_candidates, num_parts)
        super().__init__(
            _native.BeamMirror,
            settings,
            num_utterances=shape.num_utterances,
            num_candidates=shape.num_candidates,
            num_parts=shape.num_parts,
        )

    @property
    def num_steps(self) -> int:
        return self._native.num_steps

    def replay(self, entry: npt.NDArray[np.int32]) -> None:
        self._native.replay(entry=checked_entry(entry))

    def saw_nan(self, utterance: int) -> bool:
        return self._native.saw_nan(utterance=utterance_number(utterance))

    def hash(self, utterance: int) -> int:
        return self._native.hash(utterance=utterance_number(utterance))


def checked_entry(entry: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """The entry, contiguous.

    Raises:
        InvalidArgumentError: no int32 array with two axes.
    """
    if not isinstance(entry, np.ndarray) or entry.dtype != np.int32 or entry.ndim != 2:
        got = f"{entry.dtype} {list(entry.shape)}" if isinstance(entry, np.ndarray) else type(entry).__name__
        raise InvalidArgumentError(f"a ring entry must be an int32 array [utterances, words], got {got}.")
    return np.ascontiguousarray(entry)
