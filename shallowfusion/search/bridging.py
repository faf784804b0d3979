"""Language models with another tokenizer in a search: which they are, their share of a rule, their sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from shallowfusion.config import require
from shallowfusion.errors import VocabularyError
from shallowfusion.fusion.rules import EndPolicy, Rule
from shallowfusion.scorers.byte_bridge import BridgeSettings, ByteBridge, ByteLanguage
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.text.vocabulary import Vocabulary, token_map

__all__ = ["BRIDGES", "Bridges", "LmBridge"]

LmBridge = Literal["bytes"]
BRIDGES: tuple[LmBridge, ...] = ("bytes",)


class Bridges:
    """Parts the language models of a decoder: those on the acoustic model's tokens, and those that need a bridge.

    Args:
        acoustic: the acoustic model's vocabulary.
        models: those on its tokens first.
        kind: how others are joined; None = they are refused.

    Raises:
        VocabularyError: a model on other tokens that cannot be bridged, or that stands before one that needs no bridge.
    """

    def __init__(self, acoustic: Vocabulary, models: Sequence[Any], kind: LmBridge | None) -> None:
        require(kind is None or kind in BRIDGES, f"lm_bridge must be 'bytes' or None, got {kind!r}.")
        shared, languages = [], []
        for model in models:
            try:
                token_map(acoustic, model.vocabulary, include_end=True)
            except VocabularyError:
                if kind is None or not isinstance(model, CausalLMScorer):
                    raise
                languages.append(ByteLanguage(model, acoustic))
            else:
                require(
                    not languages,
                    f"{model.vocabulary.name} has the acoustic model's tokens and comes after a language model that "
                    "has not; name those that share its tokens first.",
                )
                shared.append(model)
        self.shared = tuple(shared)
        self.languages = tuple(languages)

    def check(self, rule: Rule, policy: EndPolicy) -> None:
        """Refuse what needs every token's score of a bridged model.

        Raises:
            InvalidArgumentError: a rule or end policy that cannot be had of candidates alone.
        """
        if not self.languages:
            return
        plain = rule.is_linear and not (rule.catch_up or rule.lm_mixture or rule.class_factors)
        require(
            plain,
            f"the rule {rule.name} looks at every token of its language models, but one with another tokenizer scores "
            "only candidates; use fusion.static or fusion.piecewise, or a language model on the same tokenizer.",
        )
        require(
            policy != "end_factored",
            "end_policy='end_factored' needs every token of the language models, but one with another tokenizer scores "
            "only candidates; use 'neutral', 'asr_only' or 'lm'.",
        )

    def shared_rule(self, rule: Rule) -> Rule:
        """The rule for the models that need no bridge."""
        if not self.languages:
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
    ) -> list[ByteBridge]:
        """Fresh sources for one search.

        Args:
            names, temperatures: of all models.
            end_id: the acoustic end token.
        """
        found = []
        for i, language in enumerate(self.languages, len(self.shared)):
            settings = BridgeSettings(ending=policy, temperature=temperatures[i])  # type: ignore[arg-type]
            prompts = [language.model.prompt()] * utterances
            found.append(ByteBridge(language, prompts, end_id, rule.lm_weights[i], settings, rule.share_at, names[i]))
        return found
