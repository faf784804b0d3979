"""Takes n-gram models that look up candidates alone out of the fused step."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, TypeVar

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.scorers.ngram import NgramScorer
from shallowfusion.scorers.ngram_lookups import NgramLookups
from shallowfusion.search.loop import SearchPlan
from shallowfusion.search.sources import Sources

__all__ = ["with_ngram_lookups"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


def with_ngram_lookups(own: Sources) -> Sources:
    """The same search with every n-gram model that wants only candidates among the late sources.

    Where the rule needs a whole row of it, a model that chose so for itself ("auto") stays in the fused step.

    Raises:
        InvalidArgumentError: lookups="candidates" was asked for, and the rule needs every token.
    """
    chosen = [i for i, scorer in enumerate(own.scorers) if isinstance(scorer, NgramScorer) and scorer.on_candidates]
    if not chosen:
        return own
    obstacle = _obstacle(own.plan, chosen)
    if obstacle is not None:
        scorers: list[Any] = [own.scorers[i] for i in chosen]
        asked = [scorer.vocabulary.name for scorer in scorers if scorer.lookups == "candidates"]
        if asked:
            raise InvalidArgumentError(
                f"{', '.join(asked)} looks up candidates alone, but {obstacle}; leave out ngram_lookups."
            )
        logger.info("n-gram models score every token: %s", obstacle)
        return own
    plan, rule, late = own.plan, own.plan.rule, []
    for i in chosen:
        prompts, weight = own.contexts[i].prompts, rule.lm_weights[i - 1]
        scorer: Any = own.scorers[i]
        source = NgramLookups(scorer, prompts, plan.maps[i], plan.unmapped[i], weight, rule.share_at, own.names[i])
        late.append(source)
    return dataclasses.replace(
        own,
        scorers=_without(own.scorers, chosen),
        contexts=_without(own.contexts, chosen),
        names=_without(own.names, chosen),
        plan=dataclasses.replace(
            plan,
            rule=dataclasses.replace(rule, lm_weights=_without(rule.lm_weights, [i - 1 for i in chosen])),
            maps=_without(plan.maps, chosen),
            unmapped=_without(plan.unmapped, chosen),
            temperatures=_without(plan.temperatures or (), chosen),
            fuses_late=plan.fuses_late or rule.fuses,
        ),
        late=(*late, *own.late),
        rule=own.rule or rule,
    )


def _obstacle(plan: SearchPlan, chosen: Sequence[int]) -> str | None:
    rule, temperatures = plan.rule, plan.temperatures
    if not rule.is_linear or rule.catch_up or rule.lm_mixture or rule.ilm_weight or plan.class_sources:
        return f"the rule {rule.name} looks at every token of its language models"
    if plan.normalize != "none":
        return "end_policy='end_factored' normalises whole rows"
    if temperatures is not None and any(temperatures[i] != 1.0 for i in chosen):
        return "lm_temperature needs a softmax over whole rows"
    return None


def _without(items: Sequence[T], places: Sequence[int]) -> tuple[T, ...]:
    return tuple(item for place, item in enumerate(items) if place not in places)
