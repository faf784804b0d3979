"""Attention for beams in Triton: memory and launches; the kernels are in beam_attention_device.py.

    attend_slots | attend_frames -> merge_splits (where the walk is split)
    write_slots

Nothing synchronises with the device. A launch fits every step of a search: lengths are read from memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.kernels.beam_attention_device import (
    WORD,
    attend_frames,
    attend_slots,
    merge_splits,
    write_slots,
)
from shallowfusion.kernels.fused_step import Launch

__all__ = [
    "frame_attention_triton",
    "plan_frame_attention",
    "plan_slot_attention",
    "plan_write",
    "slot_attention_triton",
    "write_slots_triton",
]

LOG2_E = 1.4426950408889634
MOST_DIM = 256
FOUR_PROGRAMS = 128  # registers a thread; without a limit of its own the compiler spills a few to get below 80
MOST_REGISTERS = 255
PROGRAMS = 264  # two for each multiprocessor of an H100 or H200
MOST_SPLITS = 32
LEAST_SPLIT = 2  # blocks of slots a split walks at least: a shorter walk takes less than the merge


def slot_attention_triton(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    scale: float,
    *,
    splits: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention over slots on the GPU; the contract is that of slot_attention_reference.

    Args:
        splits: parts in which the entries are walked; None chooses by the number of programs.
        out: [utterances, queries, heads, dim], contiguous; None = new, in the dtype of the queries.
    Raises:
        InvalidArgumentError: head size over 256 or over 128 query heads per key head.
    """
    launches, found = plan_slot_attention(query, keys, values, table, scale, splits=splits, out=out)
    for launch in launches:
        launch.run()
    return found


