"""Sessions whose searches the device drives: utterances enter and leave between steps, on the CPU without a graph."""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

from shallowfusion import fusion
from shallowfusion.errors import DivergenceError
from shallowfusion.search.device_program import Program
from shallowfusion.session.engine import SessionEngine
from shallowfusion.session.front import DecoderSession
from tests.session.conftest import BASE, alone, assert_nothing_is_left, assert_same
from tests.session.test_trusted import flags, middle, options
from tests.tiny import decoder_on, random_encoder_output

DEVICE: dict[str, Any] = {**BASE, "driver": "device"}


def host(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "driver": "host"}


def engine_of(session: DecoderSession) -> SessionEngine:
    return session._worker.engine


@pytest.mark.parametrize("stop_rule", ["hf", "whisper", "espnet"])
def test_utterances_enter_and_leave_a_running_program(one_lm, recordings, stop_rule) -> None:
    """Twelve utterances in four places, of other lengths, weights and forbidden tokens each: one program."""
    draw = random.Random(stop_rule)
    asked = [
        {
            **DEVICE, "lm_weight": draw.choice([0.1, 0.3, 0.6]), "max_new_tokens": draw.randint(1, 16), "beam_size": 3,
            "n_best": 3, "stop_rule": stop_rule, "min_new_tokens": draw.choice([0, 0, 4]),
            "suppress_tokens": draw.choice([None, (3, 7), (11, 20, 33)]), "suppress_blank": draw.choice([True, False]),
            "length_penalty": None if stop_rule == "whisper" else draw.choice([0.0, 0.6, 1.0]),
            "length_bonus": draw.choice([0.0, 0.4]),
        }
        for _ in recordings
    ]  # fmt: skip
    programs = set()
    with one_lm.session(max_utterances=4, encoder_batch=2) as session:
        futures = []
        for encoded, options in zip(recordings, asked, strict=True):
            options["min_new_tokens"] = min(options["min_new_tokens"], options["max_new_tokens"])
            futures.append(session.submit(encoded, **options))
            time.sleep(draw.choice([0.0, 0.01]))
        while not all(future.done() for future in futures):
            programs |= {id(own.program) for own in list(engine_of(session)._device._programs)}
            time.sleep(0.001)
    assert len(programs) <= 1
    for encoded, options, future in zip(recordings, asked, futures, strict=True):
        result = future.result()
        assert_same(result, alone(one_lm, encoded, **host(options)))
        assert (result.timing.driver, result.timing.host_reason) == ("device", None)
        assert 1 <= result.timing.counts["device steps"] <= options["max_new_tokens"]
        assert set(result.timing.stages) >= {"prefill", "device step", "host"}
    assert_nothing_is_left(session)


def test_random_requests_of_all_kinds_are_those_of_one_by_one(two_lms, recordings) -> None:
    """Arrivals, options, language models and cancellations at random; what the device cannot drive the host does."""
    draw = random.Random(4)
    rules = [
        fusion.static([0.3, 0.1]), fusion.piecewise([0.5, 0.2], initial_steps=2, ramp=2),
        fusion.entropy_gate([0.4, 0.2]), fusion.internal_lm([0.4, 0.2], 0.2),
    ]  # fmt: skip
    asked: list[tuple[Any, int, Any, dict[str, Any]]] = []
    with two_lms.session(max_utterances=4, memory_budget=20_000_000) as session:
        for number in range(40):
            names = draw.choice([None, None, ("lm0",), ()])
            options = {
                **BASE, "driver": draw.choice(["device", "device", "host"]), "beam_size": draw.choice([2, 3]),
                "max_new_tokens": draw.randint(1, 16), "stop_rule": draw.choice(["hf", "whisper"]),
                "length_penalty": 0.0, "no_repeat_ngram_size": draw.choice([0, 0, 0, 2]),
                "suppress_tokens": draw.choice([None, (3, 9)]),
                "lm_prompt": draw.choice([None, None, "a domain of more than sixteen tokens"]),
            }  # fmt: skip
            rule = {"rule": draw.choice(rules)} if names is None else {"lm_weight": 0.3} if names else {}
            place = draw.randrange(len(recordings))
            future = session.submit(recordings[place], language_models=names, **options, **rule)
            asked.append((future, place, names, {**options, **rule}))
            time.sleep(draw.choice([0.0, 0.0, 0.02]))
            if number % 5 == 4:
                draw.choice(asked)[0].cancel()
    drivers = []
    for future, place, names, options in asked:
        if future.cancelled():
            continue
        result = future.result()
        assert_same(result, alone(two_lms, recordings[place], names, **host(options)))
        is_device = options["driver"] == "device" and result.timing.host_reason is None
        assert result.timing.driver == ("device" if is_device else "host")
        drivers.append((options["driver"], result.timing.driver))
    assert set(drivers) == {("device", "device"), ("device", "host"), ("host", "host")}
    assert_nothing_is_left(session)
    told, cancelled = session.statistics(), sum(future.cancelled() for future, *_ in asked)
    assert (told.failed, told.cancelled, told.finished) == (0, cancelled, 40 - cancelled)
    assert 0 < told.efficiency <= 1


