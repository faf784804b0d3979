"""The fused step and the row statistics in Triton: checks, memory and launches; the kernels are in fused_step_*.py.

    one pass   fuse_logits -> row_select -> merge_rows                       (each logit loaded once)
    two pass   source_statistics -> fuse_increments -> row_select -> merge_rows

Two passes serve mixtures, vocabulary maps, and sources that lack different sets of tokens without forbidding them.
A sparse bonus adds mark_bonus in front. Nothing synchronises with the device, so a step can be captured in a CUDA graph
once its kernels are compiled (run the same step once before).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.kernels import fused_step_device as codes
from shallowfusion.kernels.fused_step_select import finish_row_statistics, merge_rows, row_select
from shallowfusion.kernels.fused_step_stream import fuse_increments, fuse_logits, mark_bonus, source_statistics
from shallowfusion.values import Candidates, RowStatistics, StepRequest, Unmapped

__all__ = [
    "Launch",
    "fused_step_triton",
    "load_limit",
    "plan_fused_step",
    "plan_row_statistics",
    "row_statistics_triton",
]

MAX_SOURCES = 4
MAX_TOP_K = 64
MAX_ROWS = 65535  # the second axis of a grid
GROUP = codes.GROUP.value
NORMALIZE = {
    "none": codes.NORMALIZE_NONE.value,
    "local": codes.LOCAL.value,
    "end_factored": codes.END_FACTORED.value,
}
BONUS_CHUNK = 64
THREE_PROGRAMS = 168  # registers a thread that let three programs of 128 threads share a multiprocessor


@dataclass(frozen=True)
class Launch:
    """One kernel launch, not yet made: `kernel[grid](*arguments, **constants)`.

    Args:
        constants: constexpr arguments and compiler options; together with the argument types they fix the variant.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, int | bool]

    def run(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.constants)


def fused_step_triton(request: StepRequest, *, block: int | None = None) -> Candidates:
    """The fused step on the GPU; the contract is that of fused_step_reference.

    Args:
        request: all tensors on one device.
        block: tokens per program, a power of two >= 32; None chooses by the number of rows.
    Raises:
        InvalidArgumentError: over 4 sources, a mapped acoustic source, top_k over 64 (and over the vocabulary), over
            65,535 rows, or beam_size * vocab of 2^31 or more.
    """
    launches, candidates = plan_fused_step(request, block=block)
    for launch in launches:
        launch.run()
    return candidates


def row_statistics_triton(source: Tensor, temperature: float = 1.0, *, block: int | None = None) -> RowStatistics:
    """Statistics of each row of `source` [rows, vocab]; the contract is that of row_statistics_reference.

    Reads each logit once and writes 16 bytes per row and split: 0.96 us per 40 rows of 51,866 half-precision logits.
    """
    launches, statistics = plan_row_statistics(source, temperature, block=block)
    for launch in launches:
        launch.run()
    return statistics


def plan_fused_step(request: StepRequest, *, block: int | None = None) -> tuple[list[Launch], Candidates]:
    """Allocates the outputs and work space of a step and lists its launches in order."""
    _check(request)
    work = _Work(request, block or _block(request.num_rows))
    launches = []
    if request.bonus is not None:
        launches.append(_mark(request, work))
    if work.keys == codes.ONE_PASS.value:
        launches.append(_one_pass(request, work))
    else:
        launches += _two_pass(request, work)
    candidates = _outputs(request)
    launches += [_select(request, work, candidates), _merge(request, work, candidates)]
    return launches, candidates


def plan_row_statistics(
    source: Tensor, temperature: float = 1.0, *, block: int | None = None
) -> tuple[list[Launch], RowStatistics]:
    """Allocates the outputs and work space of the row statistics and lists their launches in order."""
    rows, vocab = source.shape
    block = block or _block(rows)
    splits = triton.cdiv(vocab, block)
    partials = torch.empty((rows, 4, splits), dtype=torch.float32, device=source.device)
    outputs = torch.empty((4, rows), dtype=torch.float32, device=source.device).unbind(0)
    inverse, width = 1.0 / temperature, _merge_width(splits)
    stream = (source,), (source.stride(0),), (load_limit(source),), (_encode(vocab),), (inverse,), partials, 1, -1
    launches = [
        Launch(source_statistics, (splits, rows), stream, _constants(N=1, FULL=True, BLOCK=block)),
        Launch(finish_row_statistics, (rows,), (partials, splits, inverse, *outputs), _constants(1, SPLITS=width)),
    ]
    return launches, RowStatistics(*outputs)


def load_limit(logits: Tensor) -> int:
    """How many tokens of each row may be loaded: a multiple of 16 where alignment and the memory behind the last row
    allow it, which makes the loads 16 bytes wide; else the vocabulary."""
    rows, vocab = logits.shape
    padded = triton.cdiv(vocab, 16) * 16
    stride = logits.stride(0)
    elements = logits.untyped_storage().nbytes() // logits.element_size()
    reachable = logits.storage_offset() + (rows - 1) * stride + padded <= elements
    return padded if stride % 16 == 0 and logits.data_ptr() % 16 == 0 and reachable else vocab


