"""Sessions that encode ahead of the search, in a thread of its own: the promises are the same."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion import FusionDecoder
from shallowfusion.errors import AudioError, SessionError
from shallowfusion.features.log_mel import log_mel
from tests.session.conftest import BASE, alone, alone_on, assert_nothing_is_left, assert_same

LONG = {**BASE, "max_new_tokens": 60, "min_new_tokens": 60}


def until(is_so: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def test_those_that_run_go_on_while_others_are_read_and_encoded(hearing, recordings, sounds) -> None:
    opened = threading.Event()
    hearing.acoustic.scorer.on_encode = lambda features: opened.wait(60) and None
    with hearing.session(overlap_encoder=True) as session:
        assert session.overlaps_encoder
        runs = session.submit(recordings[0], **BASE)
        waits = session.submit(sounds[0], **BASE)
        assert_same(runs.result(timeout=60), alone(hearing, recordings[0], **BASE))
        later = session.submit(recordings[1], **BASE)
        assert not waits.done()
        assert not later.done()  # first come, first served
        opened.set()
    assert_same(waits.result(), alone_on(hearing, sounds[0], **BASE))
    assert_same(later.result(), alone(hearing, recordings[1], **BASE))
    assert waits.result().timing.stages["encoder"] > 0
    assert_nothing_is_left(session)


@pytest.mark.parametrize("overlap", [True, False])
def test_recordings_are_those_of_transcribe_with_and_without_overlap(hearing, sounds, overlap: bool) -> None:
    with hearing.session(max_utterances=3, encoder_batch=2, overlap_encoder=overlap) as session:
        futures = [session.submit(own, beam_size=1 + i % 3, lm_weight=0.3, **BASE) for i, own in enumerate(sounds)]
    for i, (own, future) in enumerate(zip(sounds, futures, strict=True)):
        assert_same(future.result(), alone_on(hearing, own, beam_size=1 + i % 3, lm_weight=0.3, **BASE))
        assert future.result().duration == len(own) / 9600
    assert session.statistics().seconds["encoder"] > 0
    assert_nothing_is_left(session)


def test_no_more_than_two_batches_are_encoded_ahead(hearing, sounds) -> None:
    scorer, opened = hearing.acoustic.scorer, threading.Event()
    scorer.on_start = lambda number: opened.wait(60) and None
    one = hearing.acoustic.scorer.model.config
    with hearing.session(max_utterances=1, encoder_batch=2, overlap_encoder=True) as session:
        futures = [session.submit(own, **BASE) for own in sounds]
        until(lambda: session.statistics().encoded > 2 and session.statistics().running == 1)
        time.sleep(0.05)
        told = session.statistics()
        assert told.encoded in (3, 4)
        assert told.encoded_bytes <= 4 * one.max_source_positions * one.d_model * 4
        assert sum(scorer.heard) <= 5
        opened.set()
    assert sum(scorer.heard) == 12
    assert max(scorer.heard) <= 2
    assert session.statistics().encoded_bytes == 0
    assert all(future.result().n_best for future in futures)


def test_places_are_taken_in_the_order_of_the_requests(hearing, recordings, sounds) -> None:
    over: list[int] = []
    with hearing.session(max_utterances=1, encoder_batch=3, overlap_encoder=True) as session:
        for i in range(12):
            item = sounds[i] if i % 3 else recordings[i]
            session.submit(item, **BASE).add_done_callback(lambda _, number=i: over.append(number))
    assert over == list(range(12))


def test_a_reader_that_raises_and_bad_recordings_fail_alone(hearing, sounds) -> None:
    class Broken:
        def __array__(self, *_: Any, **__: Any) -> Any:
            raise ConnectionError("the disk is away")

    with hearing.session(encoder_batch=3, overlap_encoder=True) as session:
        good = session.submit(sounds[0], **BASE)
        away = session.submit([Broken()], **BASE)
        missing = session.submit("no-such-file.wav", **BASE)
        too_long = session.submit(torch.zeros(9601), **BASE)
        last = session.submit(sounds[1], **BASE)
    with pytest.raises(ConnectionError, match="disk"):
        away.result()
    for future in (missing, too_long):
        with pytest.raises(AudioError):
            future.result()
    assert_same(good.result(), alone_on(hearing, sounds[0], **BASE))
    assert_same(last.result(), alone_on(hearing, sounds[1], **BASE))
    assert session.statistics().failed == 3
    assert_nothing_is_left(session)


def test_features_of_nan_end_one_utterance_with_a_flag(hearing, sounds) -> None:
    features = [log_mel([own], hearing.acoustic.features)[0] for own in sounds[:3]]
    features[1] = torch.full_like(features[1], float("nan"))
    with hearing.session(encoder_batch=3, admission_seconds=1.0, overlap_encoder=True) as session:
        futures = [session.submit(own, lm_weight=0.3, **BASE) for own in features]
    assert "nan" in futures[1].result().flags
    for i in (0, 2):
        assert_same(futures[i].result(), alone_on(hearing, sounds[i], lm_weight=0.3, **BASE))


def test_short_memory_in_the_encoder_waits_for_others_to_leave(hearing, recordings, sounds) -> None:
    scorer, is_short = hearing.acoustic.scorer, threading.Event()

    def scarce(features: torch.Tensor) -> None:
        is_short.set()
        if not running.done():
            raise torch.OutOfMemoryError("the search has it all")

    scorer.on_encode = scarce
    opened = threading.Event()
    scorer.on_start = lambda number: opened.wait(60) and None
    with hearing.session(overlap_encoder=True) as session:
        running = session.submit(recordings[0], **BASE)
        until(lambda: session.statistics().running == 1)
        waits = session.submit(sounds[0], **BASE)
        is_short.wait(60)
        until(lambda: session.statistics().encoded == 0)
        assert not waits.done()
        opened.set()
    assert len(scorer.heard) == 2
    assert session.statistics().failed == 0
    assert_same(waits.result(), alone_on(hearing, sounds[0], **BASE))


@pytest.mark.parametrize("overlap", [True, False])
def test_short_memory_in_the_encoder_with_nothing_running_fails_that_recording_alone(
    hearing, sounds, overlap: bool
) -> None:
    scorer = hearing.acoustic.scorer
    tries: list[int] = []

    def scarce(features: torch.Tensor) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise MemoryError("none at all")

    scorer.on_encode = scarce
    with hearing.session(max_utterances=1, encoder_batch=1, overlap_encoder=overlap) as session:
        first, second = (session.submit(own, **BASE) for own in sounds[:2])
    with pytest.raises(MemoryError):
        first.result()
    assert_same(second.result(), alone_on(hearing, sounds[1], **BASE))
    assert session.statistics().failed == 1


def test_recordings_that_cannot_be_encoded_together_are_encoded_alone(hearing, sounds) -> None:
    scorer = hearing.acoustic.scorer

    def one_only(features: torch.Tensor) -> None:
        if len(features) > 1:
            raise RuntimeError("one at a time")

    scorer.on_encode = one_only
    with hearing.session(admission_seconds=2.0, encoder_batch=3, overlap_encoder=True) as session:
        futures = [session.submit(own, **BASE) for own in sounds[:3]]
    assert scorer.heard[:4] == [3, 1, 1, 1]
    for own, future in zip(sounds, futures, strict=False):
        assert_same(future.result(), alone_on(hearing, own, **BASE))


def test_closing_with_cancel_while_the_encoder_works_leaves_nothing(hearing, recordings, sounds) -> None:
    inside, opened = threading.Event(), threading.Event()

    def held(features: torch.Tensor) -> None:
        inside.set()
        opened.wait(60)

    hearing.acoustic.scorer.on_encode = held
    session = hearing.session(encoder_batch=2, overlap_encoder=True)
    futures = [session.submit(recordings[0], **LONG), *(session.submit(own, **BASE) for own in sounds[:5])]
    assert inside.wait(60)
    closing = threading.Thread(target=session.close, args=(True,))
    closing.start()
    until(lambda: all(future.done() for future in futures))
    assert closing.is_alive()  # the pass cannot be interrupted
    opened.set()
    closing.join(60)
    assert not closing.is_alive()
    assert all(future.cancelled() for future in futures[1:])
    assert hearing.acoustic.scorer.heard in ([1], [2])
    assert_nothing_is_left(session)


@pytest.mark.parametrize("place", ["on_encode", "on_start"])
def test_a_thread_that_breaks_leaves_nobody_waiting(hearing, sounds, place: str) -> None:
    class Unforeseen(BaseException):
        pass

    def breaks(_: Any) -> None:
        raise Unforeseen

    setattr(hearing.acoustic.scorer, place, breaks)
    session = hearing.session(max_utterances=2, overlap_encoder=True)
    first = session.submit(sounds[0], **BASE)
    with pytest.raises(SessionError, match="ended before array 0 was decoded: Unforeseen"):
        first.result(timeout=60)
    with pytest.raises(SessionError, match="closed"):
        session.submit(sounds[1], **BASE)
    session.close()


def test_closing_decodes_what_was_not_yet_read(hearing, sounds) -> None:
    session = hearing.session(max_utterances=2, encoder_batch=1, overlap_encoder=True)
    futures = [session.submit(own, **BASE) for own in sounds]
    session.close()
    assert all(future.done() for future in futures)
    assert session.statistics().finished == 12


def test_a_cancelled_recording_is_not_encoded(hearing, sounds) -> None:
    scorer, opened = hearing.acoustic.scorer, threading.Event()
    scorer.on_encode = lambda features: opened.wait(60) and None
    with hearing.session(encoder_batch=1, overlap_encoder=True) as session:
        first = session.submit(sounds[0], **BASE)
        until(lambda: scorer.heard == [1])
        second = session.submit(sounds[1], **BASE)
        assert second.cancel()
        assert first.cancel()  # while it is encoded
        opened.set()
    for future in (first, second):
        with pytest.raises(CancelledError):
            future.result()
    assert scorer.heard == [1]
    assert session.statistics().cancelled == 2
    assert_nothing_is_left(session)


def test_random_arrivals_and_cancellations_with_the_encoder_ahead(hearing: FusionDecoder, sounds) -> None:
    features = [log_mel([own], hearing.acoustic.features)[0] for own in sounds]
    outputs = [hearing.acoustic.scorer.encode(own[None])[0] for own in features]
    made: dict[tuple[int, int], Any] = {}

    def wanted(place: int, width: int) -> Any:
        if (place, width) not in made:
            made[place, width] = alone_on(hearing, sounds[place], beam_size=width, lm_weight=0.3, **BASE)
        return made[place, width]

    @settings(max_examples=20)
    @given(
        seed=st.integers(0, 10_000),
        count=st.integers(1, 14),
        most=st.integers(1, 5),
        encoder_batch=st.integers(1, 4),
        overlap=st.sampled_from([True, True, False]),
        wait=st.sampled_from([0.0, 0.003]),
    )
    def check(seed: int, count: int, most: int, encoder_batch: int, overlap: bool, wait: float) -> None:
        draw = random.Random(seed)
        asked = []
        with hearing.session(
            max_utterances=most, encoder_batch=encoder_batch, overlap_encoder=overlap, admission_seconds=wait
        ) as session:
            for _ in range(count):
                place, width = draw.randrange(12), draw.randint(1, 4)
                item = draw.choice([sounds, sounds, features, outputs])[place]
                future = session.submit(item, beam_size=width, lm_weight=0.3, **BASE)
                asked.append((place, width, future))
                if draw.random() < 0.25:
                    threading.Timer(draw.choice([0.0, 0.002, 0.01]), future.cancel).start()
                time.sleep(draw.choice([0.0, 0.0, 0.003]))
                assert session.statistics().encoded <= 2 * encoder_batch
        assert_nothing_is_left(session)
        told = session.statistics()
        assert told.finished + told.cancelled == count
        for place, width, future in asked:
            if not future.cancelled():
                assert_same(future.result(), wanted(place, width))

    check()


@pytest.mark.gpu
def test_a_stream_of_its_own_gives_what_one_stream_gives() -> None:
    from tests.shipped import clip, decoder

    model = FusionDecoder.from_pretrained(decoder().acoustic.name, device="cuda", dtype="float32")
    clips = [clip(i) for i in range(12)]
    one = model.transcribe(clips, batch_size=3, overlap_encoder=False)
    for _ in range(3):  # memory that was given back too early would be another recording's by now
        other = model.transcribe(clips, batch_size=3, overlap_encoder=True)
        assert [own.best.token_ids for own in other] == [own.best.token_ids for own in one]
        with model.session(max_utterances=4, encoder_batch=2, overlap_encoder=True) as session:
            futures = [session.submit(own) for own in clips]
        assert [own.result().best.token_ids for own in futures] == [own.best.token_ids for own in one]
