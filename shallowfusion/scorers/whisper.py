"""Whisper-type acoustic models of transformers as a scorer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shallowfusion.scorers.base import CachedScorer, DecoderState
from shallowfusion.scorers.slots import SlotPlan
from shallowfusion.text.vocabulary import Vocabulary

__all__ = ["WhisperScorer"]


class WhisperScorer(CachedScorer):
    """Next-token logits of a `WhisperForConditionalGeneration`.

    Price: one decoder pass per step with beams as query positions; cross-attention keys and values are computed once
    and stored once per utterance (for large-v3 in float16: 246 MB each), self-attention keys and values once per
    distinct prefix token. Beyond `window` tokens the decoder has no positions: callers bound `max_new_tokens`.
    """

    has_cross_attention = True

    def __init__(self, model: Any, vocabulary: Vocabulary) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.device = model.device
        self.num_layers = model.config.decoder_layers
        self.window = model.config.max_target_positions

    @torch.inference_mode()
    def encode(self, features: Tensor) -> Tensor:
        """Encoder output [utterances, frames, size] of log-mel features [utterances, mels, frames]."""
        encoder = self.model.model.encoder
        output: Tensor = encoder(features.to(self.device, encoder.conv1.weight.dtype)).last_hidden_state
        return output

    def hidden_states(self, state: DecoderState, token_ids: Tensor, positions: Tensor, plan: SlotPlan) -> Tensor:
        if state.encoder_output is not None and not state.cache.is_updated.get(0):
            self._hear(state.encoder_output, state.cache)
        hidden: Tensor = self.model.model.decoder(
            input_ids=token_ids,
            position_ids=positions,
            attention_mask=plan.mask_for(self.model),
            encoder_hidden_states=state.encoder_output,
            past_key_values=state.cache,
            use_cache=True,
            **plan.options,
        ).last_hidden_state
        return hidden

    def _hear(self, encoder_output: Tensor, cache: Any) -> None:
        """Fills the cross-attention cache as the products leave it; the model would copy keys and values by head."""
        utterances, frames = encoder_output.shape[:2]
        for i, layer in enumerate(self.model.model.decoder.layers):
            attention = layer.encoder_attn
            keys, values = (
                project(encoder_output).view(utterances, frames, attention.num_heads, -1).transpose(1, 2)
                for project in (attention.k_proj, attention.v_proj)
            )
            cache.cross_attention_cache.update(keys, values, i)
            cache.is_updated[i] = True

    def head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.proj_out(hidden)
        return logits
