"""Exact choice of a weight on stored n-best lists: errors as a step function of it, without running a model.

With S_i(w) = intercept_i + w * slope_i the best hypothesis of an utterance changes only where the upper envelope of its
lines bends, so the word errors of a whole set are constant between the merged bends (minimum error rate training of one
dimension; METHODS 8.1).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shallowfusion.config import require
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.evaluation.nbest import ListedHypothesis, NBestList, reference_of
from shallowfusion.evaluation.word_errors import word_errors

__all__ = ["ErrorCurve", "Interval", "best_first", "line_search", "search_weights", "upper_envelope"]


@dataclass(frozen=True)
class Interval:
    """Weights from low to high that make the same choices; at its ends two choices tie."""

    low: float
    high: float
    errors: int

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2


@dataclass(frozen=True)
class ErrorCurve:
    """Word errors of a set as a function of one weight.

    Args:
        starts: where each piece begins, ascending; the first is the lowest weight searched.
        errors: of each piece, whole set.
        high: where the last piece ends.
        num_words: reference words of the set.
    """

    starts: tuple[float, ...]
    errors: tuple[int, ...]
    high: float
    num_words: int

    @property
    def intervals(self) -> tuple[Interval, ...]:
        ends = (*self.starts[1:], self.high)
        return tuple(
            Interval(low, high, errors) for low, high, errors in zip(self.starts, ends, self.errors, strict=True)
        )

    @property
    def best(self) -> Interval:
        """The fewest errors; among equals the widest, which a change of data moves least; then the lowest."""
        return min(self.intervals, key=lambda piece: (piece.errors, piece.low - piece.high, piece.low))

    def errors_at(self, weight: float) -> int:
        """Errors at a weight; at the start of a piece those of that piece.

        Raises:
            InvalidArgumentError: a weight outside the curve.
        """
        require(
            self.starts[0] <= weight <= self.high,
            f"the curve holds weights from {self.starts[0]} to {self.high}, got {weight!r}.",
        )
        return self.errors[bisect_right(self.starts, weight) - 1]


def upper_envelope(
    intercepts: Sequence[float], slopes: Sequence[float], low: float, high: float
) -> tuple[list[float], list[int]]:
    """Which line is highest from where on: starts (the first is `low`) and positions; equal lines count by the first.

    Price: lines x log(lines).
    """
    order = sorted(range(len(slopes)), key=lambda i: (slopes[i], -intercepts[i], i))
    hull: list[int] = []
    starts: list[float] = []
    for i in order:
        if hull and slopes[hull[-1]] == slopes[i]:
            continue  # lower, or the same line again
        start = -math.inf
        while hull:
            last = hull[-1]
            start = (intercepts[last] - intercepts[i]) / (slopes[i] - slopes[last])
            if start > starts[-1]:
                break
            hull.pop()
            starts.pop()
            start = -math.inf
        hull.append(i)
        starts.append(start)
    first = max(0, bisect_right(starts, low) - 1)
    kept = [k for k in range(first, len(hull)) if k == first or starts[k] < high]
    return [low, *(starts[k] for k in kept[1:])], [hull[k] for k in kept]


def line_search(
    lists: Sequence[NBestList],
    along: str,
    weights: Mapping[str, float] | None = None,
    low: float = 0.0,
    high: float = 2.0,
    normalise: Callable[[str], str] | None = None,
) -> ErrorCurve:
    """Word errors for every value of one weight from `low` to `high`, the other weights held.

    The score of a hypothesis is the sum of weight * feature; features are its parts by name, "total" (the recogniser's
    own), "num_words" and "num_tokens" (length bonuses).

    Args:
        lists: with references.
        along: the feature whose weight is searched.
        weights: of the other features; features not named weigh 0, one named `along` is passed over.

    Raises:
        InvalidArgumentError: no lists, a missing reference or feature, or an empty range.
    """
    require(bool(lists), "line_search needs at least one n-best list, got none.")
    require(
        math.isfinite(low) and math.isfinite(high) and low < high,
        f"low must be below high and both finite, got {low!r} and {high!r}.",
    )
    fixed = {name: weight for name, weight in (weights or {}).items() if name != along}
    first, num_words = 0, 0
    changes: dict[float, int] = {}
    for entry in lists:
        intercepts = [score(hypothesis, fixed, entry.id) for hypothesis in entry.hypotheses]
        slopes = [_feature(hypothesis, along, entry.id) for hypothesis in entry.hypotheses]
        starts, chosen = upper_envelope(intercepts, slopes, low, high)
        texts = [entry.hypotheses[i].text for i in chosen]
        found = word_errors([reference_of(entry)] * len(texts), texts, normalise)
        num_words += found.lengths[0]
        first += found.errors[0]
        for start, before, after in zip(starts[1:], found.errors, found.errors[1:], strict=False):
            changes[start] = changes.get(start, 0) + after - before
    bends = [low, *sorted(start for start, change in changes.items() if change)]
    steps = np.cumsum([first, *(changes[start] for start in bends[1:])]).tolist()
    return ErrorCurve(tuple(bends), tuple(steps), high, num_words)


def search_weights(
    lists: Sequence[NBestList],
    weights: Mapping[str, float],
    ranges: Mapping[str, tuple[float, float]],
    normalise: Callable[[str], str] | None = None,
    rounds: int = 10,
) -> tuple[dict[str, float], int]:
    """Search the weights named in `ranges` in turn, each exactly, until no round lowers the errors.

    A weight moves only where that makes fewer errors, so the result is never worse than the start. The optimum is one
    along every axis, not of all weights at once.

    Returns:
        All weights, and the word errors with them.
    """
    chosen = dict(weights)
    errors = _errors_with(lists, chosen, normalise)
    for _ in range(rounds):
        before = errors
        for name, (low, high) in ranges.items():
            best = line_search(lists, name, chosen, low, high, normalise).best
            if best.errors < errors:
                # Between the bends nothing ties; at the middle the choice is the same as all over the piece.
                chosen[name], errors = best.middle, best.errors
        if errors == before:
            break
    return chosen, errors


def best_first(entry: NBestList, weights: Mapping[str, float]) -> list[ListedHypothesis]:
    """Hypotheses by their weighted sum of features, best first; ties keep their order."""
    return sorted(entry.hypotheses, key=lambda hypothesis: -score(hypothesis, weights, entry.id))


def score(hypothesis: ListedHypothesis, weights: Mapping[str, float], id: str) -> float:
    return math.fsum(weight * _feature(hypothesis, name, id) for name, weight in weights.items())


def _errors_with(
    lists: Sequence[NBestList], weights: Mapping[str, float], normalise: Callable[[str], str] | None
) -> int:
    texts = [best_first(entry, weights)[0].text for entry in lists]
    return sum(word_errors([reference_of(entry) for entry in lists], texts, normalise).errors)


def _feature(hypothesis: ListedHypothesis, name: str, id: str) -> float:
    known: dict[str, float | None] = {
        **hypothesis.parts,
        "total": hypothesis.total,
        "num_words": hypothesis.num_words,
        "num_tokens": hypothesis.num_tokens,
    }
    value = known.get(name)
    if value is None:
        names = ", ".join(sorted(key for key, known_value in known.items() if known_value is not None))
        raise InvalidArgumentError(f"hypotheses of {id!r} have no {name!r}; they have {names}.")
    return float(value)
