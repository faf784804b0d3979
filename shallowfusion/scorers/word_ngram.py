"""A word-level n-gram model in the search of a model of pieces: it scores the candidates that survived a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shallowfusion.ngrams.words import WordNgram

__all__ = ["WordNgramScorer"]

IntArray = npt.NDArray[np.int64]


class WordNgramScorer:
    """Scores words where a candidate completes them, and </s> at the end token; see `WordNgram` and `CandidateScorer`.

    One object serves one batch of searches.

    Price: a few numpy calls and one table look-up per completed word for each step's candidates.

    Args:
        words: over the acoustic model's pieces.
        end_id: the acoustic end token.
        num_utterances: of the batch.
        weight: increments are multiplied by it.
        name: of its part in the results.
    """

    def __init__(
        self, words: WordNgram, end_id: int, num_utterances: int, weight: float, name: str = "word_lm"
    ) -> None:
        self.name, self.weight = name, weight
        self._words, self._end_id = words, end_id
        self._state = words.start(num_utterances)
        self._rows = np.arange(num_utterances)[:, None]  # [utterances, rows], places in the state

    def increments(self, lanes: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """float32 [utterances, candidates], nats; 0 where there is no candidate."""
        found = np.zeros(tokens.shape, dtype=np.float32)
        is_end, goes_on = tokens == self._end_id, (tokens >= 0) & (tokens != self._end_id)
        parents = np.take_along_axis(self._rows, np.maximum(lanes, 0), axis=1)
        found[is_end] = self._words.end(self._state.take(parents[is_end]))
        found[goes_on] = self._words.step(self._state.take(parents[goes_on]), tokens[goes_on])[0]
        return found

    def follow(self, parents: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]) -> None:
        """Row k of utterance u continues its old row parents[u, k] with tokens[u, k]."""
        old = np.take_along_axis(self._rows, parents, axis=1).reshape(-1)
        said = np.where(tokens == self._end_id, -1, tokens).reshape(-1)
        self._state = self._words.step(self._state.take(old), said)[2]
        self._rows = np.arange(tokens.size).reshape(tokens.shape)

    def keep(self, order: Sequence[int]) -> None:
        """Drop finished utterances."""
        self._rows = self._rows[list(order)]
