"""How well a model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from shallowfusion.config import require
from shallowfusion.ngrams.table import NgramTableProtocol

__all__ = ["Perplexity", "perplexity"]

BATCH_SENTENCES = 4096


@dataclass(frozen=True)
class Perplexity:
    """Sums over the sentences of a text; </s> counts as a word.

    Args:
        num_words: words, those the model does not know among them.
        num_unknown: words the model does not know.
        total: nats, of all words; unknown_total: of the unknown ones.
    """

    num_words: int
    num_unknown: int
    total: float
    unknown_total: float

    @property
    def value(self) -> float:
        """Perplexity of all words, unknown ones scored as <unk>."""
        return math.exp(-self.total / max(1, self.num_words))

    @property
    def of_known(self) -> float:
        """Perplexity of the words the model knows."""
        return math.exp(-(self.total - self.unknown_total) / max(1, self.num_words - self.num_unknown))


def perplexity(table: NgramTableProtocol, sentences: Iterable[Sequence[str]]) -> Perplexity:
    """Score sentences, each from <s> to </s>; empty ones are skipped.

    Raises:
        InvalidArgumentError: there is no sentence.
    """
    model = table.model
    rows: list[list[int]] = []
    parts: list[Perplexity] = []
    for sentence in sentences:
        if sentence:
            rows.append([*(model.id_of(word) for word in sentence), model.end_word])
        if len(rows) == BATCH_SENTENCES:
            parts.append(_scored(table, rows))
            rows = []
    if rows:
        parts.append(_scored(table, rows))
    require(len(parts) > 0, "the text to score holds no words, got only empty lines.")
    return Perplexity(
        sum(part.num_words for part in parts),
        sum(part.num_unknown for part in parts),
        sum(part.total for part in parts),
        sum(part.unknown_total for part in parts),
    )


def _scored(table: NgramTableProtocol, rows: list[list[int]]) -> Perplexity:
    rows = sorted(rows, key=len, reverse=True)
    states = np.full(len(rows), table.start_state, dtype=np.int64)
    num_unknown, total, unknown_total = 0, 0.0, 0.0
    live = len(rows)
    for place in range(len(rows[0])):
        while len(rows[live - 1]) <= place:
            live -= 1
        words = np.array([row[place] for row in rows[:live]])
        log_probs, states = table.score(states[:live], words)
        unknown = words == table.model.unknown_word
        num_unknown += int(unknown.sum())
        total += float(log_probs.sum(dtype=np.float64))
        unknown_total += float(log_probs[unknown].sum(dtype=np.float64))
    return Perplexity(sum(map(len, rows)), num_unknown, total, unknown_total)
