"""Minimum Bayes risk: the transcript with the fewest expected errors, rather than the likeliest (METHODS 8.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shallowfusion.config import require
from shallowfusion.evaluation.alignment import pairwise_edits

__all__ = ["LeastRisk", "minimum_bayes_risk"]


@dataclass(frozen=True)
class LeastRisk:
    """The chosen position and, for every hypothesis of the list, its expected errors and posterior."""

    position: int
    risks: tuple[float, ...]
    posteriors: tuple[float, ...]


def minimum_bayes_risk(
    texts: Sequence[str], totals: Sequence[float], scale: float = 1.0, unit: Literal["word", "character"] = "word"
) -> LeastRisk:
    """argmin over y of sum_j q_j * edits(y_j, y), q = softmax of scale * totals; ties go to the higher total.

    Price: hypotheses squared x words squared.

    Args:
        totals: nats; -inf is a hypothesis without weight.
        scale: sharpness of the posterior, 0.1 to 1 customary; 0 weighs all alike, which is right for samples.

    Raises:
        InvalidArgumentError: no texts, another number of totals, NaN, +inf or nothing but -inf, or a negative scale.
    """
    scores = np.asarray(totals, dtype=np.float64)
    require(
        len(texts) > 0 and scores.shape == (len(texts),),
        f"texts and totals must pair up, got {len(texts)} and {list(scores.shape)}.",
    )
    require(
        not np.isnan(scores).any() and bool((scores < math.inf).all()) and bool(np.isfinite(scores).any()),
        f"totals must be numbers below +inf, one of them finite, got {list(totals)!r}.",
    )
    require(math.isfinite(scale) and scale >= 0, f"scale must be finite and >= 0, got {scale!r}.")
    weights = np.where(
        np.isfinite(scores), np.exp(scale * (np.where(np.isfinite(scores), scores, 0.0) - scores.max())), 0.0
    )
    posteriors = weights / weights.sum()
    edits = pairwise_edits([text.split() if unit == "word" else list(text) for text in texts])
    risks = edits.astype(np.float64) @ posteriors
    slack = 1e-12 * max(1.0, float(risks.max()))
    least = np.flatnonzero(risks <= risks.min() + slack)
    position = int(least[np.argmax(scores[least])])
    return LeastRisk(position, tuple(risks.tolist()), tuple(posteriors.tolist()))
