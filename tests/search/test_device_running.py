"""Utterances that enter and leave programs of the device between two steps: each as if alone, others untouched."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion import DecodingOptions, FusionDecoder, fusion
from shallowfusion.errors import DivergenceError
from shallowfusion.kernels.beam_advance_arrays import RING_ENTRIES
from shallowfusion.scorers.attention import set_slot_attention
from shallowfusion.search.device_program import LAG, Program
from shallowfusion.search.device_running import DeviceCohort, DeviceSearches
from shallowfusion.search.loop import StageClock, search
from shallowfusion.search.sources import Sources
from tests.kernels.advance_cases import DEVICE
from tests.tiny import DEVICES, decoder_on, random_encoder_output, tiny_lm, tiny_whisper

BASE: dict[str, Any] = {
    "suppress_blank": False, "suppress_tokens": None, "max_new_tokens": 12, "beam_size": 3, "lm_weight": 0.3,
}  # fmt: skip
ASKED: list[dict[str, Any]] = [
    {},
    {"lm_weight": 0.6, "max_new_tokens": 5, "length_bonus": 0.3},
    {"min_new_tokens": 6, "suppress_tokens": (3, 7, 33), "length_penalty": 0.0},
    {"rule": fusion.piecewise(0.5, initial_steps=2, ramp=2), "min_new_tokens": 3},
    {"max_new_tokens": 1},
    {"max_new_tokens": 30, "min_new_tokens": 25, "early_stopping": "never"},
    {"beam_size": 2, "stop_rule": "whisper", "patience": 1.5},
    {"suppress_blank": True, "lm_prompt": "a domain of more than sixteen tokens"},
]


def sources(model: FusionDecoder, utterances: int, seed: int, **options: Any) -> Sources:
    chosen = {**BASE, **options}
    if "rule" in chosen:
        del chosen["lm_weight"]
    states = random_encoder_output(model.acoustic, utterances, seed).to(model.acoustic.scorer.device)
    return model.sources(states, DecodingOptions(**chosen))


def admitted(running: DeviceSearches, own: Sources) -> DeviceCohort:
    assert running.refusal(own.scorers, own.contexts, own.plan, own.late) is None
    return running.admit(own.scorers, own.contexts, own.plan)


def assert_as_alone(cohort: DeviceCohort, own: Sources, utterance: int = 0) -> None:
    found = cohort.beams.results(utterance, own.plan.settings.beam_size)
    outcomes = search(own.scorers, own.contexts, own.names, own.plan, StageClock(), own.late)
    wanted = outcomes[utterance].hypotheses
    assert [h.token_ids for h in found] == [h.token_ids for h in wanted]
    for mine, other in zip(found, wanted, strict=True):
        assert mine.total == pytest.approx(other.total, abs=1e-4)
        assert (mine.ended, mine.forced) == (other.ended, other.forced)


def run_out(running: DeviceSearches, most: int = 200) -> None:
    for _ in range(most):
        if running.is_empty:
            return
        running.step()
    raise AssertionError("searches must end")


@pytest.fixture(scope="module")
def model() -> FusionDecoder:
    return FusionDecoder(tiny_whisper(1), [tiny_lm(2)])


def hear_late(patch: pytest.MonkeyPatch) -> None:
    """Let the host hear of every step as late as it may, as beside a device that is busy."""
    entries = Program.entries

    def late(self: Program, behind: int) -> Iterator[Any]:
        run, self.num_run = self.num_run, max(self._sent, self.num_run - behind)
        found = list(entries(self, 0))
        self.num_run = run
        yield from found

    patch.setattr(Program, "entries", late)


events = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), st.integers(0, len(ASKED) - 1), st.integers(1, 2)),
        st.tuples(st.just("step"), st.integers(1, 4), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 20), st.integers(0, 1)),
    ),
    min_size=4,
    max_size=16,
)


@pytest.mark.parametrize("is_late", [False, True], ids=["at once", "late"])
@settings(max_examples=12)
@given(events, st.integers(0, 2**16))
def test_random_arrivals_and_cancellations_are_those_of_one_by_one(
    model: FusionDecoder, is_late: bool, happened: list[tuple[str, int, int]], seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if is_late:
            hear_late(patch)
        running, gone = DeviceSearches(StageClock(), 4), set()
        cohorts: list[tuple[DeviceCohort, Sources]] = []
        for what, number, other in happened:
            if what == "enter" and running.num_running + other <= 4:
                own = sources(model, other, seed + len(cohorts), **ASKED[number])
                if running.refusal(own.scorers, own.contexts, own.plan, own.late) is None:
                    cohorts.append((running.admit(own.scorers, own.contexts, own.plan), own))
            elif what == "cancel" and cohorts:
                cohort, own = cohorts[number % len(cohorts)]
                utterance = other % len(cohort.places)
                if utterance in cohort.active:
                    cohort.cancelled.add(utterance)
                    gone.add((id(cohort), utterance))
            else:
                for _ in range(number if what == "step" else 0):
                    running.step()
        run_out(running)
        for cohort, own in cohorts:
            for utterance in range(len(cohort.places)):
                if (id(cohort), utterance) not in gone:
                    assert_as_alone(cohort, own, utterance)
        for placed in running._programs:
            assert sorted(placed.free) == list(range(placed.rooms.places))
            assert bool(placed.program.step.arrays.done.all())


def memory(running: DeviceSearches) -> dict[str, torch.Tensor]:
    """Everything a captured step of the only program has by address, by place first where it is by place."""
    (placed,) = running._programs
    step, found = placed.program.step, {}
    for name, record in (("arrays", step.arrays), ("tables", step.tables), *zip("ab", step.slots, strict=True)):
        for own in dataclasses.fields(record):
            if isinstance(tensor := getattr(record, own.name), torch.Tensor):
                found[f"{name} {own.name}"] = tensor
    for number, decoder in enumerate(step.decoders):
        found[f"logits {number}"] = decoder.logits
        for place, layer in enumerate([*decoder._own.layers, *decoder._crossing]):
            found |= {f"keys {number} {place}": layer.keys, f"values {number} {place}": layer.values}
    for name in ("arrays totals", "arrays weights", "arrays masks", "logits 0", "logits 1"):
        found[name] = found[name].view(placed.rooms.places, -1, *found[name].shape[1:])
    shared = ("arrays ring", "tables end_ids", "a lanes", "b lanes")
    return {name: tensor for name, tensor in found.items() if name not in shared}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attention", ["sdpa", "reference", pytest.param("triton", marks=pytest.mark.gpu)])
def test_who_enters_moves_nothing_and_touches_no_other_place(device: str, attention: Any) -> None:
    if device == "cpu" and attention == "triton":
        pytest.skip("interpreted elsewhere")
    model = decoder_on(device)
    if attention != "sdpa":
        for scorer in (model.acoustic.scorer, *model.language_models):
            set_slot_attention(scorer.model, attention)
    running = DeviceSearches(StageClock(), 4)
    first = sources(model, 2, 1, min_new_tokens=9)
    cohort = admitted(running, first)
    for _ in range(4):
        running.step()
    before = memory(running)
    kept = {name: tensor.clone() for name, tensor in before.items()}
    assert len(before) >= 40
    second = sources(model, 1, 2, min_new_tokens=3, suppress_tokens=(4,))
    newcomer = admitted(running, second)
    assert newcomer.places == [2]
    after = memory(running)
    for name, tensor in after.items():
        assert tensor.data_ptr() == before[name].data_ptr(), name
        for place in (0, 1, 3):
            assert torch.equal(tensor[place], kept[name][place]), name
    run_out(running)
    for own, search_of, count in ((cohort, first, 2), (newcomer, second, 1)):
        for utterance in range(count):
            assert_as_alone(own, search_of, utterance)


@pytest.mark.parametrize("is_late", [False, True], ids=["at once", "late"])
def test_the_ring_goes_round_while_utterances_come_and_go(monkeypatch: pytest.MonkeyPatch, is_late: bool) -> None:
    if is_late:
        hear_late(monkeypatch)
    model = FusionDecoder(tiny_whisper(1, positions=128), [tiny_lm(2, positions=128)])
    running = DeviceSearches(clock := StageClock(), 3)
    long = sources(model, 1, 0, min_new_tokens=RING_ENTRIES + 10, max_new_tokens=RING_ENTRIES + 16, beam_size=2)
    cohort, others = admitted(running, long), []
    while cohort.active:
        if running.num_running < 3 and clock.counts["device steps"] % 5 == 0:
            own = sources(model, 1, 1 + len(others), beam_size=2, max_new_tokens=4 + len(others) % 5)
            others.append((admitted(running, own), own))
        running.step()
    run_out(running)
    assert clock.counts["device steps"] > RING_ENTRIES
    assert len(others) >= 6
    assert len({tuple(own.places) for own, _ in others}) <= 3  # places are used again
    for own, alone in [(cohort, long), *others]:
        assert_as_alone(own, alone)


def test_late_hosts_run_no_more_steps_than_a_search_may_take(monkeypatch: pytest.MonkeyPatch, model) -> None:
    hear_late(monkeypatch)
    running = DeviceSearches(clock := StageClock(), 2)
    own = sources(model, 1, 3, min_new_tokens=7, max_new_tokens=7)
    cohort = admitted(running, own)
    run_out(running)
    assert clock.counts["device steps"] == 7
    assert cohort.num_steps(0) == 7
    early = sources(model, 1, 3, max_new_tokens=12)
    cohort = admitted(running, early)
    run_out(running)
    assert clock.counts["device steps"] <= 7 + cohort.num_steps(0) + LAG
    assert_as_alone(cohort, early)


def test_nan_ends_one_utterance_and_who_takes_its_place_sees_nothing_of_it(model) -> None:
    running = DeviceSearches(StageClock(), 2)
    bad = sources(model, 1, 4)
    bad.contexts[0].encoder_output.fill_(float("nan"))
    good = sources(model, 1, 5, min_new_tokens=8)
    broken, sound = admitted(running, bad), admitted(running, good)
    while broken.active:
        running.step()
    assert bool(broken.saw_nan[0])
    after = sources(model, 1, 6)
    follower = admitted(running, after)
    assert follower.places == broken.places or sound.active == []
    run_out(running)
    assert not sound.saw_nan.any()
    assert not follower.saw_nan.any()
    assert_as_alone(sound, good)
    assert_as_alone(follower, after)


def test_a_device_that_decides_otherwise_ends_its_program_alone(model) -> None:
    running = DeviceSearches(StageClock(), 4)
    first, second = sources(model, 2, 1, min_new_tokens=8), sources(model, 1, 2, beam_size=2, min_new_tokens=8)
    broken, sound = admitted(running, first), admitted(running, second)
    running.step()
    with torch.inference_mode():
        running._programs[0].program.step.arrays.hashes[1] += 1
    assert broken in running.step()
    assert isinstance(broken.error, DivergenceError)
    assert len(running._programs) == 1
    run_out(running)
    assert sound.error is None
    assert_as_alone(sound, second)
    again = admitted(running, first)
    run_out(running)
    assert_as_alone(again, first, 1)


def test_a_model_that_fails_as_utterances_enter_changes_nothing_for_others(monkeypatch, model) -> None:
    running = DeviceSearches(StageClock(), 4)
    own = sources(model, 1, 1, min_new_tokens=8)
    cohort = admitted(running, own)
    running.step()

    def broken(hidden: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no head")

    with monkeypatch.context() as patch:
        patch.setattr(model.language_models[0], "head", broken)
        with pytest.raises(RuntimeError, match="no head"):
            admitted(running, sources(model, 2, 2))
        with pytest.raises(RuntimeError, match="no head"):
            admitted(running, sources(model, 1, 2, beam_size=5))  # a program of its own, which is not kept
    assert len(running._programs) == 1
    assert len(running._programs[0].free) == 3
    run_out(running)
    assert_as_alone(cohort, own)


def test_numbers_share_a_program_that_has_room_and_idle_ones_make_room(model) -> None:
    running = DeviceSearches(StageClock(), 3, most=2)
    roomy = sources(model, 1, 1, max_new_tokens=40, lm_prompt="a domain of more than sixteen tokens")
    admitted(running, roomy)
    small = sources(model, 2, 2, lm_weight=0.1)
    admitted(running, small)
    assert len(running._programs) == 1  # less room is wanted than there is
    assert running._programs[0].rooms.places == 4
    longer = sources(model, 1, 1, max_new_tokens=60)
    assert running.refusal(longer.scorers, longer.contexts, longer.plan) is None
    admitted(running, longer)
    wider = sources(model, 1, 1, beam_size=5)
    reason = running.refusal(wider.scorers, wider.contexts, wider.plan)
    assert reason == "searches run in 2 programs, and this one fits none of them"
    run_out(running)
    assert running.busy_bytes == 0
    assert running.num_bytes > 0
    admitted(running, wider)
    assert len(running._programs) == 2
    assert running.busy_bytes == running._programs[-1].program.step.num_bytes
    run_out(running)
    running.shrink(running._programs[-1].program.step.num_bytes)
    assert len(running._programs) == 1
    running.shrink(0)
    assert running.num_bytes == 0


def test_what_memory_does_not_bear_is_refused(model) -> None:
    free = [1e12]
    running = DeviceSearches(StageClock(), 3, free=lambda device: free[0])
    own = sources(model, 1, 1)
    assert "memory_budget leaves 1,000" in str(running.refusal(own.scorers, own.contexts, own.plan, (), 1000))
    admitted(running, own)
    assert running.refusal(own.scorers, own.contexts, own.plan, (), 1000) is None  # it is there already
    free[0] = 0.0
    other = sources(model, 1, 1, beam_size=4)
    assert "GB free" in str(running.refusal(other.scorers, other.contexts, other.plan))
    gated = sources(model, 1, 1, rule=fusion.entropy_gate(0.3))
    assert "gate" in str(running.refusal(gated.scorers, gated.contexts, gated.plan, gated.late))


@pytest.mark.slow
@pytest.mark.parametrize("stop_rule", ["hf", "whisper", "espnet"])
def test_kernels_alone_let_utterances_enter_and_leave(stop_rule: str) -> None:
    """K1, K2, K3 and the slots, in Triton's interpreter where there is no GPU."""
    model = decoder_on(str(DEVICE))
    running, asked = DeviceSearches(StageClock(), 2), []
    penalty = None if stop_rule == "whisper" else 1.0
    for number, options in enumerate(({"max_new_tokens": 3}, {"min_new_tokens": 3}, {"suppress_tokens": (3, 35)})):
        chosen = {"max_new_tokens": 5, **options, "beam_size": 2, "stop_rule": stop_rule, "length_penalty": penalty}
        own = sources(model, 1, number, **chosen)
        plan = dataclasses.replace(own.plan, backend="triton")
        while running.num_running == 2:
            running.step()
        asked.append((running.admit(own.scorers, own.contexts, plan), own))
        running.step()
    run_out(running)
    assert len(running._programs) == 1
    for cohort, own in asked:
        assert_as_alone(cohort, own)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "triton"])
def test_on_cuda_utterances_enter_and_leave_one_captured_graph(attention: Any) -> None:
    model = decoder_on("cuda")
    for scorer in (model.acoustic.scorer, *model.language_models):
        set_slot_attention(scorer.model, attention)
    running, cohorts = DeviceSearches(StageClock(), 4), []
    graphs = set()
    for number in range(12):
        options = ASKED[number % 4]
        own = sources(model, 1, number, **options)
        while running.num_running == 4:
            running.step()
        cohorts.append((admitted(running, own), own))
        running.step()
        graphs |= {id(placed.program._graph) for placed in running._programs}
        assert all(placed.program.is_captured for placed in running._programs)
    run_out(running)
    assert len(graphs) == 1
    for cohort, own in cohorts:
        assert_as_alone(cohort, own)


@pytest.mark.gpu
def test_on_cuda_steps_allocate_nothing_after_somebody_entered() -> None:
    model = decoder_on("cuda")
    running = DeviceSearches(StageClock(), 4)
    admitted(running, sources(model, 2, 1, min_new_tokens=11))
    running.step()
    admitted(running, sources(model, 1, 2, min_new_tokens=11, suppress_tokens=(4,)))
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(4):
        running.step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    run_out(running)
