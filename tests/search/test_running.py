"""Searches that share passes: cohorts that come and go do not change each other, and nothing of them stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion import DecodingOptions, FusionDecoder
from shallowfusion.scorers import attention
from shallowfusion.scorers.attention import set_slot_attention
from shallowfusion.scorers.slots import roomy
from shallowfusion.search.loop import StageClock, search
from shallowfusion.search.running import Cohort, RunningSearches
from tests.shipped import ASR, MEDICAL, clip
from tests.tiny import random_encoder_output, tiny_decoder

MODEL, PACKED = tiny_decoder(1), tiny_decoder(1)
for scorer in (PACKED.acoustic.scorer, *PACKED.language_models):
    set_slot_attention(scorer.model)
STATES = random_encoder_output(MODEL.acoustic, 10)
BASE = {"suppress_blank": False, "suppress_tokens": None, "max_new_tokens": 12}


def admitted(
    running: RunningSearches, encoded: torch.Tensor, model: FusionDecoder = MODEL, **options: object
) -> Cohort:
    own = model.sources(encoded, DecodingOptions.of(**{**BASE, **options}))
    return running.admit(own.scorers, own.contexts, own.names, own.plan, own.late)


def numbers(cohort: Cohort) -> list[list[tuple[tuple[int, ...], float]]]:
    most = cohort.plan.settings.beam_size
    return [
        [(found.token_ids, found.total) for found in cohort.beams.results(u, most)] for u in range(len(cohort.saw_nan))
    ]


def assert_as_alone(cohort: Cohort, encoded: torch.Tensor, **options: object) -> None:
    own = MODEL.sources(encoded, DecodingOptions.of(**{**BASE, **options}))
    wanted = search(own.scorers, own.contexts, own.names, own.plan, StageClock(), own.late)
    for found, outcome in zip(numbers(cohort), wanted, strict=True):
        assert [ids for ids, _ in found] == [hypothesis.token_ids for hypothesis in outcome.hypotheses]
        totals = [hypothesis.total for hypothesis in outcome.hypotheses]
        assert [total for _, total in found] == pytest.approx(totals, abs=1e-4)


@pytest.mark.parametrize("model", [MODEL, PACKED], ids=["padded", "packed"])
@given(data=st.data())
@settings(max_examples=40)
def test_cohorts_that_enter_at_any_step_find_what_they_find_alone(model: FusionDecoder, data: st.DataObject) -> None:
    running, cohorts = RunningSearches(StageClock()), []
    for _ in range(data.draw(st.integers(1, 5))):
        first, count = data.draw(st.integers(0, 7)), data.draw(st.integers(1, 3))
        options = {
            "beam_size": data.draw(st.integers(1, 5)),
            "lm_weight": data.draw(st.sampled_from([0.0, 0.4])),
            "max_new_tokens": data.draw(st.integers(1, 14)),
            "stop_rule": data.draw(st.sampled_from(["hf", "whisper", "espnet"])),
        }
        encoded = STATES[first : first + count]
        cohorts.append((admitted(running, encoded, model, **options), encoded, options))
        for _ in range(data.draw(st.integers(0, 6))):
            running.step()
    while running.num_running:
        running.step()
    assert running.is_empty
    for cohort, encoded, options in cohorts:
        assert_as_alone(cohort, encoded, **options)
        for u in range(len(encoded)):
            cohort.beams.release(u)
        assert cohort.beams.num_nodes == 0


def test_cancelled_utterances_leave_the_others_of_their_cohort_alone() -> None:
    running = RunningSearches(StageClock())
    first = admitted(running, STATES[:4], min_new_tokens=8)
    second = admitted(running, STATES[4:6], beam_size=2)
    for _ in range(3):
        running.step()
    first.cancelled |= {0, 2}
    running.step()
    assert sorted(first.active.tolist()) == [1, 3]
    while running.num_running:
        running.step()
    wanted = RunningSearches(StageClock())
    whole = admitted(wanted, STATES[:4], min_new_tokens=8)
    while wanted.num_running:
        wanted.step()
    for u in (1, 3):
        assert [ids for ids, _ in numbers(first)[u]] == [ids for ids, _ in numbers(whole)[u]]
    assert_as_alone(second, STATES[4:6], beam_size=2)


def test_a_nan_that_left_does_not_reach_who_takes_its_place() -> None:
    running = RunningSearches(StageClock())
    bad = torch.full_like(STATES[:1], float("nan"))
    admitted(running, bad)
    stays = admitted(running, STATES[:1], min_new_tokens=11)
    running.step()
    comes = admitted(running, STATES[1:2], lm_weight=0.3)
    while running.num_running:
        running.step()
    assert not stays.saw_nan.any()
    assert not comes.saw_nan.any()
    assert_as_alone(comes, STATES[1:2], lm_weight=0.3)


def test_when_a_model_cannot_start_those_that_run_go_on(monkeypatch) -> None:
    running = RunningSearches(StageClock())
    good = admitted(running, STATES[:2])
    running.step()
    lm = MODEL.language_models[0]
    for name in ("start", "admit"):  # the second fails after the acoustic model took the cohort in

        def fail(*args: object) -> None:
            raise MemoryError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(lm, name, fail)
            with pytest.raises(MemoryError):
                admitted(running, STATES[2:4])
        running.step()
    late = admitted(running, STATES[4:5])
    while running.num_running:
        running.step()
    assert running.is_empty
    assert_as_alone(good, STATES[:2])
    assert_as_alone(late, STATES[4:5])


def test_room_grows_in_few_steps_and_wastes_at_most_a_quarter() -> None:
    sizes = [roomy(count) for count in range(1, 3000)]
    assert all(count <= size <= max(count + 1, 1.25 * count) for count, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 45


@pytest.mark.parametrize(("model", "together"), [(MODEL, 12), (PACKED, 9)], ids=["padded", "packed"])
def test_rows_of_living_hypotheses_are_counted(model: FusionDecoder, together: int) -> None:
    clock = StageClock()
    running = RunningSearches(clock)
    admitted(running, STATES[:2], model, beam_size=4, min_new_tokens=9)
    running.step()
    assert clock.counts["row_steps"] == clock.counts["live_rows"] == 8
    admitted(running, STATES[2:3], model, beam_size=1, min_new_tokens=9)
    running.step()
    assert clock.counts["row_steps"] == 8 + together
    assert clock.counts["live_rows"] == 8 + 9


def test_a_mixture_of_language_models_takes_utterances_in() -> None:
    from shallowfusion import fusion
    from tests.tiny import tiny_lm

    decoder = FusionDecoder(MODEL.acoustic, [MODEL.language_models[0], tiny_lm(9)])
    options = DecodingOptions.of(**BASE, rule=fusion.mixture([0.5, 0.5], weight=0.4, forgetting=0.9), beam_size=3)
    with decoder.session(max_utterances=3) as session:
        futures = [session.submit(own, options) for own in STATES[:6]]
    for own, future in zip(STATES[:6], futures, strict=True):
        wanted = decoder.decode(own[None], options)[0]
        assert future.result().best.token_ids == wanted.best.token_ids
        assert future.result().best.total == pytest.approx(wanted.best.total, abs=1e-4)


def test_orders_of_places_stay_distinct_when_many_come_and_go() -> None:
    generator = np.random.default_rng(0)
    running = RunningSearches(StageClock())
    cohorts = []
    for i in range(12):
        options = {"beam_size": int(generator.integers(1, 4)), "max_new_tokens": int(generator.integers(1, 10))}
        encoded = STATES[i % 9 : i % 9 + 1 + i % 2]
        cohorts.append((admitted(running, encoded, **options), encoded, options))
        running.step()
        for batch in running._batches.values():
            places = sorted(int(p) for seat in batch.seats for p in seat.places)
            assert places == list(range(batch.size))
    while running.num_running:
        running.step()
    for cohort, encoded, options in cohorts:
        assert_as_alone(cohort, encoded, **options)


def test_shipped_models_hear_the_same_beside_other_beam_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    native = attention.frame_attention_native
    monkeypatch.setattr(
        attention, "frame_attention_native", lambda *a, **k: (asked.append(k["starts"] is not None), native(*a, **k))[1]
    )
    decoder = FusionDecoder.from_pretrained(ASR, MEDICAL, device="cpu")
    beams = (1, 5, 3)
    with decoder.session(max_utterances=3, encoder_batch=3) as session:
        futures = [session.submit(clip(i), beam_size=beam, lm_weight=0.4) for i, beam in enumerate(beams)]
    assert set(asked) == {True, False}  # rows laid end to end, and prompts
    assert session.statistics().efficiency > 0.9
    for i, (beam, future) in enumerate(zip(beams, futures, strict=True)):
        (wanted,) = decoder.transcribe([clip(i)], beam_size=beam, lm_weight=0.4)
        assert future.result().best.token_ids == wanted.best.token_ids
        assert future.result().best.total == pytest.approx(wanted.best.total, abs=1e-4)


def test_equal_beams_share_a_fused_step_beside_a_wider_one() -> None:
    clock = StageClock()
    running = RunningSearches(clock)
    cohorts = [(admitted(running, STATES[i : i + 1], beam_size=beam), i, beam) for i, beam in enumerate((2, 2, 4))]
    running.step()
    before = clock.counts["fused_steps"]
    running.step()
    assert clock.counts["fused_steps"] == before + 2
    while running.num_running:
        running.step()
    for cohort, i, beam in cohorts:
        assert_as_alone(cohort, STATES[i : i + 1], beam_size=beam)


def test_cohorts_share_a_fused_step_where_their_rows_lie_side_by_side() -> None:
    clock = StageClock()
    running = RunningSearches(clock)
    alike = {"beam_size": 3, "min_new_tokens": 9}
    first = admitted(running, STATES[:2], lm_weight=0.1, **alike)
    second = admitted(running, STATES[2:3], lm_weight=0.6, **alike)  # another weight is another number
    running.step()
    assert clock.counts["fused_steps"] == 1
    third = admitted(running, STATES[3:4], lm_weight=0.6, **alike)
    running.step()  # one row of its first step beside three of the others
    assert clock.counts["fused_steps"] == 1 + 2
    running.step()
    assert clock.counts["fused_steps"] == 3 + 1
    first.cancelled.add(0)
    running.step()
    before = clock.counts["fused_steps"]
    running.step()  # the last utterance moved to the place of the first, so the others are torn apart
    assert 1 <= clock.counts["fused_steps"] - before <= 3
    while running.num_running:
        running.step()
    assert_as_alone(second, STATES[2:3], lm_weight=0.6, **alike)
    assert_as_alone(third, STATES[3:4], lm_weight=0.6, **alike)
