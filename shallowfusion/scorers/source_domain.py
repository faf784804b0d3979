"""A language model of what the acoustic model was trained on, in the place of its internal language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shallowfusion.scorers.base import Context
from shallowfusion.scorers.internal_lm import SMALLEST_LOG_PROB

__all__ = ["SourceDomainScorer", "SourceDomainState"]


@dataclass
class SourceDomainState:
    """The state of the model, and its log-probs kept above -20, float32 [rows, vocab]."""

    own: Any
    logits: Tensor


class SourceDomainScorer:
    """Log-probs of a language model whose score is subtracted, kept above -20 as those of an internal LM are.

    Below that an impossible token would earn weight * (a large number).

    Price: that of the model, and a log-softmax that writes [rows, vocab] float32.

    Args:
        model: on the acoustic model's tokens, for instance a bigram of its training transcripts (LODR).
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.vocabulary = model.vocabulary

    def start(self, context: Context) -> SourceDomainState:
        """Read the prompts; the recordings are not looked at."""
        prompts = [self.model.prompt()] * len(context.prompts)
        own = self.model.start(dataclasses.replace(context, prompts=prompts, encoder_output=None))
        return SourceDomainState(own, _kept(own.logits))

    def fork(self, state: SourceDomainState, parents: np.ndarray) -> SourceDomainState:
        """Row k of utterance u continues from its old row parents[u, k]."""
        state.own = self.model.fork(state.own, parents)
        return state

    def score(self, state: SourceDomainState, token_ids: np.ndarray) -> tuple[Tensor, SourceDomainState]:
        """Append a token to each row, int64 [utterances, rows], -1 = none."""
        _, state.own = self.model.score(state.own, token_ids)
        state.logits = _kept(state.own.logits)
        return state.logits, state

    def keep(self, state: SourceDomainState, order: Sequence[int]) -> SourceDomainState:
        """Drop finished utterances."""
        state.own = self.model.keep(state.own, order)
        return state

    def admit(self, state: SourceDomainState, fresh: SourceDomainState) -> SourceDomainState:
        """Put the utterances of a fresh state behind those of one that runs."""
        state.own = self.model.admit(state.own, fresh.own)
        state.logits = _kept(state.own.logits)
        return state

    def end_scores(self, state: SourceDomainState) -> Tensor:
        """Log-prob of the end token in the latest logits, float32 [rows]."""
        return state.logits[:, self.vocabulary.end_id]


def _kept(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), dim=-1).clamp_min(SMALLEST_LOG_PROB)
