"""Promises of the search that need no outside oracle."""

from __future__ import annotations

import math

import pytest
import torch

from shallowfusion import DecodingOptions, fusion
from shallowfusion.decoder import FusionDecoder
from tests.tiny import END, random_encoder_output, tiny_decoder, tiny_lm

OPTIONS = {"suppress_blank": False, "suppress_tokens": None, "max_new_tokens": 14, "beam_size": 4, "n_best": 4}


def as_numbers(results: list) -> list:
    return [[(h.token_ids, h.total, h.score, h.parts["asr"]) for h in r.n_best] for r in results]


@pytest.fixture(scope="module")
def model() -> FusionDecoder:
    return tiny_decoder(1)


@pytest.mark.parametrize("end_policy", ["end_factored", "neutral", "lm", "asr_only"])
@pytest.mark.parametrize("stop_rule", ["hf", "whisper", "espnet"])
def test_weight_zero_with_an_lm_is_bit_identical_to_no_lm(model, stop_rule: str, end_policy: str) -> None:
    alone = FusionDecoder(model.acoustic)
    states = random_encoder_output(model.acoustic, 5)
    rules = {"stop_rule": stop_rule, "end_policy": end_policy}
    with_lm = model.decode(states, lm_weight=0.0, **rules, **OPTIONS)
    assert as_numbers(with_lm) == as_numbers(alone.decode(states, **rules, **OPTIONS))
    assert all(math.isfinite(h.parts["lm"]) for r in with_lm for h in r.n_best)


@pytest.mark.parametrize("weight", [0.0, 0.4])
@pytest.mark.parametrize("stop_rule", ["hf", "whisper", "espnet"])
def test_results_do_not_depend_on_the_batch(model, stop_rule: str, weight: float) -> None:
    states = random_encoder_output(model.acoustic, 8)
    rules = {"stop_rule": stop_rule, "lm_weight": weight}
    together = model.decode(states, **rules, **OPTIONS)
    for i in range(8):
        alone = model.decode(states[i : i + 1], **rules, **OPTIONS)[0]
        assert [h.token_ids for h in alone.n_best] == [h.token_ids for h in together[i].n_best]
        for one, other in zip(alone.n_best, together[i].n_best, strict=True):
            assert one.total == pytest.approx(other.total, abs=1e-4)
            assert one.parts == pytest.approx(other.parts, abs=1e-4)


def test_greedy_is_beam_one(model) -> None:
    states = random_encoder_output(model.acoustic, 4)
    results = model.decode(states, beam_size=1, lm_weight=0.0, max_new_tokens=14, suppress_tokens=None)
    scorer = model.acoustic.scorer.model
    for result, own in zip(results, states, strict=True):
        ids = [41, 42]
        for _ in range(14):
            decoded = scorer.model.decoder(input_ids=torch.tensor([ids]), encoder_hidden_states=own[None])
            ids.append(int(scorer.proj_out(decoded.last_hidden_state[0, -1]).argmax()))
            if ids[-1] == END:
                break
        assert list(result.n_best[0].token_ids) == [i for i in ids[2:] if i != END]


@pytest.mark.parametrize("end_policy", ["lm", "asr_only", "neutral"])
def test_total_is_the_weighted_sum_of_parts_and_bonuses(model, end_policy: str) -> None:
    states = random_encoder_output(model.acoustic, 4)
    results = model.decode(states, lm_weight=0.4, length_bonus=0.3, end_policy=end_policy, **OPTIONS)
    for hypothesis in (h for r in results for h in r.n_best):
        wanted = hypothesis.parts["asr"] + 0.4 * hypothesis.parts["lm"] + 0.3 * len(hypothesis.token_ids)
        assert hypothesis.total == pytest.approx(wanted, abs=1e-4)
        assert hypothesis.total == pytest.approx(sum(t.total for t in hypothesis.tokens), abs=1e-4)


