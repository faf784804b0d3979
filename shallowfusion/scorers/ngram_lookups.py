"""An n-gram model over the acoustic model's pieces that looks up only the candidates of the fused step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from shallowfusion.scorers.ngram import NgramScorer
from shallowfusion.values import Unmapped

__all__ = ["NgramLookups"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


class NgramLookups:
    """A `CandidateScorer` that says what `NgramScorer` says, of candidates alone; one object serves one batch.

    Log-probs are the model's own: what it gives to <unk> and to pieces that are never said is not shared out among the
    others, as a softmax over whole rows does. Continuations that the fused step, which does not hear the model, ranks
    below its `WIDENING` times as many candidates are lost, however well the model likes them.

    Price: per step one look-up per candidate on one CPU thread, none of rows x vocab, and no copy to the device. A
    state at which a token without counterpart is a candidate, as the end token is under end_policy="neutral", costs one
    row once, which the scorer remembers.

    Args:
        scorer: the model.
        prompts: read, not scored; one per utterance.
        mapping: int32 [acoustic vocab], the scorer's id of each acoustic token, -1 = no counterpart; None = same ids.
        unmapped: what is said of tokens without counterpart.
        weight: increments are multiplied by it, and by `schedule(step)`: `self.weight` is the product.
        name: of its part in the results.
    """

    def __init__(
        self,
        scorer: NgramScorer,
        prompts: Sequence[Sequence[int]],
        mapping: torch.Tensor | None,
        unmapped: Unmapped,
        weight: float,
        schedule: Callable[[int], float],
        name: str,
    ) -> None:
        self.name, self._full_weight, self._schedule, self._step = name, weight, schedule, 0
        self.weight = weight * schedule(0)
        self._scorer, self._unmapped = scorer, unmapped
        size = len(scorer.vocabulary)
        given = torch.arange(size) if mapping is None else mapping
        self._mapping = given.cpu().numpy().astype(np.int64)
        self._states = scorer.start_states(prompts)

    def increments(self, lanes: IntArray, tokens: IntArray) -> FloatArray:
        """float32 [utterances, candidates], nats; 0 where there is no candidate."""
        found = np.zeros(tokens.shape, dtype=np.float32)
        states = np.take_along_axis(self._states, np.maximum(lanes, 0), axis=1)
        ids = self._ids(tokens)
        found[ids >= 0] = self._scorer.look_up(states[ids >= 0], ids[ids >= 0])[0]
        others = (tokens >= 0) & (ids < 0)
        if self._unmapped.policy == "neutral":
            found[others] = self._scorer.favourites(states[others])
        else:
            found[others] = self._unmapped.floor if self._unmapped.policy == "floor" else -np.inf
        return found

    def follow(self, parents: IntArray, tokens: IntArray) -> None:
        """Row k of utterance u continues its old row parents[u, k] with tokens[u, k]."""
        states, ids = np.take_along_axis(self._states, parents, axis=1), self._ids(tokens)
        states[ids >= 0] = self._scorer.look_up(states[ids >= 0], ids[ids >= 0])[1]
        self._states = states
        self._step += 1
        self.weight = self._full_weight * self._schedule(self._step)

    def keep(self, order: Sequence[int]) -> None:
        """Drop finished utterances."""
        self._states = self._states[list(order)]

    def _ids(self, tokens: IntArray) -> IntArray:
        """The scorer's ids of acoustic tokens, -1 without counterpart; int64, the shape of `tokens`."""
        is_known = (tokens >= 0) & (tokens < len(self._mapping))
        return np.where(is_known, self._mapping[np.where(is_known, tokens, 0)], -1)
