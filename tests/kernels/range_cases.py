"""Requests for the tests of the range log-sum-exp, and the comparison of a backend's answer with the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from shallowfusion.kernels.range_lse_reference import range_log_probs_reference
from shallowfusion.values import RangeLogProbs, TokenRanges


def ranges_of(per_row: list[list[tuple[int, int]]]) -> TokenRanges:
    """CSR of pairs (first, last)."""
    counts = torch.tensor([0, *(len(row) for row in per_row)])
    flat = torch.tensor([pair for row in per_row for pair in row], dtype=torch.int32).reshape(-1, 2)
    return TokenRanges(counts.cumsum(0).int(), flat[:, 0].contiguous(), flat[:, 1].contiguous())


def random_ranges(rows: int, vocab: int, count: int, seed: int) -> TokenRanges:
    """Up to `count` ranges a row: empty, single, short, long, whole; every third row has none."""
    generator = torch.Generator().manual_seed(seed)

    def number(high: int) -> int:
        return int(torch.randint(0, high, (1,), generator=generator))

    per_row: list[list[tuple[int, int]]] = []
    for row in range(rows):
        own = [(0, vocab), (vocab, vocab), (0, 0)][: count if row % 3 != 1 else 0]
        while len(own) < count and row % 3 != 1:
            first = number(vocab + 1)
            span = (1, 5, 40, 300, vocab)[number(5)]
            own.append((first, min(vocab, first + number(span + 1))))
        per_row.append(own)
    return ranges_of(per_row)


def random_order(vocab: int, seed: int) -> Tensor:
    return torch.randperm(vocab, generator=torch.Generator().manual_seed(seed)).int()


def budget(logits: Tensor, ranges: TokenRanges, order: Tensor | None, temperature: float) -> Tensor:
    """Twice torch's own error of the same sums in the dtype of the logits (float32 sums at least), plus 1e-5."""
    exact = range_log_probs_reference(logits, ranges, order, None, temperature).log_probs.double()
    scaled = logits.float() / temperature
    ordered = scaled if order is None else scaled[:, order.long()]
    log_sums = torch.logsumexp(scaled, dim=1)
    rows = torch.repeat_interleave(torch.arange(len(logits)), ranges.row_offsets.diff())
    torchs = torch.full((len(rows),), -torch.inf)
    for i, (row, first, last) in enumerate(zip(rows, ranges.first.tolist(), ranges.last.tolist(), strict=True)):
        if first < last:
            torchs[i] = torch.logsumexp(ordered[row, first:last], dim=0) - log_sums[row]
    error = torch.nan_to_num((torchs.double() - exact).abs(), nan=0.0, posinf=0.0)
    largest = error.max() if len(error) else 0.0
    return 2 * largest + 1e-5 + 2**-23 * torch.nan_to_num(exact.abs(), posinf=0.0)


def assert_same(
    found: RangeLogProbs,
    logits: Tensor,
    ranges: TokenRanges,
    order: Tensor | None = None,
    log_sums: Tensor | None = None,
    temperature: float = 1.0,
) -> None:
    """`found` against the reference, within the error budget; infinities and NaN at the same places."""
    expected = range_log_probs_reference(logits, ranges, order, log_sums, temperature)
    ours, exact = found.log_probs.cpu().double(), expected.log_probs.double()
    assert torch.equal(torch.isnan(ours), torch.isnan(exact))
    assert torch.equal(ours == -torch.inf, exact == -torch.inf)
    error = torch.nan_to_num((ours - exact).abs(), nan=0.0)
    error[exact == -torch.inf] = 0.0
    allowed = budget(logits, ranges, order, temperature)
    assert bool((error <= allowed).all()), f"error {error.max()}"
    torch.testing.assert_close(found.log_sums.cpu(), expected.log_sums, rtol=1e-6, atol=1e-5, equal_nan=True)
