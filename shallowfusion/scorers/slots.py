"""K/V slots that beams share: rows move by changing what they see, never by moving what is stored.

A forward pass of a decoder runs with one batch row per utterance and its hypotheses as query positions. Every query
writes its key and value into a slot of that utterance and sees the slots of its own history (METHODS 1.7, KERNELS 4.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from shallowfusion.scorers.attention import table_backend, write_slots
from shallowfusion.scorers.page_pool import PagePool
from shallowfusion.scorers.slot_tables import slot_table

__all__ = ["BeamSlots", "SlotLayer", "SlotPlan", "StoredLayer", "decoder_cache", "moves_to_front"]

SMALLEST_CAPACITY = 64


@dataclass
class SlotPlan:
    """Where the queries of one forward pass write and what they see; shared by all layers.

    Args:
        slots: int64 [utterances, queries].
        visible: bool [utterances, 1, queries, slots], on any device.
        lanes: int64 [utterances], where in the cache each of them lies; None = in order, and then nothing is copied.
        backend: reads the slot table; None while the mask is read.
    """

    slots: Tensor
    visible: Tensor
    lanes: Tensor | None = None
    backend: str | None = field(default=None, init=False)

    @property
    def num_slots(self) -> int:
        return int(self.visible.shape[-1])

    def mask_for(self, model: Any) -> Tensor:
        """What the model is given as its attention mask: `visible`, or the slot table if its attention reads that."""
        self.backend = table_backend(model.config._attn_implementation, self.slots.device)
        if self.backend is None:
            self.visible = self.visible.to(self.slots.device)
            return self.visible
        return slot_table(self.visible[:, 0], self.lanes).to(self.slots.device)[:, None]


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one self-attention layer, [utterances, slots, heads, head_dim], written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.plan: SlotPlan | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        utterances, heads, _, dim = key_states.shape
        self.keys = key_states.new_zeros((utterances, SMALLEST_CAPACITY, heads, dim))
        self.values = value_states.new_zeros((utterances, SMALLEST_CAPACITY, heads, value_states.shape[-1]))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store the queries' [utterances, heads, queries, head_dim] and return views of all slots in use."""
        assert self.plan is not None
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots, used = self.plan.slots, self.plan.num_slots
        self.keys = _with_capacity(self.keys, used)
        self.values = _with_capacity(self.values, used)
        chosen = self.plan.lanes
        lanes = torch.arange(slots.shape[0], device=slots.device) if chosen is None else chosen
        backend = self.plan.backend
        new = (key_states.transpose(1, 2), value_states.transpose(1, 2))
        write_slots(*new, self.keys, self.values, slots, lanes, backend or "sdpa")
        if backend is not None:  # the table says where in the whole of it to look
            return self.keys.transpose(1, 2), self.values.transpose(1, 2)
        if chosen is not None:
            return self.keys[chosen, :used].transpose(1, 2), self.values[chosen, :used].transpose(1, 2)
        active = slots.shape[0]
        return self.keys[:active, :used].transpose(1, 2), self.values[:active, :used].transpose(1, 2)

    def keep(self, moves: Sequence[tuple[int, int]], used: int) -> None:
        """Copy whole utterances (source, target) into the places of those that left."""
        for source, target in moves:
            self.keys[target, :used] = self.keys[source, :used]
            self.values[target, :used] = self.values[source, :used]

    def get_seq_length(self) -> int:
        return 0 if self.plan is None else self.plan.num_slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Nothing moves: the plan of the next pass says what each row sees."""


class StoredLayer(CacheLayerMixin):  # type: ignore[misc]
    """Cross-attention keys and values, [utterances, heads, frames, head_dim], computed once per utterance."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states, value_states
        self.is_initialized = True
        return key_states, value_states

    def keep(self, moves: Sequence[tuple[int, int]], active: int) -> None:
        if not self.is_initialized:  # a decoder without recording
            return
        for source, target in moves:
            self.keys[target] = self.keys[source]
            self.values[target] = self.values[source]
        self.keys, self.values = self.keys[:active], self.values[:active]

    def get_seq_length(self) -> int:
        return int(self.keys.shape[2]) if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams are query positions of their utterance: there is nothing per beam to move."""


def _with_capacity(stored: Tensor, slots: int) -> Tensor:
    """`stored` itself, or a copy with at least twice the room when `slots` do not fit."""
    capacity = stored.shape[1]
    if slots <= capacity:
        return stored
    grown = stored.new_zeros((stored.shape[0], max(slots, 2 * capacity), *stored.shape[2:]))
    grown[:, :capacity] = stored
    return grown


def decoder_cache(num_layers: int, cross_attention: bool) -> Cache:
    """A transformers cache of slot layers; with stored cross-attention layers for encoder-decoder models."""
    own = Cache(layers=[SlotLayer() for _ in range(num_layers)])
    if not cross_attention:
        return own
    return EncoderDecoderCache(own, Cache(layers=[StoredLayer() for _ in range(num_layers)]))


def moves_to_front(kept: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Fill the places of those that left from the back, so that few utterances are copied.

    Returns:
        The copies (source, target) and, for each place of the new batch, the old place it now holds.
    """
    stay = {place for place in kept if place < len(kept)}
    free = [place for place in range(len(kept)) if place not in stay]
    moves = list(zip([place for place in kept if place >= len(kept)], free, strict=True))
    order = list(range(len(kept)))
    for source, target in moves:
        order[target] = source
    return moves, order


