"""Sessions: what comes back is what comes back one by one, whoever else runs, and nothing is left behind."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from concurrent.futures import CancelledError, wait
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion import DecodingOptions, FusionDecoder, fusion
from shallowfusion.errors import AudioError, CapacityError, InvalidArgumentError, SessionError
from tests.session.conftest import BASE, alone, assert_nothing_is_left, assert_same
from tests.shipped import clip, decoder
from tests.tiny import random_encoder_output, tiny_whisper

RULES = [
    None,
    fusion.static([0.3, 0.1]),
    fusion.piecewise([0.5, 0.2], initial_steps=2, ramp=2),
    fusion.piecewise([0.4, 0.0], initial_steps=3, catch_up=True),
    fusion.internal_lm([0.4, 0.2], 0.2),
    fusion.mixture([0.5, 0.5], weight=0.4),
    fusion.density_ratio(0.4, 0.2),
]


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """Options of one request, which recording, how many steps it waits, and whether it is cancelled after some time."""
    rule = draw(st.sampled_from(RULES))
    chosen = draw(st.sampled_from([(), ("lm1",), ("lm0",)] if rule is None else [None, ("lm0", "lm1")]))
    width = draw(st.integers(1, 6))
    options = {
        **BASE,
        "beam_size": width,
        "n_best": draw(st.integers(1, width)),
        "max_new_tokens": draw(st.integers(1, 16)),
        "min_new_tokens": draw(st.integers(0, 3)),
        "stop_rule": draw(st.sampled_from(["hf", "whisper", "espnet"])),
        "end_policy": draw(st.sampled_from(["neutral", "lm", "asr_only"])),
        "suppress_tokens": draw(st.sampled_from([None, (3, 7), (0, 1, 2)])),
        "no_repeat_ngram_size": draw(st.sampled_from([0, 0, 2])),
        "lm_prompt": draw(st.sampled_from([None, "heart", "a long domain prompt of some tokens"])),
        "initial_prompt": draw(st.sampled_from([None, None, "before"])),
        "length_penalty": draw(st.sampled_from([0.0, 1.0])),
    }
    if rule is None:
        options["lm_weight"] = draw(st.sampled_from([0.0, 0.2, 0.5])) if chosen else 0.0
    else:
        options["rule"] = rule
    return {
        "options": options,
        "language_models": chosen,
        "recording": draw(st.integers(0, 11)),
        "pause": draw(st.sampled_from([0.0, 0.0, 0.002, 0.01])),
        "cancel_after": draw(st.sampled_from([None, None, None, 0.0, 0.003])),
    }


@pytest.fixture(scope="session")
def prompted(two_lms: FusionDecoder) -> FusionDecoder:
    """The same with a token that says previous text follows."""
    acoustic = tiny_whisper(1)
    object.__setattr__(acoustic.tokens, "previous", 43)
    return FusionDecoder(acoustic, two_lms.language_models)


def test_random_arrivals_options_and_cancellations_change_no_result_and_leak_nothing(
    prompted: FusionDecoder, recordings: torch.Tensor
) -> None:
    @settings(max_examples=12)
    @given(
        asked=st.lists(requests(), min_size=1, max_size=8),
        most=st.integers(1, 5),
        encoder_batch=st.integers(1, 3),
    )
    def check(asked: list[dict[str, Any]], most: int, encoder_batch: int) -> None:
        futures = []
        with prompted.session(max_utterances=most, encoder_batch=encoder_batch) as session:
            for each in asked:
                time.sleep(each["pause"])
                encoded = recordings[each["recording"]]
                futures.append(session.submit(encoded, language_models=each["language_models"], **each["options"]))
                if each["cancel_after"] is not None:
                    threading.Timer(each["cancel_after"], futures[-1].cancel).start()
        assert_nothing_is_left(session)
        told = session.statistics()
        assert told.finished + told.cancelled == len(asked)
        assert told.failed == 0
        for each, future in zip(asked, futures, strict=True):
            assert future.done()
            if not future.cancelled():
                encoded = recordings[each["recording"]]
                wanted = alone(prompted, encoded, each["language_models"], **each["options"])
                assert_same(future.result(), wanted)

    check()


def test_all_slots_and_pages_are_free_when_all_is_over(one_lm, recordings, spied_pools) -> None:
    with one_lm.session(max_utterances=3) as session:
        futures = [session.submit(own, beam_size=1 + i % 4, lm_weight=0.2, **BASE) for i, own in enumerate(recordings)]
        futures[1].cancel()
        futures[7].cancel()
    assert len(spied_pools) >= 12
    assert all(pool.num_used == 0 and pool.num_sequences == 0 for pools in spied_pools for pool in pools)
    assert_nothing_is_left(session)


def test_a_result_returns_when_its_own_search_ends(one_lm, recordings) -> None:
    with one_lm.session(max_utterances=2) as session:
        long = session.submit(recordings[0], min_new_tokens=55, **{**BASE, "max_new_tokens": 60})
        short = session.submit(recordings[1], **{**BASE, "max_new_tokens": 1})
        short.result(timeout=60)
        assert not long.done()
        assert len(long.result().best.token_ids) >= 55


def test_beams_of_any_size_share_a_session(one_lm, recordings) -> None:
    sizes = [1, 10, 3, 1, 7, 2]
    with one_lm.session(max_utterances=6, admission_seconds=1.0, encoder_batch=6) as session:
        futures = [session.submit(recordings[i], beam_size=size, lm_weight=0.3, **BASE) for i, size in enumerate(sizes)]
    for i, (size, future) in enumerate(zip(sizes, futures, strict=True)):
        assert_same(future.result(), alone(one_lm, recordings[i], beam_size=size, lm_weight=0.3, **BASE))


def test_delayed_rules_late_sources_and_hotwords_run_beside_others(one_lm, recordings) -> None:
    asked = [
        {"rule": fusion.delayed(0.4, unit="tokens"), "end_policy": "neutral"},
        {"lm_weight": 0.3, "hotwords": {"0712": 2.0}, "hotwords_inside_words": True},
        {"rule": fusion.delayed(0.2, unit="tokens"), "end_policy": "lm"},
        {"lm_weight": 0.1, "beam_size": 2},
    ]
    with one_lm.session(max_utterances=4) as session:
        futures = [session.submit(recordings[i], **BASE, **own) for i, own in enumerate(asked)]
    for i, (own, future) in enumerate(zip(asked, futures, strict=True)):
        assert_same(future.result(), one_lm.decode(recordings[i][None], **BASE, **own)[0])
    assert futures[0].result().timing.counts["llm_calls"] >= 1
    assert_nothing_is_left(session)


def test_nan_ends_one_utterance_with_a_flag_and_not_its_neighbours_or_successors(one_lm, recordings) -> None:
    bad = torch.full_like(recordings[0], float("nan"))
    order = [recordings[0], bad, recordings[1], bad, recordings[2], recordings[3], recordings[4]]
    with one_lm.session(max_utterances=3) as session:
        futures = [session.submit(own, beam_size=3, lm_weight=0.3, **BASE) for own in order]
    for own, future in zip(order, futures, strict=True):
        result = future.result()
        if own is bad:
            assert "nan" in result.flags
        else:
            assert_same(result, alone(one_lm, own, beam_size=3, lm_weight=0.3, **BASE))


def test_a_language_model_that_returns_nan_ends_only_those_that_asked_it(two_lms, recordings, monkeypatch) -> None:
    broken = FusionDecoder(two_lms.acoustic, two_lms.language_models)
    monkeypatch.setattr(two_lms.language_models[1], "head", lambda hidden: torch.full((len(hidden), 41), torch.nan))
    broken.prefixes.resize(0)
    with broken.session(max_utterances=4) as session:
        good = session.submit(recordings[0], language_models=("lm0",), lm_weight=0.3, **BASE)
        bad = session.submit(recordings[1], language_models=("lm0", "lm1"), rule=fusion.static([0.3, 0.3]), **BASE)
    assert "nan" in bad.result().flags
    assert good.result().flags == alone(two_lms, recordings[0], ("lm0",), lm_weight=0.3, **BASE).flags


def test_cancelling_a_running_request_frees_its_place(one_lm, recordings) -> None:
    with one_lm.session(max_utterances=1) as session:
        endless = session.submit(recordings[0], min_new_tokens=60, **{**BASE, "max_new_tokens": 60})
        next_one = session.submit(recordings[1], **BASE)
        while session.statistics().running == 0:
            time.sleep(0.001)
        assert endless.cancel()
        assert_same(next_one.result(timeout=60), alone(one_lm, recordings[1], **BASE))
    with pytest.raises(CancelledError):
        endless.result()
    assert session.statistics().cancelled == 1


def test_closing_with_cancel_ends_everything_at_once(one_lm, recordings) -> None:
    session = one_lm.session(max_utterances=1)
    futures = [session.submit(own, **BASE) for own in recordings]
    session.close(cancel=True)
    done, waiting = wait(futures, timeout=10)
    assert not waiting
    assert any(future.cancelled() for future in done)
    assert_nothing_is_left(session)
    with pytest.raises(SessionError, match="closed"):
        session.submit(recordings[0])


def test_an_error_inside_the_block_cancels_what_waits(one_lm, recordings) -> None:
    futures: list[Any] = []

    def fail() -> None:
        with one_lm.session(max_utterances=1) as session:
            futures.extend(session.submit(own, **BASE) for own in recordings)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(future.done() for future in futures)
    assert futures[-1].cancelled()


def test_asyncio_awaits_results_and_cancels_requests(one_lm, recordings) -> None:
    async def serve() -> list[Any]:
        with one_lm.session(max_utterances=2) as session:
            tasks = [asyncio.create_task(session.transcribe(own, beam_size=2, **BASE)) for own in recordings[:5]]
            await asyncio.sleep(0)
            tasks[4].cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(serve())
    assert isinstance(found[4], asyncio.CancelledError)
    for own, result in zip(recordings[:4], found, strict=False):
        assert_same(result, alone(one_lm, own, beam_size=2, **BASE))


def test_many_threads_submit_and_cancel_at_random(one_lm, recordings) -> None:
    wanted = [alone(one_lm, own, beam_size=2, lm_weight=0.3, **BASE) for own in recordings]
    session = one_lm.session(max_utterances=4)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(8):
                place = draw.randrange(12)
                future = session.submit(recordings[place], beam_size=2, lm_weight=0.3, **BASE)
                if draw.random() < 0.3:
                    time.sleep(draw.random() * 0.01)
                    future.cancel()
                else:
                    assert_same(future.result(timeout=120), wanted[place])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    session.close()
    assert not failures
    assert_nothing_is_left(session)
    told = session.statistics()
    assert told.finished + told.cancelled == 48


def test_recordings_features_and_bad_audio_on_the_shipped_models() -> None:
    model = decoder()
    expected = {i: model.transcribe([clip(i)], beam_size=2)[0] for i in (2, 5)}
    with model.session(max_utterances=3) as session:
        good = [session.submit(clip(2), beam_size=2), session.submit(clip(5), beam_size=2)]
        bad = session.submit("no-such-file.wav", beam_size=2)
        silent = session.submit(np.full(16000, np.nan, dtype=np.float32), beam_size=2)
        too_long = session.submit(np.zeros(40 * 16000, dtype=np.float32), beam_size=2)
    for i, future in zip((2, 5), good, strict=True):
        result = future.result()
        assert result.text == expected[i].text
        assert result.duration == expected[i].duration
        assert result.source == str(clip(i))
        assert result.timing.stages["encoder"] > 0
        assert result.timing.stages["text"] > 0
        assert result.timing.driver == "host"
        assert result.timing.total_seconds > 0
    for future in (bad, silent, too_long):
        with pytest.raises(AudioError):
            future.result()
    assert session.statistics().failed == 3


def test_wrong_options_are_refused_when_submitted(one_lm, recordings) -> None:
    with one_lm.session() as session:
        with pytest.raises(InvalidArgumentError, match="unknown option bean_size"):
            session.submit(recordings[0], bean_size=3)
        with pytest.raises(InvalidArgumentError, match="got both"):
            session.submit(recordings[0], DecodingOptions(), beam_size=3)
        with pytest.raises(InvalidArgumentError, match="some of lm, each once"):
            session.submit(recordings[0], language_models=("lm2",))
        with pytest.raises(InvalidArgumentError, match="list of names"):
            session.submit(recordings[0], language_models="lm")
        with pytest.raises(InvalidArgumentError, match="must be DecodingOptions"):
            session.submit(recordings[0], {"beam_size": 3})
    with pytest.raises(InvalidArgumentError, match="unknown setting most"):
        one_lm.session(most=3)
    with pytest.raises(InvalidArgumentError, match="overlap_encoder must be True, False or None, got 1"):
        one_lm.session(overlap_encoder=1)


def test_a_budget_queues_what_does_not_fit_and_refuses_what_never_can(one_lm, recordings) -> None:
    with one_lm.session() as session:
        future = session.submit(recordings[0], beam_size=2, **BASE)
        while (one := session.statistics().reserved_bytes) == 0 and not future.done():
            time.sleep(0.0005)
    assert one > 0
    most: list[int] = []
    with one_lm.session(max_utterances=8, memory_budget=2 * one) as session:
        futures = [session.submit(own, beam_size=2, **BASE) for own in recordings]
        while not all(future.done() for future in futures):
            told = session.statistics()
            most.append(told.running)
            assert told.reserved_bytes <= 2 * one
            time.sleep(0.001)
        with pytest.raises(CapacityError, match="memory_budget"):
            session.submit(recordings[0], beam_size=60, **{**BASE, "max_new_tokens": 60})
    assert max(most) <= 2
    for own, future in zip(recordings, futures, strict=True):
        assert_same(future.result(), alone(one_lm, own, beam_size=2, **BASE))


@pytest.mark.gpu
def test_a_session_on_a_gpu_says_what_the_decoder_says() -> None:
    model = FusionDecoder.from_pretrained(decoder().acoustic.name, device="cuda", dtype="float32")
    encoded = random_encoder_output(model.acoustic, 6).cuda()
    options = {"max_new_tokens": 20, "suppress_tokens": None}
    with model.session(max_utterances=3) as session:
        futures = [session.submit(own, beam_size=1 + i % 3, **options) for i, own in enumerate(encoded)]
    for i, (own, future) in enumerate(zip(encoded, futures, strict=True)):
        wanted = model.decode(own[None], beam_size=1 + i % 3, **options)[0]
        assert future.result().best.token_ids == wanted.best.token_ids
        assert future.result().best.total == pytest.approx(wanted.best.total, abs=1e-3)
