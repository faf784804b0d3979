"""The fused step: checks a call once and hands it to the backend that fits its tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from shallowfusion.config import require
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.values import Candidates, Combine, Normalize, RowStatistics, SparseBonus, StepRequest, Unmapped

__all__ = ["fused_step", "row_statistics"]

Backend = Literal["auto", "reference", "cpu", "triton"]
LOGIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("auto", "reference", "cpu", "triton")


def fused_step(
    sources: Sequence[Tensor],
    weights: Tensor,
    totals: Tensor,
    *,
    beam_size: int,
    top_k: int,
    end_id: int | None,
    temperatures: Sequence[float] | None = None,
    maps: Sequence[Tensor | None] | None = None,
    unmapped: Any = "neutral",
    token_bias: Tensor | None = None,
    allowed: Tensor | None = None,
    bonus: SparseBonus | None = None,
    length_bonus: float | Tensor = 0.0,
    combine: Combine = "log_linear",
    normalize: Normalize = "none",
    backend: Backend = "auto",
) -> Candidates:
    """Score every continuation of every live hypothesis and keep the best `top_k` of each utterance.

    increment[r, v] = sum_s weights[r, s] * log_prob_s[r, map_s(v)] + length_bonus[r] * (v is not end) + bonus[r, v]
    or, with combine="mixture", log sum_s weights[r, s] * prob_s[r, map_s(v)] in place of the first sum;
    total = totals[r] + increment. Ties go to the lowest (row, token). Nothing of size [rows, vocab] is written.

    Args:
        sources: logits [rows, vocab_s], float32 | float16 | bfloat16, any row stride; rows = utterances * beam_size.
            sources[0] is acoustic and defines the token ids.
        weights: [rows, sources]; 0 takes a source out of its row altogether.
        totals: [rows]; -inf marks a dead row.
        top_k: candidates per utterance.
        end_id: the token that ends a hypothesis; None if there is none.
        temperatures: one per source, above 0; logits are divided by it before the softmax.
        maps: per source None (same ids; ids past that source's vocabulary have no counterpart) or int32 [vocab],
            -1 = no counterpart.
        unmapped: what a source says of tokens without counterpart, one for all or one per source: "neutral" (as much
            as of its favourite), "floor" (as if uniform), "forbid", or a number (that log-prob).
        token_bias: [vocab], added to every row; -inf forbids.
        allowed: int32 [rows, ceil(vocab / 32)], bit b of word w allows token 32 * w + b.
        bonus: sparse additions per row.
        length_bonus: number or [rows], added to every token but the end.
        normalize: "none"; "local": log-softmax of the fused row over what is allowed; "end_factored": language models
            redistribute words, the chance of ending stays acoustic (METHODS 1.5).
        backend: "auto" takes Triton for CUDA tensors, else the C++ core; `Candidates.backend` says which ran and why.

    Returns:
        Candidates [utterances, top_k], best first; flags tell rows in which NaN or +inf was seen.

    Raises:
        InvalidArgumentError: a shape, dtype or value outside this contract.

    Source: log-linear shallow fusion 1503.03535; mixture 2402.05457; the factored end is ours.
    """
    sources = tuple(sources)
    _check_sources(sources)
    rows, vocab = sources[0].shape
    count = len(sources)
    _check_choices(sources[0], beam_size, top_k, end_id, combine, normalize)
    device = sources[0].device
    request = StepRequest(
        sources=sources,
        weights=_float_tensor("weights", weights, (rows, count), device),
        totals=_float_tensor("totals", totals, (rows,), device),
        beam_size=beam_size,
        top_k=top_k,
        end_id=-1 if end_id is None else end_id,
        temperatures=_checked_temperatures(temperatures, count),
        maps=_checked_maps(maps, sources),
        unmapped=_checked_unmapped(unmapped, sources),
        token_bias=None if token_bias is None else _float_tensor("token_bias", token_bias, (vocab,), device),
        allowed=None if allowed is None else _int_tensor("allowed", allowed, (rows, (vocab + 31) // 32), device),
        bonus=None if bonus is None else _checked_bonus(bonus, rows, vocab, device),
        length_bonus=_length_bonus(length_bonus, rows, device),
        combine=combine,
        normalize=normalize,
    )
    if combine == "mixture" and device.type == "cpu":
        positive = bool((request.weights >= 0).all())
        require(positive, "weights of a mixture must be >= 0; a log-linear rule may subtract.")
    chosen, reason = _choose_backend(backend, device)
    return dataclasses.replace(_run(chosen, request), backend=f"{chosen}: {reason}")


def row_statistics(source: Tensor, temperature: float = 1.0, *, backend: Backend = "auto") -> RowStatistics:
    """Log-sum-exp, entropy (nats), largest log-prob and margin of each row of logits [rows, vocab].

    Reads each logit once. A row with NaN or +inf gives NaN.

    Raises:
        InvalidArgumentError: not a matrix of logits, or a temperature that is not above 0.
    """
    _check_sources((source,))
    (temperature,) = _checked_temperatures([temperature], 1)
    chosen, _ = _choose_backend(backend, source.device)
    if chosen == "triton":
        from shallowfusion.kernels.fused_step import row_statistics_triton

        return row_statistics_triton(source, temperature)  # type: ignore[no-any-return]
    if chosen == "cpu":
        from shallowfusion.fusion.native_step import row_statistics_cpu

        return row_statistics_cpu(source, temperature)
    from shallowfusion.kernels.fused_step_reference import row_statistics_reference

    return row_statistics_reference(source, temperature)  # type: ignore[no-any-return]


def _run(backend: str, request: StepRequest) -> Candidates:
    if backend == "triton":
        from shallowfusion.kernels.fused_step import fused_step_triton

        return fused_step_triton(request)  # type: ignore[no-any-return]
    if backend == "cpu":
        from shallowfusion.fusion.native_step import fused_step_cpu

        return fused_step_cpu(request)
    from shallowfusion.kernels.fused_step_reference import fused_step_reference

    return fused_step_reference(request)  # type: ignore[no-any-return]


def _choose_backend(backend: str, device: torch.device) -> tuple[str, str]:
    require(backend in BACKENDS, f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if backend == "auto":
        return ("triton", "CUDA tensors") if device.type == "cuda" else ("cpu", f"{device.type} tensors")
    require(
        backend != "cpu" or device.type == "cpu",
        f"backend='cpu' reads CPU tensors, got tensors on {device}; move them or use backend='triton'.",
    )
    return backend, "as asked"


def _check_choices(
    acoustic: Tensor, beam_size: int, top_k: int, end_id: int | None, combine: str, normalize: str
) -> None:
    rows, vocab = acoustic.shape
    for name, value in (("beam_size", beam_size), ("top_k", top_k)):
        require(isinstance(value, int) and value >= 1, f"{name} must be an integer of at least 1, got {value!r}.")
    require(rows % beam_size == 0, f"rows must be a multiple of beam_size={beam_size}, got {rows} rows of logits.")
    require(combine in ("log_linear", "mixture"), f"combine must be 'log_linear' or 'mixture', got {combine!r}.")
    require(
        normalize in ("none", "local", "end_factored"),
        f"normalize must be 'none', 'local' or 'end_factored', got {normalize!r}.",
    )
    require(
        normalize != "end_factored" or (combine == "log_linear" and end_id is not None),
        "normalize='end_factored' needs combine='log_linear' and an end_id; use 'local' or 'none' here.",
    )
    require(
        end_id is None or 0 <= end_id < vocab,
        f"end_id must be a token id below {vocab}, or None, got {end_id!r}.",
    )


def _is_fine(source: Tensor, first: Tensor) -> bool:
    return (
        isinstance(source, Tensor)
        and source.dim() == 2
        and source.dtype in LOGIT_DTYPES
        and source.numel() > 0
        and source.shape[0] == first.shape[0]
        and source.device == first.device
        and (source.stride(1) == 1 or source.shape[1] == 1)
    )


def _check_sources(sources: tuple[Tensor, ...]) -> None:
    if sources and all(_is_fine(source, sources[0]) for source in sources):
        return  # writing the messages below takes longer than a small step
    require(len(sources) >= 1, "sources must hold at least the acoustic logits, got none.")
    for s, source in enumerate(sources):
        require(
            isinstance(source, Tensor) and source.dim() == 2 and source.dtype in LOGIT_DTYPES,
            f"sources[{s}] must be a float32, float16 or bfloat16 tensor [rows, vocab], got "
            + (f"{source.dtype} {list(source.shape)}." if isinstance(source, Tensor) else f"{type(source).__name__}."),
        )
        require(min(source.shape) > 0, f"sources[{s}] must not be empty, got shape {list(source.shape)}.")
        require(
            source.shape[0] == sources[0].shape[0],
            f"sources[{s}] must have the {sources[0].shape[0]} rows of sources[0], got {source.shape[0]}.",
        )
        require(
            source.device == sources[0].device,
            f"sources[{s}] must be on {sources[0].device} like sources[0], got {source.device}.",
        )
        require(
            source.stride(1) == 1 or source.shape[1] == 1,
            f"sources[{s}] must have unit stride along the vocabulary, got {source.stride(1)}; call .contiguous().",
        )


def _float_tensor(name: str, value: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    require(
        isinstance(value, Tensor) and tuple(value.shape) == shape and value.is_floating_point(),
        f"{name} must be a float tensor of shape {list(shape)}, got "
        + (f"{value.dtype} {list(value.shape)}." if isinstance(value, Tensor) else f"{type(value).__name__}."),
    )
    return value.to(device, torch.float32).contiguous()


def _int_tensor(name: str, value: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    require(
        isinstance(value, Tensor) and tuple(value.shape) == shape and value.dtype in (torch.int32, torch.int64),
        f"{name} must be an int32 tensor of shape {list(shape)}, got "
        + (f"{value.dtype} {list(value.shape)}." if isinstance(value, Tensor) else f"{type(value).__name__}."),
    )
    return value.to(device, torch.int32).contiguous()


def _checked_temperatures(temperatures: Sequence[float] | None, count: int) -> tuple[float, ...]:
    if temperatures is None:
        return (1.0,) * count
    require(len(temperatures) == count, f"temperatures must be one per source ({count}), got {len(temperatures)}.")
    for value in temperatures:
        require(math.isfinite(value) and value > 0, f"a temperature must be finite and above 0, got {value!r}.")
    return tuple(float(value) for value in temperatures)


def _checked_maps(maps: Sequence[Tensor | None] | None, sources: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    if maps is None:
        return (None,) * len(sources)
    require(len(maps) == len(sources), f"maps must be one per source ({len(sources)}), got {len(maps)}.")
    require(maps[0] is None, "maps[0] must be None: the acoustic source defines the token ids.")
    vocab, device = sources[0].shape[1], sources[0].device
    return tuple(
        None if given is None else _int_tensor(f"maps[{s}]", given, (vocab,), device) for s, given in enumerate(maps)
    )


def _checked_unmapped(unmapped: Any, sources: tuple[Tensor, ...]) -> tuple[Unmapped, ...]:
    given = unmapped if isinstance(unmapped, (tuple, list)) else [unmapped] * len(sources)
    require(len(given) == len(sources), f"unmapped must be one for all or one per source, got {len(given)}.")
    return tuple(_one_unmapped(value, source.shape[1]) for value, source in zip(given, sources, strict=True))


def _one_unmapped(value: Any, vocab: int) -> Unmapped:
    if isinstance(value, Unmapped):
        return value
    if value == "floor":
        return Unmapped("floor", -math.log(vocab))
    if value in ("neutral", "forbid"):
        return Unmapped(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value) and value <= 0:
        return Unmapped("floor", float(value))
    raise InvalidArgumentError(f"unmapped must be 'neutral', 'floor', 'forbid' or a log-prob <= 0, got {value!r}.")


def _checked_bonus(bonus: SparseBonus, rows: int, vocab: int, device: torch.device) -> SparseBonus:
    offsets = _int_tensor("bonus.row_offsets", bonus.row_offsets, (rows + 1,), device)
    entries = bonus.token_ids.shape[0]
    tokens = _int_tensor("bonus.token_ids", bonus.token_ids, (entries,), device)
    values = _float_tensor("bonus.values", bonus.values, (entries,), device)
    if device.type == "cpu":  # on an accelerator looking at the numbers would wait for it
        first, ids = offsets.numpy(), tokens.numpy()  # a handful of numbers, for which torch takes ten times as long
        ordered = first[0] == 0 and first[-1] == entries and bool((first[1:] >= first[:-1]).all())
        require(ordered, f"bonus.row_offsets must rise from 0 to the {entries} entries, got {offsets.tolist()[:8]}...")
        inside = entries == 0 or (ids.min() >= 0 and ids.max() < vocab)
        require(bool(inside), f"bonus.token_ids must be from 0 to {vocab - 1}.")
        require(not np.isnan(values.detach().numpy()).any(), "bonus.values must not hold NaN.")
    return SparseBonus(offsets, tokens, values)


def _length_bonus(value: float | Tensor, rows: int, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return _float_tensor("length_bonus", value, (rows,), device)
    require(math.isfinite(value), f"length_bonus must be finite, got {value!r}.")
    return torch.full((rows,), float(value), device=device)
