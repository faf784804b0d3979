"""Trusted rules in sessions: judged as `transcribe` judges them, and searched again where the model is given up."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion import DecodingOptions, FusionDecoder, fusion
from shallowfusion.results import Transcription
from shallowfusion.trusting import DISTRUSTED, Evidence
from tests.session.conftest import BASE, alone, assert_nothing_is_left, assert_same

RULE = fusion.static(0.4)
SEVERAL = {**BASE, "min_new_tokens": 5}


def options(memory: float = 0.0, floor: float = -2.0, **more: Any) -> DecodingOptions:
    return DecodingOptions.of(**{**BASE, "beam_size": 3, "rule": fusion.trusted(RULE, floor, memory), **more})


def middle(decoder: FusionDecoder, recordings: torch.Tensor) -> float:
    """A floor under which some of the recordings lie, about half."""
    found = decoder.decode(recordings, beam_size=3, rule=RULE, **SEVERAL)
    means = sorted({round(own.best.parts["lm"] / len(own.best.tokens), 4) for own in found})
    assert len(means) > 3
    place = len(means) // 2
    return (means[place - 1] + means[place]) / 2


def flags(results: list[Transcription]) -> list[bool]:
    return [DISTRUSTED in own.flags for own in results]


@pytest.mark.parametrize("overlap", [True, False])
def test_each_recording_for_itself_is_what_the_decoder_says(one_lm, recordings, overlap: bool) -> None:
    own = options(floor=middle(one_lm, recordings), min_new_tokens=5)
    wanted = one_lm.decode(recordings, own)
    with one_lm.session(max_utterances=4, overlap_encoder=overlap) as session:
        futures = [session.submit(recording, own) for recording in recordings]
    for future, result in zip(futures, wanted, strict=True):
        assert_same(future.result(), result)
        assert future.result().rule == result.rule
    assert 0 < sum(flags(wanted)) < 12
    assert session.statistics().given_up == sum(flags(wanted))
    assert session.statistics().finished == 12
    assert_nothing_is_left(session)


def test_shared_evidence_follows_the_order_of_the_requests_whatever_ends_first(one_lm, recordings) -> None:
    floor, lengths = middle(one_lm, recordings), [14, 2, 9, 1, 14, 3, 1, 8, 14, 2, 5, 1]
    asked = [options(0.8, floor, max_new_tokens=most) for most in lengths]
    evidence, wanted = Evidence(), []
    for own, recording in zip(asked, recordings, strict=True):
        wanted += one_lm.decode(recording[None], own, evidence=evidence)
    assert 0 < sum(flags(wanted)) < 12
    shared = Evidence()
    with one_lm.session(max_utterances=5) as session:
        futures = [
            session.submit(recording, own, evidence=shared) for own, recording in zip(asked, recordings, strict=True)
        ]
    for future, result in zip(futures, wanted, strict=True):
        assert_same(future.result(), result)
    assert shared.nats == pytest.approx(evidence.nats, abs=1e-3)
    assert_nothing_is_left(session)


def test_random_arrivals_cancellations_and_evidences_are_judged_as_lists_are(one_lm, recordings) -> None:
    floor = middle(one_lm, recordings)

    @settings(max_examples=12)
    @given(
        asked=st.lists(
            st.tuples(st.integers(0, 11), st.integers(1, 14), st.sampled_from([None, 0, 1]), st.booleans()),
            min_size=1,
            max_size=9,
        ),
        most=st.integers(1, 4),
        overlap=st.booleans(),
    )
    def check(asked: list[tuple[int, int, int | None, bool]], most: int, overlap: bool) -> None:
        shared, futures = [Evidence(), Evidence()], []
        with one_lm.session(max_utterances=most, overlap_encoder=overlap) as session:
            for place, length, number, is_cancelled in asked:
                evidence = None if number is None else shared[number]
                own = options(0.7, floor, max_new_tokens=length)
                futures.append(session.submit(recordings[place], own, evidence=evidence))
                if is_cancelled:
                    futures[-1].cancel()
        assert_nothing_is_left(session)
        again = [Evidence(), Evidence()]
        for (place, length, number, _), future in zip(asked, futures, strict=True):
            if future.cancelled():
                continue
            own = options(0.7, floor, max_new_tokens=length)
            evidence = None if number is None else again[number]
            assert_same(future.result(), one_lm.decode(recordings[place][None], own, evidence=evidence)[0])
        assert [own.nats for own in shared] == pytest.approx([own.nats for own in again], abs=1e-3)

    check()


def test_a_result_waits_for_earlier_ones_of_its_evidence_only(hearing, recordings) -> None:
    opened, scorer = threading.Event(), hearing.acoustic.scorer
    scorer.on_start = lambda number: opened.wait(60) and None if number == 4 else None
    shared, own, over = Evidence(), options(0.5, -50.0, max_new_tokens=1), []
    with hearing.session(max_utterances=4, encoder_batch=1) as session:
        first = session.submit(recordings[0], options(0.5, -0.001, min_new_tokens=13), evidence=shared)
        second = session.submit(recordings[1], own, evidence=shared)
        second.add_done_callback(lambda _: over.append("second"))
        third = session.submit(recordings[2], own)
        third.add_done_callback(lambda _: over.append("third"))
        assert third.result(timeout=60)
        assert second.result(timeout=60)
        assert over == ["third", "second"]  # the first was judged before the second, and is searched again
        assert not first.done()
        opened.set()
    assert DISTRUSTED in first.result().flags
    assert_nothing_is_left(session)


def test_the_second_search_can_be_cancelled_and_frees_everything(hearing, recordings) -> None:
    entered, opened, scorer = threading.Event(), threading.Event(), hearing.acoustic.scorer

    def held(number: int) -> None:
        if number == 2:
            entered.set()
            opened.wait(60)

    scorer.on_start = held
    with hearing.session() as session:
        future = session.submit(recordings[0], options(floor=-0.001))
        assert entered.wait(60)
        assert future.cancel()
        opened.set()
    with pytest.raises(CancelledError):
        future.result()
    told = session.statistics()
    assert (told.given_up, told.cancelled, told.finished) == (1, 1, 0)
    assert_nothing_is_left(session)


def test_a_second_search_that_fails_does_so_alone_and_short_memory_waits(hearing, recordings) -> None:
    scorer = hearing.acoustic.scorer

    def broken(number: int) -> None:
        if number == 2:
            raise RuntimeError("not twice")

    scorer.on_start = broken
    with hearing.session(max_utterances=1) as session:
        bad, good = session.submit(recordings[0], options(floor=-0.001)), session.submit(recordings[1], **BASE)
    with pytest.raises(RuntimeError, match="not twice"):
        bad.result()
    scorer.on_start = lambda number: None
    assert_same(good.result(), alone(hearing, recordings[1], **BASE))
    assert session.statistics().failed == 1
    assert_nothing_is_left(session)


def test_timing_and_budget_count_both_searches(hearing, sounds) -> None:
    own = options(floor=-0.001)
    with hearing.session(max_utterances=1) as session:
        result = session.submit(sounds[0], own).result(timeout=60)
    assert hearing.acoustic.scorer.heard == [1]  # encoded once
    assert result.timing.stages["lm"] > 0  # of the search that was given up
    assert result.timing.stages["asr"] > 0
    assert not result.rule.fuses
    assert result.duration == len(sounds[0]) / 9600


def test_nan_wipes_the_evidence_as_in_a_list(one_lm, recordings) -> None:
    own = options(0.9, -50.0)
    mixed = torch.stack([recordings[0], torch.full_like(recordings[0], float("nan")), recordings[1]])
    evidence, shared = Evidence(), Evidence()
    wanted = one_lm.decode(mixed, own, evidence=evidence)
    with one_lm.session(max_utterances=3) as session:
        futures = [session.submit(recording, own, evidence=shared) for recording in mixed]
    assert flags([future.result() for future in futures]) == flags(wanted)
    assert shared.nats == pytest.approx(evidence.nats, abs=1e-3)
    assert_nothing_is_left(session)


def test_closing_with_cancel_ends_what_waits_for_its_verdict(hearing, recordings) -> None:
    opened, scorer = threading.Event(), hearing.acoustic.scorer
    shared = Evidence()
    session = hearing.session(max_utterances=2, encoder_batch=1)
    first = session.submit(recordings[0], options(0.5, -50.0, min_new_tokens=14), evidence=shared)
    second = session.submit(recordings[1], options(0.5, -50.0, max_new_tokens=1), evidence=shared)
    scorer.on_start = lambda number: opened.wait(60) and None
    third = session.submit(recordings[2], **BASE)
    session_is_over = threading.Thread(target=session.close, args=(True,))
    session_is_over.start()
    opened.set()
    session_is_over.join(60)
    assert not session_is_over.is_alive()
    assert all(future.done() for future in (first, second, third))
    assert_nothing_is_left(session)
