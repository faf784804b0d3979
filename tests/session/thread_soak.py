"""Sessions that threads submit to, cancel in and close at once, for as long as one likes: `python -m
tests.session.thread_soak 60`."""

from __future__ import annotations

import dataclasses
import gc
import random
import sys
import threading
import time
import weakref
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

import torch

from shallowfusion import FusionDecoder
from shallowfusion.errors import CapacityError, SessionError
from shallowfusion.results import Transcription
from shallowfusion.scorers.page_pool import PagePool
from shallowfusion.session.front import DecoderSession
from tests.ctc.joint import tiny_head
from tests.session.conftest import alone, assert_nothing_is_left, assert_same
from tests.session.soak import random_options, resident_bytes
from tests.tiny import random_encoder_output, tiny_lm, tiny_whisper

__all__ = ["thread_soak"]

NUM_THREADS = 4
ROUND_SECONDS = 0.4  # a session's life
MOST_WAITING = 12  # requests
COMPARED = 6  # results of each round that are decoded again alone


@dataclass
class Round:
    """What the threads of one session share."""

    session: DecoderSession
    recordings: torch.Tensor
    asked: list[tuple[Future[Transcription], int, dict[str, Any]]] = field(default_factory=list)
    called_back: list[Future[Transcription]] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    def work(self, seed: int, end: float) -> None:
        """Anything a caller may do, in any order, until the time is over or another has closed the session."""
        draw = random.Random(seed)
        try:
            while time.monotonic() < end:
                self.act(draw)
            self.session.close(cancel=draw.random() < 0.5)
        except SessionError:
            self.session.close(cancel=draw.random() < 0.5)
        except BaseException as failure:
            self.failures.append(failure)

    def act(self, draw: random.Random) -> None:
        action = draw.random()
        told = self.session.statistics()
        if not self.asked or (action < 0.5 and told.queued + told.running < MOST_WAITING):
            place, options = draw.randrange(len(self.recordings)), random_options(draw)
            try:
                future = self.session.submit(self.recordings[place], **options)
            except CapacityError:
                return
            future.add_done_callback(self.called_back.append)
            self.asked.append((future, place, options))
        elif 0.5 <= action < 0.56:
            draw.choice(self.asked[-MOST_WAITING:])[0].cancel()
        elif action < 0.999:
            wait([draw.choice(self.asked)[0]], timeout=draw.choice([0.0, 0.01]))
        else:
            self.session.close(cancel=draw.random() < 0.5)


def thread_soak(seconds: float, seed: int = 0, sessions: int = 1) -> dict[str, float]:
    """Open one session after the other and let threads loose on each; returns what there is to report.

    Args:
        sessions: how many there are at least, on however slow a machine.

    Returns:
        "sessions", "finished", "cancelled", "compared", and "growth_mb": resident memory at the end less that after a
        third of the time.
    """
    draw = random.Random(seed)
    decoder = FusionDecoder(dataclasses.replace(tiny_whisper(1), ctc_head=tiny_head(1)), [tiny_lm(2), tiny_lm(9)])
    decoder.prefixes.resize(200_000)
    recordings = random_encoder_output(decoder.acoustic, 12)
    recordings[7, 3] = float("nan")
    known, others = living_pools(), threading.active_count()
    found = dict.fromkeys(("sessions", "finished", "cancelled", "compared", "growth_mb"), 0.0)
    start, early = time.monotonic(), 0
    while found["sessions"] < sessions or time.monotonic() < start + seconds:
        if not early and time.monotonic() > start + seconds / 3:
            early = resident_bytes()
        settings = {
            "max_utterances": draw.randint(1, 6),
            "encoder_batch": draw.randint(1, 3),
            "memory_budget": draw.choice([None, 1_000_000, 3_000_000]),
            "admission_seconds": draw.choice([0.0, 0.005]),
        }
        own = Round(decoder.session(**settings), recordings)
        let_loose(own, draw)
        for name, number in checked(own, decoder, draw).items():
            found[name] += number
        gone = weakref.ref(own.session)
        del own
        gc.collect()
        assert gone() is None, "something holds the session"
        assert threading.active_count() == others, "a thread goes on"
    decoder.prefixes.resize(0)
    left = [pool for number, pool in living_pools().items() if number not in known]
    assert all(pool.num_used == 0 for pool in left), "pages are held"
    found["growth_mb"] = (resident_bytes() - early) / 1e6
    return found


def let_loose(own: Round, draw: random.Random) -> None:
    end = time.monotonic() + ROUND_SECONDS
    threads = [threading.Thread(target=own.work, args=(draw.random(), end)) for _ in range(NUM_THREADS)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
            assert not thread.is_alive(), "a caller hangs"
    finally:
        sys.setswitchinterval(interval)


def checked(own: Round, decoder: FusionDecoder, draw: random.Random) -> dict[str, float]:
    """Every request is over and accounted for, and some results are those of one by one."""
    if own.failures:
        raise own.failures[0]
    assert all(future.done() for future, _, _ in own.asked), "a future never ends"
    assert len(own.called_back) == len(own.asked)
    assert_nothing_is_left(own.session)
    told = own.session.statistics()
    assert told.failed == 0
    assert told.finished + told.cancelled == len(own.asked)
    finished = [asked for asked in own.asked if not asked[0].cancelled()]
    assert told.finished == len(finished)
    some = draw.sample(finished, min(COMPARED, len(finished)))
    for future, place, options in some:
        assert_same(future.result(), alone(decoder, own.recordings[place], **options))
    return {"sessions": 1, "finished": told.finished, "cancelled": told.cancelled, "compared": len(some)}


def living_pools() -> dict[int, PagePool]:
    gc.collect()
    return {id(thing): thing for thing in gc.get_objects() if type(thing) is PagePool}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(thread_soak(float(sys.argv[1])))
