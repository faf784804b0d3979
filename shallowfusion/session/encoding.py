"""Recordings read, turned into features and encoded in batches, beside a search or ahead of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from shallowfusion.ctc.joint import CtcFrames, JointCtc
from shallowfusion.features.log_mel import log_mel
from shallowfusion.scorers.loading import AcousticModel
from shallowfusion.search.loop import StageClock
from shallowfusion.session.jobs import Encoded, Job, shared_seconds

__all__ = ["EncoderPass", "RecordingEncoder", "each_ahead", "is_out_of_memory", "overlaps", "received"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


class EncoderPass:
    """The acoustic model's encoder, on a CUDA device in a stream of its own if it runs apart from the search.

    Args:
        scorer: the acoustic one.
        apart: whether a thread of its own calls this.
    """

    def __init__(self, scorer: Any, apart: bool) -> None:
        self._scorer = scorer
        self._stream: torch.cuda.Stream | None = None
        if apart and scorer.device.type == "cuda":
            self._stream = _encoder_stream(scorer.device)
            self._stream.wait_stream(torch.cuda.current_stream(scorer.device))  # the weights are there

    def hear(self, joint: JointCtc, samples: Sequence[Tensor]) -> list[CtcFrames]:
        """What a CTC model hears in each recording, float [samples]; on the CPU when this returns."""
        with torch.cuda.stream(self._stream):
            return joint.frames(samples).each()

    def __call__(
        self, features: Tensor | Sequence[Tensor], after: Sequence[torch.cuda.Event | None] = ()
    ) -> tuple[Tensor, torch.cuda.Event | None]:
        """Encoder output [recordings, frames, size] and the event that says it is there, None on the same stream.

        With a stream of its own this returns when the device is done, so that no search waits for what it is given.

        Args:
            features: [recordings, mels, frames], or [mels, frames] of each.
            after: events that must have come before features may be read.
        """
        with torch.cuda.stream(self._stream):  # does nothing without one
            for event in after:
                if event is not None:
                    torch.cuda.current_stream(self._scorer.device).wait_event(event)
            together = features if isinstance(features, Tensor) else torch.stack(list(features))
            encoded: Tensor = self._scorer.encode(together)
            if self._stream is None:
                return encoded, None
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(self._stream)
        done.synchronize()
        return encoded, done


@cache
def _encoder_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all encoders of a device: memory that torch keeps for a stream serves no other."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def received(output: Tensor, done: torch.cuda.Event | None) -> Tensor:
    """Encoder output for the current stream: it waits for the event, and the memory is kept until it has read it."""
    if done is not None:
        stream = torch.cuda.current_stream(output.device)
        stream.wait_event(done)
        output.record_stream(stream)
    return output


class RecordingEncoder:
    """Encodes the recordings of a session; not thread-safe, one thread calls it. Jobs are read, never changed.

    Args:
        acoustic: the acoustic model.
        read: samples of a recording, or an `AudioError`.
        apart: whether a thread of its own calls this.

    While somebody holds the lock `quiet`, no pass begins.
    """

    def __init__(self, acoustic: AcousticModel, read: Callable[[Any, str], Tensor], apart: bool = False) -> None:
        self.clock = StageClock()
        self.quiet = threading.Lock()
        self._acoustic = acoustic
        self._read = read
        self._pass = EncoderPass(acoustic.scorer, apart)

    def encode(self, jobs: Sequence[Job]) -> list[Encoded]:
        """What became of each, in order; one that fails does so alone, and cancelled ones are left out."""
        before = dict(self.clock.seconds)
        found: list[Encoded] = [Encoded() for _ in jobs]
        features: dict[int, Tensor] = {}
        samples: dict[int, Tensor] = {}
        for i, job in enumerate(jobs):
            if job.features is not None:
                features[i] = job.features
            elif not job.future.cancelled():
                try:
                    samples[i], features[i] = self._heard(job)
                except Exception as error:
                    found[i] = Encoded(error=error)
        frames = self._ctc_frames(jobs, samples, found)
        wanted = [i for i in features if not jobs[i].future.cancelled() and found[i].error is None]
        outputs = self._encoded([features[i] for i in wanted], [jobs[i].given for i in wanted])
        costs = shared_seconds(self.clock.seconds, before, len(jobs))
        heard_costs = {**costs, "ctc": costs.pop("ctc", 0.0) * len(jobs) / max(1, len(frames))}  # who asked pays
        for i, output in zip(wanted, outputs, strict=True):
            if isinstance(output, Exception):
                found[i] = Encoded(error=output)
            else:
                seconds = len(samples[i]) / self._acoustic.features.sampling_rate if i in samples else jobs[i].seconds
                own = heard_costs if i in frames else costs
                found[i] = Encoded(*output, seconds, own, frames=frames.get(i))
        return found

    def _heard(self, job: Job) -> tuple[Tensor, Tensor]:
        with self.clock("audio"):
            samples = self._read(job.item, job.source)
        with self.clock("features"):
            return samples, log_mel([samples], self._acoustic.features)[0]

    def _ctc_frames(
        self, jobs: Sequence[Job], samples: Mapping[int, Tensor], found: list[Encoded]
    ) -> dict[int, CtcFrames]:
        """What the session's CTC model hears of those that ask it and brought no frames; failures go to `found`."""
        asking = [(i, jobs[i].ctc) for i in samples if jobs[i].frames is None and not jobs[i].future.cancelled()]
        models = {i: joint for i, joint in asking if joint is not None}
        if not models:
            return {}
        (joint,) = set(models.values())
        with self.quiet, self.clock("ctc"):
            heard = together_or_alone(partial(self._pass.hear, joint), [samples[i] for i in models], "heard")
        frames = {}
        for i, own in zip(models, heard, strict=True):
            if isinstance(own, Exception):
                found[i] = Encoded(error=own)
            else:
                frames[i] = own
        return frames

    def _encoded(
        self, features: Sequence[Tensor], given: Sequence[torch.cuda.Event | None]
    ) -> list[tuple[Tensor, torch.cuda.Event | None] | Exception]:
        """One encoder pass; if it fails, each alone."""

        def encode(
            pairs: Sequence[tuple[Tensor, torch.cuda.Event | None]],
        ) -> list[tuple[Tensor, torch.cuda.Event | None]]:
            output, done = self._pass([own for own, _ in pairs], [event for _, event in pairs])
            return [(own, done) for own in output]

        with self.quiet, self.clock("encoder"):
            return together_or_alone(encode, list(zip(features, given, strict=True)), "encoded")


