"""A request on its way through a session, and what a session is told when it is opened."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from shallowfusion.config import require
from shallowfusion.options import DecodingOptions
from shallowfusion.planning import SearchPlanner
from shallowfusion.results import Timing, Transcription
from shallowfusion.scorers.footprint import Demand
from shallowfusion.search.sources import Sources

__all__ = ["Job", "SessionSettings", "SessionStatistics"]


@dataclass(frozen=True)
class SessionSettings:
    """How much a session does at once.

    Args:
        max_utterances: that are searched together.
        memory_budget: bytes of keys and values they may come to hold; None = no bound. Reckoned from the longest a
            search may last, so `max_new_tokens` is what makes room.
        encoder_batch: most recordings that are encoded between two steps, in one pass; those that run wait for it.
        admission_seconds: how long a recording that finds nothing running waits for others to be encoded with it.
    """

    max_utterances: int = 8
    memory_budget: int | None = None
    encoder_batch: int = 4
    admission_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_utterances", "encoder_batch"):
            value = getattr(self, name)
            require(
                isinstance(value, int) and not isinstance(value, bool) and value >= 1,
                f"{name} must be an integer of at least 1, got {value!r}.",
            )
        budget = self.memory_budget
        require(
            budget is None or (isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1),
            f"memory_budget must be a number of bytes or None, got {budget!r}.",
        )
        seconds = self.admission_seconds
        require(
            isinstance(seconds, (int, float)) and math.isfinite(seconds) and seconds >= 0,
            f"admission_seconds must be finite and >= 0, got {seconds!r}.",
        )


@dataclass(frozen=True)
class SessionStatistics:
    """What a session has done so far.

    Args:
        queued, running: requests that wait, and that are searched, now.
        finished, failed, cancelled: requests that are over.
        reserved_bytes: of keys and values, for those that run.
        counts: "row_steps" of the acoustic model, "live_rows" among them, prefix hits and so on.
        seconds: by stage.
    """

    queued: int
    running: int
    finished: int
    failed: int
    cancelled: int
    reserved_bytes: int
    counts: Mapping[str, int]
    seconds: Mapping[str, float]

    @property
    def efficiency(self) -> float:
        """Share of the rows in all passes that belonged to a living hypothesis; 1 before the first."""
        rows = self.counts.get("row_steps", 0)
        return self.counts.get("live_rows", 0) / rows if rows else 1.0


@dataclass(eq=False)
class Job:
    """One request.

    Args:
        item: the recording, or features or encoder output of one.
        demands: keys and values it may need, by model.
        seconds: of sound.
        encoded: [frames, size].
        own, place: once admitted, what its cohort searches with, and which of its utterances it is.
        timing: of its admission; its share of the steps comes to it.
        before: what each utterance's share of the steps was when it came.
    """

    future: Future[Transcription]
    source: str
    item: Any
    options: DecodingOptions
    planner: SearchPlanner
    demands: Mapping[Hashable, Demand]
    submitted: float
    seconds: float = 0.0
    features: Tensor | None = None
    encoded: Tensor | None = None
    own: Sources | None = None
    place: int = 0
    timing: Timing | None = None
    before: Mapping[str, float] = field(default_factory=dict)

    def finish(self, result: Transcription) -> bool:
        """Give the result to whoever waits; False if it was cancelled in the meantime."""
        is_wanted = self.future.set_running_or_notify_cancel()
        if is_wanted:
            self.future.set_result(result)
        return is_wanted

    def fail(self, error: BaseException) -> bool:
        """Give the error to whoever waits; False if it was cancelled in the meantime."""
        is_wanted = self.future.set_running_or_notify_cancel()
        if is_wanted:
            self.future.set_exception(error)
        return is_wanted
