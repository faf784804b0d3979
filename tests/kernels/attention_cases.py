"""Calls for the tests of attention for beams, and the comparison of a backend's answer with the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shallowfusion.kernels.beam_attention import plan_frame_attention, plan_slot_attention, plan_write
from shallowfusion.kernels.beam_attention_reference import frame_attention_reference, slot_attention_reference

HALF, FULL = (torch.float16, torch.bfloat16), torch.float32


@dataclass(frozen=True)
class Sizes:
    """Of one call."""

    heads: int
    key_heads: int
    dim: int
    queries: int
    dtype: torch.dtype = torch.float32
    utterances: int = 3
    slots: int = 70


def noise(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def slot_call(sizes: Sizes, seed: int = 0, density: float = 0.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, a pool with more places than utterances, and a table in no order; utterance 1 has no entries.

    Slots that no query sees hold NaN, as memory may that nobody has written.
    """
    generator = torch.Generator().manual_seed(seed)
    query = noise(sizes.utterances, sizes.queries, sizes.heads, sizes.dim, seed=seed, dtype=sizes.dtype)
    pool = (sizes.utterances + 1, sizes.slots, sizes.key_heads, sizes.dim)
    keys, values = (noise(*pool, seed=seed + i, dtype=sizes.dtype) for i in (1, 2))
    seen = torch.rand((sizes.utterances, sizes.queries, sizes.slots), generator=generator) < density
    seen[1 % sizes.utterances] = False
    seen[:, :, :3] = False
    seen[0, 0] = False  # a row that is dead
    places = torch.randperm(sizes.utterances + 1, generator=generator)[: sizes.utterances]
    for place, own in zip(places.tolist(), seen, strict=True):
        unseen = ~own.any(dim=0)
        keys[place, unseen], values[place, unseen] = torch.nan, torch.nan
    order = torch.randperm(sizes.slots, generator=generator)
    return query, keys, values, table_of(seen[:, :, order], order.expand(sizes.utterances, -1), places)


