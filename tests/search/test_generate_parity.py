"""The search against transformers' generate on tiny random models, float32: equal tokens, totals to 1e-4."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import LogitsProcessor

from shallowfusion.decoder import FusionDecoder
from tests.oracles import generated
from tests.tiny import DEVICES, END, decoder_on, random_encoder_output

UTTERANCES, NEW_TOKENS = 4, 14


@functools.cache
def decoder(seed: int, device: str = "cpu") -> FusionDecoder:
    return decoder_on(device, seed)


class ArticleProcessor(LogitsProcessor):
    """Adds weight * LM log-prob to every token below the end token; the LM is run from scratch each step."""

    def __init__(self, lm: torch.nn.Module, weight: float, initial_steps: int, greedy: bool) -> None:
        self.lm, self.weight, self.initial_steps, self.greedy = lm, weight, initial_steps, greedy

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        text = input_ids[:, 2:]
        if self.greedy:  # generate hands raw logits to processors in greedy search, log-probs in beam search
            scores = torch.log_softmax(scores, dim=-1)
        if text.shape[1] < self.initial_steps:
            return scores
        begin = torch.full((len(text), 1), END, device=text.device)
        logits = self.lm(torch.cat([begin, text.clamp(max=END)], dim=1)).logits[:, -1]
        fused = scores.clone()
        fused[:, :END] += self.weight * torch.log_softmax(logits, dim=-1)[:, :END]
        return fused


def assert_same(ours: list, theirs: list[list[tuple]]) -> None:
    for result, expected in zip(ours, theirs, strict=True):
        assert [list(h.token_ids) for h in result.n_best] == [tokens for tokens, _ in expected]
        for hypothesis, (_, score) in zip(result.n_best, expected, strict=True):
            if score is not None:
                assert hypothesis.score == pytest.approx(score, abs=1e-4)


PLAIN = {"suppress_blank": False, "suppress_tokens": None, "max_new_tokens": NEW_TOKENS, "end_threshold": None}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_beams", range(1, 9))
def test_weight_zero_equals_generate_for_every_beam_size(num_beams: int, device: str) -> None:
    model = decoder(num_beams, device)
    states = random_encoder_output(model.acoustic, UTTERANCES, seed=num_beams).to(device)
    ours = model.decode(states, num_beams=num_beams, n_best=num_beams, lm_weight=0.0, **PLAIN)
    assert_same(ours, generated(model, states, num_beams, NEW_TOKENS))


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -0.5])
def test_weight_zero_equals_generate_for_length_and_stopping_rules(length_penalty, early_stopping) -> None:
    model = decoder(1)
    states = random_encoder_output(model.acoustic, UTTERANCES, seed=3)
    rules = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    ours = model.decode(states, beam_size=4, n_best=4, lm_weight=0.0, **rules, **PLAIN)
    assert_same(ours, generated(model, states, 4, NEW_TOKENS, **rules))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_beams", [1, 2, 5])
@pytest.mark.parametrize(("weight", "initial_steps"), [(0.3, 0), (1.0, 0), (0.5, 3)])
def test_fusion_equals_generate_with_the_article_s_processor(
    num_beams: int, weight: float, initial_steps: int, device: str
) -> None:
    model = decoder(2, device)
    states = random_encoder_output(model.acoustic, UTTERANCES, seed=5).to(device)
    lm = model.language_models[0].model
    processor = ArticleProcessor(lm, weight, initial_steps, greedy=num_beams == 1)
    ours = model.decode(
        states, num_beams=num_beams, n_best=num_beams, lm_weight=weight, initial_steps=initial_steps,
        end_policy="asr_only", **PLAIN,
    )  # fmt: skip
    assert_same(ours, generated(model, states, num_beams, NEW_TOKENS, logits_processor=[processor]))


def test_searches_of_these_tests_end_at_different_steps_and_some_are_forced() -> None:
    found = []
    for seed in (0, 1, 2):
        model = decoder(seed)
        states = random_encoder_output(model.acoustic, 8, seed=3)
        found += [h for r in model.decode(states, beam_size=4, n_best=4, lm_weight=0.0, **PLAIN) for h in r.n_best]
    assert len({len(h.token_ids) for h in found if h.ended}) >= 4
    assert any(not h.ended for h in found)


@pytest.mark.parametrize("num_beams", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_group_of_tokens_is_said_twice_as_in_generate(size: int, num_beams: int) -> None:
    model = decoder(1)
    states = random_encoder_output(model.acoustic, UTTERANCES)
    expected = generated(model, states, num_beams, NEW_TOKENS, no_repeat_ngram_size=size)
    ours = model.decode(
        states, lm_weight=0.0, beam_size=num_beams, n_best=num_beams, max_new_tokens=NEW_TOKENS, suppress_blank=False,
        no_repeat_ngram_size=size, min_new_tokens=0,
    )  # fmt: skip
    assert_same(ours, expected)
    for hypothesis in (h for result in ours for h in result.n_best):
        groups = [hypothesis.token_ids[i : i + size] for i in range(len(hypothesis.token_ids) - size + 1)]
        assert len(groups) == len(set(groups))
