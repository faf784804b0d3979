"""The rules of timestamps for one row in plain Python, written for reading: the definition of correct."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shallowfusion.search.timestamps import TimestampRules

__all__ = ["allowed_reference"]


def allowed_reference(
    rules: TimestampRules,
    said: Sequence[int],
    logits: Sequence[float],
    forbidden: frozenset[int] = frozenset(),
    temperature: float = 1.0,
) -> set[int]:
    """The tokens a row may say next under `TimestampRules`, those in `forbidden` left out.

    Args:
        said: tokens so far, without the prompt.
        logits: acoustic, one per token of the vocabulary.
    """
    timestamps, text = _by_history(rules, said)
    timestamps, text = timestamps - forbidden, text - forbidden
    together = _log_sum_exp([float(logits[token]) / temperature for token in timestamps])
    likeliest = max((float(logits[token]) / temperature for token in text), default=-math.inf)
    return timestamps if together > likeliest else timestamps | text


def _by_history(rules: TimestampRules, said: Sequence[int]) -> tuple[set[int], set[int]]:
    """Timestamps and other tokens that may follow what was said, whatever the model thinks."""
    begin, stop = rules.begin, rules.begin + rules.count
    if not said:
        last = stop - 1 if rules.max_initial is None else min(stop - 1, begin + rules.max_initial)
        return set(range(begin, last + 1)), set()
    every, text = set(range(begin, stop)), set(range(begin))
    earlier = [token for token in said if token in every]
    if said[-1] not in every:  # within a segment, or text that none has opened
        return {token for token in every if not earlier or token > earlier[-1]}, text
    closes = len(said) >= 2 and said[-2] not in every
    if closes:  # the next segment may open where this one closed
        return {token for token in every if token >= said[-1]}, {token for token in text if token >= rules.end_id}
    return set(), text


def _log_sum_exp(values: Sequence[float]) -> float:
    top = max(values, default=-math.inf)
    if top == -math.inf:
        return top
    return top + math.log(sum(math.exp(value - top) for value in values))
