"""Where the time of a search goes: seconds by stage, on the host's clock or by events in a CUDA stream."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from shallowfusion.config import Driver

__all__ = ["Mark", "StageClock"]


class Mark(Protocol):
    """A point in the work of a device, as `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether the device has come to it."""
        ...

    def synchronize(self) -> None:
        """Wait until it has."""
        ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds to a later mark, both reached."""
        ...


class Span(NamedTuple):
    """A stage that ran, and the stage it ran in."""

    stage: str
    start: Mark
    end: Mark
    within: str | None


@dataclass
class StageClock:
    """Seconds and calls per stage of one or more searches; a stage within another counts for itself alone.

    Without marks a stage is timed by the host's clock. With marks, one is left in the device's stream at either end of
    a stage, and the time between them counts, when the device has come to both: work that a stage set going is that
    stage's, wherever the host waits for it, and nothing waits for a clock. Stages that leave the device idle cost what
    the host took.

    Args:
        marks: leaves a mark in the stream in which the work runs; None = the host's clock.
        calls: per stage.
        counts: what sources count beside time, by name.
        driver: of the search; `host_reason` says why it was not the device, where the device was asked for.
    """

    marks: Callable[[], Mark] | None = None
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    driver: Driver = "host"
    host_reason: str | None = None
    _seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _open: list[tuple[str, float]] = field(default_factory=list)  # stages that run, and seconds of those within
    _spans: deque[Span] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def on(cls, device: torch.device) -> StageClock:
        """A clock of work on that device."""
        return cls(_cuda_marks(device) if device.type == "cuda" else None)

    @property
    def seconds(self) -> dict[str, float]:
        """Of each stage; with marks, of what the device has come to."""
        self._read(waits=False)
        return self._seconds

    def settle(self) -> None:
        """Wait for the device, so that `seconds` is complete."""
        self._read(waits=True)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        mark = None if self.marks is None else self.marks()
        start = time.perf_counter()
        self._open.append((stage, 0.0))
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            _, inside = self._open.pop()
            self.calls[stage] += 1
            within, others = self._open[-1] if self._open else (None, 0.0)
            if within is not None:
                self._open[-1] = (within, others + spent)
            if self.marks is None or mark is None:
                self._seconds[stage] += spent - inside
            else:
                with self._lock:
                    self._spans.append(Span(stage, mark, self.marks(), within))

    def _read(self, waits: bool) -> None:
        """Count the spans whose ends have been reached, in order."""
        with self._lock:
            while self._spans and (waits or self._spans[0].end.query()):
                span = self._spans.popleft()
                span.end.synchronize()
                spent = span.start.elapsed_time(span.end) / 1e3
                self._seconds[span.stage] += spent
                if span.within is not None:
                    self._seconds[span.within] -= spent


def _cuda_marks(device: torch.device) -> Callable[[], Mark]:
    def mark() -> Mark:
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        found: Mark = event
        return found

    return mark
