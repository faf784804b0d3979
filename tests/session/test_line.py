"""The waiting line: order, what is claimed for the encoder, and who may enter."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import torch

from shallowfusion.session.jobs import Encoded, Job
from shallowfusion.session.line import WaitingLine


def job(name: str, encoded: bool = False) -> Job:
    return Job(Future(), name, name, None, None, {}, 0.0, encoded=torch.zeros((2, 3)) if encoded else None)  # type: ignore[arg-type]


def line_of(names: str, ahead: bool = True, batch: int = 2) -> WaitingLine:
    line = WaitingLine(batch, ahead)
    for name in names:
        line.append(job(name))
    return line


def names(jobs: Any) -> str:
    return "".join(own.source for own in jobs)


def anyone(_: Job, __: Any) -> bool:
    return True


def encode(jobs: list[Job]) -> None:
    for own in jobs:
        own.take(Encoded(torch.ones((2, 3)), seconds=1.0))


def test_recordings_are_claimed_in_order_and_enter_once_encoded() -> None:
    line = line_of("abcde")
    assert line.take(anyone) == []
    first = line.claim()
    assert names(first) == "ab"
    second = line.claim()
    assert names(second) == "cd"
    assert line.num_ahead == 4
    encode(second)
    assert not line.is_head_ready
    assert line.take(anyone) == []
    encode(first)
    assert line.encoded_bytes == 4 * 24
    assert names(line.take(anyone)) == "ab"
    assert names(line.take(anyone)) == "cd"
    assert names(line) == "e"


def test_no_more_is_claimed_while_more_than_a_batch_waits() -> None:
    line = line_of("abcdefgh")
    assert (names(line.claim()), names(line.claim()), names(line.claim())) == ("ab", "cd", "")
    encode(list(line)[:4])
    assert names(line.take(lambda own, beside: not beside)) == "a"
    assert line.claim() == []
    line.take(lambda own, beside: not beside)
    assert names(line.claim()) == "ef"


def test_without_a_thread_of_its_own_all_may_enter_unread() -> None:
    line = line_of("abc", ahead=False)
    assert names(line.take(anyone)) == "ab"
    assert names(line.take(anyone)) == "c"
    assert not line.is_head_ready


def test_given_encoder_output_needs_no_claim_and_is_not_counted() -> None:
    line = WaitingLine(2, ahead=True)
    line.append(job("a", encoded=True))
    line.append(job("b"))
    assert line.is_head_ready
    assert names(line.claim()) == "b"
    assert (line.num_ahead, line.encoded_bytes) == (1, 0)
    assert names(line.take(anyone)) == "a"


def test_cancelled_and_failed_jobs_are_swept_out_wherever_they_stand() -> None:
    line = line_of("abcd")
    claimed = line.claim()
    claimed[1].take(Encoded(error=ValueError("no")))
    list(line)[3].future.cancel()
    assert line.has_over
    assert names(line.sweep()) == "bd"
    assert names(line) == "ac"
    assert not line.has_over
    assert names(line.claim()) == "c"


def test_jobs_put_back_go_first_in_their_order() -> None:
    line = line_of("ab")
    line.put_back([job("x", encoded=True), job("y", encoded=True)])
    assert names(line) == "xyab"
    assert names(line.take(anyone)) == "xy"
