"""The fused step and the row statistics in C++: AVX-512, AVX2 or plain code, chosen when called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shallowfusion import _native
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.values import Candidates, RowStatistics, StepRequest, Unmapped

__all__ = ["available_levels", "fused_step_cpu", "row_statistics_cpu"]

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
POLICY_CODES = {"neutral": 0, "floor": 1, "forbid": 2}
ANY_POLICY = Unmapped("neutral")


def available_levels() -> tuple[str, ...]:
    """SIMD levels this machine runs, slowest first: of `scalar`, `avx2`, `avx512`."""
    return tuple(_native.fused_step_levels())


def fused_step_cpu(request: StepRequest, *, level: str | None = None, threads: int | None = None) -> Candidates:
    """Score every continuation of every row and keep the best `top_k` of each utterance.

    Log-linear rows whose sources share token ids read each logit once: rows * sum(vocab_s * itemsize) bytes, which is
    the bound; mixtures, mapped sources and logits that leave float32's range take about four reads.
    The result has the same bits for any number of threads.

    Args:
        level: SIMD level, one of `available_levels()`; None = the fastest.
        threads: None = as many as torch uses (torch.get_num_threads()).

    Raises:
        InvalidArgumentError: a tensor is not on the CPU, not contiguous, or of a wrong shape, dtype or value.
    """
    sources = [
        _source(source, temperature, token_map, unmapped)
        for source, temperature, token_map, unmapped in zip(
            request.sources, request.temperatures, request.maps, request.unmapped, strict=True
        )
    ]
    if any(source.shape[0] != request.num_rows for source in request.sources):
        raise InvalidArgumentError(f"every source must have the {request.num_rows} rows of the first.")
    bonus = request.bonus
    try:
        found = _native.fused_step(
            sources=sources,
            weights=_array(request.weights, "weights"),
            totals=_array(request.totals, "totals"),
            beam_size=request.beam_size,
            top_k=request.top_k,
            end_id=request.end_id,
            token_bias=_array(request.token_bias, "token_bias"),
            allowed=_array(request.allowed, "allowed"),
            bonus=None
            if bonus is None
            else (
                _array(bonus.row_offsets, "bonus.row_offsets"),
                _array(bonus.token_ids, "bonus.token_ids"),
                _array(bonus.values, "bonus.values"),
            ),
            length_bonus=_array(request.length_bonus, "length_bonus"),
            combine=request.combine,
            normalize=request.normalize,
            level=level,
            threads=torch.get_num_threads() if threads is None else threads,
        )
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(str(error)) from error
    return Candidates(
        totals=torch.from_numpy(found["totals"]),
        parent_rows=torch.from_numpy(found["parent_rows"]),
        token_ids=torch.from_numpy(found["token_ids"]),
        parts=torch.from_numpy(found["parts"]),
        flags=torch.from_numpy(found["flags"]),
        backend=f"cpu ({found['level']}; rows in one pass {found['one_pass_rows']}, in several "
        f"{found['general_rows']}, shared between threads {found['split_rows']})",
    )


def row_statistics_cpu(
    source: Tensor, temperature: float = 1.0, *, level: str | None = None, threads: int | None = None
) -> RowStatistics:
    """Log-sum-exp, entropy, largest log-prob and margin of each row of `source` [rows, vocab].

    Reads each logit once. A row that holds NaN or +inf gives NaN everywhere; a row of -inf gives -inf, 0, -inf, 0.

    Raises:
        InvalidArgumentError: `source` is not a CPU tensor [rows, vocab] of a supported dtype and unit stride.
    """
    try:
        found = _native.row_statistics(
            source=_source(source, temperature, None, ANY_POLICY),
            rows=source.shape[0],
            level=level,
            threads=torch.get_num_threads() if threads is None else threads,
        )
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(str(error)) from error
    return RowStatistics(
        log_sum_exp=torch.from_numpy(found["log_sum_exp"]),
        entropy=torch.from_numpy(found["entropy"]),
        max_log_prob=torch.from_numpy(found["max_log_prob"]),
        margin=torch.from_numpy(found["margin"]),
    )


def _source(source: Tensor, temperature: float, token_map: Tensor | None, unmapped: Unmapped) -> _native.Source:
    """One source as the binding takes it; the caller keeps the tensor alive."""
    if not source.is_cpu or source.dim() != 2 or source.dtype not in DTYPE_CODES:
        raise InvalidArgumentError(
            "a source must be a CPU tensor [rows, vocab] of float32, float16 or bfloat16, "
            f"got {source.dtype} {list(source.shape)} on {source.device}."
        )
    rows, vocab = source.shape
    row_stride, unit_stride = source.stride()
    if vocab > 1 and unit_stride != 1:
        raise InvalidArgumentError(f"a source needs stride 1 along the vocabulary, got {unit_stride}.")
    stride = row_stride if rows > 1 else vocab
    address = source.data_ptr() if rows > 0 else 64  # no row is read
    code = DTYPE_CODES[source.dtype]
    policy = POLICY_CODES[unmapped.policy]
    return address, code, vocab, stride, temperature, _array(token_map, "map"), policy, unmapped.floor


def _array(tensor: Tensor | None, name: str) -> Any:
    """The tensor's memory as a numpy array."""
    if tensor is None:
        return None
    if not tensor.is_cpu:
        raise InvalidArgumentError(f"{name} must be on the CPU, got {tensor.device}.")
    return (tensor.detach() if tensor.requires_grad else tensor).numpy()
