"""A device-driven step as a program: captured on CUDA, run again and again, its records sent after it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shallowfusion.scorers.base import Context
from shallowfusion.search.device_step import DeviceStep
from shallowfusion.search.loop import SearchPlan

__all__ = ["LAG", "Program"]

logger = logging.getLogger(__name__)

LAG = 2  # steps the host may be behind; a search then runs at most so many steps too far
WARM_UP_STEPS = 2


class Program:
    """A device-driven step that can be repeated, and the ring's way to the host.

    Args:
        captures: whether steps on CUDA become graphs.
        branches: whether the models read on streams of their own there.
    """

    def __init__(self, step: DeviceStep, captures: bool, branches: bool) -> None:
        self.step = step
        self._branches = branches and step.device.type == "cuda"
        self._captures = captures and step.device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._host_ring = torch.empty(0)
        self._streams: list[Any] = []
        self._events: list[Any] = []
        self.num_run = self._sent = 0

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def begin(self, contexts: Sequence[Context], plan: SearchPlan) -> None:
        """Start a batch in the first places; whatever ran before is over, whether it ended or failed."""
        if self._streams:  # a search that failed may have left copies under way
            torch.cuda.current_stream(self.step.device).wait_stream(self._streams[0])
        self.step.clear()
        self.num_run = self._sent = 0
        self.start(range(len(contexts[0].prompts)), contexts, plan)

    def start(self, places: Sequence[int], contexts: Sequence[Context], plan: SearchPlan) -> None:
        """Start searches in free places, between two steps; the first on CUDA capture the graph."""
        first = not self.step.is_ready
        self.step.start(places, contexts, plan)
        if not first:
            return
        ring = self.step.arrays.ring
        on_cuda = self.step.device.type == "cuda"
        self._host_ring = torch.empty(ring.shape, dtype=ring.dtype, pin_memory=on_cuda) if on_cuda else ring
        if on_cuda:
            self._streams = [_stream(self.step.device) for _ in self.step.decoders]
            self._events = [torch.cuda.Event() for _ in range(len(ring))]  # type: ignore[no-untyped-call]
        if self._captures:
            self._capture()
            self.step.start(places, contexts, plan)

    def stop(self, places: Sequence[int]) -> None:
        """End the searches in these places, which are free from the next step on."""
        self.step.stop(places)

    def run(self) -> None:
        """Set the next step going and send its ring entry after it."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._once()
        place = self.num_run % len(self._host_ring)
        self.num_run += 1
        if self.step.device.type != "cuda":
            return
        copying = self._streams[0]
        copying.wait_stream(torch.cuda.current_stream(self.step.device))
        with torch.cuda.stream(copying):
            self._host_ring[place].copy_(self.step.arrays.ring[place], non_blocking=True)
            self._events[place].record(copying)

    def entries(self, behind: int) -> Iterator[tuple[int, npt.NDArray[np.int32]]]:
        """Ring entries that have arrived, each after the number of its step; waits for those over `behind` steps old.

        An entry may be overwritten when the ring has gone round.
        """
        while self._sent < self.num_run:
            number, place = self._sent, self._sent % len(self._host_ring)
            if self._events and not self._events[place].query():
                if self.num_run - number <= behind:
                    return
                self._events[place].synchronize()
            self._sent += 1
            yield number, self._host_ring[place].numpy()

    def _once(self) -> None:
        """One step; with branches the models read on streams of their own, between a fork and a join."""
        step = self.step
        step.select()
        if not self._branches:
            for source in range(len(step.decoders)):
                step.read(source)
            return
        current = torch.cuda.current_stream(step.device)
        for source, stream in enumerate(self._streams[1:], start=1):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                step.read(source)
        step.read(0)
        for stream in self._streams[1:]:
            current.wait_stream(stream)

    def _capture(self) -> None:
        """Record a step as a CUDA graph; a step over searches that are all done warms it up and changes nothing."""
        device = self.step.device
        self.step.clear()
        stream = _stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self._once()
        torch.cuda.current_stream(device).wait_stream(stream)
        self.step.clear()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._once()
        except RuntimeError as error:
            logger.warning("the step could not be captured as a CUDA graph and runs eagerly: %s", error)
            torch.cuda.synchronize(device)
            return
        self._graph = graph


def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
