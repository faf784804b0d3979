"""Twins agree on random searches, nothing leaks, and a beam as wide as the space is exhaustive search."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion.config import BeamSettings
from shallowfusion.search.beam_state import BeamState, BeamStep, FinishedHypothesis
from shallowfusion.search.beam_state_reference import ReferenceBeamState

END = 0
Prefix = tuple[int, ...]
Table = Callable[[int, Prefix], npt.NDArray[np.float32]]


def random_table(seed: int, vocab: int, coarse: bool, spread: float = 3.0) -> Table:
    """Log-probs [vocab] that depend on the whole prefix; coarse ones are quarters, so that many tie."""

    def log_probs(utterance: int, prefix: Prefix) -> npt.NDArray[np.float32]:
        generator = np.random.default_rng([seed, utterance, zlib.crc32(repr(prefix).encode())])
        scores = generator.normal(size=vocab) * spread
        scores -= np.log(np.exp(scores).sum())
        return (np.round(scores * 4) / 4 if coarse else scores).astype(np.float32)

    return log_probs


@dataclass
class Lanes:
    """What a search loop knows of one utterance: the prefix and total of each live lane."""

    prefixes: list[Prefix] = field(default_factory=lambda: [()])
    totals: list[np.float32] = field(default_factory=lambda: [np.float32(0)])

    def follow(self, step: BeamStep, row: int) -> None:
        live = np.flatnonzero(np.isfinite(step.totals[row]))
        assert live.tolist() == list(range(len(live)))
        pairs = [(int(step.parents[row, lane]), int(step.tokens[row, lane])) for lane in live]
        self.prefixes = [(*self.prefixes[parent], token) for parent, token in pairs]
        self.totals = [step.totals[row, lane] for lane in live]


def candidates_of(
    lanes: Lanes, table: Table, utterance: int, count: int
) -> list[tuple[np.float32, int, int, np.float32]]:
    """The best `count` continuations as (total, parent, token, part), ties to the lowest lane and token."""
    found = [
        (np.float32(total + log_prob), lane, token, log_prob)
        for lane, (prefix, total) in enumerate(zip(lanes.prefixes, lanes.totals, strict=True))
        for token, log_prob in enumerate(table(utterance, prefix))
    ]
    return sorted(found, key=lambda candidate: (-candidate[0], candidate[1], candidate[2]))[:count]


def pack(rows: list[list[tuple[np.float32, int, int, np.float32]]], count: int) -> tuple[npt.NDArray[Any], ...]:
    """Candidates as the arrays of `advance`, -inf and -1 where there are fewer than `count`."""
    impossible = (np.float32(-np.inf), -1, -1, np.float32(0))
    padded = [[*row, *[impossible] * (count - len(row))] for row in rows]
    totals, parents, tokens, parts = (
        np.array([[candidate[column] for candidate in row] for row in padded]).reshape(len(rows), count)
        for column in range(4)
    )
    return totals.astype(np.float32), parents.astype(np.int64), tokens.astype(np.int64), parts[:, :, None]


def run(state: Any, beam: BeamSettings, table: Table, utterances: int) -> list[list[FinishedHypothesis]]:
    """A whole search; all finished hypotheses of each utterance."""
    lanes = {utterance: Lanes() for utterance in range(utterances)}
    while lanes:
        active = list(lanes)
        rows = [candidates_of(lanes[utterance], table, utterance, beam.num_candidates) for utterance in active]
        step = state.advance(active, *pack(rows, beam.num_candidates))
        for row, utterance in enumerate(active):
            lanes[utterance].follow(step, row)
            if step.done[row]:
                del lanes[utterance]
    return [state.results(utterance, 10**6) for utterance in range(utterances)]


def assert_equal_results(ours: list[FinishedHypothesis], theirs: list[FinishedHypothesis]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for name in ("token_ids", "total", "key", "ended", "forced"):
            assert getattr(one, name) == getattr(other, name), name
            assert type(getattr(one, name)) is type(getattr(other, name)), name
        for name in ("token_totals", "parts"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), strict=True)


def assert_consistent(hypothesis: FinishedHypothesis) -> None:
    assert len(hypothesis.token_totals) == len(hypothesis.parts) == len(hypothesis.token_ids) + hypothesis.ended
    assert hypothesis.token_totals.sum(dtype=np.float64) == pytest.approx(hypothesis.total, rel=1e-5, abs=1e-4)
    assert hypothesis.forced != hypothesis.ended


def beam_settings(rule: str) -> st.SearchStrategy[BeamSettings]:
    penalties: list[float | None] = [-1.5, -0.5, 0.0, 0.6, 1.0, 2.0, 400.0, -400.0]
    return st.builds(
        BeamSettings,
        beam_size=st.sampled_from([2, 1, 3, 5, 8]),
        end_ids=st.sampled_from([(END,), (), (END, 3), (2, END)]),
        max_new_tokens=st.integers(1, 16),
        stop_rule=st.just(rule),
        length_penalty=st.sampled_from([None, *penalties] if rule == "whisper" else penalties),
        early_stopping=st.sampled_from(["heuristic", "first", "never"]),
        patience=st.sampled_from([0.7, 1.0, 1.5, 2.5, 1e300]),
        recombination=st.sampled_from(["none", "max", "logsumexp"]),
    )


def spoil(generator: np.random.Generator, totals: npt.NDArray[Any], parents: npt.NDArray[Any]) -> None:
    """Make some candidates impossible in the ways a step may."""
    totals[generator.random(totals.shape) < 0.2] = generator.choice([np.nan, -np.inf, np.inf])
    parents[generator.random(totals.shape) < 0.1] = -1


def advance_twins(twins: tuple[Any, Any], active: list[int], arrays: tuple[npt.NDArray[Any], ...]) -> BeamStep:
    steps = [state.advance(active, *arrays) for state in twins]
    for name in ("tokens", "parents", "totals", "done"):
        np.testing.assert_array_equal(*(getattr(step, name) for step in steps), strict=True)
    assert twins[0].num_nodes == twins[1].num_nodes
    for utterance in active:
        for name in ("is_done", "num_live", "num_finished"):
            assert getattr(twins[0], name)(utterance) == getattr(twins[1], name)(utterance)
    return steps[0]


@pytest.mark.parametrize("rule", ["hf", "whisper", "espnet"])
@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from([5, 9, 2, 1]), st.integers(0, 2**16), st.booleans(), st.booleans(), st.booleans())
def test_twins_agree_step_by_step(
    rule: str, data: st.DataObject, vocab: int, seed: int, coarse: bool, spoilt: bool, repeated: bool
) -> None:
    """Random tables; impossible, NaN and repeated candidates; utterances stopped or released midway."""
    beam = data.draw(beam_settings(rule))
    twins = (BeamState(beam, 3, 1), ReferenceBeamState(beam, 3, 1))
    generator = np.random.default_rng(seed)
    table = random_table(seed, vocab, coarse)
    lanes = {utterance: Lanes() for utterance in range(3)}
    kept, count = set(lanes), beam.num_candidates
    while lanes:
        active = [int(utterance) for utterance in generator.permutation(list(lanes))]
        rows = [candidates_of(lanes[utterance], table, utterance, count) for utterance in active]
        if repeated:
            rows = [sorted(row + row[::2], key=lambda candidate: -candidate[0])[:count] for row in rows]
        arrays = pack(rows, count)
        if spoilt:
            spoil(generator, *arrays[:2])
        step = advance_twins(twins, active, arrays)
        for row, utterance in enumerate(active):
            lanes[utterance].follow(step, row)
            if beam.recombination != "none":
                assert len(set(lanes[utterance].prefixes)) == len(lanes[utterance].prefixes)
            fate = generator.random()
            for state in twins:
                if fate < 0.04:
                    state.force_finish(utterance)
                elif fate > 0.96:
                    state.release(utterance)
            if fate > 0.96:
                kept.remove(utterance)
            if step.done[row] or fate < 0.04 or fate > 0.96:
                del lanes[utterance]
    for utterance in kept:
        ours, theirs = (state.results(utterance, 10**6) for state in twins)
        assert_equal_results(ours, theirs)
        for hypothesis in ours:
            assert_consistent(hypothesis)
        for state in twins:
            state.release(utterance)
    assert twins[0].num_nodes == twins[1].num_nodes == 0


def every_hypothesis(table: Table, vocab: int, max_new_tokens: int) -> dict[tuple[Prefix, bool], tuple[float, int]]:
    """(words, ended) -> (total, tokens counted) of every hypothesis of up to `max_new_tokens` tokens."""
    found = {}
    for length in range(max_new_tokens + 1):
        for words in itertools.product(range(1, vocab), repeat=length):
            total = sum(float(table(0, words[:at])[word]) for at, word in enumerate(words))
            if length < max_new_tokens:
                found[words, True] = (total + float(table(0, words)[END]), length + 1)
            else:
                found[words, False] = (total, length)
    return found


def exhaustive(beam: BeamSettings, table: Table) -> list[tuple[float, Prefix, bool]]:
    """Every hypothesis with its key, best first, straight from the formula of the stop rule."""
    ranked = []
    for (words, ended), (total, length) in every_hypothesis(table, 4, beam.max_new_tokens).items():
        if beam.stop_rule != "whisper":
            key = total / length**beam.length_penalty
        elif beam.length_penalty is None:
            key = total / max(1, len(words))
        else:
            key = total / ((5 + len(words)) / 6) ** beam.length_penalty
        ranked.append((key, words, ended))
    return sorted(ranked, reverse=True)


WIDE_BEAMS = [
    BeamSettings(150, (END,), 4, stop_rule="hf", early_stopping="never", length_penalty=0.0),
    BeamSettings(150, (END,), 4, stop_rule="hf", early_stopping="never", length_penalty=1.0),
    BeamSettings(150, (END,), 4, stop_rule="whisper", length_penalty=None),
    BeamSettings(150, (END,), 4, stop_rule="whisper", length_penalty=0.8, recombination="logsumexp"),
    BeamSettings(150, (END,), 4, stop_rule="espnet", length_penalty=0.0, recombination="max"),
    BeamSettings(150, (END,), 4, stop_rule="espnet", length_penalty=1.0),
]


@pytest.mark.parametrize("beam", WIDE_BEAMS, ids=lambda beam: f"{beam.stop_rule}-{beam.length_penalty}")
@pytest.mark.parametrize("seed", range(3))
def test_beam_as_wide_as_the_space_is_exhaustive_search(state_class: type, beam: BeamSettings, seed: int) -> None:
    table = random_table(seed, 4, coarse=False, spread=1.0)
    wanted = exhaustive(beam, table)
    (found,) = run(state_class(beam, 1, 1), beam, table, 1)
    assert len(found) == len(wanted) == 1 + 3 + 9 + 27 + 81
    for hypothesis, (key, words, ended) in zip(found, wanted, strict=True):
        assert hypothesis.key == pytest.approx(key, abs=1e-5)
        assert (hypothesis.token_ids, hypothesis.ended) == (words, ended)
        np.testing.assert_allclose(hypothesis.parts[:, 0], hypothesis.token_totals, atol=2e-6)


@pytest.mark.parametrize("rule", ["hf", "whisper", "espnet"])
def test_wider_beam_finds_the_best_hypothesis_of_a_small_space(state_class: type, rule: str) -> None:
    """The best total a beam finds never beats the exhaustive one and reaches it once the beam is wide."""
    table = random_table(11, 4, coarse=False, spread=1.5)
    space = {"early_stopping": "never", "length_penalty": 0.0, "patience": 2.0}
    best = exhaustive(BeamSettings(1, (END,), 5, stop_rule=rule, **space), table)[0][0]
    keys = []
    for beam_size in (1, 2, 4, 16, 81, 364):
        beam = BeamSettings(beam_size, (END,), 5, stop_rule=rule, **space)
        keys.append(run(state_class(beam, 1, 1), beam, table, 1)[0][0].key)
    assert all(key <= best + 1e-5 for key in keys)
    assert keys[-1] == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("rule", ["hf", "whisper", "espnet"])
@pytest.mark.parametrize("seed", range(3))
def test_recombination_keeps_the_best_by_max_and_never_lowers_it_by_logsumexp(
    state_class: type, rule: str, seed: int
) -> None:
    """Each continuation comes in two parts of its probability, of which the larger is what a search alone can have."""
    table, shares = random_table(seed, 4, coarse=False), np.log(np.array([0.7, 0.3], dtype=np.float32))
    best = {}
    for recombination in ("none", "max", "logsumexp"):
        settings = {"stop_rule": rule, "early_stopping": "never", "length_penalty": 0.0, "patience": 2.0}
        beam = BeamSettings(400, (END,), 3, recombination=recombination, **settings)
        state, lanes = state_class(beam, 1, 1), Lanes()
        while not state.is_done(0):
            whole = candidates_of(lanes, table, 0, 10**6)
            parts = [(np.float32(total + share), *rest) for total, *rest in whole for share in shares]
            parts.sort(key=lambda candidate: -candidate[0])
            lanes.follow(state.advance([0], *pack([parts[: beam.num_candidates]], beam.num_candidates)), 0)
        best[recombination] = state.results(0, 1)[0]
    unsplit = run(state_class(beam, 1, 1), beam, table, 1)[0][0]
    assert best["max"].total == best["none"].total <= best["logsumexp"].total
    assert best["logsumexp"].token_ids == unsplit.token_ids
    assert best["logsumexp"].total == pytest.approx(unsplit.total, abs=1e-5)


@pytest.mark.parametrize("rule", ["hf", "whisper", "espnet"])
def test_batch_gives_what_single_searches_give(state_class: type, rule: str) -> None:
    table = random_table(5, 6, coarse=False)
    beam = BeamSettings(4, (END,), 10, stop_rule=rule)
    together = run(state_class(beam, 5, 1), beam, table, 5)
    for utterance, wanted in enumerate(together):
        alone = run(state_class(beam, 1, 1), beam, lambda _, prefix, chosen=utterance: table(chosen, prefix), 1)
        assert_equal_results(alone[0], wanted)
