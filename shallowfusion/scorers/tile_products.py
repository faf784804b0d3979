"""Products of float32 rows and matrices on a CPU's bfloat16 matrix units, to float32's accuracy; with a plain twin."""

from __future__ import annotations

import torch
from torch import Tensor

from shallowfusion import _native
from shallowfusion.config import require
from shallowfusion.scorers.weight_memory import WeightMemory, in_huge_pages

__all__ = ["cut", "has_tile_rows", "packed_tiles", "tile_rows", "tile_rows_reference", "unpacked_tiles"]

OUTPUTS, INPUTS = 32, 32  # what packed weights are rounded up to
UPPER_HALF = -(1 << 16)
MANY_BYTES = 4 << 20


def has_tile_rows() -> bool:
    """Whether this machine multiplies so (AMX with bfloat16, on Linux)."""
    return _native.has_tile_product()


def packed_tiles(weights: Tensor, memory: WeightMemory | None = None) -> Tensor:
    """float32 weights [outputs, inputs] as `tile_rows` reads them; the same bytes, both sizes rounded up to 32.

    Args:
        memory: where they go; None = memory of their own.
    """
    require(
        weights.is_cpu and weights.dim() == 2 and weights.dtype == torch.float32 and weights.numel() > 0,
        f"weights must be a float32 matrix on the CPU, got {weights.dtype} {list(weights.shape)}.",
    )
    outputs, inputs = weights.shape
    weights = weights.contiguous()
    packed = (memory or WeightMemory(piece=0)).empty(
        _native.packed_tiles_size(outputs=outputs, inputs=inputs), torch.float32
    )
    _native.pack_tiles(weights=weights.data_ptr(), outputs=outputs, inputs=inputs, packed=packed.data_ptr())
    return packed


def unpacked_tiles(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """What `packed_tiles` was given."""
    steps = -(-inputs // INPUTS)
    tiles = packed.view(-1, steps, 2, INPUTS // 2, OUTPUTS // 2, 2)  # pair, step, tile, two inputs, output, which
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(-1, steps * INPUTS)[:outputs, :inputs]


def tile_rows(values: Tensor, packed: Tensor, outputs: int, bias: Tensor | None) -> Tensor:
    """values @ weights.T + bias; a row's result does not depend on the rows beside it.

    Price: the packed weights once for each MiB of rows cut (192 of 768 inputs); six bfloat16 products in place of a
    float32 one, which the units do in half of its time or less. Parts of numbers below 2^-126 count as 0; a row that
    holds an infinity becomes NaN.

    Args:
        values: float32 [rows, inputs] on the CPU.
        packed: by `packed_tiles`.
        bias: float32 [outputs] or None.

    Returns:
        float32 [rows, outputs].

    Raises:
        InvalidArgumentError: values of another type or size.
    """
    fits = values.dim() == 2 and packed.numel() == _rounded(outputs, OUTPUTS) * _rounded(values.shape[-1], INPUTS)
    require(
        fits and values.dtype == torch.float32 and values.is_cpu,
        f"values must be float32 [rows, inputs] on the CPU, got {values.dtype} {list(values.shape)} for "
        f"{packed.numel()} packed weights of {outputs} outputs.",
    )
    values = values.contiguous()
    rows, inputs = values.shape
    output = torch.empty((rows, outputs))
    if output.nbytes >= MANY_BYTES:  # keys and values of recordings, which every step reads
        in_huge_pages(output)
    if rows:
        _native.tile_product(
            values=values.data_ptr(),
            packed=packed.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            output=output.data_ptr(),
            rows=rows,
            inputs=inputs,
            outputs=outputs,
            threads=torch.get_num_threads(),
        )
    return output


def cut(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three float32 tensors whose sum is the given one; each is a bfloat16: its lower half is 0."""
    first = _upper_half(values)
    second = _upper_half(values - first)
    return first, second, values - first - second


def tile_rows_reference(values: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """`tile_rows` in torch, over weights [outputs, inputs]: six of nine products, summed in float64."""
    mine, theirs = cut(values), cut(weights)
    pairs = [(i, j) for i in range(3) for j in range(3) if i + j < 3]
    total = sum(mine[i].double() @ theirs[j].double().T for i, j in pairs)
    assert isinstance(total, Tensor)
    return (total if bias is None else total + bias).float()


def _upper_half(values: Tensor) -> Tensor:
    return (values.contiguous().view(torch.int32) & UPPER_HALF).view(torch.float32)


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
