"""Language models that score candidates alone, n-grams of words and those with another tokenizer, and their share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from shallowfusion.config import require
from shallowfusion.errors import InvalidArgumentError, VocabularyError
from shallowfusion.fusion.rules import EndPolicy, Rule
from shallowfusion.scorers.byte_bridge import BridgeSettings, ByteBridge, ByteLanguage
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.scorers.word_ngram import WordLanguage, WordNgramScorer
from shallowfusion.search.candidates import CandidateScorer
from shallowfusion.text.vocabulary import Vocabulary, token_map

__all__ = ["BRIDGES", "Bridges", "LmBridge"]

LmBridge = Literal["bytes"]
BRIDGES: tuple[LmBridge, ...] = ("bytes",)


class Bridges:
    """Parts the language models of a decoder: those that score every token, and those that score candidates alone.

    The latter are n-gram models of words and, with a bridge, causal language models on another tokenizer.

    Args:
        acoustic: the acoustic model's vocabulary.
        models: those on its tokens first.
        kind: how those on other tokens are joined; None = not.

    Raises:
        VocabularyError: a model on other tokens that cannot be bridged.
        InvalidArgumentError: a model that scores candidates alone stands before one that scores every token.
    """

    def __init__(self, acoustic: Vocabulary, models: Sequence[Any], kind: LmBridge | None) -> None:
        require(kind is None or kind in BRIDGES, f"lm_bridge must be 'bytes' or None, got {kind!r}.")
        shared: list[Any] = []
        languages: list[ByteLanguage | WordLanguage] = []
        for model in models:
            language = model if isinstance(model, WordLanguage) else _bridged(model, acoustic, kind)
            if language is not None:
                languages.append(language)
                continue
            if languages:
                raise InvalidArgumentError(
                    f"{model.vocabulary.name} has the acoustic model's tokens and comes after a language model that "
                    "has not; name those that share its tokens first."
                )
            shared.append(model)
        self.shared = tuple(shared)
        self.languages = tuple(languages)
        self.has_bytes = any(isinstance(language, ByteLanguage) for language in languages)

    def check(self, rule: Rule, policy: EndPolicy) -> None:
        """Refuse what needs every token's score of a bridged model.

        Raises:
            InvalidArgumentError: a rule or end policy that cannot be had of candidates alone.
        """
        if not self.languages or rule.delay is not None:
            return
        plain = rule.is_linear and not (rule.catch_up or rule.lm_mixture or rule.class_factors)
        require(
            plain,
            f"the rule {rule.name} looks at every token of its language models, but n-grams of words and models with "
            "another tokenizer score only candidates; use fusion.static or fusion.piecewise, or a language model on "
            "the same tokenizer.",
        )
        require(
            policy != "end_factored",
            "end_policy='end_factored' needs every token of the language models, but n-grams of words and models with "
            "another tokenizer score only candidates; use 'neutral', 'asr_only' or 'lm'.",
        )

    def shared_rule(self, rule: Rule) -> Rule:
        """The rule for the models that score every token."""
        if not self.languages or rule.delay is not None:
            return rule
        return dataclasses.replace(rule, lm_weights=rule.lm_weights[: len(self.shared)])

    def sources(
        self,
        rule: Rule,
        policy: EndPolicy,
        names: Sequence[str],
        temperatures: Sequence[float],
        utterances: int,
        end_id: int,
    ) -> list[CandidateScorer]:
        """Fresh sources for one search.

        Args:
            names, temperatures: of all models.
            end_id: the acoustic end token.
        """
        found: list[CandidateScorer] = []
        for i, language in enumerate(self.languages, len(self.shared)):
            weight, schedule, name = rule.lm_weights[i], rule.share_at, names[i]
            if isinstance(language, WordLanguage):
                ending: Any = policy
                found.append(
                    WordNgramScorer(language.words, end_id, utterances, weight, name, language, ending, schedule)
                )
                continue
            settings = BridgeSettings(ending=policy, temperature=temperatures[i])  # type: ignore[arg-type]
            prompts = [language.model.prompt()] * utterances
            found.append(ByteBridge(language, prompts, end_id, weight, settings, schedule, name))
        return found


def _bridged(model: Any, acoustic: Vocabulary, kind: LmBridge | None) -> ByteLanguage | None:
    """The model behind a bridge; None if it needs none, or there is none."""
    if kind is None:
        return None
    try:
        token_map(acoustic, model.vocabulary, include_end=True)
    except VocabularyError:
        if not isinstance(model, CausalLMScorer):
            raise
        return ByteLanguage(model, acoustic)
    return None
