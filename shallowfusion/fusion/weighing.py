"""From a rule to the numbers of one fused step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shallowfusion.fusion.gates import StepView
from shallowfusion.fusion.rules import Rule

__all__ = ["StepWeights", "step_weights"]


@dataclass(frozen=True)
class StepWeights:
    """What a rule gives the fused step.

    Args:
        weights: float32 [rows, sources].
        shift: float32 [rows], added to the rows' totals; None = nothing.
    """

    weights: Tensor
    shift: Tensor | None = None

    def with_acoustic(self, weight: float) -> StepWeights:
        """The same with the first source's weight multiplied."""
        if weight == 1.0:
            return self
        return replace(self, weights=torch.cat([weight * self.weights[:, :1], self.weights[:, 1:]], dim=1))


def step_weights(rule: Rule, view: StepView) -> StepWeights:
    """Weights of the acoustic model, the language models and, last, of an internal LM that the rule subtracts.

    Reads no logits unless the rule has a gate or a mixture by entropy.
    """
    rows, device = view.logits[0].shape[0], view.logits[0].device
    if rule.mixture is not None:
        # Before its start a mixture is the acoustic model alone.
        if rule.share_at(view.step) == 0:
            return StepWeights(torch.tensor([1.0, 0.0]).expand(rows, 2))
        return StepWeights(_finite(rule.mixture.weights(view)))
    plain = [1.0] if rule.delay is not None else [1.0, *rule.weights_at(view.step)]  # delayed models speak elsewhere
    subtracted = [-rule.ilm_weight * rule.share_at(view.step)] if rule.ilm_weight else []
    weights = torch.tensor([*plain, *subtracted], device=device).expand(rows, -1)
    if rule.gate is None or not any(plain[1:]):
        return StepWeights(weights)
    shares = _finite(rule.gate.shares(_without_internal(view, bool(subtracted))))
    gated = weights[:, 1 : len(plain)] * shares
    internal = weights[:, len(plain) :] * (shares.amax(dim=1, keepdim=True) if rule.gate.needs_sums else 1.0)
    weights = torch.cat([weights[:, :1], gated, internal], dim=1)
    if rule.form != "advantage":
        return StepWeights(weights)
    favourites = torch.stack([statistics.max_log_prob for statistics in view.language[: len(plain) - 1]], dim=1)
    return StepWeights(weights, -(gated * _finite(favourites)).sum(dim=1))


def _without_internal(view: StepView, is_last: bool) -> StepView:
    if not is_last:
        return view
    maps = None if view.maps is None else view.maps[:-1]
    return replace(view, logits=view.logits[:-1], temperatures=view.temperatures[:-1], maps=maps)


def _finite(values: Tensor) -> Tensor:
    """Rows with NaN logits get NaN here; the fused step flags them itself, and wants finite weights."""
    return torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
