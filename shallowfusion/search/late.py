"""Makes the late sources of a delayed rule from loaded language models."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shallowfusion.config import require
from shallowfusion.errors import InvalidArgumentError, VocabularyError
from shallowfusion.fusion.delays import Delay
from shallowfusion.fusion.rules import EndPolicy, Rule
from shallowfusion.scorers.base import Context
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.scorers.token_trees import TokenTrees
from shallowfusion.search.beam_state import FinishedHypothesis
from shallowfusion.search.candidates import CandidateScorer
from shallowfusion.search.delayed import DelayedLM, DelayedTexts
from shallowfusion.search.loop import SearchOutcome, StageClock
from shallowfusion.search.proxy import DenseCandidates, ReplacedProxy
from shallowfusion.text.spelling import Retokenised, SharedTokens, Spelling
from shallowfusion.text.vocabulary import Vocabulary, token_map

__all__ = ["LateSources", "late_sources", "spelling_of"]


@dataclass(frozen=True, eq=False)
class LateSources:
    """The late sources of one batch of searches: the delayed model first, then its stand-in.

    Args:
        sources: fresh; as the search takes them.
    """

    sources: tuple[CandidateScorer, ...] = ()

    def finished(self, outcomes: list[SearchOutcome], clock: StageClock) -> list[SearchOutcome]:
        """Score what the delayed model was not asked yet, take a stand-in's scores back, and rank again.

        The last token of a hypothesis bears the change. `llm_calls` and `llm_tokens` are added to the clock's counts.
        """
        if not self.sources:
            return outcomes
        delayed = self.sources[0]
        assert isinstance(delayed, DelayedLM)
        wanted = delayed.totals_of([outcome.hypotheses for outcome in outcomes])
        clock.counts["llm_calls"] += delayed.texts.trees.num_calls
        clock.counts["llm_tokens"] += delayed.texts.trees.num_tokens
        replaced = len(self.sources) > 1 and isinstance(self.sources[1], ReplacedProxy)
        found = []
        for outcome, totals in zip(outcomes, wanted, strict=True):
            ranked = [
                _completed(hypothesis, self.sources, [total, 0.0] if replaced else [total])
                for hypothesis, total in zip(outcome.hypotheses, totals.tolist(), strict=True)
            ]
            found.append(SearchOutcome(sorted(ranked, key=lambda hypothesis: -hypothesis.key), outcome.saw_nan))
        return found


def _completed(
    hypothesis: FinishedHypothesis, sources: Sequence[CandidateScorer], wanted: Sequence[float]
) -> FinishedHypothesis:
    """The hypothesis with its late parts, the last ones, made to sum to `wanted`; keys are linear in totals."""
    parts, totals = hypothesis.parts.copy(), hypothesis.token_totals.copy()
    if len(parts) == 0:
        return hypothesis
    change = 0.0
    for place, total in enumerate(wanted):
        column = parts.shape[1] - len(sources) + place
        rest = total - float(parts[:, column].sum(dtype=np.float64))
        parts[-1, column] += rest
        change += sources[place].weight * rest
    totals[-1] += change
    total = hypothesis.total + change
    share = hypothesis.key / hypothesis.total if hypothesis.total else 1.0
    return dataclasses.replace(hypothesis, total=total, key=share * total, token_totals=totals, parts=parts)


def late_sources(
    rule: Rule,
    models: Sequence[Any],
    names: Sequence[str],
    acoustic: Vocabulary,
    context: Context,
    end_policy: EndPolicy,
    clock: StageClock,
    temperature: float = 1.0,
) -> LateSources:
    """What a rule asks of language models after the fused step; nothing unless it is a delayed one.

    Args:
        models: one per weight of the rule: the delayed causal model, and maybe its stand-in.
        names: of their parts.
        context: of the acoustic scorer: how many utterances, rows and tokens.
        end_policy: of the rule in force.

    Raises:
        InvalidArgumentError: an end policy or a model that cannot be delayed.
        VocabularyError: a tokenizer that is missing, or wanted equal and is not.
    """
    delay = rule.delay
    if delay is None or not models:
        return LateSources()
    require(
        end_policy != "end_factored",
        'end_policy="end_factored" rescales whole rows, which a delayed model does not see; choose "neutral" or "lm".',
    )
    llm = models[0]
    if not isinstance(llm, CausalLMScorer):
        raise InvalidArgumentError(
            f"a delayed rule needs a causal language model first, got {type(llm).__name__}; n-gram models are cheap "
            "enough for fusion.static, and can stand in as the second model."
        )
    trees = TokenTrees(llm, len(context.prompts), temperature=temperature)
    texts = DelayedTexts(trees, spelling_of(llm, acoustic, delay), delay)
    delayed = DelayedLM(texts, acoustic.tokens, acoustic.end_id, end_policy, rule.lm_weights[0], names[0], clock)
    if len(models) == 1:
        return LateSources((delayed,))
    proxy = _stand_in(models[1], names[1], rule.lm_weights[1], acoustic, context, end_policy)
    if delay.proxy_form == "replace":
        proxy = ReplacedProxy(proxy, delayed, is_late=False)
    return LateSources((delayed, proxy))


def spelling_of(llm: CausalLMScorer, acoustic: Vocabulary, delay: Delay) -> Spelling:
    """How the model reads transcripts: in the acoustic tokens where they are its own, else re-tokenised.

    Raises:
        VocabularyError: unit="tokens" with differing tokenizers, or no tokenizer to re-tokenise with.
    """
    if delay.unit in ("auto", "tokens"):
        try:
            mapping = token_map(acoustic, llm.vocabulary, include_end=False)
        except VocabularyError:
            if delay.unit == "tokens":
                raise
        else:
            return SharedTokens(range(len(acoustic)) if mapping is None else mapping.tolist())
    unit = "characters" if delay.unit == "characters" else "words"
    return Retokenised(llm.tokenizer, llm.vocabulary, acoustic.tokens, unit, lower=delay.lower)


def _stand_in(
    model: Any, name: str, weight: float, acoustic: Vocabulary, context: Context, end_policy: EndPolicy
) -> CandidateScorer:
    mapping = token_map(acoustic, model.vocabulary, include_end=end_policy == "lm")
    ids = list(range(len(model.vocabulary))) if mapping is None else mapping.tolist()
    ids += [-1] * (len(acoustic) - len(ids))
    if end_policy != "lm":
        ids[acoustic.end_id] = -1
    heard = Context([model.prompt()] * len(context.prompts), context.beam_size, context.max_new_tokens)
    return DenseCandidates(model, heard, ids, weight, name)
