"""Utterances in which a `trusted` rule gives its language models up, and how those are decoded then."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from shallowfusion.config import require
from shallowfusion.fusion.rules import Rule
from shallowfusion.fusion.trust import floor_of, likelihood
from shallowfusion.options import DecodingOptions
from shallowfusion.results import Transcription
from shallowfusion.values import Hypothesis

__all__ = ["DISTRUSTED", "Evidence", "alone_options", "flagged", "given_up", "trust_floor"]

DISTRUSTED = "lm_distrusted"  # the flag of a transcript that the language model had no part in


@dataclass
class Evidence:
    """What the utterances of a session said so far of its language models; the only state of a trusted rule."""

    nats: float = 0.0


def given_up(best: Sequence[Hypothesis], rule: Rule, names: Sequence[str], evidence: Evidence) -> list[int]:
    """Places of the utterances that are to be decoded without language models, in order; `evidence` follows.

    Args:
        best: fused first choices, in the order they were said.
        names: of the language models' parts.
    """
    assert rule.trust is not None
    lost = []
    for place, hypothesis in enumerate(best):
        own = likelihood(hypothesis.parts, names, rule.lm_weights)
        evidence.nats = rule.trust.follow(evidence.nats, own, len(hypothesis.tokens))
        if not evidence.nats > 0:
            lost.append(place)
    return lost


def alone_options(options: DecodingOptions) -> DecodingOptions:
    """The same options for the acoustic model alone: no rule, no temperatures that serve a fusion."""
    return dataclasses.replace(
        options, rule=None, lm_weight=None, initial_steps=0, asr_temperature=1.0, lm_temperature=1.0
    )


def flagged(hypotheses: Sequence[Hypothesis]) -> tuple[Hypothesis, ...]:
    return tuple(dataclasses.replace(own, flags=(*own.flags, DISTRUSTED)) for own in hypotheses)


def trust_floor(results: Sequence[Transcription], share: float = 0.1) -> float:
    """The floor for `fusion.trusted` from fused transcripts of recordings of the right domain; no references needed.

    Args:
        results: decoded with the rule that is to be trusted.
        share: of them that would be given up; 0.1 kept nearly all of the gain where it was measured.

    Raises:
        InvalidArgumentError: no results, or some without language models.
    """
    found, counts = [], []
    for result in results:
        best = result.best
        names = [name for name in best.parts if name.startswith("lm")]
        require(bool(names), f"{result.source} has no scores of a language model; decode it with the rule to trust.")
        weights = () if result.rule is None else result.rule.lm_weights
        found.append(likelihood(best.parts, names, weights))
        counts.append(len(best.tokens))
    return floor_of(found, counts, share)
