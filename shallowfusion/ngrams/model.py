"""An n-gram model as plain arrays: what readers make, writers write and tables are built from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from shallowfusion.config import require

__all__ = ["BEGIN", "END", "LOG_10", "UNKNOWN", "UNKNOWN_LOG_PROB", "NgramModel", "NgramOrder"]

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
LOG_10 = math.log(10.0)
UNKNOWN_LOG_PROB = -100.0 * LOG_10  # of words a model without <unk> does not know; KenLM's choice


@dataclass(frozen=True, eq=False)
class NgramOrder:
    """The n-grams of one order.

    Args:
        words: int32 [ngrams, order], word ids in the order they are said.
        log_probs: float32 [ngrams], nats, of the last word after the others.
        back_offs: float32 [ngrams], nats, added when the n-gram is a context that does not know the next word.
    """

    words: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float32]
    back_offs: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.words)


@dataclass(frozen=True, eq=False)
class NgramModel:
    """A back-off model: log P(w | h) is that of the longest n-gram that ends in w, plus the back-offs of the longer
    contexts.

    Args:
        words: spelling of each word id.
        orders: unigrams first, one for every word.
        begin_word: id of <s>; end_word: of </s>; unknown_word: of <unk>.
        name: shown in errors.
    """

    words: tuple[str, ...]
    orders: tuple[NgramOrder, ...]
    begin_word: int
    end_word: int
    unknown_word: int
    name: str = "n-gram model"

    def __post_init__(self) -> None:
        require(len(self.orders) > 0, f"{self.name} must have unigrams at least, got no n-grams.")
        for order, ngrams in enumerate(self.orders, start=1):
            count = len(ngrams.words)
            require(
                ngrams.words.shape == (count, order) and ngrams.log_probs.shape == ngrams.back_offs.shape == (count,),
                f"n-grams of order {order} must be words [ngrams, {order}] with a log-prob and a back-off each, got "
                f"{list(ngrams.words.shape)}, {list(ngrams.log_probs.shape)}, {list(ngrams.back_offs.shape)}.",
            )

    @property
    def order(self) -> int:
        return len(self.orders)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Id of each spelling."""
        return {word: i for i, word in enumerate(self.words)}

    def id_of(self, word: str) -> int:
        """Id of a word, that of <unk> if the model does not know it."""
        return self.ids.get(word, self.unknown_word)