def test_many_initial_steps_equal_weight_zero_and_none_equal_static(model) -> None:
    states = random_encoder_output(model.acoustic, 4)
    late = model.decode(states, rule=fusion.piecewise(0.5, initial_steps=100), **OPTIONS)
    never = model.decode(states, rule=fusion.static(0.0), **OPTIONS)
    assert [r.n_best[0].token_ids for r in late] == [r.n_best[0].token_ids for r in never]
    at_once = model.decode(states, rule=fusion.piecewise(0.5, initial_steps=0), **OPTIONS)
    assert as_numbers(at_once) == as_numbers(model.decode(states, rule=fusion.static(0.5), **OPTIONS))


def test_ramp_grows_to_the_full_weight() -> None:
    rule = fusion.piecewise(0.6, initial_steps=2, ramp=3)
    assert [round(rule.weights_at(t)[0], 6) for t in range(7)] == [0, 0, 0.2, 0.4, 0.6, 0.6, 0.6]


def test_catch_up_totals_equal_static_totals(model) -> None:
    states = random_encoder_output(model.acoustic, 6)
    options = {**OPTIONS, "end_policy": "lm", "min_new_tokens": 4, "length_penalty": 0.0}
    results = model.decode(states, rule=fusion.piecewise(0.5, initial_steps=3, catch_up=True), **options)
    for hypothesis in (h for r in results for h in r.n_best):
        wanted = hypothesis.parts["asr"] + 0.5 * hypothesis.parts["lm"]
        assert hypothesis.total == pytest.approx(wanted, abs=1e-4)


def test_two_language_models_are_weighed_apart(model) -> None:
    both = FusionDecoder(model.acoustic, [model.language_models[0], tiny_lm(9)])
    states = random_encoder_output(model.acoustic, 3)
    results = both.decode(states, rule=fusion.static([0.3, 0.2]), end_policy="lm", **OPTIONS)
    for hypothesis in (h for r in results for h in r.n_best):
        wanted = hypothesis.parts["asr"] + 0.3 * hypothesis.parts["lm0"] + 0.2 * hypothesis.parts["lm1"]
        assert hypothesis.total == pytest.approx(wanted, abs=1e-4)
    only_first = both.decode(states, rule=fusion.static([0.3, 0.0]), end_policy="lm", **OPTIONS)
    assert as_numbers(only_first) == as_numbers(model.decode(states, lm_weight=0.3, end_policy="lm", **OPTIONS))


def test_min_new_tokens_forbids_an_early_end(model) -> None:
    states = random_encoder_output(model.acoustic, 6)
    results = model.decode(states, lm_weight=0.0, min_new_tokens=9, **OPTIONS)
    assert all(len(h.token_ids) >= 9 for r in results for h in r.n_best)


def test_suppressed_tokens_never_appear(model) -> None:
    states = random_encoder_output(model.acoustic, 4)
    used = {i for r in model.decode(states, lm_weight=0.0, **OPTIONS) for h in r.n_best for i in h.token_ids}
    options = {**OPTIONS, "suppress_tokens": sorted(used)[:3]}
    again = {i for r in model.decode(states, lm_weight=0.0, **options) for h in r.n_best for i in h.token_ids}
    assert used & set(sorted(used)[:3])
    assert not again & set(sorted(used)[:3])


def test_end_threshold_refuses_ends_the_acoustic_model_finds_unlikely(model) -> None:
    states = random_encoder_output(model.acoustic, 8)
    options = {**OPTIONS, "end_policy": "asr_only", "length_penalty": 0.0}
    open_gate = model.decode(states, lm_weight=1.0, end_threshold=None, **options)
    strict = model.decode(states, lm_weight=1.0, end_threshold=1.0, **options)
    lengths = [sum(len(r.n_best[0].token_ids) for r in results) for results in (open_gate, strict)]
    assert lengths[1] > lengths[0]
    for hypothesis in (h for r in strict for h in r.n_best if h.ended):
        assert hypothesis.tokens[-1].parts["asr"] > math.log(1 / 45)


def test_wide_beams_with_high_weight_are_cut_short_by_asr_only_and_not_by_the_factored_end(model) -> None:
    states = random_encoder_output(model.acoustic, 8)
    options = {"beam_size": 8, "max_new_tokens": 30, "suppress_tokens": None, "length_penalty": 0.0}
    lengths = {}
    for policy in ("asr_only", "end_factored"):
        results = model.decode(states, lm_weight=1.0, end_policy=policy, end_threshold=None, **options)
        lengths[policy] = sum(len(r.n_best[0].token_ids) for r in results) / len(results)
    assert lengths["asr_only"] < 0.7 * lengths["end_factored"]