class BeamSlots:
    """Which slots the hypotheses of each utterance own: one page pool per utterance, pages of one slot.

    Price: a few microseconds per utterance and step; no tensor is touched.
    """

    def __init__(self, num_utterances: int, slots_per_utterance: int, device: torch.device) -> None:
        self._pools = [PagePool(slots_per_utterance, page_size=1) for _ in range(num_utterances)]
        self._rows = [np.array([pool.create()], dtype=np.int64) for pool in self._pools]
        self._device = device

    @property
    def num_used(self) -> int:
        """Slots in use by all utterances."""
        return sum(pool.num_used for pool in self._pools)

    def high_water(self) -> int:
        return int(max(pool.high_water for pool in self._pools))

    def prefill(self, lengths: Sequence[int]) -> SlotPlan:
        """Plan of a pass over prompts [utterances, longest], right-padded; one row per utterance."""
        for pool, rows, length in zip(self._pools, self._rows, lengths, strict=True):
            pool.append(int(rows[0]), int(length))
        longest = max(lengths)
        position = torch.arange(longest)
        slots = position.expand(len(lengths), longest)
        causal = position[None, :, None] >= position[None, None, :]
        real = position[None, None, :] < torch.tensor(lengths)[:, None, None]
        return self._plan(slots, causal & real)

    def fork(self, parents: np.ndarray) -> None:
        """Row k of each utterance continues from its old row parents[utterance, k]."""
        for i, pool in enumerate(self._pools):
            self._rows[i] = pool.reorder(self._rows[i], parents[i])

    def append(self, advancing: np.ndarray) -> SlotPlan:
        """Plan of a pass with one query per row; rows that do not advance write where nobody looks."""
        scratch = 0
        slots = np.full(advancing.shape, -1, dtype=np.int64)
        for i, (pool, rows) in enumerate(zip(self._pools, self._rows, strict=True)):
            chosen = np.flatnonzero(advancing[i])
            slots[i, chosen] = pool.append_each(rows[chosen])
            scratch = max(scratch, pool.high_water)
        idle = slots < 0
        width = scratch + int(idle.any())
        slots[idle] = scratch
        visible = np.zeros((*advancing.shape, width), dtype=bool)
        for i, (pool, rows) in enumerate(zip(self._pools, self._rows, strict=True)):
            seen = pool.visibility(rows)
            visible[i, :, : seen.shape[1]] = seen
        if idle.any():
            visible[idle, scratch] = True  # a query that sees nothing would be NaN
        return self._plan(torch.from_numpy(slots), torch.from_numpy(visible))

    def restart(self, lengths: np.ndarray) -> SlotPlan:
        """Rows of length > 0 forget their history; plan of a pass over that many fresh tokens of each, laid end to end.

        Args:
            lengths: [utterances, rows]; rows of length 0 stay as they are and have no query in the pass.
        """
        for i, pool in enumerate(self._pools):
            for k in np.flatnonzero(lengths[i]):
                pool.release(int(self._rows[i][k]))
                self._rows[i][k] = pool.create()
        taken = [
            [pool.append(int(row), int(n)).slots if n else None for row, n in zip(rows, own, strict=True)]
            for pool, rows, own in zip(self._pools, self._rows, lengths, strict=True)
        ]
        scratch, width = self.high_water(), int(lengths.sum(axis=1).max())
        slots = np.full((len(lengths), width), scratch, dtype=np.int64)
        visible = np.zeros((len(lengths), width, scratch + 1), dtype=bool)
        visible[:, :, scratch] = True
        for i, per_row in enumerate(taken):
            start = 0
            for own_slots in per_row:
                if own_slots is not None:
                    query = np.arange(start, start + len(own_slots))
                    slots[i, query] = own_slots
                    visible[i, query[:, None], own_slots[None, :]] = np.tri(len(own_slots), dtype=bool)
                    visible[i, query, scratch] = False
                    start += len(own_slots)
        return self._plan(torch.from_numpy(slots), torch.from_numpy(visible))

    def keep(self, order: Sequence[int]) -> None:
        """Place i of the new batch holds what was at order[i]; the others release their slots."""
        for place in set(range(len(self._pools))) - set(order):
            for row in self._rows[place]:
                self._pools[place].release(int(row))
        self._pools = [self._pools[place] for place in order]
        self._rows = [self._rows[place] for place in order]

    def _plan(self, slots: Tensor, visible: Tensor) -> SlotPlan:
        return SlotPlan(slots.to(self._device), visible[:, None])