def together_or_alone(work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T], done: str) -> list[R | Exception]:
    """What `work` makes of all items; if that fails, of each alone, or why not.

    Args:
        done: what recordings could not be, for the log.
    """
    if not items:
        return []
    try:
        return list(work(items))
    except Exception as error:
        if len(items) == 1:
            return [error]
        logger.warning("%d recordings could not be %s together (%s); each is tried alone", len(items), done, error)
    return [found for item in items for found in together_or_alone(work, [item], done)]


def overlaps(wanted: bool | None, device: torch.device) -> bool:
    """Whether recordings are encoded by a thread of its own, while others are searched.

    Args:
        wanted: True or False; None = on CUDA only. On a CPU it takes a core that would else be idle; where there is
            none, it only costs.
    """
    return device.type == "cuda" if wanted is None else wanted


def each_ahead(work: Callable[[T], R], items: Sequence[T], ahead: bool) -> Iterator[R]:
    """What `work` makes of each item, in order; an error is raised in its turn.

    Args:
        ahead: work on the next item, in a thread of its own, while the caller has the one before.
    """
    if not ahead or len(items) < 2:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(1, "shallowfusion encoder") as pool:
        coming = pool.submit(work, items[0])
        for item in items[1:]:
            found = coming.result()
            coming = pool.submit(work, item)
            yield found
        yield coming.result()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory was short; on the CPU torch says so in a RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate" in str(error) and "memory" in str(error)
