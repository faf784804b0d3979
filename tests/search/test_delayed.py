"""Delayed fusion against fusion at every token, against rescoring, and against texts scored from scratch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion import DecodingOptions, fusion
from shallowfusion.decoder import FusionDecoder
from shallowfusion.fusion.delays import Delay
from shallowfusion.rescoring import score_texts
from shallowfusion.results import Transcription
from shallowfusion.scorers.token_trees import Request, TokenTrees
from shallowfusion.search.delayed import DelayedLM, DelayedTexts, Scored
from shallowfusion.search.late import finished
from shallowfusion.search.loop import StageClock, search
from shallowfusion.text.spelling import SharedTokens
from tests.delayed_world import OPTIONS, across
from tests.tiny import moved, random_encoder_output, tiny_decoder, tiny_lm

WEIGHT = 0.4


@pytest.fixture(scope="module")
def same() -> FusionDecoder:
    """Both models on one tokenizer."""
    return tiny_decoder(1)


@pytest.fixture(scope="module")
def other() -> FusionDecoder:
    """The language model on another tokenizer."""
    return across(0)


def decode(model: FusionDecoder, states: torch.Tensor, rule: Any, **options: Any) -> list[Transcription]:
    return model.decode(states, rule=rule, **{**OPTIONS, **options})


def from_scratch(model: FusionDecoder, texts: list[str], end: bool = True) -> list[float]:
    return [float(own.sum()) for own in score_texts(model.language_models[0], texts, include_end=end)]


@pytest.mark.gpu
def test_a_delayed_rule_on_a_gpu_says_what_it_says_on_the_cpu(other) -> None:
    there = across(0)
    for scorer in (there.acoustic.scorer, *there.language_models):
        moved(scorer, "cuda")
    states = random_encoder_output(other.acoustic, 3, 2)
    rule = fusion.delayed(WEIGHT, "interval", 2)
    ours, theirs = decode(there, states.cuda(), rule, beam_size=4), decode(other, states, rule, beam_size=4)
    assert [own.best.token_ids for own in ours] == [own.best.token_ids for own in theirs]
    for own, wanted in zip(ours, theirs, strict=True):
        assert own.best.total == pytest.approx(wanted.best.total, abs=1e-3)


@pytest.mark.parametrize("end_policy", ["neutral", "lm", "asr_only"])
@pytest.mark.parametrize("seed", range(3))
def test_every_step_with_one_vocabulary_is_fusion_at_every_token(same, seed: int, end_policy: str) -> None:
    states = random_encoder_output(same.acoustic, 3, seed)
    options = {"beam_size": 48, "n_best": 48, "end_policy": end_policy, "max_new_tokens": 6, "length_penalty": 0.0}
    at_once = decode(same, states, fusion.static(WEIGHT), **options)
    late = decode(same, states, fusion.delayed(WEIGHT, "interval", 1), **options)
    for one, two in zip(at_once, late, strict=True):
        known = {(h.token_ids, h.ended): h for h in one.n_best}
        both = [(h, known[h.token_ids, h.ended]) for h in two.n_best if (h.token_ids, h.ended) in known]
        assert len(both) > 12
        for ours, wanted in both:
            assert ours.total == pytest.approx(wanted.total, abs=1e-4)
            assert ours.score == pytest.approx(wanted.score, abs=1e-4)
            assert ours.parts == pytest.approx(wanted.parts, abs=1e-4)
        assert two.best.token_ids == one.best.token_ids


@pytest.mark.parametrize("stop_rule", ["hf", "whisper", "espnet"])
def test_never_is_rescoring_of_the_final_beam(other, stop_rule: str) -> None:
    states = random_encoder_output(other.acoustic, 4, 3)
    options = {"beam_size": 5, "n_best": 5, "stop_rule": stop_rule, "end_policy": "lm"}
    beams = FusionDecoder(other.acoustic).decode(states, **{**OPTIONS, **options})
    late = decode(other, states, fusion.delayed(WEIGHT, "interval", None), **options)
    for alone, rescored in zip(beams, late, strict=True):
        assert {h.token_ids for h in alone.n_best} == {h.token_ids for h in rescored.n_best}
        scores = from_scratch(other, [h.text for h in alone.n_best])
        without_end = from_scratch(other, [h.text for h in alone.n_best], end=False)
        wanted = {
            h.token_ids: h.total + WEIGHT * (score if h.ended else bare)
            for h, score, bare in zip(alone.n_best, scores, without_end, strict=True)
        }
        assert {h.token_ids: h.total for h in rescored.n_best} == pytest.approx(wanted, abs=1e-3)
        keys = [h.score for h in rescored.n_best]
        assert keys == sorted(keys, reverse=True)
    assert late[0].timing is not None
    assert late[0].timing.counts["llm_calls"] == 1


@pytest.mark.parametrize("trigger", ["shortest", "interval", "hybrid"])
@pytest.mark.parametrize("score_span", ["all", "common"])
def test_one_hypothesis_leaves_nothing_to_choose(other, trigger: Any, score_span: Any) -> None:
    states = random_encoder_output(other.acoustic, 5, 1)
    rule = fusion.delayed(WEIGHT, trigger, 2, score_span)
    alone = FusionDecoder(other.acoustic).decode(states, beam_size=1, **OPTIONS)
    late = decode(other, states, rule, beam_size=1)
    assert [r.best.token_ids for r in late] == [r.best.token_ids for r in alone]


rules = st.builds(
    fusion.delayed,
    st.just(WEIGHT),
    st.sampled_from(["shortest", "interval", "hybrid"]),
    st.integers(1, 5),
    st.sampled_from(["all", "common"]),
    unit=st.sampled_from(["words", "characters"]),
    tail=st.sampled_from(["mean", "free"]),
)


@given(rules, st.integers(0, 9), st.integers(1, 4), st.integers(1, 6))
@settings(deadline=None, max_examples=25)
def test_what_was_added_up_on_the_way_is_the_text_scored_from_scratch(
    rule: Any, seed: int, count: int, beam_size: int
) -> None:
    model = across(0)
    states = random_encoder_output(model.acoustic, count, seed)
    results = decode(model, states, rule, beam_size=beam_size, n_best=beam_size, end_policy="lm")
    for result in results:
        texts = [h.text for h in result.n_best]
        with_end, without = from_scratch(model, texts), from_scratch(model, texts, end=False)
        for h, whole, bare in zip(result.n_best, with_end, without, strict=True):
            assert h.parts["lm"] == pytest.approx(whole if h.ended else bare, abs=1e-3)
            assert h.total == pytest.approx(h.parts["asr"] + WEIGHT * h.parts["lm"], abs=1e-3)
            assert sum(token.total for token in h.tokens) == pytest.approx(h.total, abs=1e-3)
            assert sum(token.parts["lm"] for token in h.tokens) == pytest.approx(h.parts["lm"], abs=1e-3)


@pytest.mark.parametrize("rule", [fusion.delayed(WEIGHT, "interval", 3), fusion.delayed(WEIGHT, "shortest")])
def test_results_do_not_depend_on_the_batch(other, rule: Any) -> None:
    states = random_encoder_output(other.acoustic, 6, 2)
    together = decode(other, states, rule, beam_size=4, n_best=4)
    for i in range(6):
        alone = decode(other, states[i : i + 1], rule, beam_size=4, n_best=4)[0]
        assert [h.token_ids for h in alone.n_best] == [h.token_ids for h in together[i].n_best]
        for one, two in zip(alone.n_best, together[i].n_best, strict=True):
            assert one.total == pytest.approx(two.total, abs=1e-4)


@pytest.mark.parametrize("stop_rule", ["hf", "whisper", "espnet"])
def test_weight_zero_is_bit_identical_to_no_lm_and_reports_the_part(other, stop_rule: str) -> None:
    states = random_encoder_output(other.acoustic, 5, 4)
    options = {"beam_size": 4, "n_best": 4, "stop_rule": stop_rule}
    alone = FusionDecoder(other.acoustic).decode(states, **{**OPTIONS, **options})
    late = decode(other, states, fusion.delayed(0.0, "interval", 2), **options)
    for one, two in zip(alone, late, strict=True):
        assert [(h.token_ids, h.total, h.score) for h in one.n_best] == [
            (h.token_ids, h.total, h.score) for h in two.n_best
        ]
        assert all(math.isfinite(h.parts["lm"]) and h.parts["lm"] < 0 for h in two.n_best)


@pytest.mark.parametrize(
    "rule", [fusion.delayed(WEIGHT, "interval", 2), fusion.delayed(WEIGHT, "shortest", 1, "common")]
)
def test_no_slot_leaks(other, rule: Any) -> None:
    for seed in range(4):
        states, clock = random_encoder_output(other.acoustic, 5, seed), StageClock()
        own = other.sources(states, DecodingOptions.of(rule=rule, **OPTIONS))
        outcomes = search(own.scorers, own.contexts, own.names, own.plan, clock, own.late)
        delayed = own.late[0]
        assert isinstance(delayed, DelayedLM)
        assert delayed.texts.trees.num_used > 5
        finished(outcomes, own.late, clock)
        assert delayed.texts.trees.num_used == 5  # the begin token of each


def test_more_steps_between_calls_are_fewer_calls_and_time_is_told_apart(other) -> None:
    states = random_encoder_output(other.acoustic, 6, 2)
    counts = []
    for interval in (1, 3, 9):
        result = decode(other, states, fusion.delayed(WEIGHT, "interval", interval), beam_size=4)[0]
        assert result.timing is not None
        counts.append(result.timing.counts["llm_calls"])
        assert result.timing.stages["lm"] > 0
        assert result.to_json()["timing"]["llm_calls"] == counts[-1]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_windows_shorter_than_the_text_are_moved() -> None:
    model = across(0)
    short = across(0).language_models[0]
    short.window = 8
    states = random_encoder_output(model.acoustic, 3, 2)
    decoder = FusionDecoder(model.acoustic, [short])
    for result in decode(decoder, states, fusion.delayed(WEIGHT, "interval", 2), beam_size=3, end_policy="lm"):
        assert result.best.parts["lm"] == pytest.approx(from_scratch(decoder, [result.text])[0], abs=1e-3)


# The triggers alone, on tokens that mean themselves.


class Beam:
    """Hypotheses of one utterance, told token by token."""

    def __init__(self, delay: Delay, count: int) -> None:
        pieces = [b"a"] * 40
        self.texts = DelayedTexts(TokenTrees(tiny_lm(), 1), SharedTokens(range(40), pieces), delay)
        self.rows: list[Scored | None] = [self.texts.fresh(0) for _ in range(count)]

    def say(self, *tokens: int | None, steps: int = 1) -> list[int]:
        """Each hypothesis says a token, or none; how many units of each are scored after that."""
        said = []
        for row, token in zip(self.rows, tokens, strict=True):
            assert row is not None
            said.append(
                row if token is None else Scored(row.said.and_then(token, b"a"), row.node, row.units, row.reach)
            )
        (self.rows,) = self.texts.advance([said], steps)
        return [0 if row is None else row.units for row in self.rows]


def test_interval_fires_every_so_many_steps() -> None:
    beam = Beam(Delay("interval", 3), 2)
    assert [beam.say(1, 2) for _ in range(7)] == [[0, 0], [0, 0], [3, 3], [3, 3], [3, 3], [6, 6], [6, 6]]
    frames = Beam(Delay("interval", 10), 1)
    assert [frames.say(1, steps=4) for _ in range(4)] == [[0], [0], [3], [3]]


def test_shortest_fires_when_the_shortest_hypothesis_has_grown() -> None:
    beam = Beam(Delay("shortest"), 2)
    assert beam.say(1, None) == [0, 0]
    assert beam.say(1, None) == [0, 0]
    assert beam.say(1, 2) == [3, 1]
    assert beam.say(1, None) == [3, 1]
    assert beam.say(None, 2) == [4, 2]


def test_common_scores_as_much_of_each_as_all_have() -> None:
    beam = Beam(Delay("interval", 1, "common"), 2)
    assert beam.say(1, None) == [0, 0]
    assert beam.say(1, 2) == [1, 1]
    assert beam.say(None, 2) == [2, 2]


def test_hybrid_waits_for_something_new_and_then_for_an_interval() -> None:
    beam = Beam(Delay("hybrid", 2), 1)
    assert [beam.say(None) for _ in range(5)] == [[0]] * 5
    assert beam.say(1) == [1]
    assert beam.say(1) == [1]
    assert beam.say(1) == [3]


def test_what_is_not_scored_yet_costs_what_the_text_costs_on_the_average() -> None:
    beam = Beam(Delay("interval", 3), 1)
    for _ in range(4):
        beam.say(7)
    (row,) = beam.rows
    assert row is not None
    assert beam.texts.rates[0] == pytest.approx(row.node.total / 3)
    assert beam.texts.total(0, row) == pytest.approx(row.node.total * 4 / 3)
    free = Beam(Delay("interval", 3, tail="free"), 1)
    for _ in range(4):
        free.say(7)
    (row,) = free.rows
    assert row is not None
    assert free.texts.total(0, row) == row.node.total == pytest.approx(beam.rows[0].node.total, abs=1e-5)  # type: ignore[union-attr]


def test_equal_texts_are_scored_once() -> None:
    beam = Beam(Delay("interval", 1), 3)
    beam.say(1, 1, 2)
    assert beam.texts.trees.num_tokens == 1  # the begin token
    beam.say(3, 3, 4)
    assert beam.texts.trees.num_tokens == 3  # and what the first tokens left behind, 1 once
    fresh = TokenTrees(tiny_lm(), 1)
    node = fresh.grow(0, [1, 3])
    fresh.score([Request(0, node)])
    assert beam.rows[0].node.total == pytest.approx(node.total, abs=1e-5)  # type: ignore[union-attr]


def test_bad_choices_are_refused() -> None:
    from shallowfusion.errors import InvalidArgumentError

    for words, arguments in (
        ("trigger must be one of", {"trigger": "sometimes"}),
        ("score_span must be one of", {"score_span": "some"}),
        ("interval must be", {"interval": 0}),
        ("interval must be", {"interval": True}),
        ("interval=None goes with", {"trigger": "shortest", "interval": None}),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            fusion.delayed(0.3, **arguments)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="constant and piecewise"):
        fusion.by_class(fusion.delayed(0.3), digits=0.1)
    model = across(0)
    with pytest.raises(InvalidArgumentError, match="end_factored"):
        decode(model, random_encoder_output(model.acoustic, 1), fusion.delayed(0.3), end_policy="end_factored")
