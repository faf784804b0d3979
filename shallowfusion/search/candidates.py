"""Sources that score only the continuations that survived the fused step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["CandidateArrays", "CandidateScorer", "owed_of", "with_candidate_scores"]

Array = npt.NDArray[Any]

WIDENING = 2  # the fused step keeps this many times the candidates that a search without such sources wants


@dataclass(frozen=True)
class CandidateArrays:
    """Candidates as the beam state takes them, best first; where the total is -inf, lane and token are -1.

    Args:
        totals: float32 [utterances, candidates].
        lanes: int64 [utterances, candidates], parents as rows of their own utterance.
        tokens: int64 [utterances, candidates].
        parts: float32 [utterances, candidates, sources].
        flagged: bool [utterances]: NaN or +inf was seen.
    """

    totals: Array
    lanes: Array
    tokens: Array
    parts: Array
    flagged: Array


class CandidateScorer(Protocol):
    """A source that is too dear or too sparse to score every token: CTC prefixes, word n-grams, delayed LMs.

    One object serves one batch of searches and remembers its live rows, at first one per utterance.

    A source that speaks late may have an attribute `owed`, float [utterances, rows]: what it says, since the last step,
    of what the live rows had said before. The search adds it to their totals after `keep`, and the increments of the
    next step's candidates hold it, so that the parts of a hypothesis sum to what its total holds.

    Args:
        name: of its part in the results.
        weight: increments are multiplied by it.
    """

    name: str
    weight: float

    def increments(self, lanes: Array, tokens: Array) -> Array:
        """What the source says of each candidate; may be called once per step, before `follow`.

        Args:
            lanes, tokens: int64 [utterances, candidates], acoustic ids; -1 = no candidate.

        Returns:
            Log-probs in nats, float [utterances, candidates]; -inf = impossible, anything where there is no candidate.
            NaN or +inf makes a candidate impossible and raises the utterance's flag.
        """
        ...

    def follow(self, parents: Array, tokens: Array) -> None:
        """Row k of utterance u now continues its old row parents[u, k] with tokens[u, k]; both [utterances, rows]."""
        ...

    def keep(self, order: Sequence[int]) -> None:
        """Drop finished utterances: place i of the new batch holds what was at place order[i]."""
        ...


def with_candidate_scores(
    found: CandidateArrays, scorers: Sequence[CandidateScorer], num_candidates: int
) -> CandidateArrays:
    """Add weight * increment of every source, append their parts, and keep the best `num_candidates`.

    Ties keep the order of the fused step. NaN of a source of weight 0 changes nothing.
    """
    totals = found.totals.astype(np.float64)
    parts = [found.parts]
    exists, flagged = found.lanes >= 0, found.flagged
    for scorer in scorers:
        increments = np.where(exists, scorer.increments(found.lanes, found.tokens), 0.0)
        broken = ~(increments < np.inf)
        if scorer.weight and broken.any():
            flagged = flagged | broken.any(axis=1)
            increments = np.where(broken, -np.inf, increments)
        owed = owed_of(scorer)
        new = increments if owed is None else increments - np.take_along_axis(owed, np.maximum(found.lanes, 0), axis=1)
        totals = totals + (scorer.weight * np.where(exists, new, 0.0) if scorer.weight else 0.0)
        parts.append(increments[:, :, None].astype(np.float32))
    order = np.argsort(-totals, axis=1, kind="stable")[:, :num_candidates]
    kept = np.take_along_axis(totals, order, axis=1).astype(np.float32)
    possible = kept > -np.inf
    return dataclasses.replace(
        found,
        flagged=flagged,
        totals=kept,
        lanes=np.where(possible, np.take_along_axis(found.lanes, order, axis=1), -1),
        tokens=np.where(possible, np.take_along_axis(found.tokens, order, axis=1), -1),
        parts=np.where(possible[:, :, None], np.take_along_axis(np.concatenate(parts, 2), order[:, :, None], 1), 0.0),
    )


def owed_of(scorer: CandidateScorer) -> Array | None:
    """What a source that speaks late has said of the live rows since their last token; see `CandidateScorer`."""
    return getattr(scorer, "owed", None)
