"""Probability of ranges of tokens: checks a call once and hands it to the backend that fits its tensors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor

from shallowfusion import _native
from shallowfusion.config import require
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.values import RangeLogProbs, TokenRanges

__all__ = ["range_log_probs", "range_log_probs_cpu"]

Backend = Literal["auto", "reference", "cpu", "triton"]
BACKENDS = ("auto", "reference", "cpu", "triton")
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def range_log_probs(
    logits: Tensor,
    ranges: TokenRanges,
    *,
    order: Tensor | None = None,
    log_sums: Tensor | None = None,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> RangeLogProbs:
    """Log of the summed probability of the tokens at places [first, last) of an order of the vocabulary.

    log_probs[i] = log sum over p in [first[i], last[i]) of softmax(logits[row of i] / temperature)[order[p]]

    With the tokens in order of their bytes, those that start with given bytes are one range (`ByteOrder`).

    Price: one read of each logit of rows that have ranges; on the CPU, where log-sums are given and a row's ranges hold
    few tokens, only those. Nothing is subtracted, so the log-prob of a range of 1e-30 is as exact as that of 0.5.

    Args:
        logits: [rows, vocab], float32 | float16 | bfloat16, any row stride.
        ranges: see `TokenRanges`.
        order: int32 [vocab], the token at each place, every id once; None = the ids in order.
        log_sums: float32 [rows], log-sum-exps of logits / temperature from an earlier call; None = worked out.
        backend: "auto" takes Triton for CUDA tensors, else the C++ core; `RangeLogProbs.backend` says which ran.

    Returns:
        A row with NaN or +inf gives NaN (only where it is seen, if log-sums are given); one of -inf alone -inf.

    Raises:
        InvalidArgumentError: a shape, dtype or value outside this contract.

    Source: the sorted vocabulary 2405.14259, 2506.14123; sums by groups are ours.
    """
    _check_logits(logits)
    require(math.isfinite(temperature) and temperature > 0, f"temperature must be above 0, got {temperature!r}.")
    require(backend in BACKENDS, f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    rows, vocab = logits.shape
    device = logits.device
    count = ranges.first.shape[0] if ranges.first.dim() == 1 else -1
    checked = TokenRanges(
        _integers("ranges.row_offsets", ranges.row_offsets, (rows + 1,), device),
        _integers("ranges.first", ranges.first, (count,), device),
        _integers("ranges.last", ranges.last, (count,), device),
    )
    if order is not None:
        order = _integers("order", order, (vocab,), device)
    if log_sums is not None:
        given = tuple(log_sums.shape)
        require(given == (rows,), f"log_sums must have shape [{rows}], got {list(given)}.")
        log_sums = log_sums.to(device, torch.float32).contiguous()
    chosen, reason = _choose(backend, device)
    if chosen == "triton":
        from shallowfusion.kernels.range_lse import range_log_probs_triton

        found: RangeLogProbs = range_log_probs_triton(logits, checked, order, log_sums, temperature)
    elif chosen == "cpu":
        found = range_log_probs_cpu(logits, checked, order, log_sums, temperature)
    else:
        from shallowfusion.kernels.range_lse_reference import range_log_probs_reference

        _check_ranges(checked, vocab)
        found = range_log_probs_reference(logits, checked, order, log_sums, temperature)
    return dataclasses.replace(found, backend=f"{chosen}: {reason}")


def range_log_probs_cpu(
    logits: Tensor,
    ranges: TokenRanges,
    order: Tensor | None = None,
    log_sums: Tensor | None = None,
    temperature: float = 1.0,
    *,
    level: str | None = None,
    threads: int | None = None,
) -> RangeLogProbs:
    """`range_log_probs` in C++: AVX-512, AVX2 or plain code, chosen when called.

    Args:
        level: SIMD level, one of `available_levels()`; None = the fastest.
        threads: None = as many as torch uses.

    Raises:
        InvalidArgumentError: a tensor off the CPU, or a range or an id outside the vocabulary.
    """
    rows, vocab = logits.shape
    stride = logits.stride(0) if rows > 1 else vocab
    address = logits.data_ptr() if rows > 0 else 64  # no row is read
    try:
        log_probs, sums, name = _native.range_log_probs(
            logits=(address, DTYPE_CODES[logits.dtype], rows, vocab, stride),
            temperature=temperature,
            order=None if order is None else _array(order),
            row_offsets=_array(ranges.row_offsets),
            first=_array(ranges.first),
            last=_array(ranges.last),
            log_sums=None if log_sums is None else _array(log_sums),
            level=level,
            threads=torch.get_num_threads() if threads is None else threads,
        )
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(str(error)) from error
    return RangeLogProbs(torch.from_numpy(log_probs), torch.from_numpy(sums), backend=f"cpu ({name})")


def _choose(backend: str, device: torch.device) -> tuple[str, str]:
    if backend == "auto":
        return ("triton", "CUDA tensors") if device.type == "cuda" else ("cpu", f"{device.type} tensors")
    require(
        backend != "cpu" or device.type == "cpu",
        f"backend='cpu' reads CPU tensors, got tensors on {device}; move them or use backend='triton'.",
    )
    return backend, "as asked"


def _check_logits(logits: Tensor) -> None:
    is_tensor = isinstance(logits, Tensor)
    if not (is_tensor and logits.dim() == 2 and logits.dtype in DTYPE_CODES and logits.shape[1] > 0):
        got = f"{logits.dtype} {list(logits.shape)}" if is_tensor else type(logits).__name__
        raise InvalidArgumentError(f"logits must be a float32, float16 or bfloat16 tensor [rows, vocab], got {got}.")
    require(
        logits.stride(1) == 1 or logits.shape[1] == 1,
        f"logits must have unit stride along the vocabulary, got {logits.stride(1)}; call .contiguous().",
    )


def _check_ranges(ranges: TokenRanges, vocab: int) -> None:
    places = torch.cat([ranges.first, ranges.last])
    require(
        bool(((places >= 0) & (places <= vocab)).all()),
        f"ranges must be from 0 to {vocab}, got some outside the vocabulary.",
    )


def _integers(name: str, value: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    fine = isinstance(value, Tensor) and tuple(value.shape) == shape and value.dtype in (torch.int32, torch.int64)
    if not fine:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InvalidArgumentError(f"{name} must be an int32 tensor of shape {list(shape)}, got {got}.")
    return value.to(device, torch.int32).contiguous()


def _array(tensor: Tensor) -> Any:
    if not tensor.is_cpu:
        raise InvalidArgumentError(f"the C++ core reads CPU tensors, got one on {tensor.device}.")
    return tensor.detach().numpy()