def test_nan_in_one_utterance_ends_only_that_one(model) -> None:
    states = random_encoder_output(model.acoustic, 3)
    good = model.decode(states, lm_weight=0.4, **OPTIONS)
    states = states.clone()
    states[1] = float("nan")
    results = model.decode(states, lm_weight=0.4, **OPTIONS)
    assert "nan" in results[1].flags
    for i in (0, 2):  # a search that leaves early changes batch shapes, hence the last bits of the others
        assert [h.token_ids for h in results[i].n_best] == [h.token_ids for h in good[i].n_best]
        assert [h.total for h in results[i].n_best] == pytest.approx([h.total for h in good[i].n_best], abs=1e-4)


@pytest.mark.parametrize("end_policy", ["neutral", "lm", "asr_only"])
def test_reranking_with_the_same_rule_keeps_the_order_and_another_rule_changes_totals(model, end_policy) -> None:
    states = random_encoder_output(model.acoustic, 5)
    results = model.decode(states, lm_weight=0.4, end_policy=end_policy, **OPTIONS)
    same = fusion.Rule("static", (0.4,), end_policy=end_policy)
    for result in results:
        again = result.rerank(same)
        assert [h.token_ids for h in again.n_best] == [h.token_ids for h in result.n_best]
        assert [h.score for h in again.n_best] == pytest.approx([h.score for h in result.n_best], abs=1e-4)
        alone = result.rerank(fusion.static(0.0))
        assert alone.best.total == pytest.approx(alone.best.parts["asr"], abs=1e-4)


def test_slots_are_all_free_after_a_search(model, monkeypatch) -> None:
    kept = []
    scorer = model.acoustic.scorer
    start = scorer.start

    def remember(context):
        state = start(context)
        kept.append(state)
        return state

    monkeypatch.setattr(scorer, "start", remember)
    model.decode(random_encoder_output(model.acoustic, 5), lm_weight=0.4, **OPTIONS)
    # What the last running utterances hold is at most their union of live slots.
    assert kept[0].slots.num_used <= 5 * (2 + 4 * 14)


def test_options_reach_the_search_unchanged() -> None:
    options = DecodingOptions.of(num_beams=3, n_best=2, stop_rule="whisper", patience=2.0, length_penalty=None)
    settings = options.beam_settings(end_id=7, room=20)
    assert (settings.beam_size, settings.end_ids, settings.max_new_tokens) == (3, (7,), 20)
    assert (settings.stop_rule, settings.patience, settings.length_penalty) == ("whisper", 2.0, None)


@pytest.mark.parametrize("stop_rule", ["hf", "whisper"])
def test_one_factor_for_every_class_is_another_weight(model, stop_rule: str) -> None:
    states = random_encoder_output(model.acoustic, 5)
    options = {**OPTIONS, "end_policy": "lm", "stop_rule": stop_rule, "suppress_tokens": [41, 42, 43]}
    rule = fusion.by_class(fusion.static(0.5), digits=0.4, end=0.4)  # every text token here is written in digits
    by_class = model.decode(states, rule=rule, **options)
    plain = model.decode(states, rule=fusion.static(0.2), **options)
    for one, other in zip(by_class, plain, strict=True):
        assert [h.token_ids for h in one.n_best] == [h.token_ids for h in other.n_best]
        assert [h.total for h in one.n_best] == pytest.approx([h.total for h in other.n_best], abs=1e-4)
        assert [h.parts for h in one.n_best] == [pytest.approx(h.parts, abs=1e-4) for h in other.n_best]


def test_a_factor_changes_the_weight_of_its_class_alone(model) -> None:
    states = random_encoder_output(model.acoustic, 5)
    results = model.decode(states, rule=fusion.by_class(fusion.static(0.5), end=3.0), **{**OPTIONS, "end_policy": "lm"})
    for hypothesis in (h for r in results for h in r.n_best):
        for token in hypothesis.tokens:
            weight = 1.5 if token.id == END else 0.5
            assert token.total == pytest.approx(token.parts["asr"] + weight * token.parts["lm"], abs=1e-4)
