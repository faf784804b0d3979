"""Rows of floats as int8 with one scale each, and products of such rows as floats again; in C++, with plain twins."""

from __future__ import annotations

import torch
from torch import Tensor

from shallowfusion import _native
from shallowfusion.config import require
from shallowfusion.scorers.weight_memory import WeightMemory

__all__ = [
    "few_int8_rows", "has_int8_rows", "int8_rows", "int8_rows_reference", "packed_int8", "round_rows",
    "round_rows_reference", "scale_rows", "scale_rows_reference", "unpacked_int8",
]  # fmt: skip

LARGEST = 127  # int8 without -128, so that zero is in the middle
SMALLEST_SCALE = 1e-30
MANY_ROWS = 1 << 31
MOST_INPUTS = 1 << 16  # so that a sum of products fits 32 bits
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


def has_int8_rows(inputs: int) -> bool:
    """Whether this machine multiplies rows of so many inputs with packed int8 weights (AVX-512 VNNI)."""
    return inputs % 4 == 0 and 0 < inputs <= MOST_INPUTS and _native.has_int8_product()


def few_int8_rows(inputs: int) -> int:
    """Up to how many rows `int8_rows` is ahead of oneDNN's product (docs/speed.md)."""
    return MANY_ROWS if inputs % 64 == 0 and _native.has_int8_tiles() else 24


def packed_int8(weights: Tensor, memory: WeightMemory | None = None) -> Tensor:
    """Dense int8 weights [outputs, inputs] as `int8_rows` reads them; uint8, outputs rounded up to 16.

    Args:
        memory: where they go; None = memory of their own.
    """
    outputs, inputs = weights.shape
    packed = (memory or WeightMemory(piece=0)).empty(
        _native.packed_int8_size(outputs=outputs, inputs=inputs), torch.uint8
    )
    _native.pack_int8(weights=weights.data_ptr(), outputs=outputs, inputs=inputs, packed=packed.data_ptr())
    return packed


def unpacked_int8(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """What `packed_int8` was given."""
    blocks = packed.view(-1, inputs // 4, 16, 4).permute(0, 2, 1, 3).reshape(-1, inputs)
    return (blocks[:outputs].to(torch.int16) - 128).to(torch.int8)


def int8_rows(
    values: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows rounded to int8 times int8 weights, scaled back: `round_rows`, the exact product, `scale_rows` in one call.

    Price: the packed weights once, up to 48 rows. More than 6 rows go to matrix units (AMX) where there are any and
    inputs is a multiple of 64, else to vector units (VNNI); the result does not depend on which.

    Args:
        values: float32 or bfloat16 [rows, inputs] on the CPU.
        packed: by `packed_int8`.
        scales: float32 [outputs], of the weights.
        bias: float32 [outputs] or None.
        dtype: of the result, float32 or bfloat16.

    Returns:
        [rows, outputs].
    """
    values = values.contiguous()
    rows, inputs = values.shape
    output = torch.empty((rows, len(scales)), dtype=dtype)
    if rows:
        _native.int8_product(
            values=values.data_ptr(),
            dtype=DTYPE_CODES[values.dtype],
            packed=packed.data_ptr(),
            scales=scales.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            output=output.data_ptr(),
            output_dtype=DTYPE_CODES[dtype],
            rows=rows,
            inputs=inputs,
            outputs=len(scales),
            threads=torch.get_num_threads(),
        )
    return output


def int8_rows_reference(
    values: Tensor, weights: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`int8_rows` in torch, over unpacked int8 weights [outputs, inputs]; the two agree bit for bit."""
    whole, row_scales = round_rows_reference(values)
    exact = (whole.double() @ weights.double().T).float() * scales
    return scale_rows_reference(exact, row_scales, bias, dtype)


def round_rows_reference(values: Tensor) -> tuple[Tensor, Tensor]:
    """`round_rows` in torch; the two agree bit for bit."""
    scales = values.float().abs().amax(dim=1, keepdim=True).div_(LARGEST).clamp_min_(SMALLEST_SCALE)
    return (values / scales).round_().to(torch.int8), scales


def scale_rows_reference(product: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`scale_rows` in torch; equal but for the last bit of a product that is added to."""
    scaled = product * scales
    return (scaled if bias is None else scaled + bias).to(dtype)
