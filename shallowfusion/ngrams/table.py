"""Look-up of n-gram log-probs: a search holds one integer per hypothesis, which says all its history can matter for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shallowfusion import _native
from shallowfusion.checks import integer_array
from shallowfusion.ngrams.arpa import read_arpa
from shallowfusion.ngrams.model import UNKNOWN_LOG_PROB, NgramModel

__all__ = ["NgramTable", "NgramTableProtocol", "WordTableProtocol", "Words", "word_log_probs"]

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]


class Words(Protocol):
    """The words of a model."""

    @property
    def words(self) -> tuple[str, ...]: ...
    @property
    def ids(self) -> dict[str, int]: ...
    @property
    def begin_word(self) -> int: ...
    @property
    def end_word(self) -> int: ...
    @property
    def unknown_word(self) -> int: ...
    @property
    def name(self) -> str: ...


class WordTableProtocol(Protocol):
    """The part of `NgramTableProtocol` that a search of words needs."""

    @property
    def model(self) -> Words: ...
    @property
    def start_state(self) -> int: ...
    @property
    def null_state(self) -> int: ...
    def score(self, states: npt.ArrayLike, words: npt.ArrayLike) -> tuple[Float32Array, Int64Array]: ...
    def end(self, states: npt.ArrayLike) -> Float32Array: ...


class NgramTableProtocol(Protocol):
    """log P(word | state) of a back-off model, in nats, with the state that follows.

    A state is an integer that stands for the longest suffix of the history which the model can tell apart; equal
    states score every continuation alike, so hypotheses in equal states may be recombined. Word ids are those of
    `model`; a word the model does not know is `model.unknown_word`.

    Every method raises `InvalidArgumentError` for states or words out of range and arrays of the wrong shape.
    """

    model: NgramModel

    @property
    def start_state(self) -> int:
        """After <s>."""
        ...

    @property
    def null_state(self) -> int:
        """After nothing."""
        ...

    def score(self, states: npt.ArrayLike, words: npt.ArrayLike) -> tuple[Float32Array, Int64Array]:
        """Score one word after each state.

        Args:
            states: int64 [rows].
            words: int64 [rows].

        Returns:
            float32 [rows] log-probs and int64 [rows] the states after the words.
        """
        ...

    def end(self, states: npt.ArrayLike) -> Float32Array:
        """float32 [rows], log-prob of </s> after each state."""
        ...

    def dense(self, states: npt.ArrayLike) -> Float32Array:
        """float32 [rows, words], log-prob of every word after each state."""
        ...


class NgramTable:
    """The C++ table; see `NgramTableProtocol`. Immutable, so threads may share it.

    Price: a look-up takes O(order * log(words seen after a context)); `dense` one pass over the words per row and one
    visit of each n-gram that extends the row's history. Memory: 24 bytes per n-gram.

    Args:
        model: any order.

    Raises:
        InvalidArgumentError: the same n-gram twice, word ids out of range, log-probs that are NaN or infinite.
    """

    def __init__(self, model: NgramModel) -> None:
        self.model = model
        self.native: Any = _native.NgramTable(
            num_words=len(model.words),
            orders=[(ngrams.words, ngrams.log_probs, ngrams.back_offs) for ngrams in model.orders],
            begin_word=model.begin_word,
            end_word=model.end_word,
            unknown_word=model.unknown_word,
        )

    @classmethod
    def from_arpa(cls, path: str | Path, unknown_log_prob: float = UNKNOWN_LOG_PROB) -> NgramTable:
        """Read an ARPA file; see `read_arpa`."""
        return cls(read_arpa(path, unknown_log_prob))

    @property
    def start_state(self) -> int:
        return int(self.native.start_state)

    @property
    def null_state(self) -> int:
        return int(self.native.null_state)

    @property
    def num_bytes(self) -> int:
        """Memory of the table, without the spellings."""
        return int(self.native.num_bytes)

    def score(self, states: npt.ArrayLike, words: npt.ArrayLike) -> tuple[Float32Array, Int64Array]:
        rows = integer_array("states", states, (None,))
        scored: tuple[Float32Array, Int64Array] = self.native.score(
            states=rows, words=integer_array("words", words, rows.shape)
        )
        return scored

    def end(self, states: npt.ArrayLike) -> Float32Array:
        log_probs: Float32Array = self.native.end(states=integer_array("states", states, (None,)))
        return log_probs

    def dense(self, states: npt.ArrayLike) -> Float32Array:
        log_probs: Float32Array = self.native.dense(states=integer_array("states", states, (None,)))
        return log_probs


def word_log_probs(
    table: NgramTableProtocol, words: Sequence[str], begin: bool = True, end: bool = True
) -> Float32Array:
    """Score a sentence.

    Args:
        words: spellings; those the model does not know are scored as <unk>.
        begin: whether the history starts with <s>; end: whether </s> is scored last.

    Returns:
        float32 [words + end], nats.
    """
    state = table.start_state if begin else table.null_state
    ids = [table.model.id_of(word) for word in words]
    log_probs = []
    for word in [*ids, table.model.end_word] if end else ids:
        scored, states = table.score([state], [word])
        log_probs.append(scored[0])
        state = int(states[0])
    return np.array(log_probs, dtype=np.float32)
