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
from shallowfusion.scorers.packed_rows import PackedRows
from shallowfusion.scorers.page_pool import PagePool
from shallowfusion.scorers.slot_tables import slot_table

__all__ = ["BeamSlots", "SlotLayer", "SlotPlan", "StoredLayer", "decoder_cache", "moves_to_front", "roomy"]

SMALLEST_CAPACITY = 64


@dataclass
class SlotPlan:
    """Where the queries of one forward pass write and what they see; shared by all layers.

    Args:
        slots: int64 [utterances, queries]; with `rows` [rows, 1].
        visible: bool [utterances, 1, queries, slots], on any device.
        lanes: int64 [utterances], where in the cache each of them lies; None = in order, and then nothing is copied.
        table: the slot table, where somebody keeps one; of `visible` only the shape then counts. None = made of it.
        rows: the rows of a pass [1, rows] and whose queries they are; None = the pass is [utterances, queries].
        backend: reads the slot table; None while the mask is read.
    """

    slots: Tensor
    visible: Tensor
    lanes: Tensor | None = None
    table: Tensor | None = None
    rows: PackedRows | None = None
    backend: str | None = field(default=None, init=False)

    @property
    def num_slots(self) -> int:
        return int(self.visible.shape[-1])

    @property
    def options(self) -> dict[str, Any]:
        """What the model hands through to its attention beside the mask."""
        return {} if self.rows is None else {"packed_rows": self.rows}

    def mask_for(self, model: Any) -> Tensor:
        """What the model is given as its attention mask: `visible`, or the slot table if its attention reads that."""
        self.backend = table_backend(model.config._attn_implementation, self.slots.device)
        if self.backend is None:
            self.visible = self.visible.to(self.slots.device)
            return self.visible
        if self.table is not None:
            return self.table[:, None]
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
        chosen, rows = self.plan.lanes, self.plan.rows
        active = slots.shape[0] if rows is None else rows.num_utterances
        if used > self.keys.shape[1]:
            kept = active if chosen is None else self.keys.shape[0]
            self._reserve(kept, kept, used)
        lanes = torch.arange(active, device=slots.device) if chosen is None else chosen
        backend = self.plan.backend
        new = (key_states.transpose(1, 2), value_states.transpose(1, 2))
        if rows is not None:
            new, lanes = (new[0].transpose(0, 1), new[1].transpose(0, 1)), rows.owners  # [rows, 1, heads, head_dim]
        write_slots(*new, self.keys, self.values, slots, lanes, backend or "sdpa")
        if backend is not None:  # the table says where in the whole of it to look
            return self.keys.transpose(1, 2), self.values.transpose(1, 2)
        if chosen is not None:
            return self.keys[chosen, :used].transpose(1, 2), self.values[chosen, :used].transpose(1, 2)
        return self.keys[:active, :used].transpose(1, 2), self.values[:active, :used].transpose(1, 2)

    def keep(self, moves: Sequence[tuple[int, int]], used: int) -> None:
        """Copy whole utterances (source, target) into the places of those that left."""
        for source, target in moves:
            self.keys[target, :used] = self.keys[source, :used]
            self.values[target, :used] = self.values[source, :used]

    def reserve(self, active: int, joining: int, slots: int) -> None:
        """Room for utterances that enter beside the `active` ones, all of whom use at most that many slots."""
        together = active + joining
        if together > self.keys.shape[0] or slots > self.keys.shape[1]:
            self._reserve(together, active, slots)

    def admit(self, fresh: SlotLayer, active: int, joining: int, used: int) -> None:
        """Copy `used` slots of each utterance of another layer behind the `active` ones of this; `reserve` comes first.

        What an earlier utterance left in the other slots is cleared: a NaN is NaN even where the mask hides it.
        """
        together = active + joining
        for own, other in ((self.keys, fresh.keys), (self.values, fresh.values)):
            own[active:together, :used] = other[:joining, :used]
            own[active:together, used:] = 0

    def preload(self, keys: Tensor, values: Tensor) -> None:
        """Take what was read before, [utterances, slots, heads, head_dim], as the first slots of all utterances."""
        self.keys, self.values = keys, values
        self._reserve(len(keys), len(keys), keys.shape[1])
        self.is_initialized = True

    def _reserve(self, utterances: int, active: int, slots: int) -> None:
        """Room for that much, and no more than `roomy` says; what the first `active` utterances hold is kept."""
        grown = [_grown(own, utterances, active, slots) for own in (self.keys, self.values)]
        self.keys, self.values = grown  # both or, when memory is short, none

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

    def __init__(self) -> None:
        super().__init__()
        self._stored: tuple[Tensor, Tensor] | None = None  # with room for more utterances than run

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
        if self._stored is None:
            self._stored = (self.keys, self.values)
        for source, target in moves:
            self.keys[target] = self.keys[source]
            self.values[target] = self.values[source]
        self.keys, self.values = self.keys[:active], self.values[:active]

    def reserve(self, joining: int) -> None:
        """Room for utterances that enter; those that are here are copied only if there is none."""
        if not self.is_initialized:
            return
        if self._stored is None:
            self._stored = (self.keys, self.values)
        active = self.keys.shape[0]
        if active + joining > self._stored[0].shape[0]:
            stored = (self._room(self.keys, active + joining), self._room(self.values, active + joining))
            stored[0][:active], stored[1][:active] = self.keys, self.values
            self._stored = stored
            self.keys, self.values = stored[0][:active], stored[1][:active]

    @staticmethod
    def _room(own: Tensor, utterances: int) -> Tensor:
        """Frames outside heads in memory, as they come."""
        _, heads, frames, dim = own.shape
        return own.new_empty((roomy(utterances), frames, heads, dim)).transpose(1, 2)

    def admit(self, fresh: StoredLayer, joining: int) -> None:
        """Put the utterances of another layer behind those of this; `reserve` comes first."""
        if not self.is_initialized:
            return
        assert self._stored is not None
        keys, values = self._stored
        active, together = self.keys.shape[0], self.keys.shape[0] + joining
        keys[active:together], values[active:together] = fresh.keys[:joining], fresh.values[:joining]
        self.keys, self.values = keys[:together], values[:together]

    def get_seq_length(self) -> int:
        return int(self.keys.shape[2]) if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams are query positions of their utterance: there is nothing per beam to move."""


def roomy(count: int) -> int:
    """How many utterances or slots get room where `count` are wanted: up to a quarter more, in few distinct sizes."""
    step = 1 << max(0, count.bit_length() - 3)
    return -(-count // step) * step


def _grown(stored: Tensor, utterances: int, active: int, slots: int) -> Tensor:
    """A copy of the first `active` utterances with room for [utterances, slots, ...], zeros elsewhere."""
    grown = stored.new_zeros((roomy(utterances), max(SMALLEST_CAPACITY, roomy(slots)), *stored.shape[2:]))
    held = min(stored.shape[1], grown.shape[1])
    grown[:active, :held] = stored[:active, :held]
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

    def prefill(self, lengths: Sequence[int], known: Sequence[int] = ()) -> SlotPlan:
        """Plan of a pass over prompts [utterances, longest], right-padded; one row per utterance.

        Args:
            lengths: of the whole prompts.
            known: tokens of each whose keys and values are there already; the pass is over the others.
        """
        for pool, rows, length in zip(self._pools, self._rows, lengths, strict=True):
            pool.append(int(rows[0]), int(length))
        before = torch.tensor(list(known) or [0] * len(lengths))[:, None]
        longest = int((torch.tensor(lengths) - before[:, 0]).max())
        slots = before + torch.arange(longest)
        position = torch.arange(int(slots.max()) + 1 if longest else 0)
        causal = slots[:, :, None] >= position[None, None, :]
        real = position[None, None, :] < torch.tensor(lengths)[:, None, None]
        return self._plan(slots, causal & real)

    def fork(self, parents: np.ndarray) -> None:
        """Row k of each utterance continues from its old row parents[utterance, k]."""
        for i, pool in enumerate(self._pools):
            self._rows[i] = pool.reorder(self._rows[i], parents[i])

    def append(self, advancing: np.ndarray, packed: np.ndarray | None = None) -> SlotPlan:
        """Plan of a pass with one query per row; rows that do not advance write where nobody looks.

        Args:
            advancing: bool [utterances, rows].
            packed: bool likewise, the rows that the pass is over, laid end to end; None = all, utterance by utterance.
        """
        scratch = 0
        slots = np.full(advancing.shape, -1, dtype=np.int64)
        for i, (pool, rows) in enumerate(zip(self._pools, self._rows, strict=True)):
            chosen = np.flatnonzero(advancing[i])
            slots[i, chosen] = pool.append_each(rows[chosen])
            scratch = max(scratch, pool.high_water)
        idle = slots < 0 if packed is None else packed & (slots < 0)
        width = scratch + int(idle.any())
        slots[idle] = scratch
        visible = np.zeros((*advancing.shape, width), dtype=bool)
        for i, (pool, rows) in enumerate(zip(self._pools, self._rows, strict=True)):
            seen = pool.visibility(rows)
            visible[i, :, : seen.shape[1]] = seen
        if idle.any():
            visible[idle, scratch] = True  # a query that sees nothing would be NaN
        if packed is None:
            return self._plan(torch.from_numpy(slots), torch.from_numpy(visible))
        plan = self._plan(torch.from_numpy(slots[packed][:, None]), torch.from_numpy(visible))
        plan.rows = PackedRows.of(packed, self._device)
        return plan

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

    def admit(self, fresh: BeamSlots, rows: int) -> None:
        """Take over the utterances of another, one row each, behind those of this; their other rows are dead."""
        for pool, own in zip(fresh._pools, fresh._rows, strict=True):
            dead = [pool.create() for _ in range(rows - len(own))]
            self._pools.append(pool)
            self._rows.append(np.array([*own, *dead], dtype=np.int64))
        fresh._pools, fresh._rows = [], []

    def keep(self, order: Sequence[int]) -> None:
        """Place i of the new batch holds what was at order[i]; the others release their slots."""
        for place in set(range(len(self._pools))) - set(order):
            for row in self._rows[place]:
                self._pools[place].release(int(row))
        self._pools = [self._pools[place] for place in order]
        self._rows = [self._rows[place] for place in order]

    def _plan(self, slots: Tensor, visible: Tensor) -> SlotPlan:
        return SlotPlan(slots.to(self._device), visible[:, None])
