"""Reading and encoding: each recording's own outcome, ahead of the caller or not."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from functools import partial

import pytest
import torch

from shallowfusion.errors import AudioError
from shallowfusion.features.log_mel import log_mel
from shallowfusion.session.encoding import EncoderPass, RecordingEncoder, each_ahead, is_out_of_memory, overlaps
from shallowfusion.session.hearing import samples_of
from shallowfusion.session.jobs import Job


def job(item: object) -> Job:
    return Job(Future(), "sound", item, None, None, {}, 0.0)  # type: ignore[arg-type]


def test_a_batch_is_encoded_in_one_pass_and_costs_are_shared(hearing, sounds) -> None:
    encoder = RecordingEncoder(hearing.acoustic, partial(samples_of, hearing.acoustic))
    jobs = [job(own) for own in sounds[:3]]
    found = encoder.encode(jobs)
    wanted = hearing.acoustic.scorer.encode(log_mel(sounds[:3], hearing.acoustic.features))
    assert hearing.acoustic.scorer.heard == [3, 3]
    for own, output, sound in zip(found, wanted, sounds, strict=False):
        assert own.error is None
        torch.testing.assert_close(own.output, output)
        assert own.seconds == len(sound) / 9600
    shares = [own.costs["encoder"] for own in found]
    assert sum(shares) == pytest.approx(encoder.clock.seconds["encoder"])
    assert all(own.encoded is None for own in jobs)  # they are read, not changed


def test_each_outcome_is_its_own(hearing, sounds) -> None:
    def fails(features: torch.Tensor) -> None:
        if len(features) > 1 or bool(features.isnan().any()):
            raise RuntimeError("broken")

    hearing.acoustic.scorer.on_encode = fails
    nan = torch.full_like(log_mel(sounds[:1], hearing.acoustic.features)[0], float("nan"))
    jobs = [job(sounds[0]), job("no-such-file.wav"), job(None), job(sounds[1])]
    jobs[2].features, jobs[2].seconds = nan, 1.0
    jobs[3].future.cancel()
    found = RecordingEncoder(hearing.acoustic, partial(samples_of, hearing.acoustic)).encode(jobs)
    assert found[0].output is not None
    assert isinstance(found[1].error, AudioError)
    assert isinstance(found[2].error, RuntimeError)
    assert found[3].output is None
    assert found[3].error is None
    assert hearing.acoustic.scorer.heard == [2, 1, 1]


def test_features_are_taken_together_or_one_by_one(hearing, sounds) -> None:
    features = log_mel(sounds[:2], hearing.acoustic.features)
    encode = EncoderPass(hearing.acoustic.scorer, apart=True)
    (one, first), (other, second) = encode(features), encode(list(features))
    torch.testing.assert_close(one, other)
    assert first is second is None  # on the CPU there are no streams


def test_work_ahead_is_in_order_and_one_item_ahead() -> None:
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        return 10 * item

    found = each_ahead(work, [1, 2, 3, 4], ahead=True)
    assert next(found) == 10
    assert set(started) <= {1, 2}
    assert list(found) == [20, 30, 40]
    assert started == [1, 2, 3, 4]
    assert list(each_ahead(work, [5], ahead=True)) == [50]
    assert list(each_ahead(work, [], ahead=True)) == []


@pytest.mark.parametrize("ahead", [True, False])
def test_an_error_is_raised_in_its_turn_and_ends_the_work(ahead: bool) -> None:
    done: list[int] = []

    def work(item: int) -> int:
        if item == 2:
            raise KeyError(item)
        done.append(item)
        return item

    found = each_ahead(work, [1, 2, 3], ahead)
    assert next(found) == 1
    with pytest.raises(KeyError):
        next(found)
    assert done == [1]


def test_work_ahead_has_a_thread_of_its_own() -> None:
    names = list(each_ahead(lambda item: threading.current_thread().name, [1, 2], ahead=True))
    assert all("encoder" in name for name in names)
    assert list(each_ahead(lambda item: threading.current_thread(), [1, 2], ahead=False)) == 2 * [
        threading.current_thread()
    ]


def test_overlap_is_taken_where_it_pays() -> None:
    assert overlaps(True, torch.device("cpu"))
    assert not overlaps(False, torch.device("cuda"))
    assert overlaps(None, torch.device("cuda"))
    assert not overlaps(None, torch.device("cpu"))


def test_short_memory_is_told_from_other_errors() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(None)
