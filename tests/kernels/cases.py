"""Requests for the tests of the fused step, and the comparison of a backend's answer with the reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from shallowfusion.kernels.fused_step_reference import fused_step_reference
from shallowfusion.values import Candidates, SparseBonus, StepRequest, Unmapped

IMPOSSIBLE = float("-inf")
FLOAT32_STEP = 2.0**-24


def logits(
    rows: int, vocab: int, *, seed: int, dtype: torch.dtype = torch.float32, padding: int | None = None
) -> Tensor:
    """Random logits; with `padding`, a view of rows padded with NaN to a multiple of it, as a head GEMM leaves them."""
    values = (torch.randn((rows, vocab), generator=torch.Generator().manual_seed(seed)) * 4.0).to(dtype)
    if padding is None:
        return values
    padded = torch.full((rows, -(-vocab // padding) * padding), float("nan"), dtype=dtype)
    padded[:, :vocab] = values
    return padded[:, :vocab]


def request(*sources: Tensor, beam_size: int = 2, weights: Any = None, **changes: Any) -> StepRequest:
    """A plain request over `sources`; `changes` replace any field. Weights default to 1, 0.3, 0.3, ..."""
    rows, count = sources[0].shape[0], len(sources)
    if weights is None:
        weights = [1.0] + [0.3] * (count - 1)
    fields: dict[str, Any] = {
        "sources": sources,
        "weights": torch.tensor(weights, dtype=torch.float32).expand(rows, count).contiguous(),
        "totals": -torch.arange(rows, dtype=torch.float32) * 0.7 - 3.0,
        "beam_size": beam_size,
        "top_k": 4,
        "end_id": sources[0].shape[1] - 1,
        "temperatures": (1.0,) * count,
        "maps": (None,) * count,
        "unmapped": (Unmapped("neutral"),) * count,
        "token_bias": None,
        "allowed": None,
        "bonus": None,
        "length_bonus": torch.zeros(rows),
        "combine": "log_linear",
        "normalize": "none",
    }
    return StepRequest(**{**fields, **changes})


def extras(rows: int, vocab: int, end_id: int) -> dict[str, Any]:
    """Every optional field at once: a bias, a bitmask, bonuses (some rows have none, one is for the end token)."""
    generator = torch.Generator().manual_seed(11)
    bias = torch.randn(vocab, generator=generator)
    bias[vocab // 3] = IMPOSSIBLE
    words = -(-vocab // 32)
    allowed = torch.randint(-(2**31), 2**31 - 1, (rows, words), generator=generator, dtype=torch.int32)
    allowed[:, end_id // 32] = -1
    counts = [(3 * row) % 4 for row in range(rows)]
    tokens = [sorted(torch.randperm(vocab, generator=generator)[:count].tolist()) for count in counts]
    tokens[1 % rows] = sorted({end_id, *tokens[1 % rows]})
    offsets = torch.tensor([0, *[len(row) for row in tokens]]).cumsum(0).int()
    values = torch.randn(int(offsets[-1]), generator=generator) * 6.0
    bonus = SparseBonus(offsets, torch.tensor([token for row in tokens for token in row], dtype=torch.int32), values)
    return {
        "token_bias": bias,
        "allowed": allowed,
        "bonus": bonus,
        "length_bonus": torch.rand(rows, generator=generator),
    }


def to_device(given: Any, device: torch.device) -> Any:
    """Any record or tuple of tensors on another device; strides and padding stay."""
    if isinstance(given, Tensor):
        if given.device == device:
            return given
        flat = torch.empty(0, dtype=given.dtype, device=given.device).set_(given.untyped_storage())
        return flat.to(device).as_strided(given.shape, given.stride(), given.storage_offset())
    if isinstance(given, tuple):
        return tuple(to_device(item, device) for item in given)
    if dataclasses.is_dataclass(given):
        return type(given)(**{f.name: to_device(getattr(given, f.name), device) for f in dataclasses.fields(given)})
    return given


def assert_same(found: Candidates, asked: StepRequest, *, same_order: bool = True) -> None:
    """`found` against the reference on the device of `asked`: flags, scores and parts, and the same candidates.

    Without `same_order`, candidates may differ where the reference's own totals are closer than the error budget.
    """
    found = to_device(found, asked.totals.device)
    expected = fused_step_reference(asked)
    assert torch.equal(found.flags, expected.flags)
    impossible = expected.totals == IMPOSSIBLE
    assert torch.equal(found.totals == IMPOSSIBLE, impossible)
    assert (found.token_ids[impossible] == -1).all()
    assert (found.parent_rows[impossible] == -1).all()
    assert (found.parts[impossible] == 0).all()
    budget = 1e-5 + 4 * FLOAT32_STEP * expected.totals.double().abs()
    error = (found.totals.double() - expected.totals.double()).abs()
    assert (impossible | (error <= budget)).all(), f"error {error[~impossible].max()}"
    same = (found.parent_rows == expected.parent_rows) & (found.token_ids == expected.token_ids)
    tied = torch.nn.functional.pad(expected.totals.double().diff(dim=1).abs() <= 2 * budget[:, 1:], (1, 1))
    tied[:, -1] = True  # what follows the last candidate is not known here
    assert (same if same_order else same | tied[:, 1:] | tied[:, :-1]).all()
    ours, exact = (found.parts[same], expected.parts[same])
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=2e-5, equal_nan=True)
