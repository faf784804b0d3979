"""Threads that submit, cancel and close at once lose nothing; `python -m tests.session.thread_soak 60` for longer."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from shallowfusion.errors import SessionError
from tests.session.conftest import BASE, alone, assert_nothing_is_left, assert_same
from tests.session.thread_soak import thread_soak


def test_threads_submit_cancel_and_close_and_nothing_is_left() -> None:
    found = thread_soak(2.0, seed=1, sessions=3)
    assert found["sessions"] >= 3
    assert found["finished"] > 0
    assert found["cancelled"] > 0


class CancelledWhenAsked(Future[Any]):
    """As if another thread cancelled it right after each question whether it is cancelled."""

    def cancelled(self) -> bool:
        answer = super().cancelled()
        self.cancel()
        return answer


def test_a_request_cancelled_while_the_session_looks_at_it_is_one_cancelled_request(
    one_lm: Any, recordings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one_lm.session() as session:
        with monkeypatch.context() as patched:
            patched.setattr("shallowfusion.session.front.Future", CancelledWhenAsked)
            unwanted = session.submit(recordings[0], **BASE)
        good = session.submit(recordings[1], **BASE)
        assert_same(good.result(timeout=60), alone(one_lm, recordings[1], **BASE))
    told = session.statistics()
    assert (told.finished, told.cancelled) == (1, 1)
    assert unwanted.done()
    assert_nothing_is_left(session)


def test_a_failure_of_the_session_itself_reaches_everybody_who_waits(
    one_lm: Any, recordings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = one_lm.session(max_utterances=2)

    def broken(job: Any, beside: Any = ()) -> bool:
        raise RuntimeError("a defect")

    monkeypatch.setattr(session._worker.engine, "has_room", broken)
    future = session.submit(recordings[0], **BASE)
    with pytest.raises(SessionError, match="a defect"):
        future.result(timeout=60)
    with pytest.raises(SessionError, match="closed"):
        session.submit(recordings[1], **BASE)
    session.close()
