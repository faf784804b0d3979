"""From options to what a search runs: scorers with their contexts, and the plan."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from shallowfusion.config import require
from shallowfusion.ctc.joint import CtcFrames, JointCtc, joint_demand, joint_scorers
from shallowfusion.features.log_mel import log_mel
from shallowfusion.fusion.rules import DEFAULT_END_POLICY, IlmVariant, Rule
from shallowfusion.fusion.token_classes import class_sources
from shallowfusion.options import DecodingOptions
from shallowfusion.scorers.base import Context, Scorer
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.scorers.fingerprints import fingerprint
from shallowfusion.scorers.footprint import Demand, slot_bytes
from shallowfusion.scorers.internal_lm import InternalLMScorer
from shallowfusion.scorers.loading import AcousticModel, LanguageModel
from shallowfusion.scorers.mixture import MixtureScorer
from shallowfusion.scorers.prefixes import PrefixCache, Prefixes
from shallowfusion.scorers.source_domain import SourceDomainScorer
from shallowfusion.search.bridging import Bridges, LmBridge
from shallowfusion.search.candidates import CandidateScorer
from shallowfusion.search.hotword_phrases import HotwordPhrases
from shallowfusion.search.late import DelayedModels, late_sources
from shallowfusion.search.lookups import with_ngram_lookups
from shallowfusion.search.loop import SearchPlan, StageClock
from shallowfusion.search.sources import Sources
from shallowfusion.search.timestamp_guard import timestamp_rules
from shallowfusion.search.timestamps import TimestampRules
from shallowfusion.text.vocabulary import class_factors, text_map, token_map
from shallowfusion.values import Unmapped

__all__ = ["SearchPlanner"]

T = TypeVar("T")


class SearchPlanner:
    """Knows the models; `FusionDecoder` asks it what to run.

    Args:
        acoustic: the acoustic model.
        language_models: on its tokenizer, then those that need a bridge; the first on any, under a delayed rule.
        internal_context: float [frames, size] for fusion.internal_lm(variant="trained").
        lm_bridge: how language models on another tokenizer are joined, None = only delayed.
        names: of the parts of acoustic and language models; None = "asr", then "lm", or "lm0", "lm1", ...
        prefixes: what language models have read before; None = a new cache.
        joint: a CTC model that `ctc_weight` hears in place of the acoustic model's own head.
    """

    def __init__(
        self,
        acoustic: AcousticModel,
        language_models: Sequence[LanguageModel],
        internal_context: Tensor | None,
        lm_bridge: LmBridge | None = None,
        names: tuple[str, ...] | None = None,
        prefixes: PrefixCache | None = None,
        joint: JointCtc | None = None,
    ) -> None:
        self.acoustic = acoustic
        self.language_models = tuple(language_models)
        self.internal_context = internal_context
        self.lm_bridge = lm_bridge
        self.joint = joint
        self.prefixes = PrefixCache() if prefixes is None else prefixes
        self._names = names
        self._made: dict[Hashable, Any] = {}
        self._phrases = HotwordPhrases(acoustic.tokenizer, acoustic.scorer.vocabulary.tokens)
        self._bridges = Bridges(acoustic.scorer.vocabulary, self.language_models, lm_bridge)

    @cached_property
    def fingerprints(self) -> tuple[str, ...]:
        """Of the acoustic model and each language model."""
        return tuple(fingerprint(scorer) for scorer in (self.acoustic.scorer, *self.language_models))

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the parts: "asr", then "lm", or "lm0", "lm1", ... for several."""
        if self._names is not None:
            return self._names
        count = len(self.language_models)
        return ("asr", "lm") if count == 1 else ("asr", *(f"lm{i}" for i in range(count)))

    def names_under(self, rule: Rule) -> tuple[str, ...]:
        """Names of the parts under a rule: `source_names`, and "ilm" where it subtracts the internal LM."""
        own = ("asr", "lm") if rule.lm_mixture else self.source_names
        if rule.subtracts_last:
            own = ("asr", "lm") if len(own) == 3 else own[:-1]
        return (*own, "ilm") if rule.ilm_weight else own

    def among(self, names: Sequence[str]) -> SearchPlanner:
        """The same with some of the language models only, which keep their names.

        Raises:
            InvalidArgumentError: no such language model, or one twice.
        """
        known = self.source_names[1:]
        require(
            set(names) <= set(known) and len(set(names)) == len(names),
            f"language_models must be some of {', '.join(known) or 'none'}, each once, got {tuple(names)}.",
        )
        chosen = [place for place, name in enumerate(known) if name in names]
        models = [self.language_models[place] for place in chosen]
        own = ("asr", *(known[place] for place in chosen))
        return SearchPlanner(
            self.acoustic, models, self.internal_context, self.lm_bridge, own, self.prefixes, self.joint
        )

    def _once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made once for a key."""
        if key not in self._made:
            self._made[key] = make()
        found: T = self._made[key]
        return found

    def check(self, rule: Rule) -> None:
        """Refuse language models that the rule cannot use.

        Raises:
            VocabularyError: a model's tokens differ from the acoustic model's, and the rule does not delay it.
        """
        require(
            rule.delay is None or not self._bridges.has_bytes,
            "a delayed rule re-tokenises the text itself, so it goes without lm_bridge; leave one of the two out.",
        )
        for model in self._bridges.shared[0 if rule.delay is None else 1 :]:
            token_map(self.acoustic.scorer.vocabulary, model.vocabulary, include_end=True)

    def _models_under(self, rule: Rule) -> Sequence[Any]:
        """What the fused step hears beside the acoustic model."""
        if rule.delay is not None:
            return ()
        if not rule.lm_mixture:
            models = self._bridges.shared
            return models[: len(models) - int(rule.subtracts_last)]
        weights, forgetting = rule.lm_mixture, rule.forgetting
        make = lambda: MixtureScorer(self.language_models, weights, forgetting)  # noqa: E731
        return [self._once(("mixture", weights, forgetting), make)]

    def sources(
        self,
        encoder_output: Tensor,
        options: DecodingOptions,
        clock: StageClock,
        seconds: list[float] | None = None,
        ctc_frames: CtcFrames | None = None,
    ) -> Sources:
        """What a search of these utterances runs.

        Args:
            encoder_output: [utterances, frames, size].
            seconds: of sound in each recording; None = the whole window.
            ctc_frames: what the CTC model of `joint` heard.
        """
        languages = self._languages(encoder_output, options, clock)
        prefixes = [self._prefix(language, options) for language in languages]
        plan = self._plan(options, max(len(prefix) for prefix in prefixes))
        width, longest = options.beam_size, plan.settings.max_new_tokens
        models = self._models_under(plan.rule)
        scorers: list[Scorer] = [self.acoustic.scorer, *models]
        heard = Context(prefixes, width, longest, encoder_output)
        contexts = [heard]
        known = Prefixes(self.prefixes, clock.counts)
        prompts = [model.prompt(self._domain_ids(model, options)) for model in models]
        contexts += [Context([prompt] * len(prefixes), width, longest, prefixes=known) for prompt in prompts]
        if plan.rule.ilm_weight:
            scorers.append(self._internal_lm(plan.rule.ilm_variant))
            contexts.append(heard)
        delayed = self._late(options, plan, Context(prefixes, width, longest), clock)
        rule = options.resolved_rule(len(self.language_models))
        bridged = self._bridged(options, rule, len(prefixes), plan.end_id)
        joint = joint_scorers(self.acoustic, encoder_output, options, plan, seconds, self.joint, ctc_frames)
        late = (*delayed, *bridged, *joint)
        named = {source.name for source in late}
        names = tuple(name for name in self.names_under(rule) if name not in named)
        return with_ngram_lookups(Sources(tuple(scorers), tuple(contexts), names, plan, tuple(languages), late, rule))

    def _bridged(self, options: DecodingOptions, rule: Rule, utterances: int, end_id: int) -> list[CandidateScorer]:
        if not self._bridges.languages or rule.delay is not None:
            return []
        policy = options.end_policy or rule.end_policy or DEFAULT_END_POLICY
        temperatures = options.lm_temperatures(len(self.language_models))
        return self._bridges.sources(rule, policy, self.source_names[1:], temperatures, utterances, end_id)

    def _late(
        self, options: DecodingOptions, plan: SearchPlan, context: Context, clock: StageClock
    ) -> list[CandidateScorer]:
        if plan.rule.delay is None or not self.language_models:
            return []
        policy = options.end_policy or plan.rule.end_policy or DEFAULT_END_POLICY
        temperatures = options.lm_temperatures(len(self.language_models))
        delayed = DelayedModels(self.language_models, self.source_names[1:], temperatures, policy)
        return late_sources(plan.rule, delayed, self.acoustic.scorer.vocabulary, context, clock)

    def demands(self, options: DecodingOptions) -> dict[Hashable, Demand]:
        """What keys and values and CTC scores one utterance may need, by model; delayed and bridged ones do not count.

        Raises:
            InvalidArgumentError: as `sources`.
        """
        tokens, acoustic = self.acoustic.tokens, self.acoustic.scorer
        language = options.language or (next(iter(tokens.languages)) if tokens.languages else "en")
        require(
            not tokens.languages or language in tokens.languages,
            f"language must be one of {', '.join(sorted(tokens.languages))}, got {options.language!r}.",
        )
        prefix = len(self._prefix(language, options))
        plan = self._plan(options, prefix)
        frames, own = acoustic.model.config.max_source_positions, slot_bytes(acoustic.model)
        new = (options.beam_size + 1) * plan.settings.max_new_tokens  # one more: what rows beside the beam hold on to
        found: dict[Hashable, Demand] = {acoustic: Demand(prefix + new, own, frames * own)}
        listed = self.language_models if plan.rule.lm_mixture else self._models_under(plan.rule)
        for model in listed:
            if isinstance(model, CausalLMScorer):
                read = min(model.window, len(model.prompt(self._domain_ids(model, options))))
                found[model] = Demand(read + new, slot_bytes(model.model))
        if plan.rule.ilm_weight:
            trained = self.internal_context
            whole = {"silence": frames, "zero_context": 0, "trained": 0 if trained is None else len(trained)}
            fixed = whole.get(plan.rule.ilm_variant, 1) * own
            found["ilm", plan.rule.ilm_variant] = Demand(prefix + new, own, fixed)
        if plan.rule.subtracts_last and isinstance(self.language_models[-1], CausalLMScorer):
            last = self.language_models[-1]
            found["ilm", "source_lm"] = Demand(len(last.prompt()) + new, slot_bytes(last.model))
        return {**found, **joint_demand(self.acoustic, options, plan, self.joint)}

    def _domain_ids(self, model: Any, options: DecodingOptions) -> list[int]:
        """The domain prompt as tokens of a language model that shares the acoustic model's."""
        if not options.lm_prompt or not options.lm_prompt.strip():
            return []
        ids = self.acoustic.tokenizer.encode(" " + options.lm_prompt.strip(), add_special_tokens=False)
        mapping = token_map(self.acoustic.scorer.vocabulary, model.vocabulary, include_end=False)
        return [int(i) if mapping is None else int(mapping[i]) for i in ids]

    def _internal_lm(self, variant: IlmVariant) -> Scorer:
        if variant == "source_lm":
            return self._once("source lm", lambda: SourceDomainScorer(self.language_models[-1]))
        return self._once(("ilm", variant), lambda: self._new_internal_lm(variant))

    def _new_internal_lm(self, variant: IlmVariant) -> InternalLMScorer:
        if variant == "trained":
            require(
                self.internal_context is not None,
                'internal_lm(variant="trained") needs a trained context; give internal_context=... to the decoder.',
            )
            return InternalLMScorer(self.acoustic.scorer, variant, self.internal_context)
        if variant != "silence":
            return InternalLMScorer(self.acoustic.scorer, variant)
        samples = torch.zeros(self.acoustic.features.chunk_samples)
        silence = self.acoustic.scorer.encode(log_mel([samples], self.acoustic.features))[0]
        return InternalLMScorer(self.acoustic.scorer, variant, silence)

    def _plan(self, options: DecodingOptions, prefix_length: int) -> SearchPlan:
        rule = options.resolved_rule(len(self.language_models))
        require(
            not options.lm_prompt or (rule.delay is None and not self._bridges.languages),
            "lm_prompt is for language models that the fused step hears, which delayed and bridged ones are not; "
            "leave it out.",
        )
        if rule.gate is not None and getattr(rule.gate, "fingerprints", None):  # a learned gate knows its models
            rule.gate.check_models(self.fingerprints)  # type: ignore[attr-defined]
        policy = options.end_policy or rule.end_policy or DEFAULT_END_POLICY
        self._bridges.check(rule, policy)
        require(
            not (rule.subtracts_last and self._bridges.languages),
            f"the rule {rule.name} needs every language model on the acoustic model's tokenizer, without lm_bridge.",
        )
        fuses, rule = rule.fuses and bool(self._bridges.languages), self._bridges.shared_rule(rule)
        acoustic, tokens = self.acoustic.scorer, self.acoustic.tokens
        include_end = policy in ("lm", "end_factored")
        vocabularies = [model.vocabulary for model in self._models_under(rule)]
        maps = [token_map(acoustic.vocabulary, vocabulary, include_end) for vocabulary in vocabularies]
        nothing = Unmapped("floor", 0.0)
        unmapped = [nothing if policy == "asr_only" else Unmapped("neutral")] * (1 + len(maps))
        heard = len(maps) + len(self._bridges.languages) + int(rule.subtracts_last)
        loaded = len(self.language_models) if rule.delay else heard
        temperatures = [options.asr_temperature, *options.lm_temperatures(loaded)[: len(maps)]]
        if rule.ilm_weight:  # nothing is subtracted from the end and special tokens
            maps.append(self._once(("subtracted", rule.subtracts_last), lambda: self._subtracted_map(rule)))
            unmapped.append(nothing)
            temperatures.append(1.0)
        room = acoustic.window - prefix_length
        require(room >= 1, f"the prompt takes all {acoustic.window} positions of the model; shorten initial_prompt.")
        return SearchPlan(
            settings=options.beam_settings(tokens.end, room),
            rule=rule,
            maps=(None, *maps),
            unmapped=tuple(unmapped),
            normalize=rule.normalize(policy) if self.language_models or rule.ilm_weight else "none",
            temperatures=tuple(temperatures),
            suppressed=self._suppressed(options),
            first_suppressed=tokens.first_suppressed if options.suppress_blank else (),
            min_new_tokens=options.min_new_tokens,
            end_threshold=options.end_threshold,
            acoustic_weight=1.0 - options.ctc_weight,
            fuses_late=fuses,
            length_bonus=options.length_bonus,
            class_sources=class_sources(
                class_factors(acoustic.vocabulary, dict(rule.class_factors)),
                (None, *maps),
                [len(acoustic.vocabulary), *map(len, vocabularies)],
                not include_end,
                tokens.end,
            ),
            phrases=self._phrases.automaton(options.weighted_hotwords(), options.hotwords_inside_words),
            vocab_size=len(acoustic.vocabulary),
            no_repeat_ngram_size=options.no_repeat_ngram_size,
            timestamps=self._timestamps(options),
        )

    def _subtracted_map(self, rule: Rule) -> Tensor:
        """Ids in the subtracted model of the text tokens alone."""
        own = text_map(self.acoustic.scorer.vocabulary)
        if not rule.subtracts_last:
            return own
        known = token_map(self.acoustic.scorer.vocabulary, self.language_models[-1].vocabulary, include_end=False)
        return own if known is None else torch.where(own < 0, own, known)

    def _timestamps(self, options: DecodingOptions) -> TimestampRules | None:
        return None if options.without_timestamps else timestamp_rules(self.acoustic, options.max_initial_timestamp)

    def _suppressed(self, options: DecodingOptions) -> tuple[int, ...]:
        given, rules = options.suppress_tokens, self._timestamps(options)
        own = () if rules is None else (rules.begin - 1,)  # the token that says there are none
        if given in ("-1", -1):
            return (*self.acoustic.tokens.suppressed, *own)
        if given is None:
            return own
        require(
            isinstance(given, Sequence) and not isinstance(given, str),
            f"suppress_tokens must be token ids, '-1' or None, got {given!r}.",
        )
        size = len(self.acoustic.scorer.vocabulary)
        ids = tuple(int(token) for token in given)  # type: ignore[union-attr]
        require(all(0 <= i < size for i in ids), f"suppress_tokens must be ids from 0 to {size - 1}, got {ids}.")
        return (*ids, *own)

    def _languages(self, encoder_output: Tensor, options: DecodingOptions, clock: StageClock) -> list[str]:
        known = self.acoustic.tokens.languages
        count = len(encoder_output)
        if not known:
            require(
                options.language in (None, "en", "english") and options.task == "transcribe",
                f"{self.acoustic.name} is English-only, got language={options.language!r}, task={options.task!r}; "
                "load a multilingual model.",
            )
            return ["en"] * count
        if options.language is not None:
            require(
                options.language in known,
                f"language must be one of {', '.join(sorted(known))}, got {options.language!r}.",
            )
            return [options.language] * count
        with clock("asr"):
            context = Context([[self.acoustic.tokens.start]] * count, 1, 1, encoder_output)
            logits = self.acoustic.scorer.start(context).logits
        codes, ids = list(known), list(known.values())
        return [codes[best] for best in logits[:, ids].argmax(dim=1).tolist()]

    def _prefix(self, language: str, options: DecodingOptions) -> list[int]:
        """Previous text, start, language, task and, without timestamps, the token for that, as in training."""
        tokens = self.acoustic.tokens
        prefix = self._previous_text(options)
        prefix.append(tokens.start)
        if tokens.is_multilingual:
            prefix.append(tokens.languages[language])
            prefix.append(tokens.tasks[options.task])
        if options.without_timestamps and tokens.no_timestamps is not None:
            prefix.append(tokens.no_timestamps)
        return prefix

    def _previous_text(self, options: DecodingOptions) -> list[int]:
        if not options.initial_prompt or not options.initial_prompt.strip():
            return []
        previous = self.acoustic.tokens.previous
        require(previous is not None, f"{self.acoustic.name} has no start-of-previous token for initial_prompt.")
        text = " " + options.initial_prompt.strip()
        ids = self.acoustic.tokenizer.encode(text, add_special_tokens=False)
        return [int(previous), *ids[-(self.acoustic.scorer.window // 2 - 1) :]]  # type: ignore[arg-type]
