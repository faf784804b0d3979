"""Terms that reward hypotheses for having listened to the whole recording (METHODS 1.6)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from shallowfusion.config import require

__all__ = ["COVERAGE_KINDS", "CoverageKind", "attention_centre", "coverage"]

CoverageKind = Literal["threshold", "gnmt", "excess"]
COVERAGE_KINDS: tuple[CoverageKind, ...] = get_args(CoverageKind)
LEAST = 1e-3  # keeps the logarithm of an unseen frame finite


def coverage(attention: Tensor, kind: CoverageKind = "threshold", threshold: float = 0.5) -> float:
    """How well the frames were looked at, c_j = sum over tokens of attention to frame j.

    threshold: frames with c_j > threshold (1612.02695); gnmt: sum_j log(min(c_j, 1)), at least log(0.001) each
    (1609.08144); excess: -sum_j max(c_j - threshold, 0) / tokens, against looking at the same frames again and again.

    Args:
        attention: [tokens, frames], of the frames that hold sound; each token's attention sums to at most 1.

    Raises:
        InvalidArgumentError: an unknown kind or no frames.
    """
    require(kind in COVERAGE_KINDS, f"coverage must be one of {', '.join(COVERAGE_KINDS)}, got {kind!r}.")
    require(
        attention.dim() == 2 and attention.shape[1] > 0, f"attention must be [tokens, frames], got {attention.shape}."
    )
    seen = attention.double().sum(dim=0)
    if kind == "threshold":
        return float((seen > threshold).sum())
    if kind == "gnmt":
        return float(seen.clamp(LEAST, 1.0).log().sum())
    return float(-(seen - threshold).clamp_min(0).sum() / max(1, attention.shape[0]))


def attention_centre(attention: Tensor) -> float:
    """Mean position of the last token's attention, 0 = first frame, 1 = last; [tokens, frames].

    A hypothesis that ends while it looks at the middle of the recording was cut short.
    """
    last = attention[-1].double()
    places = torch.linspace(0, 1, len(last), dtype=torch.float64)
    return float((last * places).sum() / last.sum().clamp_min(1e-12))
