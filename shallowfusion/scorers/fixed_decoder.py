"""A cached decoder over memory that never moves, so that a pass can be captured once and replayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from shallowfusion.scorers.attention import table_backend
from shallowfusion.scorers.base import CachedScorer, Context
from shallowfusion.scorers.slots import SlotLayer, SlotPlan, StoredLayer

__all__ = ["FixedDecoder", "attention_of"]

PADDING = 128  # logits of a row start at a multiple of this, so that the fused step loads them 16 bytes at a time


class FixedStoredLayer(StoredLayer):
    """Cross-attention keys and values that stay at one address from batch to batch."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            return super().update(key_states, value_states)
        self.keys.copy_(key_states)
        self.values.copy_(value_states)
        return self.keys, self.values


@dataclass
class FixedState:
    """What `CachedScorer.hidden_states` reads of a state."""

    cache: Any
    encoder_output: Tensor | None = None


class FixedDecoder:
    """One cached scorer with room for a batch: slots for every token of the longest search, logits in place.

    Attributes written by whoever drives the search, all at fixed addresses: `ids`, `positions` and `slots`, int64
    [utterances, beam_size]; `table`, the slot table; and, unless `reads_table`, `visible`, bool [utterances, 1,
    beam_size, capacity].

    Price: a pass reads the slots in the table, or without one all slots in the mask, used or not; memory as the
    scorer's own with every slot in use.

    Args:
        scorer: its passes are used, its own page pools are not.
        table: int32 [utterances, 3, capacity], see `slot_table`; read by models whose attention does.
    """

    def __init__(self, scorer: CachedScorer, ids: Tensor, positions: Tensor, slots: Tensor, table: Tensor) -> None:
        self.scorer = scorer
        self.ids, self.positions, self.slots, self.table = ids, positions, slots, table
        self.reads_table = table_backend(attention_of(scorer), ids.device) is not None
        shape = (ids.shape[0], 1, ids.shape[1], table.shape[2])
        held = (1, 1, 1, 1) if self.reads_table else shape
        self.visible = torch.zeros(held, dtype=torch.bool, device=ids.device).expand(shape)
        self._state = FixedState(_fixed_cache(scorer))
        self.logits = torch.empty(0)

    @property
    def capacity(self) -> int:
        return int(self.visible.shape[-1])

    @torch.inference_mode()
    def prefill(self, context: Context) -> tuple[Tensor, Tensor]:
        """Read the prompts, one row per utterance, at slots 0, 1, ...; every lane gets the logits of its utterance.

        Rows beyond the context's are padding; they read the first prompt.

        Returns:
            Lengths of the prompts read and their last tokens, int64 [utterances] each.
        """
        device, utterances = self.ids.device, self.ids.shape[0]
        window = self.scorer.window
        given = [prompt[-(window - 1) :] for prompt in context.prompts]
        prompts = [*given, *[given[0]] * (utterances - len(given))]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        padded = torch.zeros((utterances, longest), dtype=torch.int64)
        for i, prompt in enumerate(prompts):
            padded[i, : len(prompt)] = torch.tensor(prompt)
        self._forget(context.encoder_output, utterances)
        position = torch.arange(longest)
        visible = torch.zeros((utterances, 1, longest, self.capacity), dtype=torch.bool)
        causal = position[None, :, None] >= position[None, None, :]
        visible[:, 0, :, :longest] = causal & (position[None, None, :] < lengths[:, None, None])
        positions = position.expand_as(padded)
        plan = SlotPlan(positions.to(device), visible.to(device))
        hidden = self._pass(padded.to(device), positions.to(device), plan)
        last = lengths - 1
        rows = torch.arange(utterances)
        self._keep(
            self.scorer.head(hidden[rows.to(device), last.to(device)])[:, None].expand(-1, self.ids.shape[1], -1)
        )
        return lengths.to(device), padded[rows, last].to(device)

    @torch.inference_mode()
    def read(self) -> None:
        """One pass over what the lanes read next; overwrites `logits`. Waits for nothing."""
        table = self.table if self.reads_table else None
        hidden = self._pass(self.ids, self.positions, SlotPlan(self.slots, self.visible, table=table))
        self._keep(self.scorer.head(hidden))

    def _pass(self, ids: Tensor, positions: Tensor, plan: SlotPlan) -> Tensor:
        cache = self._state.cache
        for layer in getattr(cache, "self_attention_cache", cache).layers:
            layer.plan = plan
        return self.scorer.hidden_states(self._state, ids, positions, plan)  # type: ignore[arg-type]

    def _keep(self, logits: Tensor) -> None:
        """Copy logits [utterances, beam_size, vocab] to their fixed place, rows padded."""
        flat = logits.reshape(-1, logits.shape[-1])
        if self.logits.numel() == 0:
            rows, vocab = flat.shape
            stored = flat.new_zeros((rows, -(-vocab // PADDING) * PADDING))
            self.logits = stored[:, :vocab]
        self.logits.copy_(flat)

    def _forget(self, encoder_output: Tensor | None, utterances: int) -> None:
        """Make ready for another batch; what an earlier one left could be NaN, which masks do not stop."""
        cache = self._state.cache
        for layer in getattr(cache, "self_attention_cache", cache).layers:
            if layer.is_initialized:
                layer.keys.zero_()
                layer.values.zero_()
        if not self.scorer.has_cross_attention:
            return
        assert encoder_output is not None
        cache.is_updated = dict.fromkeys(range(self.scorer.num_layers), False)
        missing = utterances - len(encoder_output)
        padding = encoder_output.new_zeros((missing, *encoder_output.shape[1:]))
        self._state.encoder_output = torch.cat([encoder_output, padding])


def attention_of(scorer: Any) -> str | None:
    """How a scorer's model attends, as transformers calls it; a program is built for one way."""
    found: str | None = scorer.model.config._attn_implementation
    return found


def _fixed_cache(scorer: CachedScorer) -> Cache:
    own = Cache(layers=[SlotLayer() for _ in range(scorer.num_layers)])
    if not scorer.has_cross_attention:
        return own
    layers: Sequence[FixedStoredLayer] = [FixedStoredLayer() for _ in range(scorer.num_layers)]
    return EncoderDecoderCache(own, Cache(layers=list(layers)))
