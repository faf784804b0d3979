"""A cheap language model that stands in for a delayed one on the words it has not scored yet (METHODS 4.6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shallowfusion.scorers.base import Context, Scorer
from shallowfusion.search.candidates import CandidateScorer
from shallowfusion.search.delayed import DelayedLM

__all__ = ["DenseCandidates", "ReplacedProxy"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class DenseCandidates:
    """A scorer of every token, asked about the candidates that survived the fused step alone.

    Price: the scorer's own, and a log-softmax of its rows.

    Args:
        scorer: on the acoustic tokens, or some of them.
        context: see `Context`.
        mapping: the scorer's id of each acoustic token; -1 = none, and then it says what its favourite would get.
        weight, name: see `CandidateScorer`.
    """

    def __init__(
        self, scorer: Scorer, context: Context, mapping: Sequence[int], weight: float, name: str = "proxy"
    ) -> None:
        self.name, self.weight = name, weight
        self._scorer: Any = scorer
        self._mapping = np.asarray(mapping, dtype=np.int64)
        self._state: Any = scorer.start(context)
        self._log_probs = _log_softmax(self._state.logits)
        self._width = 1
        self._tokens: IntArray = np.zeros((len(context.prompts), 1), dtype=np.int64)

    def increments(self, lanes: IntArray, tokens: IntArray) -> FloatArray:
        """Log-prob of each candidate's token."""
        rows = np.arange(len(lanes))[:, None] * self._width + np.maximum(lanes, 0)
        ids = self._mapping[np.maximum(tokens, 0)]
        scores = self._log_probs[rows, np.maximum(ids, 0)]
        return np.where(ids >= 0, scores, self._log_probs.max(axis=1)[rows])

    def follow(self, parents: IntArray, tokens: IntArray) -> None:
        """Remember the rows; they are read once the finished utterances are gone."""
        self._state = self._scorer.fork(self._state, parents)
        self._tokens, self._width = tokens, parents.shape[1]

    def keep(self, order: Sequence[int]) -> None:
        """Drop finished utterances and read the new tokens of the others."""
        if list(order) != list(range(len(self._tokens))):
            self._state = self._scorer.keep(self._state, order)
        logits, self._state = self._scorer.score(self._state, self._mapping[self._tokens[list(order)]])
        self._log_probs = _log_softmax(logits)


class ReplacedProxy:
    """A stand-in whose scores are taken back as far as the delayed model has spoken; in the end nothing of it is left.

    S = asr + weight * lm(scored words) + proxy_weight * proxy(the rest).

    Args:
        inner: the stand-in.
        delayed: the delayed model; it must come before this source in the search.
        is_late: the stand-in scores a word with the token that completes it, as `WordNgramScorer` does.
    """

    def __init__(self, inner: CandidateScorer, delayed: DelayedLM, is_late: bool) -> None:
        self.name, self.weight = inner.name, inner.weight
        self._inner, self._delayed, self._is_late = inner, delayed, is_late
        self._said: list[list[tuple[float, ...]]] = [[()] for _ in delayed.rows]  # of each token, 0 once taken back
        self._last: tuple[IntArray, IntArray, FloatArray] | None = None
        self.owed: FloatArray = np.zeros((len(delayed.rows), 1))

    def increments(self, lanes: IntArray, tokens: IntArray) -> FloatArray:
        """The stand-in's, with what is taken back."""
        own = np.asarray(self._inner.increments(lanes, tokens), dtype=np.float64)
        self._last = (lanes, tokens, own)
        return own + np.take_along_axis(self.owed, np.maximum(lanes, 0), axis=1)

    def follow(self, parents: IntArray, tokens: IntArray) -> None:
        """Row k of utterance u continues its old row parents[u, k] with tokens[u, k]."""
        assert self._last is not None
        lanes, offered, scores = self._last
        same = (lanes[:, None] == parents[:, :, None]) & (offered[:, None] == tokens[:, :, None])
        chosen = np.where(same.any(axis=2), np.take_along_axis(scores, same.argmax(axis=2), axis=1), 0.0)
        self._said = [
            [(*rows[parent], score) for parent, score in zip(own, new, strict=True)]
            for rows, own, new in zip(self._said, parents.tolist(), chosen.tolist(), strict=True)
        ]
        self._inner.follow(parents, tokens)
        self.owed = np.zeros(parents.shape)

    def keep(self, order: Sequence[int]) -> None:
        """Drop finished utterances, then take back what the delayed model has scored meanwhile."""
        self._inner.keep(order)
        self._said = [self._said[place] for place in order]
        self.owed = np.zeros((len(order), self.owed.shape[1]))
        for place, covered in enumerate(self._delayed.covered()):
            for row, count in enumerate(covered):
                said = self._said[place][row]
                stop = min(len(said), count + (self._is_late and count > 0))
                self.owed[place, row] = -sum(said[:stop])
                self._said[place][row] = (*[0.0] * stop, *said[stop:])


def _log_softmax(logits: Tensor) -> FloatArray:
    scores: FloatArray = torch.log_softmax(logits.float(), dim=1).double().cpu().numpy()
    return scores
