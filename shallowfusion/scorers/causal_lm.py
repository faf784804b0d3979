"""Causal language models of transformers (GPT-2, Llama, Qwen types) as a scorer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shallowfusion.scorers.base import CachedScorer, DecoderState
from shallowfusion.scorers.slots import SlotPlan
from shallowfusion.text.vocabulary import Vocabulary

__all__ = ["CausalLMScorer"]


class CausalLMScorer(CachedScorer):
    """Next-token logits of a transformers causal LM.

    Every prompt starts with the model's begin token (for GPT-2 its end-of-text token), so the first word is scored in
    a context the model knows. Beyond its window of positions a row keeps the last half of the window as context.

    Price: one pass over utterances x beam_size tokens per step; keys and values once per distinct prefix token.
    """

    def __init__(self, model: Any, vocabulary: Vocabulary, tokenizer: Any = None) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.tokenizer = tokenizer
        self.device = model.device
        self.num_layers = model.config.num_hidden_layers
        self.window = model.config.max_position_embeddings

    def prompt(self, text_ids: Sequence[int] = ()) -> list[int]:
        """The begin token and whatever text is to be read, not scored."""
        begin = self.vocabulary.begin_id
        return [self.vocabulary.end_id if begin is None else begin, *text_ids]

    def hidden_states(self, state: DecoderState, token_ids: Tensor, positions: Tensor, plan: SlotPlan) -> Tensor:
        return self._hidden(state.cache, token_ids, positions, plan)

    def _hidden(self, cache: Any, token_ids: Tensor, positions: Tensor, plan: SlotPlan) -> Tensor:
        hidden: Tensor = self.model.base_model(
            input_ids=token_ids,
            position_ids=positions,
            attention_mask=plan.mask_for(self.model),
            past_key_values=cache,
            use_cache=True,
            **plan.options,
        ).last_hidden_state
        return hidden

    @torch.inference_mode()
    def read(self, cache: Any, token_ids: Tensor, positions: Tensor, plan: SlotPlan) -> Tensor:
        """One pass over [utterances, queries] tokens at any slots of a cache of slot layers -> [.., .., size]."""
        for layer in cache.layers:
            layer.plan = plan
        return self._hidden(cache, token_ids, positions, plan)

    @torch.inference_mode()
    def tree_hidden_states(self, token_ids: Sequence[int], parents: Sequence[int]) -> Tensor:
        """One pass over a tree of tokens, each of which sees itself and its ancestors; [nodes, size].

        Args:
            parents: the node before each; -1 for the first token of all, a parent always before its children.
        """
        return self.trees_hidden_states([(token_ids, parents)])[0]

    def head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits
