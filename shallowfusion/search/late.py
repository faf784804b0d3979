"""Makes the late sources of a delayed rule from loaded language models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from shallowfusion.config import require
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.fusion.delays import Delay
from shallowfusion.fusion.rules import EndPolicy, Rule
from shallowfusion.scorers.base import Context
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.scorers.token_trees import TokenTrees
from shallowfusion.scorers.word_ngram import WordLanguage, WordNgramScorer
from shallowfusion.search.beam_state import FinishedHypothesis
from shallowfusion.search.candidates import CandidateScorer
from shallowfusion.search.delayed import DelayedLM, DelayedTexts
from shallowfusion.search.loop import SearchOutcome, StageClock
from shallowfusion.search.proxy import DenseCandidates, ReplacedProxy
from shallowfusion.text.spelling import Retokenised, SharedTokens, Spelling, Unit
from shallowfusion.text.vocabulary import Vocabulary, token_map

__all__ = ["DelayedModels", "finished", "late_sources", "spelling_of"]


@dataclass(frozen=True, eq=False)
class DelayedModels:
    """The language models of a delayed rule.

    Args:
        models: one per weight of the rule: the delayed causal model, and maybe its stand-in.
        names: of their parts.
        temperatures: of their logits.
        end_policy: in force.
    """

    models: Sequence[Any]
    names: Sequence[str]
    temperatures: Sequence[float]
    end_policy: EndPolicy


def late_sources(
    rule: Rule, given: DelayedModels, acoustic: Vocabulary, context: Context, clock: StageClock
) -> list[CandidateScorer]:
    """What a delayed rule asks of language models after the fused step: the delayed model, then its stand-in.

    Args:
        context: of the acoustic scorer: how many utterances, rows and tokens.

    Raises:
        InvalidArgumentError: an end policy or a model that cannot be delayed.
        VocabularyError: a tokenizer that is missing, or wanted equal and is not.
    """
    delay, llm = rule.delay, given.models[0]
    assert delay is not None
    require(
        given.end_policy != "end_factored",
        'end_policy="end_factored" rescales whole rows, which a delayed model does not see; choose "neutral" or "lm".',
    )
    if not isinstance(llm, CausalLMScorer):
        raise InvalidArgumentError(
            f"a delayed rule needs a causal language model first, got {type(llm).__name__}; n-gram models are cheap "
            "enough for fusion.static, and can stand in as the second model."
        )
    trees = TokenTrees(llm, len(context.prompts), temperature=given.temperatures[0])
    texts = DelayedTexts(trees, spelling_of(llm, acoustic, delay), delay)
    delayed = DelayedLM(
        texts, acoustic.tokens, acoustic.end_id, given.end_policy, rule.lm_weights[0], given.names[0], clock
    )
    if len(given.models) == 1:
        return [delayed]
    proxy = _stand_in(given, rule.lm_weights[1], acoustic, context)
    if delay.proxy_form == "replace":
        proxy = ReplacedProxy(proxy, delayed, is_late=isinstance(given.models[1], WordLanguage))
    return [delayed, proxy]


def finished(
    outcomes: Sequence[SearchOutcome], late: Sequence[CandidateScorer], clock: StageClock
) -> list[SearchOutcome]:
    """Score what a delayed model was not asked yet, take its stand-in's scores back, and rank again.

    The last token of a hypothesis bears the change; where the model says NaN there is none, and the flag is raised.
    `llm_calls` and `llm_tokens` are added to the clock's counts.

    Args:
        outcomes: of a search.
        late: its late sources; without a delayed model nothing changes.
    """
    found = list(outcomes)
    for place, source in enumerate(late):
        if isinstance(source, DelayedLM):
            totals = source.totals_of([outcome.hypotheses for outcome in found])
            clock.counts["llm_calls"] += source.texts.trees.num_calls
            clock.counts["llm_tokens"] += source.texts.trees.num_tokens
        elif isinstance(source, ReplacedProxy):
            totals = [np.zeros(len(outcome.hypotheses)) for outcome in found]
        else:
            continue
        found = [
            _renewed(outcome, own, place - len(late), source.weight) for outcome, own in zip(found, totals, strict=True)
        ]
    return found


def _renewed(outcome: SearchOutcome, totals: npt.NDArray[np.float64], column: int, weight: float) -> SearchOutcome:
    """The outcome with one part of its hypotheses made to sum to `totals`, ranked."""
    pairs = zip(outcome.hypotheses, totals.tolist(), strict=True)
    made = [h if math.isnan(total) else _completed(h, total, column, weight) for h, total in pairs]
    saw_nan = outcome.saw_nan or (weight != 0 and bool(np.isnan(totals).any()))
    ranked = sorted(made, key=lambda hypothesis: -hypothesis.key)
    return dataclasses.replace(outcome, hypotheses=ranked, saw_nan=saw_nan)


def _completed(hypothesis: FinishedHypothesis, wanted: float, column: int, weight: float) -> FinishedHypothesis:
    parts, totals = hypothesis.parts.copy(), hypothesis.token_totals.copy()
    if len(parts) == 0:
        return hypothesis
    rest = wanted - float(parts[:, column].sum(dtype=np.float64))
    parts[-1, column] += rest
    totals[-1] += weight * rest
    total = hypothesis.total + weight * rest
    key = hypothesis.key
    if total != hypothesis.total:  # keys are linear in totals
        key = key / hypothesis.total * total if hypothesis.total else total
    return dataclasses.replace(hypothesis, total=total, key=key, token_totals=totals, parts=parts)


def spelling_of(llm: CausalLMScorer, acoustic: Vocabulary, delay: Delay) -> Spelling:
    """How the model reads transcripts: in the acoustic tokens where they are its own, else re-tokenised.

    A model that merely has every acoustic token, and longer ones besides, would not spell the text in them; "auto"
    re-tokenises for it.

    Raises:
        VocabularyError: unit="tokens" with an acoustic token that the model lacks, no tokenizer to re-tokenise with, or
            one that cannot write what the acoustic tokens do.
    """
    is_same = _texts(llm.vocabulary) == _texts(acoustic)
    if delay.unit == "tokens" or (delay.unit == "auto" and is_same):
        mapping = token_map(acoustic, llm.vocabulary, include_end=False)
        return SharedTokens(_ids(mapping, acoustic, llm.vocabulary), acoustic.tokens)
    unit: Unit = "characters" if delay.unit == "characters" else "words"
    spelling = Retokenised(llm.tokenizer, llm.vocabulary, unit, lower=delay.lower)
    letters = bytes(sorted(set(b"".join(filter(None, acoustic.tokens)))))
    spelling.check(letters.decode("ascii", "ignore"))
    return spelling


def _texts(vocabulary: Vocabulary) -> set[bytes]:
    return {token for token in vocabulary.tokens if token}


def _ids(mapping: Tensor | None, acoustic: Vocabulary, language: Vocabulary) -> list[int]:
    """The language model's id of each acoustic token; -1 = none."""
    ids: list[int] = list(range(len(language))) if mapping is None else mapping.tolist()
    return [*ids, *[-1] * (len(acoustic) - len(ids))][: len(acoustic)]


def _stand_in(given: DelayedModels, weight: float, acoustic: Vocabulary, context: Context) -> CandidateScorer:
    model = given.models[1]
    if isinstance(model, WordLanguage):
        ending: Any = given.end_policy
        count = len(context.prompts)
        return WordNgramScorer(model.words, acoustic.end_id, count, weight, given.names[1], model, ending)
    mapping = token_map(acoustic, model.vocabulary, include_end=given.end_policy == "lm")
    ids = _ids(mapping, acoustic, model.vocabulary)
    if given.end_policy != "lm":
        ids[acoustic.end_id] = -1
    heard = Context([model.prompt()] * len(context.prompts), context.beam_size, context.max_new_tokens)
    return DenseCandidates(model, heard, ids, weight, given.names[1])