def table_of(seen: Tensor, slots: Tensor, places: Tensor) -> Tensor:
    """A slot table, bit by bit: seen [utterances, queries, entries], slots [utterances, entries]."""
    utterances, queries, entries = seen.shape
    table = torch.zeros((utterances, 2 + -(-queries // 32), max(2, entries + 5)), dtype=torch.int64)
    table[:, 0, 0], table[:, 0, 1] = places, entries
    table[:, 1, :entries] = slots
    table[:, :, entries + 1 :] = -1  # nothing beyond the entries is read
    for q in range(queries):
        table[:, 2 + q // 32, :entries] |= seen[:, q].long() << (q % 32)
    return table.to(torch.int32) if bool((table < 2**31).all()) else (table - (table >= 2**31) * 2**32).to(torch.int32)


def frame_call(sizes: Sizes, frames: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values as a projection leaves them, lengths of which one is 0."""
    query = noise(sizes.utterances, sizes.queries, sizes.heads, sizes.dim, seed=seed, dtype=sizes.dtype)
    own = (sizes.utterances, sizes.key_heads, frames, sizes.dim)
    keys, values = (noise(*own, seed=seed + i, dtype=sizes.dtype).transpose(1, 2) for i in (1, 2))
    lengths = torch.tensor([frames, 0, frames // 2 + 1] * sizes.utterances, dtype=torch.int32)[: sizes.utterances]
    return query, keys, values, lengths


def mask_of(table: Tensor, queries: int, slots: int) -> Tensor:
    """bool [utterances, 1, queries, slots] of a table."""
    mask = torch.zeros((len(table), 1, queries, slots), dtype=torch.bool)
    for i, rows in enumerate(table.tolist()):
        for entry in range(rows[0][1]):
            for q in range(queries):
                mask[i, 0, q, rows[1][entry]] |= bool(rows[2 + q // 32][entry] >> (q % 32) & 1)
    return mask


def torch_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """scaled_dot_product_attention in the dtype of the queries; what is not seen is 0, not NaN."""
    unseen = ~mask.any(dim=2)[:, 0]
    keys, values = (part.masked_fill(unseen[:, :, None, None], 0.0) for part in (keys, values))
    group = query.shape[2] // keys.shape[2]
    own = [part.repeat_interleave(group, dim=2).transpose(1, 2) for part in (keys, values)]
    found = torch.nn.functional.scaled_dot_product_attention(query.transpose(1, 2), *own, attn_mask=mask, scale=scale)
    return torch.where(mask.any(dim=3)[..., None], found, 0.0).transpose(1, 2)


def assert_in_budget(found: Tensor, exact: Tensor, torchs: Tensor) -> None:
    """In each row [dim] our largest error is at most twice torch's in the same dtype, plus 1e-5."""
    assert not torch.isnan(found).any()
    ours, theirs = ((one.double() - exact).abs().amax(dim=-1) for one in (found, torchs))
    assert bool((ours <= 2 * theirs + 1e-5).all()), f"errors {ours.max()}, torch's {theirs.max()}"


def exact_slots(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, scale: float) -> Tensor:
    return slot_attention_reference(query.double(), keys, values, table, scale)


def exact_frames(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None, scale: float) -> Tensor:
    return frame_attention_reference(query.double(), keys, values, lengths, scale)


def gate_sizes() -> Iterator[Sizes]:
    """Every kind of tile that the launcher can choose, at head sizes that models have."""
    for heads, key_heads, dim, queries in (
        (20, 20, 64, 5), (12, 12, 64, 32), (14, 2, 64, 5), (71, 1, 64, 5), (20, 20, 80, 5), (16, 16, 96, 5),
        (16, 16, 128, 5), (16, 2, 128, 5), (71, 1, 128, 5), (8, 1, 256, 5),
    ):  # fmt: skip
        yield Sizes(heads, key_heads, dim, queries, torch.float16, 8, 448)
    yield Sizes(20, 20, 64, 5, torch.bfloat16, 8, 448)
    for heads, key_heads, dim, queries in (
        (20, 20, 64, 5), (12, 12, 64, 32), (32, 1, 64, 5), (71, 1, 64, 5), (16, 16, 128, 5), (16, 2, 128, 5),
    ):  # fmt: skip
        yield Sizes(heads, key_heads, dim, queries, torch.float32, 8, 448)


def attention_launches() -> Iterator[tuple[str, Any]]:
    """Launches for the compile gate; another number of queries, slots or frames must need no variant of its own."""
    for sizes in gate_sizes():
        name = f"attention {sizes.dtype} {sizes.heads}/{sizes.key_heads} x {sizes.dim} queries {sizes.queries}"
        common = sizes.heads == 20  # where the head is large or shared, merge and write are as elsewhere
        for launch in _launches(sizes, splits=(1, 3)):
            if common or launch.kernel.__name__.startswith("attend"):
                yield name, launch
    typical = Sizes(20, 20, 64, 5, torch.float16, 8, 448)
    yield from (("attention split the other way", launch) for launch in _launches(typical, splits=(3, 1)))
    for other in (Sizes(20, 20, 64, 7, torch.float16, 3, 480), Sizes(16, 16, 64, 6, torch.float16, 1, 96)):
        yield from (("same variants", launch) for launch in _launches(other, (1, 3)) if "HEADS" not in launch.constants)


def _launches(sizes: Sizes, splits: tuple[int, int]) -> Iterator[Any]:
    query = torch.zeros((sizes.utterances, sizes.queries, sizes.heads, sizes.dim), dtype=sizes.dtype)
    pool = torch.zeros((sizes.utterances, sizes.slots, sizes.key_heads, sizes.dim), dtype=sizes.dtype)
    stored = torch.zeros((sizes.utterances, sizes.key_heads, 1500, sizes.dim), dtype=sizes.dtype).transpose(1, 2)
    table = torch.zeros((sizes.utterances, 3, sizes.slots), dtype=torch.int32)
    yield from plan_slot_attention(query, pool, pool, table, 1.0, splits=splits[0])[0]
    yield from plan_frame_attention(query, stored, stored, None, 1.0, splits=splits[1])[0]
    new = pool[:, : sizes.queries]
    yield plan_write(new, new, pool, pool, torch.zeros((sizes.utterances, sizes.queries), dtype=torch.int64))
