"""Whose time it is: on the host's clock, and on that of a device that works on while the host goes ahead."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from shallowfusion.results import Timing
from shallowfusion.search.stage_clock import StageClock


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.at = stream, max(stream.host, stream.busy_until)

    def query(self) -> bool:
        return self.at <= self.stream.host

    def synchronize(self) -> None:
        self.stream.host = max(self.stream.host, self.at)

    def elapsed_time(self, end_event: Event) -> float:
        assert self.query()
        assert end_event.query()
        return 1e3 * (end_event.at - self.at)


class Stream:
    """A device that does what it is given in order, and the host's time, in seconds."""

    def __init__(self) -> None:
        self.host = self.busy_until = 0.0

    def launch(self, seconds: float) -> None:
        self.busy_until = max(self.host, self.busy_until) + seconds
        self.host += 0.25

    def wait(self) -> None:
        self.host = max(self.host, self.busy_until)

    def mark(self) -> Event:
        return Event(self)


def test_work_counts_where_it_was_set_going_and_not_where_it_is_waited_for() -> None:
    stream = Stream()
    clock = StageClock(stream.mark)
    for _ in range(3):
        with clock("asr"):
            stream.launch(5.0)
        with clock("lm"):
            stream.launch(2.0)
        with clock("fusion"):
            stream.launch(1.0)
            stream.wait()
        with clock("search"):
            stream.host += 0.5
    assert dict(clock.seconds) == {"asr": 15.0, "lm": 6.0, "fusion": 3.0, "search": 1.5}
    assert sum(clock.seconds.values()) == stream.host  # nothing is lost and nothing counts twice
    assert clock.calls["asr"] == 3


def test_stages_within_others_count_for_themselves_and_nothing_waits_until_it_is_settled() -> None:
    stream = Stream()
    clock = StageClock(stream.mark)
    with clock("device step"):
        stream.launch(4.0)
        with clock("host"):
            stream.host += 1.0  # hidden by what the device does meanwhile
        stream.launch(4.0)
    assert stream.host == 1.5
    assert "device step" not in clock.seconds
    clock.settle()
    assert stream.host == 8.0
    assert dict(clock.seconds) == {"device step": 8.0, "host": 0.0}
    with clock("device step"), clock("host"):
        stream.host += 1.0  # the device has nothing to do
    assert dict(clock.seconds) == {"device step": 8.0, "host": 1.0}


def test_the_clock_of_the_host() -> None:
    clock = StageClock.on(torch.device("cpu"))
    with clock("search"):
        with clock("lm"):
            time.sleep(0.02)
        time.sleep(0.01)
    assert clock.seconds["search"] >= 0.01
    assert clock.seconds["lm"] >= 0.02
    with pytest.raises(RuntimeError, match="broken"), clock("lm"):
        raise RuntimeError("broken")
    assert clock.calls == {"lm": 2, "search": 1}
    timing = Timing.of(clock, 3.0)
    assert timing.total_seconds == sum(clock.seconds.values())
    assert timing.driver == "host"
    assert timing.host_reason is None


@pytest.mark.gpu
def test_on_cuda_a_models_time_is_its_own() -> None:
    device, clock = torch.device("cuda"), StageClock.on(torch.device("cuda"))
    sleep: Any = torch.cuda._sleep
    torch.zeros(1, device=device).item()
    with clock("asr"):
        sleep(200_000_000)
    with clock("fusion"):
        torch.zeros(1, device=device).item()
    clock.settle()
    assert clock.seconds["asr"] > 10 * clock.seconds["fusion"]
