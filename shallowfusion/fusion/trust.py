"""Whether a language model is heard at all, from how likely it finds what was said with its help."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shallowfusion.config import require

__all__ = ["Trust", "floor_of", "likelihood"]


@dataclass(frozen=True)
class Trust:
    """A language model is heard in an utterance while evidence > 0, with

    evidence = memory * evidence before + log P_lm(transcript) - floor * tokens

    where the transcript is the fused one, its end included. A model of another domain finds even what it bent to its
    taste less likely than a fitting model finds what was said. Source: ours.

    Args:
        floor: mean log-prob per token that is too low, nats, below 0; `floor_of` has it from recordings that fit.
        memory: 0 = every utterance for itself; towards 1 the earlier utterances of a session count, in their order.
    """

    floor: float
    memory: float = 0.0

    def __post_init__(self) -> None:
        require(
            isinstance(self.floor, (int, float)) and math.isfinite(self.floor) and self.floor < 0,
            f"floor must be a mean log-prob per token, finite and below 0, got {self.floor!r}; floor_of has it from "
            "transcripts of the right domain.",
        )
        require(
            isinstance(self.memory, (int, float)) and 0 <= self.memory < 1,
            f"memory must be at least 0 and below 1, got {self.memory!r}; 0 judges every utterance for itself.",
        )

    def follow(self, before: float, log_prob: float, num_tokens: int) -> float:
        """The evidence after one more utterance; one that is not a number, as of a broken model, wipes all out."""
        own = log_prob - self.floor * num_tokens
        return self.memory * before + own if math.isfinite(own) else 0.0


def likelihood(parts: Mapping[str, float], names: Sequence[str], weights: Sequence[float]) -> float:
    """log P_lm of a transcript; of several language models the mean by their weights.

    Args:
        parts: of a hypothesis, by source name; `names`: of the language models, in the order of `weights`.
    """
    shares = list(weights) if len(weights) == len(names) else [1.0] * len(names)
    whole = sum(shares)
    if whole == 0:
        shares, whole = [1.0] * len(names), float(len(names))
    return sum(share * parts[name] for share, name in zip(shares, names, strict=True) if share) / whole


def floor_of(log_probs: Sequence[float], num_tokens: Sequence[int], share: float = 0.1) -> float:
    """The floor under which `share` of some fused transcripts of the right domain would lie; no references needed.

    Args:
        log_probs: `likelihood` of each transcript; `num_tokens`: its tokens, the end counted.
        share: from 0 to below 1, of transcripts that are given up.

    Raises:
        InvalidArgumentError: no transcripts, numbers that do not pair, or a share outside its range.
    """
    require(0 <= share < 1, f"share must be at least 0 and below 1, got {share!r}.")
    require(
        len(log_probs) == len(num_tokens) > 0,
        f"floor_of needs transcripts with one log-prob and one length each, got {len(log_probs)} and "
        f"{len(num_tokens)}.",
    )
    means = sorted(own / max(1, count) for own, count in zip(log_probs, num_tokens, strict=True))
    place = share * (len(means) - 1)
    low = math.floor(place)
    high = min(low + 1, len(means) - 1)
    return min(means[low] + (place - low) * (means[high] - means[low]), -1e-9)
