"""A cached decoder over memory that never moves, so that a pass can be captured once and replayed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from shallowfusion.scorers.attention import table_backend
from shallowfusion.scorers.base import CachedScorer, Context
from shallowfusion.scorers.slots import SlotLayer, SlotPlan, StoredLayer

__all__ = ["FixedDecoder", "attention_of", "sent"]

PADDING = 128  # logits of a row start at a multiple of this, so that the fused step loads them 16 bytes at a time


class FixedSlotLayer(SlotLayer):
    """Keys and values that stay at one address: every slot of every place is there from the start.

    Args:
        num_places, capacity: utterances and slots of each.
    """

    def __init__(self, num_places: int, capacity: int) -> None:
        super().__init__()
        self._size = (num_places, capacity)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        heads = key_states.shape[1]
        self.keys = key_states.new_zeros((*self._size, heads, key_states.shape[-1]))
        self.values = value_states.new_zeros((*self._size, heads, value_states.shape[-1]))
        self.is_initialized = True

    def clear(self, places: Tensor) -> None:
        """Zeros where an utterance has left: what it left could be NaN, which masks do not stop."""
        if self.is_initialized:
            self.keys.index_fill_(0, places, 0)
            self.values.index_fill_(0, places, 0)


class FixedStoredLayer(StoredLayer):
    """Cross-attention keys and values that stay at one address, whoever comes."""

    def take(self, places: Tensor, fresh: StoredLayer, num_places: int) -> None:
        """Copy the utterances of another layer into these places."""
        if not self.is_initialized:
            _, heads, frames, dim = fresh.keys.shape
            self.keys, self.values = (
                own.new_zeros((num_places, frames, heads, dim)).transpose(1, 2) for own in (fresh.keys, fresh.values)
            )
            self.is_initialized = True
        self.keys.index_copy_(0, places, fresh.keys)
        self.values.index_copy_(0, places, fresh.values)


@dataclass
class FixedState:
    """What `CachedScorer.hidden_states` reads of a state."""

    cache: Any
    encoder_output: Tensor | None = None


class FixedDecoder:
    """One cached scorer with room for some utterances: slots for every token of the longest search, logits in place.

    Attributes written by whoever drives the searches, all at fixed addresses: `ids`, `positions` and `slots`, int64
    [places, beam_size]; `table`, the slot table; and, unless `reads_table`, `visible`, bool [places, 1, beam_size,
    capacity].

    Price: a pass reads the slots in the table, or without one all slots in the mask, used or not; memory as the
    scorer's own with every slot of every place in use.

    Args:
        scorer: its passes are used, its own page pools are not.
        table: int32 [places, 3, capacity], see `slot_table`; read by models whose attention does.
    """

    def __init__(self, scorer: CachedScorer, ids: Tensor, positions: Tensor, slots: Tensor, table: Tensor) -> None:
        self.scorer = scorer
        self.ids, self.positions, self.slots, self.table = ids, positions, slots, table
        self.reads_table = table_backend(attention_of(scorer), ids.device) is not None
        num_places, _, capacity = table.shape
        shape = (num_places, 1, ids.shape[1], capacity)
        held = (1, 1, 1, 1) if self.reads_table else shape
        self.visible = torch.zeros(held, dtype=torch.bool, device=ids.device).expand(shape)
        self._own = Cache(layers=[FixedSlotLayer(num_places, capacity) for _ in range(scorer.num_layers)])
        self._crossing: list[FixedStoredLayer] = []
        self._state = FixedState(self._own)
        if scorer.has_cross_attention:
            self._crossing = [FixedStoredLayer() for _ in range(scorer.num_layers)]
            self._state = FixedState(EncoderDecoderCache(self._own, Cache(layers=list(self._crossing))))
        self.logits = torch.empty(0)

    @property
    def num_places(self) -> int:
        return int(self.ids.shape[0])

    @property
    def capacity(self) -> int:
        return int(self.visible.shape[-1])

    @property
    def num_bytes(self) -> int:
        """Of keys and values."""
        layers = [*self._own.layers, *self._crossing]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if layer.is_initialized)

    @torch.inference_mode()
    def start(self, places: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Read prompts at slots 0, 1, ... of some places; every lane there gets the logits of its utterance.

        What other places hold is not touched, and nothing moves.

        Args:
            places: int64, distinct, on the device, one for each utterance of the context.

        Returns:
            Lengths of the prompts read and their last tokens, int64 [utterances] each, on the device.
        """
        device, window = self.ids.device, self.scorer.window
        prompts = [prompt[-(window - 1) :] for prompt in context.prompts]
        longest = max(len(prompt) for prompt in prompts)
        rows = [[len(prompt), *prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        given = sent(torch.tensor(rows), device)
        lengths, ids = given[:, 0], given[:, 1:]
        for layer in self._own.layers:
            layer.clear(places)
        position = torch.arange(longest, device=device)
        visible = (position[:, None] >= position) & (position < lengths[:, None, None])
        positions = position.expand_as(ids)
        fresh = [StoredLayer() for _ in self._crossing]
        state = FixedState(self._own)
        if fresh:
            state = FixedState(EncoderDecoderCache(self._own, Cache(layers=list(fresh))), context.encoder_output)
        hidden = self._pass(state, ids, positions, SlotPlan(positions, visible[:, None], lanes=places))
        for own, new in zip(self._crossing, fresh, strict=True):
            own.take(places, new, self.num_places)
        if fresh:
            self._hears(context.encoder_output)
        last = torch.arange(len(prompts), device=device), lengths - 1
        self._keep(self.scorer.head(hidden[last]), places)
        return lengths, ids[last]

    @torch.inference_mode()
    def read(self) -> None:
        """One pass over what the lanes read next; overwrites `logits`. Waits for nothing."""
        table = self.table if self.reads_table else None
        plan = SlotPlan(self.slots, self.visible, table=table)
        self.logits.copy_(self.scorer.head(self._pass(self._state, self.ids, self.positions, plan)).flatten(0, 1))

    def _pass(self, state: FixedState, ids: Tensor, positions: Tensor, plan: SlotPlan) -> Tensor:
        for layer in self._own.layers:
            layer.plan = plan
        return self.scorer.hidden_states(state, ids, positions, plan)  # type: ignore[arg-type]

    def _keep(self, logits: Tensor, places: Tensor) -> None:
        """Copy logits [utterances, vocab] to every lane of these places; rows are padded."""
        lanes, vocab = self.ids.shape[1], logits.shape[1]
        if self.logits.numel() == 0:
            self.logits = logits.new_zeros((self.ids.numel(), -(-vocab // PADDING) * PADDING))[:, :vocab]
        by_place = self.logits.view(self.num_places, lanes, vocab)
        by_place.index_copy_(0, places, logits[:, None].expand(-1, lanes, -1))

    def _hears(self, encoder_output: Tensor | None) -> None:
        """Let passes use the stored keys and values; of the encoder's output they look at the shape alone."""
        assert encoder_output is not None
        self._state.cache.is_updated = dict.fromkeys(range(self.scorer.num_layers), True)
        shape = (self.num_places, *encoder_output.shape[1:])
        self._state.encoder_output = encoder_output.new_zeros(1, 1, 1).expand(shape)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor from the CPU on a device; the host does not wait for what the device has yet to do."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def attention_of(scorer: Any) -> str | None:
    """How a scorer's model attends, as transformers calls it; a program is built for one way."""
    found: str | None = scorer.model.config._attn_implementation
    return found
