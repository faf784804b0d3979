"""Attention of a few queries per utterance over its frames on the CPU: keys and values are read once for all."""

from __future__ import annotations

import torch
from torch import Tensor

from shallowfusion import _native

__all__ = ["frame_attention_native", "is_native"]

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
LANES, MOST_DIM = 16, 256


def is_native(query: Tensor, keys: Tensor) -> bool:
    """Whether the C++ core can hold heads and memory like these."""
    dim = query.shape[-1]
    return query.is_cpu and dim % LANES == 0 and dim <= MOST_DIM and query.stride(-1) == keys.stride(-1) == 1


def frame_attention_native(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor | None,
    scale: float,
    level: str | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """`frame_attention` of `shallowfusion.scorers.attention`, which checks shapes; dim a multiple of 16 up to 256.

    Sums are float32 whatever the dtype. Price: keys and values once, in the order of memory; scores of an utterance,
    float32 [heads, queries, frames], in the cache.

    Args:
        level: one of `_native.fused_step_levels()`; None = the fastest.
        starts: int64 [utterances + 1], the first query of each utterance in [1, queries, heads, dim], and behind them
            the number of queries; None = queries are [utterances, queries, heads, dim].
    """
    queries, heads, dim = query.shape[1:]
    output = torch.empty(query.shape)
    if not output.numel() or not keys.shape[1]:
        return output.zero_().to(query.dtype)
    asked = query.float()
    _native.frame_attention(
        query=asked.data_ptr(),
        query_strides=_strides(asked),
        keys=keys.data_ptr(),
        key_strides=_strides(keys),
        values=values.data_ptr(),
        value_strides=_strides(values),
        dtype=DTYPE_CODES[keys.dtype],
        output=output.data_ptr(),
        lengths=0 if lengths is None else lengths.contiguous().data_ptr(),
        starts=0 if starts is None else starts.contiguous().data_ptr(),
        sizes=(keys.shape[0], queries, heads, keys.shape[2], keys.shape[1], dim),
        scale=scale,
        level=level,
        threads=torch.get_num_threads(),
    )
    return output.to(query.dtype)


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)