def frame_attention_triton(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor | None,
    scale: float,
    *,
    splits: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention over frames on the GPU; the contract is that of frame_attention_reference."""
    launches, found = plan_frame_attention(query, keys, values, lengths, scale, splits=splits, out=out)
    for launch in launches:
        launch.run()
    return found


def write_slots_triton(
    new_keys: Tensor, new_values: Tensor, keys: Tensor, values: Tensor, slots: Tensor, places: Tensor | None = None
) -> None:
    """Writes new keys and values into their slots on the GPU; the contract is that of write_slots_reference."""
    plan_write(new_keys, new_values, keys, values, slots, places).run()


def plan_slot_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    scale: float,
    *,
    splits: int | None = None,
    out: Tensor | None = None,
) -> tuple[list[Launch], Tensor]:
    """Allocates output and work space and lists the launches in order."""
    width = table.shape[2]
    shape = _Shape(query, keys, out)
    count = splits or shape.splits(triton.cdiv(width, shape.block) // LEAST_SPLIT)
    work = shape.work(count)
    arguments = (
        *_strided(query), *_strided(keys), *_strided(values), table, table.stride(0), width, shape.out, *work,
        scale * LOG2_E, shape.queries, shape.heads, count,
    )  # fmt: skip
    return shape.launches(attend_slots, arguments, count, work), shape.out


def plan_frame_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor | None,
    scale: float,
    *,
    splits: int | None = None,
    out: Tensor | None = None,
) -> tuple[list[Launch], Tensor]:
    """Allocates output and work space and lists the launches in order."""
    frames = keys.shape[1]
    shape = _Shape(query, keys, out)
    count = splits or shape.splits(triton.cdiv(frames, shape.block))
    work = shape.work(count)
    arguments = (
        *_strided(query), *_strided(keys), *_strided(values), lengths, shape.out, *work, scale * LOG2_E, shape.queries,
        shape.heads, frames, count,
    )  # fmt: skip
    return shape.launches(attend_frames, arguments, count, work), shape.out


def plan_write(
    new_keys: Tensor, new_values: Tensor, keys: Tensor, values: Tensor, slots: Tensor, places: Tensor | None = None
) -> Launch:
    """The one launch of the K/V write."""
    utterances, queries, heads, dim = new_keys.shape
    arguments = (
        *_strided(new_keys), *_strided(new_values), *_strided(keys), *_strided(values), slots, *slots.stride(), places,
    )  # fmt: skip
    every, wide = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
    warps = max(1, min(4, every * wide * keys.element_size() // 512))  # 16 bytes a thread
    constants = {"HEADS": heads, "ALL": every, "DIM": dim, "WIDE": wide, "num_warps": warps}
    return Launch(write_slots, (queries, utterances), arguments, constants)


class _Shape:
    """Sizes of one call and the variant they need."""

    def __init__(self, query: Tensor, keys: Tensor, out: Tensor | None) -> None:
        self.utterances, self.queries, self.heads, self.dim = query.shape
        self.key_heads = keys.shape[2]
        self.group = self.heads // self.key_heads
        reason = refusal(self.group, self.dim, keys.dtype)
        if reason is not None:
            raise InvalidArgumentError(f"{reason}; use backend='sdpa'.")
        self.out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
        self.wide = max(16, triton.next_power_of_2(self.dim))
        usual, _ = _row_limits(self.wide, keys.dtype)
        self.per_program = max(1, min(WORD.value, triton.next_power_of_2(self.queries), _floor(usual // self.group)))
        self.rows = max(16, triton.next_power_of_2(self.per_program * self.group))
        self.blocks = triton.cdiv(self.queries, self.per_program)
        self.block, self.warps = _tile(self.wide, self.rows, keys.dtype)
        small = self.rows == 16 and self.wide <= 64 and keys.dtype != torch.float32
        self.registers = FOUR_PROGRAMS if small else MOST_REGISTERS
        self.upcast = triton.knobs.runtime.interpret and keys.dtype == torch.bfloat16

    def splits(self, most: int) -> int:
        """Enough for every multiprocessor to have two programs, and no more than `most`."""
        programs = self.utterances * self.key_heads * self.blocks
        return max(1, min(triton.cdiv(PROGRAMS, programs), most, MOST_SPLITS))

    def work(self, splits: int) -> tuple[Tensor | None, Tensor | None]:
        if splits == 1:
            return None, None
        rows, device = self.out.numel() // self.dim, self.out.device
        parts = torch.empty((rows, splits, self.dim), dtype=torch.float32, device=device)
        return parts, torch.empty((rows, splits, 2), dtype=torch.float32, device=device)

    def launches(
        self, kernel: Any, arguments: tuple[Any, ...], splits: int, work: tuple[Tensor | None, Tensor | None]
    ) -> list[Launch]:
        constants = {
            "GROUP": self.group, "QUERIES": self.per_program, "ROWS": self.rows, "DIM": self.dim, "WIDE": self.wide,
            "BLOCK": self.block, "STAGES": 2, "UPCAST": self.upcast, "num_warps": self.warps,
            "maxnreg": self.registers,
        }  # fmt: skip
        grid = (self.key_heads * splits, self.utterances, self.blocks)
        found = [Launch(kernel, grid, arguments, constants)]
        if splits > 1:
            width = {"DIM": self.dim, "WIDE": self.wide, "SPLITS": triton.next_power_of_2(splits), "num_warps": 1}
            found.append(Launch(merge_splits, (self.out.numel() // self.dim,), (*work, self.out, splits), width))
        return found


def refusal(group: int, dim: int, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot hold a query's heads in registers; None if they can."""
    if dim > MOST_DIM:
        return f"the triton backend takes head sizes up to {MOST_DIM}, got {dim}"
    _, most = _row_limits(max(16, triton.next_power_of_2(dim)), dtype)
    if group > most:
        return f"the triton backend takes up to {most} query heads per key head of size {dim} in {dtype}, got {group}"
    return None


def _row_limits(wide: int, dtype: torch.dtype) -> tuple[int, int]:
    """Query rows a program holds as a rule, and where one query has more: the most that do not spill."""
    if dtype == torch.float32:
        return (32, 128) if wide <= 64 else (32, 32) if wide <= 128 else (0, 0)
    return (64, 128) if wide <= 128 else (16, 16)


def _tile(wide: int, rows: int, dtype: torch.dtype) -> tuple[int, int]:
    """Slots or frames per step and warps of a program: what the compile gate found not to spill."""
    if dtype == torch.float32:
        return (32, 4) if wide <= 64 and rows <= 32 else (16, 8)
    if wide <= 128:
        return 64 if rows <= 64 else 32, 4 if rows <= 32 else 8
    return 32, 8


def _floor(number: int) -> int:
    """The largest power of two that is not larger; 0 of 0."""
    return 1 << (number.bit_length() - 1) if number else 0


def _strided(tensor: Tensor) -> tuple[Tensor, int, int, int]:
    """A tensor [.., .., .., dim] as the kernels take it; features must be contiguous."""
    return tensor, tensor.stride(0), tensor.stride(1), tensor.stride(2)
