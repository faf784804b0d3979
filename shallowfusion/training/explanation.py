"""Why a transcript came out as it did: what each model said of each token, and where the language model decided."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from shallowfusion.config import require
from shallowfusion.decoder import FusionDecoder
from shallowfusion.fusion.gates import StepView
from shallowfusion.fusion.step import row_statistics
from shallowfusion.fusion.weighing import step_weights
from shallowfusion.options import DecodingOptions
from shallowfusion.results import Transcription
from shallowfusion.search.rows import Rows
from shallowfusion.search.sources import Sources
from shallowfusion.training.teacher_forcing import forced_steps, mapped_log_probs

__all__ = ["Alternative", "Divergence", "Explanation", "ScoredToken", "explain"]

FUSED = "fused"


@dataclass(frozen=True)
class Alternative:
    """A token a source would have liked, and its log-prob there (of "fused": its increment), nats."""

    text: str
    score: float


@dataclass(frozen=True)
class ScoredToken:
    """One token of a path under the fused rule.

    Args:
        text: what it adds to the text; "<end>" for the end.
        weights: in force, by source; an internal LM's is negative.
        parts: each source's log-prob of it, unweighted.
        increment: what the fused step adds for it; -inf where it is forbidden.
        entropies: of each source in this row, nats.
        alternatives: the best tokens of each source, and of the fused row under "fused", best first.
    """

    id: int
    text: str
    weights: Mapping[str, float]
    parts: Mapping[str, float]
    increment: float
    entropies: Mapping[str, float]
    alternatives: Mapping[str, tuple[Alternative, ...]]

    @property
    def contributions(self) -> dict[str, float]:
        """Weight times log-prob of each source."""
        return {name: weight * self.parts[name] if weight else 0.0 for name, weight in self.weights.items()}


@dataclass(frozen=True)
class Divergence:
    """The first token at which the fused transcript leaves that of the acoustic model alone.

    Args:
        position: of the token.
        prefix: text both share before it.
        fused, alone: the two tokens after the same prefix, under the fused rule.
    """

    position: int
    prefix: str
    fused: ScoredToken
    alone: ScoredToken


@dataclass(frozen=True)
class Explanation:
    """A transcript next to that of the acoustic model alone.

    Args:
        result: fused; `alone`: the acoustic model's.
        steps: the tokens of the fused transcript, the end last if it ended.
        alone_steps: the tokens of the acoustic model's transcript under the fused rule.
        divergence: None where both are the same.
        length_penalty: what totals are divided by, as a power of the number of tokens.
    """

    result: Transcription
    alone: Transcription
    steps: tuple[ScoredToken, ...]
    alone_steps: tuple[ScoredToken, ...]
    divergence: Divergence | None
    length_penalty: float

    @property
    def totals(self) -> dict[str, dict[str, float]]:
        """By path ("fused", "alone"): what each source gave it in all, its total, and the score it is ranked by.

        "other" is what no source gave at its weight: length bonus, hotwords, renormalisation, factors of token classes,
        scores that a rule catches up with. The score is that of the search, without a ranking by coverage.
        """
        found = {}
        for name, steps in ((FUSED, self.steps), ("alone", self.alone_steps)):
            gave = {source: math.fsum(step.contributions[source] for step in steps) for source in steps[0].weights}
            total = math.fsum(step.increment for step in steps)
            rank = total / len(steps) ** self.length_penalty
            found[name] = {**gave, "other": total - math.fsum(gave.values()), "total": total, "score": rank}
        return found


@torch.inference_mode()
def explain(decoder: FusionDecoder, recording: Any, options: DecodingOptions, num_alternatives: int = 4) -> Explanation:
    """Transcribe a recording fused and alone, and read both transcripts through all models again.

    Price: three passes of the encoder, two searches, and one forced pass of every model over both transcripts.

    Args:
        recording: as for `FusionDecoder.transcribe`.

    Raises:
        InvalidArgumentError: no language model is loaded, or a rule that gives none a say.
        AudioError: the recording cannot be read.
    """
    rule = options.resolved_rule(len(decoder.language_models))
    require(
        bool(decoder.language_models) and rule.fuses,
        f"explain compares a language model's say with the acoustic model's, but under {rule} none has one; "
        "load one with --lm and give it a weight.",
    )
    require(options.ctc_weight == 0, f"explain reads no CTC scores, got ctc_weight={options.ctc_weight}; use 0.")
    result = decoder.transcribe([recording], options)[0]
    if result.error is not None:
        raise result.error
    plain = replace(options, rule=None, lm_weight=None, initial_steps=0, lm_temperature=1.0)
    alone = FusionDecoder(decoder.acoustic).transcribe([recording], plain)[0]
    encoded = decoder.encode([recording])
    end = decoder.acoustic.tokens.end
    paths = [(*own.best.token_ids, *([end] if own.best.ended else [])) for own in (result, alone)]
    sources = decoder.sources(encoded.expand(2, -1, -1), options)
    fused_steps, alone_steps = _scored(decoder, sources, paths, num_alternatives)
    penalty = options.length_penalty if options.length_penalty is not None else 1.0
    return Explanation(
        result, alone, tuple(fused_steps), tuple(alone_steps), _divergence(fused_steps, alone_steps), penalty
    )


def _scored(
    decoder: FusionDecoder, sources: Sources, paths: Sequence[Sequence[int]], count: int
) -> list[list[ScoredToken]]:
    """Each path's tokens under the plan's rule, one row per path."""
    vocab = len(decoder.acoustic.scorer.vocabulary)
    plan = replace(sources.plan, backend="reference")
    rows = [
        Rows(plan, len(sources.scorers), prompts[:1], top_k=vocab)
        for prompts in [sources.contexts[0].prompts]
        for _ in paths
    ]
    found: list[list[ScoredToken]] = [[] for _ in paths]
    for view, _ in forced_steps(sources, [path[:-1] for path in paths]):
        for i, path in enumerate(paths):
            if view.step < len(path):
                own = _row_of(view, i)
                found[i].append(_token(decoder, sources, own, rows[i], path[view.step], count))
    return found


def _row_of(view: StepView, row: int) -> StepView:
    one = slice(row, row + 1)
    sums = None if view.sums is None else view.sums[one]
    return replace(view, logits=[source[one] for source in view.logits], sums=sums)


def _token(decoder: FusionDecoder, sources: Sources, view: StepView, rows: Rows, token: int, count: int) -> ScoredToken:
    plan, names = sources.plan, sources.names
    before = float(rows.totals[0, 0])
    found = rows.candidates(view.logits, view.step)
    listed = {int(id): place for place, id in enumerate(found.tokens[0]) if id >= 0}
    log_probs = [mapped_log_probs(view, s, plan.unmapped)[0] for s in range(len(names))]
    place = listed.get(token)
    total = -math.inf if place is None else float(found.totals[0, place])
    if place is not None:
        here = np.array([[token]])
        rows.follow(found, here, np.zeros_like(here), found.totals[:, place : place + 1])
    weights = step_weights(plan.rule, view).weights[0].tolist()
    alternatives = {
        name: _best(decoder, own, _said_by(decoder, view, s), count)
        for s, (name, own) in enumerate(zip(names, log_probs, strict=True))
    }
    words = [id for id in listed if id in _said_by(decoder, view, 0)][:count]
    alternatives[FUSED] = tuple(
        Alternative(token_text(decoder, id), float(found.totals[0, listed[id]]) - before) for id in words
    )
    entropies = [
        float(row_statistics(own, t).entropy[0]) for own, t in zip(view.logits, view.temperatures, strict=True)
    ]
    return ScoredToken(
        token,
        token_text(decoder, token),
        dict(zip(names, weights, strict=True)),
        {name: float(own[token]) for name, own in zip(names, log_probs, strict=True)},
        total - before,
        dict(zip(names, entropies, strict=True)),
        alternatives,
    )


def _said_by(decoder: FusionDecoder, view: StepView, source: int) -> set[int]:
    """Acoustic ids of the text tokens and the end, as far as a source has its own words for them."""
    vocabulary = decoder.acoustic.scorer.vocabulary
    ids = {i for i, token in enumerate(vocabulary.tokens) if token is not None or i == vocabulary.end_id}
    mapping = None if view.maps is None else view.maps[source]
    if mapping is not None:
        return ids & set(torch.nonzero(mapping >= 0)[:, 0].tolist())
    return {i for i in ids if i < view.logits[source].shape[1]}


def _best(decoder: FusionDecoder, log_probs: torch.Tensor, known: set[int], count: int) -> tuple[Alternative, ...]:
    ids = sorted(known)
    values, places = log_probs[ids].topk(min(count, len(ids)))
    return tuple(
        Alternative(token_text(decoder, ids[place]), value)
        for value, place in zip(values.tolist(), places.tolist(), strict=True)
    )


def token_text(decoder: FusionDecoder, token: int) -> str:
    """What a token adds to the text, "<end>" for the end."""
    if token == decoder.acoustic.tokens.end:
        return "<end>"
    return str(decoder.acoustic.tokenizer.decode([token], skip_special_tokens=True))


def _divergence(fused: Sequence[ScoredToken], alone: Sequence[ScoredToken]) -> Divergence | None:
    for position, (own, other) in enumerate(zip(fused, alone, strict=False)):
        if own.id != other.id:
            prefix = "".join(step.text for step in fused[:position])
            return Divergence(position, prefix, own, other)
    return None