class _Work:
    """Sizes and work space of one step."""

    def __init__(self, request: StepRequest, block: int) -> None:
        self.block = block
        self.sources = len(request.sources)
        self.vocabs = tuple(_encode(source.shape[1]) for source in request.sources)
        self.strides = tuple(source.stride(0) for source in request.sources)
        self.limits = tuple(load_limit(source) for source in request.sources)
        self.temperatures = tuple(1.0 / temperature for temperature in request.temperatures)
        self.floors = tuple(_floor(unmapped) for unmapped in request.unmapped)
        self.keys, self.boundary = _keys(request)
        self.normalize = NORMALIZE[request.normalize]
        self.left_out = request.end_id if request.normalize == "end_factored" else -1
        self.extras = not (request.token_bias is None and request.allowed is None and request.bonus is None)
        self.gained = self.extras or self.keys != codes.ONE_PASS.value
        self.splits = triton.cdiv(max(source.shape[1] for source in request.sources), block)
        self.groups = triton.cdiv(request.vocab_size, block) * (block // GROUP)
        self.per_row = max(2, _ceil(min(request.top_k, request.vocab_size)))
        self.words = triton.cdiv(request.vocab_size, GROUP)
        rows, device = request.num_rows, request.totals.device
        self.statistics = torch.empty((rows, self.sources + 2, 2, self.splits), dtype=torch.float32, device=device)
        self.maxima = torch.empty((rows, 2, self.groups), dtype=torch.float32, device=device)
        self.row_constants = torch.empty((rows, 3 * self.sources + 4), dtype=torch.float32, device=device)
        self.gains = torch.empty((rows, self.per_row + 1), dtype=torch.float32, device=device)
        self.candidate_tokens = torch.empty((rows, self.per_row), dtype=torch.int32, device=device)
        # an absent array is never read: its bound is 0, and some tensor stands in for its pointer
        bias, allowed = request.token_bias, request.allowed
        self.bias = (request.totals, 0) if bias is None else (bias, load_limit(bias[None]))
        self.allowed = (request.weights.view(torch.int32), 0) if allowed is None else (allowed, self.words)
        self.marked = (request.weights.view(torch.int32), 0)
        if request.bonus is not None:
            self.marked = (torch.zeros((rows, self.words), dtype=torch.int32, device=device), self.words)


def _check(request: StepRequest) -> None:
    sources, top_k = len(request.sources), request.top_k
    if sources > MAX_SOURCES:
        raise InvalidArgumentError(
            f"the triton backend fuses at most {MAX_SOURCES} sources, got {sources}; use backend='reference' or 'cpu'"
        )
    if request.maps[0] is not None:
        raise InvalidArgumentError("the acoustic source defines the token ids and takes no map, got one; pass None")
    if min(top_k, request.vocab_size) > MAX_TOP_K:
        raise InvalidArgumentError(
            f"the triton backend keeps at most {MAX_TOP_K} candidates per utterance, got top_k {top_k}; "
            "lower it or use backend='reference' or 'cpu'"
        )
    if request.num_rows > MAX_ROWS:
        raise InvalidArgumentError(f"at most {MAX_ROWS} rows per step, got {request.num_rows}; split the batch")
    if request.beam_size * request.vocab_size >= 2**31:
        raise InvalidArgumentError(
            f"beam_size * vocab must be below 2**31, got {request.beam_size} * {request.vocab_size}; lower beam_size"
        )


def _keys(request: StepRequest) -> tuple[int, int]:
    """The kind of ranking keys, and the first token that lacks a row constant in the one-pass kind."""
    vocab = request.vocab_size
    if request.combine == "mixture":
        return codes.MIXTURE.value, vocab
    if any(given is not None for given in request.maps):
        return codes.LOG_LINEAR.value, vocab
    pairs = zip(request.sources, request.unmapped, strict=True)
    shorter = {source.shape[1] for source, unmapped in pairs if source.shape[1] < vocab and unmapped.policy != "forbid"}
    if len(shorter) > 1:
        return codes.LOG_LINEAR.value, vocab
    return codes.ONE_PASS.value, min(shorter, default=vocab)


def _mark(request: StepRequest, work: _Work) -> Launch:
    marked, words = work.marked
    arguments = (request.bonus.row_offsets, request.bonus.token_ids, marked, words)
    return Launch(mark_bonus, (request.num_rows,), arguments, _constants(1, BLOCK=BONUS_CHUNK))


def _one_pass(request: StepRequest, work: _Work) -> Launch:
    arguments = (
        request.sources, work.strides, work.limits, work.vocabs, work.temperatures, work.floors, request.weights,
        *work.bias, *work.allowed, *work.marked,
        work.statistics, work.maxima, work.groups, request.vocab_size, work.boundary, request.end_id, work.left_out,
    )  # fmt: skip
    constants = _constants(N=work.sources, NORMALIZE=work.normalize, EXTRAS=work.extras, BLOCK=work.block)
    if work.sources <= 2:
        constants["maxnreg"] = THREE_PROGRAMS  # older compilers would take 200 and leave room for two
    return Launch(fuse_logits, (work.splits, request.num_rows), arguments, constants)


def _two_pass(request: StepRequest, work: _Work) -> list[Launch]:
    grid = (work.splits, request.num_rows)
    planes = work.sources + 2
    first = (
        request.sources, work.strides, work.limits, work.vocabs, work.temperatures,
        work.statistics, planes, work.left_out,
    )  # fmt: skip
    second = (
        request.sources, work.strides, work.limits, work.vocabs, request.maps, work.temperatures,
        work.floors, request.weights, *work.bias, *work.allowed, *work.marked,
        work.statistics, work.splits, work.maxima, work.groups, request.vocab_size, request.end_id, work.left_out,
    )  # fmt: skip
    constants = _constants(
        N=work.sources, KEYS=work.keys, NORMALIZE=work.normalize, SPLITS=_merge_width(work.splits), BLOCK=work.block
    )
    return [
        Launch(source_statistics, grid, first, _constants(N=work.sources, FULL=False, BLOCK=work.block)),
        Launch(fuse_increments, grid, second, constants),
    ]


def _select(request: StepRequest, work: _Work, candidates: Candidates) -> Launch:
    bonus = request.bonus
    entries = (work.candidate_tokens, work.candidate_tokens, work.gains, 0)
    if bonus is not None:
        entries = (bonus.row_offsets, bonus.token_ids, bonus.values, 1)
    arguments = (
        request.sources, work.strides, work.vocabs, request.maps, work.temperatures, work.floors,
        request.weights, request.totals, request.length_bonus, *work.bias, *work.allowed, *work.marked, *entries,
        work.statistics, work.splits, work.maxima, work.groups, request.vocab_size, work.boundary, request.end_id,
        work.left_out, work.normalize, work.candidate_tokens, work.gains, work.row_constants, candidates.flags,
    )  # fmt: skip
    constants = _constants(
        N=work.sources,
        KEYS=work.keys,
        EXTRAS=work.gained,
        SPLITS=_merge_width(work.splits),
        GROUPS=max(_ceil(work.groups), work.per_row),
        P=work.per_row,
        ENTRIES=BONUS_CHUNK,
    )
    return Launch(row_select, (request.num_rows,), arguments, constants)


def _merge(request: StepRequest, work: _Work, candidates: Candidates) -> Launch:
    arguments = (
        request.sources, work.strides, work.vocabs, request.maps, work.temperatures, request.weights,
        work.candidate_tokens, work.gains, work.row_constants, request.vocab_size, request.end_id,
        candidates.totals, candidates.parent_rows, candidates.token_ids, candidates.parts,
    )  # fmt: skip
    width = max(2, _ceil(request.top_k))
    lanes = max(width, _ceil(request.beam_size * (work.per_row + 1)))
    constants = _constants(
        1 if lanes <= 128 else 4,
        N=work.sources,
        KEYS=work.keys,
        EXTRAS=work.gained,
        BEAM=request.beam_size,
        P=work.per_row,
        TOP_K=request.top_k,
        LANES=lanes,
        WIDTH=width,
    )
    return Launch(merge_rows, (request.num_rows // request.beam_size,), arguments, constants)


def _outputs(request: StepRequest) -> Candidates:
    utterances, device = request.num_rows // request.beam_size, request.totals.device
    shape = (utterances, request.top_k)
    return Candidates(
        totals=torch.empty(shape, dtype=torch.float32, device=device),
        parent_rows=torch.empty(shape, dtype=torch.int64, device=device),
        token_ids=torch.empty(shape, dtype=torch.int64, device=device),
        parts=torch.empty((*shape, len(request.sources)), dtype=torch.float32, device=device),
        flags=torch.empty(request.num_rows, dtype=torch.bool, device=device),
        backend="triton",
    )


def _floor(unmapped: Unmapped) -> float:
    """The policy as one number, since floats are never specialised: see source_constants."""
    return {"neutral": float("nan"), "forbid": float("-inf")}.get(unmapped.policy, float(unmapped.floor))


def _encode(size: int) -> int:
    """A size that goes into a tuple: see decoded."""
    return 2 * size + 1


def _block(rows: int) -> int:
    """Tokens per program: fewer where there are few rows, so that all of the device has work."""
    return 2048 if rows <= 10 else 4096


def _merge_width(splits: int) -> int:
    """Lanes that merge partial statistics: 32 up to a vocabulary of 65,536, so that one variant serves both blocks."""
    return max(32, _ceil(splits))


def _ceil(number: int) -> int:
    return triton.next_power_of_2(number)


def _constants(num_warps: int = 4, **constants: int | bool) -> dict[str, int | bool]:
    # contraction would let two kernels round one ranking key differently
    return {**constants, "num_warps": num_warps, "enable_fp_fusion": False}
