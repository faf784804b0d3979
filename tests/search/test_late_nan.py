"""NaN of a language model that is bridged or asked late: the utterance has the flag, the others are as without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shallowfusion import FusionDecoder, fusion
from shallowfusion.fusion import Rule
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.scorers.slots import SlotPlan
from tests.delayed_world import OPTIONS, bpe_lm, spoken
from tests.tiny import random_encoder_output

BROKEN = 1  # of the three utterances


class BreakingLM(CausalLMScorer):
    """Says NaN of one utterance of the batch once it has read `after` passes."""

    def __init__(self, inner: CausalLMScorer, after: int) -> None:
        super().__init__(inner.model, inner.vocabulary, inner.tokenizer)
        self.after, self.passes = after, 0

    def _hidden(self, cache: Any, token_ids: Tensor, positions: Tensor, plan: SlotPlan) -> Tensor:
        hidden = super()._hidden(cache, token_ids, positions, plan).clone()
        self.passes += 1
        if self.passes > self.after and len(hidden) == 3:
            hidden[BROKEN] = float("nan")
        return hidden


RULES = {
    "by bytes": (fusion.static(0.4), "bytes"),
    "delayed": (fusion.delayed(0.4, interval=1), None),
    "at the end": (fusion.delayed(0.4, interval=None), None),
}


@pytest.mark.parametrize(
    ("name", "after"), [("by bytes", 0), ("by bytes", 2), ("delayed", 0), ("delayed", 1), ("at the end", 0)]
)
def test_nan_of_a_late_model_raises_the_flag_of_its_utterance(name: str, after: int) -> None:
    rule, bridge = RULES[name]
    acoustic = spoken(0)
    states = random_encoder_output(acoustic, 3)

    def decoded(model: CausalLMScorer, own: Rule) -> list[Any]:
        decoder = FusionDecoder(acoustic, [model], lm_bridge=bridge)  # type: ignore[arg-type]
        return decoder.decode(states, rule=own, beam_size=4, n_best=4, **OPTIONS)

    wanted = decoded(bpe_lm(), rule)
    model = BreakingLM(bpe_lm(), after)
    found = decoded(model, rule)
    assert model.passes > after
    assert "nan" in found[BROKEN].flags
    assert all(torch.isfinite(torch.tensor([h.total, h.score])).all() for h in found[BROKEN].n_best)
    for place in (0, 2):
        assert "nan" not in found[place].flags
        assert [h.token_ids for h in found[place].n_best] == [h.token_ids for h in wanted[place].n_best]
    silent = decoded(BreakingLM(bpe_lm(), after), fusion.static(0.0) if bridge else fusion.delayed(0.0, interval=3))
    assert all("nan" not in result.flags for result in silent)
