"""Classes of tokens whose language-model weight may differ: factors become further sources of the fused step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ClassSource", "class_sources"]


@dataclass(frozen=True)
class ClassSource:
    """A second look at a source, for the tokens of one factor.

    Adding (factor - 1) * weight * log_prob for those tokens alone makes their weight factor * weight.

    Args:
        source: whose logits are read again.
        factor: of the source's weight; the class's own factor less one.
        map: int32 [vocab], the source's id of each token of the class, -1 for all others, which get nothing.
    """

    source: int
    factor: float
    map: Tensor


def class_sources(
    factors: Tensor, maps: Sequence[Tensor | None], sizes: Sequence[int], end_is_neutral: bool, end_id: int
) -> tuple[ClassSource, ...]:
    """One source per language model and distinct factor other than 1.

    Args:
        factors: float [vocab], of each acoustic token.
        maps: per source, the acoustic one first; None = same ids below the source's size.
        sizes: vocabulary of each source.
        end_is_neutral: the end token has no counterpart, so a factor for it cannot be applied to a log-prob of its own.
    """
    found = []
    ids = torch.arange(len(factors), dtype=torch.int32)
    for source in range(1, len(maps)):
        mapping = maps[source]
        own = torch.where(ids < sizes[source], ids, -1) if mapping is None else mapping
        for factor in sorted(set(factors.tolist()) - {1.0}):
            chosen = torch.where(factors == factor, own, -1)
            if end_is_neutral:
                chosen[end_id] = -1
            if bool((chosen >= 0).any()):
                found.append(ClassSource(source, factor - 1.0, chosen.to(torch.int32)))
    return tuple(found)
