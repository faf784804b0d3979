"""Sessions that nobody closes: their threads end, whoever waits gets an error, and nothing is left."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

from shallowfusion.errors import SessionError
from tests.session.conftest import BASE, alone, assert_same
from tests.session.thread_soak import living_pools

ROOT = Path(__file__).resolve().parents[2]
LONG = {**BASE, "max_new_tokens": 60, "min_new_tokens": 60}


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("shallowfusion")]


def wait_for_no_thread(seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while own_threads():
        assert time.monotonic() < end, own_threads()
        time.sleep(0.005)


@pytest.mark.parametrize("overlap", [True, False])
def test_an_idle_session_that_is_dropped_leaves_no_thread(one_lm, recordings, overlap: bool) -> None:
    known = living_pools()
    for _ in range(3):
        session = one_lm.session(overlap_encoder=overlap)
        result = session.submit(recordings[0], **BASE).result(timeout=60)
        assert_same(result, alone(one_lm, recordings[0], **BASE))
        assert len(own_threads()) == 1 + overlap
        shell, worker = weakref.ref(session), weakref.ref(session._worker)
        del session
        assert shell() is None  # at once, without a collection
        wait_for_no_thread()
        gc.collect()
        assert worker() is None
    assert all(pool.num_used == 0 for number, pool in living_pools().items() if number not in known)


@pytest.mark.parametrize("overlap", [True, False])
def test_what_is_not_over_fails_when_the_session_is_dropped(hearing, sounds, recordings, overlap: bool) -> None:
    inside, opened = threading.Event(), threading.Event()

    def held(number: int) -> None:
        inside.set()
        opened.wait(60)

    hearing.acoustic.scorer.on_start = held
    session = hearing.session(max_utterances=1, overlap_encoder=overlap)
    futures = [session.submit(recordings[0], **LONG), *(session.submit(own, **BASE) for own in sounds[:3])]
    cancelled = futures.pop()
    cancelled.cancel()
    assert inside.wait(60)
    del session
    opened.set()
    for future in futures:
        with pytest.raises(SessionError, match=r"ended before .* was decoded: it was dropped without close"):
            future.result(timeout=60)
    assert cancelled.cancelled()
    wait_for_no_thread()


def test_a_session_in_a_cycle_ends_when_it_is_collected(one_lm, recordings) -> None:
    holder: dict[str, Any] = {"session": one_lm.session()}
    holder["self"] = holder
    future = holder["session"].submit(recordings[0], **BASE)
    assert future.result(timeout=60).n_best
    del holder
    assert len(own_threads()) == 1
    gc.collect()
    wait_for_no_thread()
    assert future.result().n_best  # a result that is there stays


def test_a_thread_that_nobody_could_wake_looks_for_itself(one_lm) -> None:
    session = one_lm.session()
    worker = session._worker
    inside, opened = threading.Event(), threading.Event()

    def holds_the_lock() -> None:
        with worker.wakes:
            inside.set()
            opened.wait(60)

    holder = threading.Thread(target=holds_the_lock)
    holder.start()
    assert inside.wait(60)
    del session  # returns, though another has the lock
    opened.set()
    holder.join()
    wait_for_no_thread()
    assert worker.is_closing


def test_a_closed_session_and_one_in_a_block_are_as_before(one_lm, recordings) -> None:
    session = one_lm.session()
    future = session.submit(recordings[0], **BASE)
    session.close()
    assert not own_threads()
    del session
    assert future.result().n_best
    with one_lm.session() as other:
        future = other.submit(recordings[1], **BASE)
    assert not own_threads()
    assert future.result().n_best


SCRIPT = """
import threading, sys
import torch
from shallowfusion import FusionDecoder
from tests.tiny import random_encoder_output, tiny_lm, tiny_whisper

torch.set_num_threads(1)
decoder = FusionDecoder(tiny_whisper(1), [tiny_lm(2)])
recordings = random_encoder_output(decoder.acoustic, 12)
options = {"suppress_blank": False, "suppress_tokens": None, "max_new_tokens": 60, "min_new_tokens": 60}
session = decoder.session(max_utterances=2, overlap_encoder=bool(int(sys.argv[1])))
futures = [session.submit(own, **options) for own in recordings]
futures[-1].add_done_callback(lambda future: print(type(future.exception()).__name__))
print(len(futures[0].result().n_best))
cycle = [session]
cycle.append(cycle)
"""


@pytest.mark.parametrize("overlap", ["0", "1"])
def test_a_script_that_forgets_to_close_ends_in_peace(overlap: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, overlap], capture_output=True, text=True, timeout=300, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "terminate" not in done.stderr
    assert done.stdout.split() == ["1", "SessionError"]
