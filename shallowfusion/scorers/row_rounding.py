"""Rows of floats as int8 with one scale each, and products of such rows as floats again; in C++, with plain twins."""

from __future__ import annotations

import torch
from torch import Tensor

from shallowfusion import _native
from shallowfusion.config import require

__all__ = ["round_rows", "round_rows_reference", "scale_rows", "scale_rows_reference"]

LARGEST = 127  # int8 without -128, so that zero is in the middle
SMALLEST_SCALE = 1e-30
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 2}


def round_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [rows, columns] and float32 scales [rows, 1] with values ~ whole * scales, each row's largest at 127.

    A row that holds NaN has a NaN scale. Price: two passes over each row, which the second finds in the cache.

    Args:
        values: float32 or bfloat16 [rows, columns] on the CPU.
    """
    require(
        values.is_cpu and values.dim() == 2 and values.dtype in DTYPE_CODES,
        f"values must be a float32 or bfloat16 matrix on the CPU, got {values.dtype} {list(values.shape)}.",
    )
    values = values.contiguous()
    whole = torch.empty(values.shape, dtype=torch.int8)
    scales = torch.empty((len(values), 1))
    if values.numel():
        _native.round_rows(
            values=values.data_ptr(),
            dtype=DTYPE_CODES[values.dtype],
            rows=values.shape[0],
            columns=values.shape[1],
            whole=whole.data_ptr(),
            scales=scales.data_ptr(),
            threads=torch.get_num_threads(),
        )
    return whole, scales


def scale_rows(product: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """product * scales + bias as float32 (into the product's own memory) or bfloat16.

    Args:
        product: float32 [rows, columns], dense.
        scales: float32 [rows, 1].
        bias: float32 [columns] or None.
    """
    shapes = tuple(product.shape), tuple(scales.shape), None if bias is None else tuple(bias.shape)
    fits = shapes[1] == (len(product), 1) and (bias is None or shapes[2] == tuple(product.shape[1:]))
    given = [product, scales] if bias is None else [product, scales, bias]
    require(
        fits and all(own.is_cpu and own.dtype == torch.float32 and own.is_contiguous() for own in given),
        f"product, scales and bias must be dense float32 [rows, columns], [rows, 1] and [columns], got {shapes}.",
    )
    require(dtype in DTYPE_CODES, f"dtype must be float32 or bfloat16, got {dtype}.")
    output = product if dtype == torch.float32 else torch.empty(product.shape, dtype=dtype)
    if product.numel():
        _native.scale_rows(
            product=product.data_ptr(),
            scales=scales.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            rows=product.shape[0],
            columns=product.shape[1],
            output=output.data_ptr(),
            dtype=DTYPE_CODES[dtype],
            threads=torch.get_num_threads(),
        )
    return output


def round_rows_reference(values: Tensor) -> tuple[Tensor, Tensor]:
    """`round_rows` in torch; the two agree bit for bit."""
    scales = values.float().abs().amax(dim=1, keepdim=True).div_(LARGEST).clamp_min_(SMALLEST_SCALE)
    return (values / scales).round_().to(torch.int8), scales


def scale_rows_reference(product: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`scale_rows` in torch; equal but for the last bit of a product that is added to."""
    scaled = product * scales
    return (scaled if bias is None else scaled + bias).to(dtype)
