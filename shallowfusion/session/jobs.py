"""A request on its way through a session, and what a session is told when it is opened."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shallowfusion.config import require
from shallowfusion.ctc.joint import CtcFrames, JointCtc
from shallowfusion.options import DecodingOptions
from shallowfusion.planning import SearchPlanner
from shallowfusion.results import Timing, Transcription
from shallowfusion.scorers.footprint import Demand
from shallowfusion.search.sources import Sources
from shallowfusion.trusting import Evidence

__all__ = ["Encoded", "Job", "Second", "SessionSettings", "SessionStatistics", "shared_seconds"]


@dataclass(frozen=True)
class SessionSettings:
    """How much a session does at once.

    Args:
        max_utterances: that are searched together.
        memory_budget: bytes of keys and values, and of CTC scores, they may come to hold, programs of the device
            included; None = no bound. Reckoned from the longest a search may last, so `max_new_tokens` is what makes
            room.
        encoder_batch: most recordings that are encoded in one pass.
        admission_seconds: how long a recording that finds nothing running waits for others to be encoded with it.
        overlap_encoder: a thread of its own reads and encodes, at most twice encoder_batch ahead; False = that is done
            between two steps, and those that run wait; None = on CUDA.
    """

    max_utterances: int = 8
    memory_budget: int | None = None
    encoder_batch: int = 4
    admission_seconds: float = 0.0
    overlap_encoder: bool | None = None

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
        require(
            self.overlap_encoder is None or isinstance(self.overlap_encoder, bool),
            f"overlap_encoder must be True, False or None, got {self.overlap_encoder!r}.",
        )


@dataclass(frozen=True)
class SessionStatistics:
    """What a session has done so far.

    Args:
        queued, running: requests that wait, and that are searched, now.
        encoded: of those that wait, recordings that the session has encoded, or is encoding, ahead.
        finished, failed, cancelled: requests that are over.
        given_up: requests in which a trusted rule gave the language models up, so that they were searched again.
        reserved_bytes: of keys and values and CTC scores, for those that run, and of programs of the device, used or
            not.
        encoded_bytes: of encoder output, and of what a CTC model heard, that waits.
        counts: "row_steps" of the acoustic model, "live_rows" among them, prefix hits and so on.
        seconds: by stage.
    """

    queued: int
    running: int
    encoded: int
    finished: int
    failed: int
    cancelled: int
    given_up: int
    reserved_bytes: int
    encoded_bytes: int
    counts: Mapping[str, int]
    seconds: Mapping[str, float]

    @property
    def efficiency(self) -> float:
        """Share of the rows in all passes that belonged to a living hypothesis; 1 before the first."""
        rows = self.counts.get("row_steps", 0)
        return self.counts.get("live_rows", 0) / rows if rows else 1.0


@dataclass(frozen=True)
class Encoded:
    """What became of one recording.

    Args:
        output: [frames, size]; None = `error` says why not, or nobody wants it any more.
        done: recorded on the encoder's stream when the output is there; None = on the stream that reads it.
        seconds: of sound.
        costs: this recording's share of the seconds it took, by stage.
        frames: what the CTC model heard of it; None = it was not asked.
    """

    output: Tensor | None = None
    done: torch.cuda.Event | None = None
    seconds: float = 0.0
    costs: Mapping[str, float] = field(default_factory=dict)
    error: Exception | None = None
    frames: CtcFrames | None = None


@dataclass(frozen=True)
class Second:
    """How a recording is searched again if its trusted rule gives the language models up."""

    options: DecodingOptions
    planner: SearchPlanner
    demands: Mapping[Hashable, Demand]


@dataclass(eq=False)
class Job:
    """One request. The decoding thread alone ends its future, which others may cancel.

    Args:
        item: the recording, or features or encoder output of one.
        demands: keys and values and CTC scores it may need, by model.
        ctc: the CTC model that has a say; None = none has.
        frames: what that model heard, of one utterance, on the CPU.
        seconds: of sound.
        encoded: [frames, size].
        given: on the caller's stream, when tensors of the request are there.
        done: on the encoder's stream, when `encoded` is there.
        costs: its share of the seconds of reading and encoding, by stage.
        error: why it could not be encoded.
        is_claimed: the encoder's thread has it, or had.
        second: for a trusted rule; None once it was judged.
        evidence: shared by requests whose trusted rule has a memory.
        fused: the result that waits for its verdict; `prior`: timing of the search that was given up.
        own, place: once admitted, what its cohort searches with, and which of its utterances it is.
        timing: of its admission; its share of the steps comes to it.
        host_reason: why the host must drive its search, which was to be the device's; None = nobody knows of a reason.
        before: what each utterance's share of the steps was when it came.
    """

    future: Future[Transcription]
    source: str
    item: Any
    options: DecodingOptions
    planner: SearchPlanner
    demands: Mapping[Hashable, Demand]
    submitted: float
    ctc: JointCtc | None = None
    frames: CtcFrames | None = None
    seconds: float = 0.0
    features: Tensor | None = None
    encoded: Tensor | None = None
    given: torch.cuda.Event | None = None
    done: torch.cuda.Event | None = None
    costs: Mapping[str, float] = field(default_factory=dict)
    error: Exception | None = None
    is_claimed: bool = False
    second: Second | None = None
    evidence: Evidence | None = None
    fused: Transcription | None = None
    prior: Timing | None = None
    own: Sources | None = None
    place: int = 0
    timing: Timing | None = None
    host_reason: str | None = None
    before: Mapping[str, float] = field(default_factory=dict)

    @property
    def encoded_bytes(self) -> int:
        """Of what is known of its recording."""
        heard = 0 if self.frames is None else self.frames.nbytes
        return heard + (0 if self.encoded is None else self.encoded.nbytes)

    @property
    def asks_device(self) -> bool:
        """Whether its keys and values will be, or are, in a program of the device."""
        return self.options.driver == "device" and self.host_reason is None

    def take(self, encoded: Encoded) -> None:
        """Go on with what became of its recording."""
        self.error = encoded.error
        if encoded.output is not None:
            self.encoded, self.done, self.costs = encoded.output, encoded.done, encoded.costs
            self.seconds, self.features = encoded.seconds, None
            self.frames = encoded.frames or self.frames

    def fail(self, error: BaseException) -> bool:
        """Give the error to whoever waits; False if it was cancelled in the meantime."""
        is_wanted = self.future.set_running_or_notify_cancel()
        if is_wanted:
            self.future.set_exception(error)
        return is_wanted


def shared_seconds(seconds: Mapping[str, float], before: Mapping[str, float], count: int) -> dict[str, float]:
    """What one of `count` has to bear, by stage, of the seconds that were added."""
    return {stage: (own - before.get(stage, 0.0)) / max(1, count) for stage, own in seconds.items()}
