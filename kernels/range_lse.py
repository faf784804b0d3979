"""The range log-sum-exp in Triton: memory and launches; the kernels are in range_lse_device.py.

    group_sums -> row_sums (unless the log-sums are given) -> range_sums

Nothing synchronises with the device.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from shallowfusion.kernels.fused_step import Launch, load_limit
from shallowfusion.kernels.range_lse_device import GROUP, group_sums, range_sums, row_sums
from shallowfusion.values import RangeLogProbs, TokenRanges

__all__ = ["plan_range_log_probs", "range_log_probs_triton"]

CHUNK = 128  # groups a range adds at a time


def range_log_probs_triton(
    logits: Tensor,
    ranges: TokenRanges,
    order: Tensor | None = None,
    log_sums: Tensor | None = None,
    temperature: float = 1.0,
    *,
    block: int | None = None,
) -> RangeLogProbs:
    """Log-probs of ranges on the GPU; the contract is that of range_log_probs_reference.

    Args:
        logits: [rows, vocab], up to 65,535 rows; all tensors on one device.
        block: tokens per program, a power of two >= 32; None chooses by the number of rows.
    """
    launches, found = plan_range_log_probs(logits, ranges, order, log_sums, temperature, block=block)
    for launch in launches:
        launch.run()
    return found


def plan_range_log_probs(
    logits: Tensor,
    ranges: TokenRanges,
    order: Tensor | None = None,
    log_sums: Tensor | None = None,
    temperature: float = 1.0,
    *,
    block: int | None = None,
) -> tuple[list[Launch], RangeLogProbs]:
    """Allocates the outputs and work space and lists the launches in order."""
    rows, vocab = logits.shape
    count, device = len(ranges.first), logits.device
    block = block or (1024 if rows <= 10 else 2048)
    groups = triton.cdiv(vocab, GROUP.value)
    pairs = torch.empty((rows, 2, groups), dtype=torch.float32, device=device)
    sums = torch.empty(rows, dtype=torch.float32, device=device) if log_sums is None else log_sums
    found = RangeLogProbs(torch.empty(count, dtype=torch.float32, device=device), sums, backend="triton")
    counts = ranges.row_offsets.diff()
    numbers = torch.arange(rows, dtype=torch.int32, device=device)
    row_of = torch.repeat_interleave(numbers, counts, output_size=count)
    inverse = 1.0 / temperature
    width = max(32, triton.next_power_of_2(groups))
    limit = load_limit(logits if order is None else _as_row(order))
    first = (logits, logits.stride(0), order, ranges.row_offsets, pairs, vocab, limit, groups, inverse)
    launches = [Launch(group_sums, (triton.cdiv(vocab, block), rows), first, {"BLOCK": block, "num_warps": 4})]
    if log_sums is None:
        second = (ranges.row_offsets, pairs, sums, groups, inverse)
        launches.append(Launch(row_sums, (rows,), second, {"WIDTH": width, "num_warps": 4}))
    if count:
        third = (
            logits, logits.stride(0), order, row_of, ranges.first, ranges.last, pairs, sums, found.log_probs, groups,
            inverse,
        )  # fmt: skip
        launches.append(Launch(range_sums, (count,), third, {"CHUNK": CHUNK, "num_warps": 1}))
    return launches, found


def _as_row(order: Tensor) -> Tensor:
    """The order as a matrix of one row whose stride does not stand in the way of wide loads."""
    return order.as_strided((1, len(order)), (triton.cdiv(len(order), 16) * 16, 1))
