"""The device-driven step against its twin and the C++ beam state: on the GPU where there is one, else interpreted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion.config import BeamSettings
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.kernels.beam_advance_arrays import RING_ENTRIES, AdvanceTables
from shallowfusion.kernels.beam_advance_reference import beam_advance_reference
from shallowfusion.values import Candidates
from tests.kernels.advance_cases import END, Trio

RULES = ["hf", "whisper", "espnet"]
EARLY = ["heuristic", "first", "never"]


@pytest.mark.parametrize("beam_size", range(1, 11))
@pytest.mark.parametrize("rule", RULES)
def test_kernel_twin_and_beam_state_decide_alike(rule: str, beam_size: int) -> None:
    early = EARLY[beam_size % 3]
    steps = Trio(BeamSettings(beam_size, (END,), 9, rule, early_stopping=early), 2, seed=beam_size).run()
    assert steps >= 1


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=12)
@given(
    st.sampled_from([2, 1, 5, 8]),
    st.sampled_from([(END,), (), (END, 6)]),
    st.integers(1, 14),
    st.sampled_from([-1.5, 0.0, 0.6, 1.0, 2.0, 400.0, -400.0]),
    st.sampled_from(EARLY),
    st.sampled_from([0.7, 1.0, 2.5, 1e300]),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_every_setting_decides_alike(
    rule: str, beam_size: int, ends: tuple[int, ...], longest: int, penalty: float, early: str, patience: float,
    coarse: bool, seed: int,
) -> None:  # fmt: skip
    if rule == "whisper" and round(beam_size * patience) < 1:
        patience = 1.0
    chosen = BeamSettings(beam_size, ends, longest, rule, penalty, early, patience)
    Trio(chosen, 3, seed, coarse).run()


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=300)
@given(st.data(), st.integers(0, 2**16))
def test_the_twin_decides_as_the_beam_state_in_many_searches(rule: str, data: st.DataObject, seed: int) -> None:
    chosen = BeamSettings(
        data.draw(st.integers(1, 10)),
        data.draw(st.sampled_from([(END,), (), (END, 6)])),
        data.draw(st.integers(1, 30)),
        rule,
        data.draw(st.sampled_from([-1.5, 0.0, 0.6, 1.0, 2.0, 400.0, -400.0])),
        data.draw(st.sampled_from(EARLY)),
        data.draw(st.sampled_from([1.0, 1.5, 2.5, 1e300])),
    )
    trio = Trio(chosen, 3, seed, data.draw(st.booleans()))
    trio.run(beam_advance_reference)


def test_many_end_tokens_spread_over_lanes_wider_than_a_warp() -> None:
    Trio(BeamSettings(32, (END, 4, 6), 6, "hf"), 1, seed=4, coarse=True).run()


@pytest.mark.parametrize(("best", "total", "stops"), [(1e-7, -10.0, True), (0.0, -10.0, False), (-1e-7, -10.0, False)])
def test_espnet_margin_is_exact_where_float32_rounds(best: float, total: float, stops: bool) -> None:
    """-10 - 1e-7 rounds to the margin itself; the exact sign decides, as in the beam state's doubles."""
    trio = Trio(BeamSettings(2, (END,), 30, "espnet"), 1, seed=0)
    for length in range(1, 7):
        assert trio.step is None or not trio.step.done.any()
        totals = [best, best] if length == 1 else [best, total if length < 5 else -20.0]
        trio.advance(candidates=plain(totals, [1, END]))
    assert trio.step is not None
    assert bool(trio.step.done[0]) == stops


def plain(totals: list[float], tokens: list[int]) -> Candidates:
    """Candidates of one utterance whose lane 0 alone goes on, filled up with impossible ones."""
    missing = 4 - len(totals)
    return Candidates(
        totals=torch.tensor([[*totals, *[float("-inf")] * missing]]),
        parent_rows=torch.tensor([[0] * len(totals) + [-1] * missing]),
        token_ids=torch.tensor([[*tokens, *[-1] * missing]]),
        parts=torch.zeros((1, 4, 2)),
        flags=torch.zeros(2, dtype=torch.bool),
    )


def test_the_ring_goes_round_and_done_utterances_leave_a_mark() -> None:
    trio = Trio(BeamSettings(2, (), RING_ENTRIES + 6, "whisper"), 2, seed=1)
    trio.ours.done[1] = trio.reference.done[1] = 1
    for _ in range(RING_ENTRIES + 2):
        if bool(trio.reference.done[0]):
            break
        trio.advance()
    ring = trio.ours.ring.cpu()
    last = int(trio.ours.clocks[0]) - 1
    assert ring[last % RING_ENTRIES, 0, 0] == last
    assert ring[last % RING_ENTRIES, 1, :2].tolist() == [last, 2]


def test_early_masks_are_lifted_step_by_step() -> None:
    trio = Trio(BeamSettings(3, (), 9, "whisper"), 1, seed=2)
    seen = []
    for _ in range(3):
        trio.advance()
        both = (trio.ours.place_masks[0], *trio.ours.masks)
        seen.append(
            [{bool(words[token // 32] >> token % 32 & 1) for words in both} for token in (5, 7, 31, 35, END, 9)]
        )
    yes, no = {True}, {False}
    assert seen == [[yes, no, no, no, no, no], [yes, yes, yes, yes, no, no], [yes, yes, yes, yes, yes, no]]


def drawn(rule: str, beam_size: int, generator: np.random.Generator) -> BeamSettings:
    """Numbers of a search that may share a step with all others of that rule and beam."""
    return BeamSettings(
        beam_size,
        (END,),
        int(generator.integers(1, 10)),
        rule,
        float(generator.choice([0.0, 0.6, 1.0, -1.5])),
        str(generator.choice(["heuristic", "never"])),
        float(generator.choice([1.0, 1.5, 2.5])),
    )


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_searches_start_at_any_time_each_with_its_own_numbers(rule: str, seed: int) -> None:
    """Kernel, twin and one beam state per place; whoever starts changes nothing for the others."""
    generator, places, beam_size = np.random.default_rng(seed), 3, 3
    trio = Trio(BeamSettings(beam_size, (END,), 9, rule), places, seed, longest=12)
    trio.stop(range(places))
    for _ in range(45):
        idle = [place for place in range(places) if not trio.is_running(place)]
        starting = [place for place in idle if generator.random() < 0.5]
        if starting:
            trio.start(starting, drawn(rule, beam_size, generator))
        if generator.random() < 0.1:
            trio.stop([int(generator.integers(places))])
        trio.advance()
    assert trio.num_started > 10
    assert int(trio.reference.ticks[0]) == 45


def test_what_it_cannot_do_is_refused() -> None:
    weights = torch.ones((10, 1))
    for wrong, word in (
        (BeamSettings(33, (END,), 9), "beam_size"),
        (BeamSettings(2, (END,), 9, recombination="max"), "recombine"),
        (BeamSettings(2, (END,), 2**20), "max_new_tokens"),
    ):
        with pytest.raises(InvalidArgumentError, match=word):
            AdvanceTables.make(wrong, weights)
