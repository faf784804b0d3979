"""Several language models as one: a weighted sum of their probabilities, with weights that may follow the text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shallowfusion.config import require
from shallowfusion.errors import VocabularyError
from shallowfusion.scorers.base import DEAD, Context
from shallowfusion.scorers.packed_rows import joined_numbers, row_numbers

__all__ = ["MixtureScorer", "MixtureState"]


@dataclass
class MixtureState:
    """States of the models, and what the text so far says of their weights.

    Args:
        states: one per model.
        logits: [rows, vocab], log-probs of the mixture.
        log_probs: [models, rows, vocab] of the latest pass.
        log_weights: [models, utterances, rows], each row's sum of weights is 1.
        rows: int64 [utterances, rows], the row of `log_probs` each present row descends from; -1 = none.
    """

    states: list[Any]
    logits: Tensor
    log_probs: Tensor
    log_weights: Tensor
    rows: np.ndarray


class MixtureScorer:
    """log sum_k weight_k * P_k(token | text), a distribution, unlike a sum of log-probs.

    With `forgetting` the weights follow the text: weight_k[t] is proportional to weight_k[t - 1] ** forgetting *
    P_k(y[t - 1]), so that the model which predicts a row's text best gains weight there (Bayesian interpolation;
    METHODS 11.3). 1 never forgets, 0.9 looks back about ten tokens.

    Price: beside the models' own passes a log-softmax of each, which writes [models, rows, vocab] float32.

    Args:
        models: scorers of one vocabulary.
        weights: prior weights, above 0; they are divided by their sum.
        forgetting: from 0 to 1; None keeps the prior weights.

    Raises:
        VocabularyError: the models' tokens differ.
        InvalidArgumentError: weights that do not pair with the models, or values outside their range.
    """

    def __init__(self, models: Sequence[Any], weights: Sequence[float], forgetting: float | None = None) -> None:
        require(
            len(models) == len(weights) >= 1,
            f"a mixture needs one weight per language model, got {len(weights)} for {len(models)}.",
        )
        require(
            all(math.isfinite(weight) and weight > 0 for weight in weights),
            f"weights of a mixture must be finite and above 0, got {tuple(weights)}.",
        )
        require(
            forgetting is None or 0 <= forgetting <= 1,
            f"forgetting must be from 0 to 1, or None for constant weights, got {forgetting!r}.",
        )
        self.models = tuple(models)
        self.vocabulary = models[0].vocabulary
        for model in self.models[1:]:
            if model.vocabulary.tokens != self.vocabulary.tokens or model.vocabulary.end_id != self.vocabulary.end_id:
                raise VocabularyError(
                    f"{model.vocabulary.name} and {self.vocabulary.name} have different tokens, so their probabilities "
                    "cannot be summed; weigh them log-linearly with static([...])."
                )
        self.weights = tuple(weight / sum(weights) for weight in weights)
        self.forgetting = forgetting

    def prompt(self, text_ids: Sequence[int] = ()) -> list[int]:
        """Text to be read, not scored; each model puts its own begin token before it."""
        return list(text_ids)

    def start(self, context: Context) -> MixtureState:
        """Read the prompts; one row per utterance."""
        states = [
            model.start(dataclasses.replace(context, prompts=[model.prompt(prompt) for prompt in context.prompts]))
            for model in self.models
        ]
        log_probs = self._log_probs(states)
        prior = torch.tensor(self.weights, device=log_probs.device).log()
        log_weights = prior[:, None, None].expand(-1, len(context.prompts), 1).contiguous()
        rows = np.arange(len(context.prompts))[:, None]
        return MixtureState(states, _mixed(log_weights[:, :, 0], log_probs), log_probs, log_weights, rows)

    def fork(self, state: MixtureState, parents: np.ndarray) -> MixtureState:
        """Row k of utterance u continues from its old row parents[u, k]."""
        state.states = [model.fork(own, parents) for model, own in zip(self.models, state.states, strict=True)]
        lanes = torch.from_numpy(parents).to(state.log_weights.device)
        state.log_weights = state.log_weights.gather(2, lanes[None].expand(len(self.models), -1, -1))
        state.rows = np.take_along_axis(state.rows, parents, axis=1)
        return state

    def score(self, state: MixtureState, token_ids: np.ndarray) -> tuple[Tensor, MixtureState]:
        """Append a token to each row, int64 [utterances, rows], -1 = none, DEAD = nor has it logits."""
        if self.forgetting is not None:
            state.log_weights = self._followed(state, token_ids)
        pairs = zip(self.models, state.states, strict=True)
        state.states = [model.score(own, token_ids)[1] for model, own in pairs]
        taken = token_ids != DEAD
        state.log_probs, state.rows = self._log_probs(state.states), row_numbers(taken)
        state.logits = _mixed(state.log_weights[:, torch.from_numpy(taken)], state.log_probs)
        return state.logits, state

    def keep(self, state: MixtureState, order: Sequence[int]) -> MixtureState:
        """Drop finished utterances."""
        state.states = [model.keep(own, order) for model, own in zip(self.models, state.states, strict=True)]
        state.log_weights = state.log_weights[:, list(order)]
        state.rows = state.rows[list(order)]
        return state

    def admit(self, state: MixtureState, fresh: MixtureState) -> MixtureState:
        """Put the utterances of a fresh state behind those of one that runs."""
        rows = state.log_weights.shape[2]
        trios = zip(self.models, state.states, fresh.states, strict=True)
        state.states = [model.admit(own, other) for model, own, other in trios]
        entering = fresh.log_weights.expand(-1, -1, rows)
        state.log_weights = torch.cat([state.log_weights, entering], dim=1)
        state.rows = joined_numbers(state.rows, fresh.rows, len(state.logits))
        state.logits = torch.cat([state.logits, fresh.logits])
        state.log_probs = torch.cat([state.log_probs, fresh.log_probs], dim=1)
        return state

    def end_scores(self, state: MixtureState) -> Tensor:
        """Log-prob of the end token in the latest logits, float32 [rows]."""
        return state.logits[:, self.vocabulary.end_id]

    def _log_probs(self, states: Sequence[Any]) -> Tensor:
        return torch.stack([torch.log_softmax(state.logits.float(), dim=1) for state in states])

    def _followed(self, state: MixtureState, token_ids: np.ndarray) -> Tensor:
        assert self.forgetting is not None
        tokens = np.maximum(token_ids, 0)
        rows, tokens = (torch.from_numpy(own).to(state.log_probs.device) for own in (state.rows, tokens))
        said = state.log_probs[:, rows, tokens]
        moved = torch.log_softmax(self.forgetting * state.log_weights + said, dim=0)
        advancing = torch.from_numpy(token_ids >= 0).to(moved.device)
        return torch.where(advancing[None], moved, state.log_weights)


def _mixed(log_weights: Tensor, log_probs: Tensor) -> Tensor:
    """[models, rows] and [models, rows, vocab] -> [rows, vocab]."""
    return torch.logsumexp(log_weights[:, :, None] + log_probs, dim=0)
