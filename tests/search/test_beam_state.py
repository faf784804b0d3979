"""Cases worked out by hand from the three stop rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from shallowfusion.config import BeamSettings
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.search.beam_state import BeamStep

END = 0
INFINITY = float("inf")
NAN = float("nan")


def advance(state: Any, candidates: list[tuple[float, int, int]], utterance: int = 0) -> BeamStep:
    """One step of one utterance with candidates (total, parent, token); each part is 10 * rank."""
    totals, parents, tokens = zip(*candidates, strict=True)
    parts = np.arange(len(candidates), dtype=np.float32)[None, :, None] * 10
    return state.advance([utterance], [totals], [parents], [tokens], parts)


def lanes(step: BeamStep) -> list[tuple[float, int, int]]:
    """The live lanes as (total, parent, token)."""
    columns = zip(step.totals[0].tolist(), step.parents[0].tolist(), step.tokens[0].tolist(), strict=True)
    return [lane for lane in columns if lane[0] > -INFINITY]


def words(state: Any, utterance: int = 0) -> list[tuple[int, ...]]:
    return [hypothesis.token_ids for hypothesis in state.results(utterance, 100)]


def test_end_token_finishes_only_inside_the_first_lanes(state_class: type) -> None:
    state = state_class(BeamSettings(2, (END,), 9), 1, 1)
    step = advance(state, [(-1, 0, END), (-2, 0, 5), (-3, 0, END), (-4, 0, 6)])
    assert lanes(step) == [(-2, 0, 5), (-4, 0, 6)]
    assert state.num_finished(0) == 1
    assert not step.done[0]


def test_hf_pool_keeps_the_best_and_stops_when_nothing_can_improve(state_class: type) -> None:
    state = state_class(BeamSettings(2, (END,), 9), 1, 1)
    advance(state, [(-1, 0, END), (-2, 0, 5), (-2.5, 0, 6), (-4, 0, 7)])  # key -1
    step = advance(state, [(-3, 0, END), (-3.5, 1, 8), (-4, 0, 9), (-5, 0, END)])  # key -1.5
    assert state.num_finished(0) == 2
    assert step.done[0]  # best live -3.5 / 2 = -1.75
    assert not lanes(step)
    best, second = state.results(0, 5)
    assert (best.token_ids, best.total, best.key, best.ended, best.forced) == ((), -1, -1, True, False)
    assert (second.token_ids, second.total, second.key) == ((5,), -3, -1.5)
    assert second.token_totals.tolist() == [-2, -1]
    assert second.parts.tolist() == [[10], [0]]
    assert second.parts.dtype == second.token_totals.dtype == np.float32


@pytest.mark.parametrize(("early_stopping", "done"), [("heuristic", False), ("first", True), ("never", False)])
def test_hf_early_stopping(state_class: type, early_stopping: str, done: bool) -> None:
    state = state_class(BeamSettings(2, (END,), 9, early_stopping=early_stopping), 1, 1)
    advance(state, [(-1, 0, END), (-1.2, 0, 5), (-1.3, 0, 6), (-4, 0, 7)])
    advance(state, [(-1.3, 0, 8), (-1.4, 1, 8), (-5, 0, 9), (-6, 0, 4)])
    step = advance(state, [(-1.4, 0, 8), (-6, 1, END), (-6.5, 0, 4), (-7, 0, 3)])
    assert state.num_finished(0) == 2  # keys -1 and -2, best live -1.4 / 3
    assert step.done[0] == done


def test_hf_never_judges_by_the_longest_length(state_class: type) -> None:
    for early_stopping, done in (("heuristic", True), ("never", False)):
        state = state_class(BeamSettings(2, (END,), 9, early_stopping=early_stopping), 1, 1)
        advance(state, [(-1, 0, END), (-2, 0, 5), (-3, 0, 6), (-4, 0, 7)])
        step = advance(state, [(-3, 0, END), (-3.5, 1, 8), (-4, 0, 9), (-5, 0, 7)])
        assert step.done[0] == done  # -3.5 / 2 is below -1.5, -3.5 / 9 is above


def test_one_lane_is_greedy(state_class: type) -> None:
    for early_stopping in ("heuristic", "first", "never"):
        state = state_class(BeamSettings(1, (END,), 9, early_stopping=early_stopping), 1, 1)
        assert lanes(advance(state, [(-1, 0, 5), (-1.5, 0, END)])) == [(-1, 0, 5)]
        assert advance(state, [(-2, 0, END), (-2.1, 0, 5)]).done[0]
        assert words(state) == [(5,)]


def test_hypotheses_at_the_limit_are_forced_unless_they_end(state_class: type) -> None:
    state = state_class(BeamSettings(3, (END,), 2), 1, 1)
    advance(state, [(-1, 0, 4), (-2, 0, 5), (-3, 0, 6), (-4, 0, 7)])
    step = advance(state, [(-2, 0, 8), (-3, 0, END), (-4, 1, 9), (-5, 1, END)])
    assert step.done[0]
    found = [(result.token_ids, result.ended, result.forced) for result in state.results(0, 3)]
    assert found == [((4, 8), False, True), ((4,), True, False), ((5, 9), False, True)]


def test_every_end_id_ends(state_class: type) -> None:
    beam = BeamSettings(2, (7, END), 9)
    assert beam.num_candidates == 6
    state = state_class(beam, 1, 1)
    step = advance(state, [(-1, 0, 7), (-2, 0, END), (-3, 0, 5), (-4, 0, 7), (-5, 0, 6), (-6, 0, 4)])
    assert step.done[0]
    assert [result.ended for result in state.results(0, 9)] == [True, True]
    assert step.tokens.tolist() == [[7, 7]]  # dead lanes carry the first end id
    assert step.parents.tolist() == [[0, 0]]


def test_missing_candidates_leave_dead_lanes(state_class: type) -> None:
    state = state_class(BeamSettings(3, (END,), 9), 1, 1)
    step = advance(state, [(-1, 0, 4), (NAN, 0, 5), (-2, -1, 5), (-3, 0, 6), (-INFINITY, 77, -5), (INFINITY, 0, 3)])
    assert lanes(step) == [(-1, 0, 4), (-3, 0, 6)]
    assert step.totals[0, 2] == -INFINITY
    assert state.num_live(0) == 2
    with pytest.raises(InvalidArgumentError, match="live lanes"):
        advance(state, [(-4, 2, 5)])


@pytest.mark.parametrize("rule", ["hf", "whisper", "espnet"])
@pytest.mark.parametrize("flagged", [None, [True], [False]])
def test_without_a_possible_candidate_the_live_finish_by_force(state_class: type, rule: str, flagged: Any) -> None:
    state = state_class(BeamSettings(2, (END,), 9, stop_rule=rule), 1, 1)
    advance(state, [(-1, 0, 4), (-2, 0, 5)])
    step = state.advance([0], [[NAN, -INFINITY]], [[0, 0]], [[4, 4]], [[[0], [0]]], flagged)
    assert step.done[0]
    assert words(state) == [(4,), (5,)]
    assert all(result.forced and not result.ended for result in state.results(0, 2))


@pytest.mark.parametrize("rule", ["hf", "whisper", "espnet"])
def test_flag_alone_changes_nothing(state_class: type, rule: str) -> None:
    state = state_class(BeamSettings(2, (END,), 9, stop_rule=rule), 1, 1)
    step = state.advance([0], [[-1.0, -2.0]], [[0, 0]], [[4, 5]], [[[0], [0]]], flagged=[True])
    assert lanes(step) == [(-1, 0, 4), (-2, 0, 5)]


@pytest.mark.parametrize("rule", ["hf", "whisper", "espnet"])
def test_forced_before_the_first_step_gives_the_empty_hypothesis(state_class: type, rule: str) -> None:
    state = state_class(BeamSettings(2, (END,), 9, stop_rule=rule), 2, 3)
    state.force_finish(1)
    state.force_finish(1)
    (only,) = state.results(1, 5)
    assert (only.token_ids, only.total, only.key, only.ended, only.forced) == ((), 0, 0, False, True)
    assert only.parts.shape == (0, 3)
    assert only.token_totals.shape == (0,)
    assert not state.is_done(0)


def test_whisper_keeps_the_first_to_finish_up_to_patience(state_class: type) -> None:
    state = state_class(BeamSettings(2, (END,), 9, stop_rule="whisper", patience=1.5, length_penalty=None), 1, 1)
    step = advance(state, [(-1, 0, 4), (-2, 0, END), (-3, 0, 5), (-4, 0, END)])
    assert lanes(step) == [(-1, 0, 4), (-3, 0, 5)]
    assert state.num_finished(0) == 1  # the second end comes after two live ones
    step = advance(state, [(-1.5, 0, END), (-3.5, 1, END), (-3.6, 0, 6), (-3.7, 1, 6)])
    assert state.num_finished(0) == 3
    assert step.done[0]
    assert [result.key for result in state.results(0, 9)] == [-1.5, -2, -3.5]  # the empty one counts as one token
    assert words(state) == [(4,), (), (5,)]


def test_whisper_fills_up_with_live_ones_whose_end_is_not_scored(state_class: type) -> None:
    state = state_class(BeamSettings(3, (END,), 2, stop_rule="whisper", length_penalty=None), 1, 1)
    advance(state, [(-1, 0, 4), (-2, 0, 5), (-3, 0, 6)])
    step = advance(state, [(-2, 0, 7), (-2.5, 1, END), (-3, 0, 8), (-4, 1, 9)])
    assert step.done[0]
    found = [(result.token_ids, result.total, result.key, result.forced) for result in state.results(0, 9)]
    assert found == [((4, 7), -2, -1, True), ((4, 8), -3, -1.5, True), ((5,), -2.5, -2.5, False)]


def test_whisper_length_penalty_is_gnmt_over_words(state_class: type) -> None:
    state = state_class(BeamSettings(1, (END,), 9, stop_rule="whisper", length_penalty=0.6), 1, 1)
    advance(state, [(-1, 0, 4), (-2, 0, 5)])
    advance(state, [(-1.5, 0, 4), (-2, 0, 5)])
    advance(state, [(-3, 0, END), (-3.5, 0, 5)])
    (only,) = state.results(0, 1)
    assert only.key == pytest.approx(-3 / ((5 + 2) / 6) ** 0.6)
    assert only.token_totals.tolist() == [-1, -0.5, -1.5]


@pytest.mark.parametrize(("words", "divisor"), [(1, 1.000), (5, 1.359), (10, 1.733), (20, 2.354), (50, 3.779)])
def test_whisper_length_penalty_gives_the_worked_numbers(state_class: type, words: int, divisor: float) -> None:
    state = state_class(BeamSettings(1, (END,), 99, stop_rule="whisper", length_penalty=0.6), 1, 1)
    for count in range(1, words + 1):
        advance(state, [(-count, 0, 4), (-99, 0, 5)])
    advance(state, [(-60, 0, END), (-99, 0, 5)])
    (only,) = state.results(0, 1)
    assert only.key == pytest.approx(-60 / divisor, rel=4e-4)


def test_whisper_patience_that_rounds_to_nothing_is_refused(state_class: type) -> None:
    with pytest.raises(InvalidArgumentError, match="patience"):
        state_class(BeamSettings(1, (END,), 9, stop_rule="whisper", patience=0.5), 1, 1)
    state_class(BeamSettings(1, (END,), 9, stop_rule="hf", patience=0.5), 1, 1)


def test_espnet_lanes_get_fewer_as_hypotheses_end(state_class: type) -> None:
    state = state_class(BeamSettings(3, (END,), 9, stop_rule="espnet", length_penalty=0.0), 1, 1)
    step = advance(state, [(-1, 0, 4), (-2, 0, END), (-3, 0, 5), (-4, 0, 6)])
    assert lanes(step) == [(-1, 0, 4), (-3, 0, 5)]  # the fourth is outside the beam
    step = advance(state, [(-1.5, 0, END), (-3.5, 1, END), (-4, 0, END), (-5, 1, 9)])
    assert step.done[0]
    assert [result.total for result in state.results(0, 9)] == [-1.5, -2, -3.5, -4]


def test_espnet_stops_when_three_lengths_fell_behind(state_class: type) -> None:
    """The best ends with 1 token; those of 2, 3 and 4 tokens are 11 nats worse; ESPnet looks two tokens back."""
    state = state_class(BeamSettings(2, (END,), 50, stop_rule="espnet"), 1, 1)
    advance(state, [(-1, 0, END), (-2, 0, 5)])
    for length in range(2, 6):
        assert not advance(state, [(-3 - length, 0, 5), (-12, 0, END)]).done[0]
    assert advance(state, [(-9, 0, 5), (-12, 0, END)]).done[0]
    assert state.results(0, 1)[0].total == -1
    assert state.num_finished(0) == 6


def test_espnet_finishes_live_ones_at_the_limit(state_class: type) -> None:
    state = state_class(BeamSettings(2, (END,), 2, stop_rule="espnet", length_penalty=1.0), 1, 1)
    advance(state, [(-1, 0, 4), (-2, 0, 5)])
    assert advance(state, [(-2, 0, END), (-3, 0, 6)]).done[0]
    assert [(result.key, result.forced) for result in state.results(0, 9)] == [(-1, False), (-1.5, True)]


def test_recombination_of_equal_sequences(state_class: type) -> None:
    offered = [(-1.0, 0, 4), (-1.25, 0, 5), (-1.5, 0, 4), (-1.5, 0, 5), (-1.5, 0, 5), (-2.0, 0, 6)]
    expected = {
        "none": [(-1.0, 4), (-1.25, 5), (-1.5, 4)],
        "max": [(-1.0, 4), (-1.25, 5), (-2.0, 6)],
        "logsumexp": [(np.logaddexp.reduce([-1.25, -1.5, -1.5]), 5), (np.logaddexp(-1.0, -1.5), 4), (-2.0, 6)],
    }
    for recombination, wanted in expected.items():
        state = state_class(BeamSettings(3, (END,), 9, recombination=recombination), 1, 1)
        step = advance(state, offered)
        assert [token for _, _, token in lanes(step)] == [token for _, token in wanted]
        assert [total for total, _, _ in lanes(step)] == pytest.approx([total for total, _ in wanted])
        state.force_finish(0)
        parts = [result.parts.item() for result in state.results(0, 3)]
        assert parts == ([10, 0, 50] if recombination == "logsumexp" else parts)  # the better one's own


def test_recombined_ends_finish_once(state_class: type) -> None:
    state = state_class(BeamSettings(2, (END,), 9, recombination="logsumexp", length_penalty=0.0), 1, 1)
    step = advance(state, [(-1, 0, 5), (-2, 0, END), (-2, 0, END), (-3, 0, 6)])
    assert lanes(step) == [(-1, 0, 5), (-3, 0, 6)]
    assert state.num_finished(0) == 1
    state.force_finish(0)
    assert state.results(0, 9)[1].total == pytest.approx(-2 + np.log(2))


def test_ties_go_to_the_earlier(state_class: type) -> None:
    for rule in ("hf", "whisper", "espnet"):
        state = state_class(BeamSettings(2, (END, 1), 2, stop_rule=rule, length_penalty=0.0), 1, 1)
        assert lanes(advance(state, [(-1, 0, 9), (-1, 0, 3), (-1, 0, 6)])) == [(-1, 0, 9), (-1, 0, 3)]
        advance(state, [(-2, 1, END), (-2, 0, 1), (-2, 0, 4), (-2, 1, 4)])
        assert words(state)[:2] == [(3,), (9,)]


def test_nodes_of_dead_branches_are_freed(state_class: type) -> None:
    state = state_class(BeamSettings(2, (END,), 9), 2, 1)
    assert state.num_nodes == 0
    advance(state, [(-1, 0, 4), (-2, 0, 5)])
    advance(state, [(-1, 0, 4), (-2, 0, 5)], utterance=1)
    assert state.num_nodes == 4
    advance(state, [(-3, 1, 6), (-4, 1, 7)])  # lane 0's branch dies
    assert state.num_nodes == 5
    state.release(0)
    assert state.num_nodes == 2
    state.force_finish(1)
    assert state.num_nodes == 2
    state.release(1)
    assert state.num_nodes == 0
