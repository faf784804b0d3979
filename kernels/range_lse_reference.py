"""Range log-sum-exp in plain torch, float64: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor

from shallowfusion.values import RangeLogProbs, TokenRanges

__all__ = ["range_log_probs_reference"]

IMPOSSIBLE = float("-inf")


def range_log_probs_reference(
    logits: Tensor,
    ranges: TokenRanges,
    order: Tensor | None = None,
    log_sums: Tensor | None = None,
    temperature: float = 1.0,
) -> RangeLogProbs:
    """log sum over places p in [first, last) of softmax(logits[r] / temperature)[order[p]], for each range of row r.

    A row with NaN or +inf gives NaN for all its ranges; one of -inf alone gives -inf. Where `log_sums` are given they
    are taken off as they are, and tokens outside the ranges need not be looked at.
    """
    offsets = ranges.row_offsets.tolist()
    values = torch.empty(len(ranges.first), dtype=torch.float64, device=logits.device)
    sums = torch.full((len(logits),), float("nan"), dtype=torch.float64, device=logits.device)
    if log_sums is not None:
        sums = log_sums.double()
    for row, scaled in enumerate(logits.double() / temperature):
        start, stop = offsets[row : row + 2]
        if start == stop:
            continue
        if log_sums is None:
            broken = bool((torch.isnan(scaled) | (scaled == float("inf"))).any())
            sums[row] = float("nan") if broken else torch.logsumexp(scaled, dim=0)
        ordered = scaled if order is None else scaled[order.long()]
        for i in range(start, stop):
            tokens = ordered[int(ranges.first[i]) : int(ranges.last[i])]
            total = torch.logsumexp(tokens, dim=0) if len(tokens) else torch.full_like(sums[row], IMPOSSIBLE)
            values[i] = total if total == IMPOSSIBLE and not torch.isnan(sums[row]) else total - sums[row]
    return RangeLogProbs(values.float(), sums.float(), backend="reference")