def test_what_the_device_cannot_drive_the_host_drives_beside_it_and_says_why(one_lm, recordings, caplog) -> None:
    gated = {**DEVICE, "rule": fusion.entropy_gate(0.3)}
    with caplog.at_level(logging.WARNING), one_lm.session() as session:
        plain = session.submit(recordings[0], lm_weight=0.3, **DEVICE)
        other = session.submit(recordings[1], **gated)
    assert plain.result().timing.driver == "device"
    timing = other.result().timing
    assert (timing.driver, timing.host_reason) == ("host", "the rule has a gate")
    assert "the host drives this search: the rule has a gate" in caplog.text
    assert_same(plain.result(), alone(one_lm, recordings[0], lm_weight=0.3, **BASE))
    assert_same(other.result(), alone(one_lm, recordings[1], **host(gated)))


def test_nan_ends_one_utterance_with_a_flag(one_lm, recordings) -> None:
    bad = torch.full_like(recordings[0], float("nan"))
    order = [recordings[0], bad, recordings[1], bad, recordings[2], recordings[3]]
    with one_lm.session(max_utterances=2) as session:
        futures = [session.submit(own, beam_size=3, lm_weight=0.3, **DEVICE) for own in order]
    for own, future in zip(order, futures, strict=True):
        if own is bad:
            assert "nan" in future.result().flags
        else:
            assert_same(future.result(), alone(one_lm, own, beam_size=3, lm_weight=0.3, **BASE))


def test_cancelling_frees_the_place(one_lm, recordings) -> None:
    with one_lm.session(max_utterances=1) as session:
        endless = session.submit(recordings[0], min_new_tokens=60, **{**DEVICE, "max_new_tokens": 60})
        next_one = session.submit(recordings[1], **DEVICE)
        while engine_of(session)._device.num_running == 0:
            time.sleep(0.001)
        assert endless.cancel()
        assert_same(next_one.result(timeout=60), alone(one_lm, recordings[1], **BASE))
    with pytest.raises(CancelledError):
        endless.result()
    assert session.statistics().cancelled == 1
    assert_nothing_is_left(session)


def test_a_step_that_fails_ends_the_searches_of_its_program_alone(one_lm, recordings, monkeypatch) -> None:
    long = {"min_new_tokens": 12, "max_new_tokens": 14}
    with one_lm.session(max_utterances=3) as session:
        run, broken = Program.run, []

        def breaks_once(self: Program) -> None:
            if self.step.plan.settings.beam_size == 3 and self.num_run == 2 and not broken:
                broken.append(self)
                raise RuntimeError("the device is gone")
            run(self)

        monkeypatch.setattr(Program, "run", breaks_once)
        lost = session.submit(recordings[0], beam_size=3, **{**DEVICE, **long})
        others = [
            session.submit(recordings[1], beam_size=2, **{**DEVICE, **long}),
            session.submit(recordings[2], beam_size=3, **{**BASE, **long}),
        ]
        with pytest.raises(RuntimeError, match="device is gone"):
            lost.result(timeout=60)
        again = session.submit(recordings[0], beam_size=3, **{**DEVICE, **long})
        for own, future, beam_size in zip(recordings[1:3], others, (2, 3), strict=True):
            assert_same(future.result(timeout=60), alone(one_lm, own, beam_size=beam_size, **{**BASE, **long}))
        assert_same(again.result(timeout=60), alone(one_lm, recordings[0], beam_size=3, **{**BASE, **long}))
    assert session.statistics().failed == 1
    assert_nothing_is_left(session)


def test_a_host_driven_step_that_fails_leaves_the_programs_alone(one_lm, recordings, monkeypatch) -> None:
    lm, calls = one_lm.language_models[0], []

    def breaks(state: Any, token_ids: Any) -> Any:
        calls.append(1)
        raise RuntimeError("no pass")

    monkeypatch.setattr(lm, "score", breaks)
    with one_lm.session(max_utterances=2) as session:
        sound = session.submit(recordings[0], min_new_tokens=10, **DEVICE)
        lost = session.submit(recordings[1], min_new_tokens=10, **BASE)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="no pass"):
        lost.result()
    assert calls
    assert_same(sound.result(), alone(one_lm, recordings[0], min_new_tokens=10, **BASE))


