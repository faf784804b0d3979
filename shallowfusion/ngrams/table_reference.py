"""`NgramTable` in plain Python, float64, written for reading: the definition of correct for the native class."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from shallowfusion.checks import integer, integer_array
from shallowfusion.config import require
from shallowfusion.ngrams.model import NgramModel
from shallowfusion.ngrams.table import Float32Array, Int64Array

__all__ = ["ReferenceNgramTable"]

History = tuple[int, ...]


class ReferenceNgramTable:
    """Dictionaries of n-grams; see `NgramTableProtocol`. A state numbers a history of up to order - 1 words."""

    def __init__(self, model: NgramModel) -> None:
        self.model = model
        self._log_probs: dict[History, float] = {}
        self._back_offs: dict[History, float] = {}
        for ngrams in model.orders:
            for words, log_prob, back_off in zip(
                ngrams.words.tolist(), ngrams.log_probs.tolist(), ngrams.back_offs.tolist(), strict=True
            ):
                self._add(tuple(words), log_prob, back_off)
        for word in range(len(model.words)):
            require((word,) in self._log_probs, f"every word needs one unigram: got none for word {word}.")
        self._histories: list[History] = [()]
        self._states: dict[History, int] = {(): 0}
        self._start_state = self._state_of((model.begin_word,))

    def _add(self, words: History, log_prob: float, back_off: float) -> None:
        for word in words:
            integer("words of n-grams", word, 0, len(self.model.words) - 1)
        require(words not in self._log_probs, f"n-gram {list(words)} is given twice.")
        require(
            max(log_prob, back_off) < math.inf and not math.isnan(log_prob + back_off),
            f"n-gram {list(words)} has a log-prob or back-off that is NaN or +inf.",
        )
        self._log_probs[words] = log_prob
        if len(words) < self.model.order:
            self._back_offs[words] = back_off

    @property
    def start_state(self) -> int:
        return self._start_state

    @property
    def null_state(self) -> int:
        return 0

    def score(self, states: npt.ArrayLike, words: npt.ArrayLike) -> tuple[Float32Array, Int64Array]:
        rows = integer_array("states", states, (None,))
        ids = integer_array("words", words, rows.shape)
        histories = [self._history(state) for state in rows]
        checked = [integer("words", word, 0, len(self.model.words) - 1) for word in ids]
        log_probs = [self._log_prob(history, word) for history, word in zip(histories, checked, strict=True)]
        after = [self._state_of((*history, word)) for history, word in zip(histories, checked, strict=True)]
        return np.array(log_probs, dtype=np.float32), np.array(after, dtype=np.int64)

    def end(self, states: npt.ArrayLike) -> Float32Array:
        rows = integer_array("states", states, (None,))
        return self.score(rows, np.full(rows.shape, self.model.end_word))[0]

    def dense(self, states: npt.ArrayLike) -> Float32Array:
        histories = [self._history(state) for state in integer_array("states", states, (None,))]
        table = [[self._log_prob(history, word) for word in range(len(self.model.words))] for history in histories]
        return np.array(table, dtype=np.float32).reshape(len(histories), len(self.model.words))

    def _log_prob(self, history: History, word: int) -> float:
        if (*history, word) in self._log_probs:
            return self._log_probs[(*history, word)]
        return self._back_offs.get(history, 0.0) + self._log_prob(history[1:], word)

    def _state_of(self, history: History) -> int:
        kept = history[-(self.model.order - 1) :] if self.model.order > 1 else ()
        if kept not in self._states:
            self._states[kept] = len(self._histories)
            self._histories.append(kept)
        return self._states[kept]

    def _history(self, state: int) -> History:
        return self._histories[integer("states", state, 0, len(self._histories) - 1)]
