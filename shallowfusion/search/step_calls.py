"""Calls of the fused step as records, so that utterances which did not start together may share one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shallowfusion.fusion.step import fused_step
from shallowfusion.search.candidates import CandidateArrays

__all__ = ["StepCall", "run_together"]


@dataclass(frozen=True, eq=False)
class StepCall:
    """What one set of rows asks of the fused step.

    Args:
        sources: logits [rows, vocab_s].
        weights: float32 [rows, sources]; `totals`: float32 [rows]; `allowed`: as `fused_step` takes it.
        beam_size: rows per utterance.
        parts: of the first that many sources the candidates hold parts.
        settings: what else `fused_step` is given, the same for all rows.
        key: calls with an equal key differ in nothing but their rows; None = has no equal.
    """

    sources: Sequence[Tensor]
    weights: Tensor
    totals: Tensor
    allowed: Tensor | None
    beam_size: int
    parts: int
    settings: Mapping[str, Any]
    key: Hashable | None

    @property
    def num_utterances(self) -> int:
        return len(self.totals) // self.beam_size


def run_together(calls: Sequence[StepCall], sources: Sequence[Tensor] | None = None) -> list[CandidateArrays]:
    """One fused step for calls of one key; the candidates of each, in order.

    Args:
        sources: logits of all rows, one call's after the other's; None for one call.
    """
    first = calls[0]
    allowed = None if first.allowed is None else _joined([call.allowed for call in calls])
    found = fused_step(
        list(first.sources if sources is None else sources),
        _joined([call.weights for call in calls]),
        _joined([call.totals for call in calls]),
        beam_size=first.beam_size,
        allowed=allowed,
        **first.settings,
    )
    parents = found.parent_rows.cpu().numpy()
    totals, tokens = found.totals.cpu().numpy(), found.token_ids.cpu().numpy()
    parts = found.parts[:, :, : first.parts].cpu().numpy()
    lanes = np.where(parents >= 0, parents % first.beam_size, -1)
    flagged = np.asarray(found.flags.cpu().numpy().reshape(-1, first.beam_size).any(axis=1))
    ends = np.cumsum([call.num_utterances for call in calls])
    spans = [slice(int(end) - call.num_utterances, int(end)) for call, end in zip(calls, ends, strict=True)]
    return [CandidateArrays(totals[own], lanes[own], tokens[own], parts[own], flagged[own]) for own in spans]


def _joined(tensors: Sequence[Any]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat([tensor.to(tensors[0].device) for tensor in tensors])