def test_divergence_is_that_programs_error(one_lm, recordings, monkeypatch) -> None:
    monkeypatch.setattr("shallowfusion.search.device_running.BeamMirror.replay", diverge)
    with one_lm.session() as session:
        lost = session.submit(recordings[0], **DEVICE)
        sound = session.submit(recordings[1], **BASE)
    with pytest.raises(DivergenceError):
        lost.result()
    assert_same(sound.result(), alone(one_lm, recordings[1], **BASE))
    assert_nothing_is_left(session)


def diverge(self: Any, entry: Any) -> None:
    raise DivergenceError("utterance 0, step 0: the device chose other lanes")


def test_no_memory_for_a_program_lets_the_host_drive(one_lm, recordings, monkeypatch) -> None:
    def short(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("no memory for a program")

    monkeypatch.setattr(Program, "start", short)
    with one_lm.session() as session:
        future = session.submit(recordings[0], **DEVICE)
    timing = future.result().timing
    assert (timing.driver, timing.host_reason) == ("host", "memory was short (no memory for a program)")
    assert_same(future.result(), alone(one_lm, recordings[0], **BASE))
    assert_nothing_is_left(session)


def test_programs_count_in_the_budget(one_lm, recordings) -> None:
    """Where it bears a program, searches enter it for nothing; where not, they are driven by the host within it."""
    with one_lm.session(max_utterances=4) as session:
        session.submit(recordings[0], **DEVICE).result()
        program = session.statistics().reserved_bytes
        assert program == engine_of(session)._device.num_bytes
    assert program > 0
    for budget, driver in ((2 * program, "device"), (program // 2, "host")):
        most: list[int] = []
        with one_lm.session(max_utterances=4, memory_budget=budget) as session:
            futures = [session.submit(own, min_new_tokens=6, **DEVICE) for own in recordings]
            while not all(future.done() for future in futures):
                most.append(engine_of(session).reserved_bytes)
                time.sleep(0.001)
        assert max(most) <= budget
        for own, future in zip(recordings, futures, strict=True):
            assert future.result().timing.driver == driver
            assert_same(future.result(), alone(one_lm, own, min_new_tokens=6, **BASE))
        if driver == "host":
            assert "memory_budget leaves" in str(futures[0].result().timing.host_reason)
        assert_nothing_is_left(session)


def test_programs_and_searches_of_the_host_share_the_budget(one_lm, recordings) -> None:
    """Those that entered together too: a program leaves less for who comes after it."""
    with one_lm.session(max_utterances=4) as session:
        session.submit(recordings[0], **DEVICE).result()
        program = session.statistics().reserved_bytes
    budget, most = program + 250_000, []
    with one_lm.session(max_utterances=4, memory_budget=budget, admission_seconds=1.0) as session:
        futures = [
            session.submit(own, min_new_tokens=6, **(BASE if i % 2 else DEVICE)) for i, own in enumerate(recordings)
        ]
        while not all(future.done() for future in futures):
            most.append(engine_of(session).reserved_bytes)
            time.sleep(0.001)
    assert program < max(most) <= budget
    for own, future in zip(recordings, futures, strict=True):
        assert_same(future.result(), alone(one_lm, own, min_new_tokens=6, **BASE))
    assert session.statistics().failed == 0
    assert_nothing_is_left(session)


def test_a_rule_given_up_is_searched_again_by_the_device(one_lm, recordings) -> None:
    own = options(floor=middle(one_lm, recordings), min_new_tokens=5, driver="device")
    wanted = one_lm.decode(recordings, dataclasses.replace(own, driver="host"))
    with one_lm.session(max_utterances=4) as session:
        futures = [session.submit(recording, own) for recording in recordings]
    for future, result in zip(futures, wanted, strict=True):
        assert_same(future.result(), result)
        assert future.result().timing.driver == "device"
    assert 0 < session.statistics().given_up == sum(flags(wanted)) < 12
    assert_nothing_is_left(session)


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [True, False])
def test_on_cuda_a_session_runs_captured_steps(overlap: bool) -> None:
    model = decoder_on("cuda")
    encoded = random_encoder_output(model.acoustic, 12).cuda()
    with model.session(max_utterances=4, overlap_encoder=overlap) as session:
        futures = []
        for i, own in enumerate(encoded):
            chosen = {**DEVICE, "beam_size": 2 + i % 2, "lm_weight": 0.1 * (1 + i % 5), "max_new_tokens": 6 + i}
            futures.append((session.submit(own, **chosen), chosen))
            time.sleep(0.005 * (i % 3))
        programs = list(engine_of(session)._device._programs)
        for own, (future, chosen) in zip(encoded, futures, strict=True):
            assert future.result(timeout=300).timing.driver == "device"
            wanted = model.decode(own[None], **host(chosen))[0]
            assert future.result().best.token_ids == wanted.best.token_ids
            assert future.result().best.total == pytest.approx(wanted.best.total, abs=1e-3)
        assert all(own.program.is_captured for own in [*programs, *engine_of(session)._device._programs])
    assert_nothing_is_left(session)
