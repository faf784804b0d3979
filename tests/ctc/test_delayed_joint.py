"""Delayed fusion in joint CTC-attention decoding: rescoring at the end, and one utterance at a time like the batch."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest

from shallowfusion import fusion
from shallowfusion.decoder import FusionDecoder
from shallowfusion.rescoring import score_texts
from shallowfusion.scorers.causal_lm import CausalLMScorer
from tests.ctc.joint import tiny_head
from tests.delayed_world import OPTIONS, bpe_lm, spoken
from tests.tiny import random_encoder_output

WEIGHT, CTC = 0.4, 0.3


@cache
def decoder(with_lm: bool = True) -> FusionDecoder:
    """Attention decoder and CTC head on one tokenizer, the language model on another."""
    acoustic = dataclasses.replace(spoken(0), ctc_head=tiny_head(0))
    return FusionDecoder(acoustic, [bpe_lm()] if with_lm else [])


def decode(states: Any, rule: Any, beam_size: int = 4) -> list[Any]:
    own = decoder(rule is not None)
    options: dict[str, Any] = {**OPTIONS, "end_policy": "lm", "ctc_weight": CTC}
    return own.decode(states, rule=rule, beam_size=beam_size, n_best=beam_size, **options)


def from_scratch(text: str, end: bool) -> float:
    model = decoder().language_models[0]
    assert isinstance(model, CausalLMScorer)
    return float(score_texts(model, [text], include_end=end)[0].sum())


def test_asked_only_at_the_end_it_rescores_the_beam_of_the_joint_search() -> None:
    states = random_encoder_output(decoder().acoustic, 4, 3)
    for alone, late in zip(decode(states, None), decode(states, fusion.delayed(WEIGHT, interval=None)), strict=True):
        assert {h.token_ids for h in alone.n_best} == {h.token_ids for h in late.n_best}
        wanted = {h.token_ids: h.total + WEIGHT * from_scratch(h.text, h.ended) for h in alone.n_best}
        assert {h.token_ids: h.total for h in late.n_best} == pytest.approx(wanted, abs=1e-3)
        scores = [h.score for h in late.n_best]
        assert scores == sorted(scores, reverse=True)
        assert late.timing.counts["llm_calls"] == 1


@pytest.mark.parametrize("trigger", ["interval", "shortest", "hybrid"])
def test_totals_are_the_weighted_parts_and_do_not_depend_on_the_batch(trigger: Any) -> None:
    rule = fusion.delayed(WEIGHT, trigger, 3)
    states = random_encoder_output(decoder().acoustic, 5, 2)
    together = decode(states, rule)
    for place, result in enumerate(together):
        (alone,) = decode(states[place : place + 1], rule)
        assert [h.token_ids for h in alone.n_best] == [h.token_ids for h in result.n_best]
        for one, two in zip(alone.n_best, result.n_best, strict=True):
            assert one.total == pytest.approx(two.total, abs=1e-4)
            assert two.parts["lm"] == pytest.approx(from_scratch(two.text, two.ended), abs=1e-3)
            heard = (1 - CTC) * two.parts["asr"] + CTC * two.parts["ctc"]
            assert two.total == pytest.approx(heard + WEIGHT * two.parts["lm"], abs=1e-3)
    assert len({h.text for result in together for h in result.n_best}) > 5
