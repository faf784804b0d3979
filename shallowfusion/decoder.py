"""The front of the library: recordings in, transcripts with every model's scores out."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shallowfusion.audio.reading import read_audio
from shallowfusion.config import require
from shallowfusion.errors import AudioError, InvalidArgumentError, ShallowFusionError
from shallowfusion.features.log_mel import log_mel
from shallowfusion.fusion.rules import DEFAULT_END_POLICY, IlmVariant, Rule
from shallowfusion.fusion.token_classes import class_sources
from shallowfusion.options import DecodingOptions
from shallowfusion.results import Timing, Transcription, compression_ratio
from shallowfusion.scorers.base import Context, Scorer
from shallowfusion.scorers.internal_lm import InternalLMScorer
from shallowfusion.scorers.loading import (
    AcousticModel,
    LanguageModel,
    choose_device,
    choose_dtype,
    load_language_model,
    load_whisper,
)
from shallowfusion.scorers.mixture import MixtureScorer
from shallowfusion.search.beam_state import FinishedHypothesis
from shallowfusion.search.late import late_sources
from shallowfusion.search.loop import SearchOutcome, SearchPlan, StageClock, search
from shallowfusion.text.vocabulary import class_factors, text_map, token_map
from shallowfusion.values import Hypothesis, Token, Unmapped

__all__ = ["FusionDecoder"]

logger = logging.getLogger(__name__)

LOOP_COMPRESSION_RATIO = 2.4  # openai-whisper's threshold
TRUNCATION_LOG_PROB = math.log(0.1)


class FusionDecoder:
    """Transcribes with a Whisper-type model and language models fused inside beam search.

    Args:
        acoustic: the acoustic model.
        language_models: on the acoustic model's tokenizer, or of any under fusion.delayed; one weight of the rule
            belongs to each.
        internal_context: float [frames, size], trained to stand for "no recording", for
            fusion.internal_lm(variant="trained").
    """

    def __init__(
        self,
        acoustic: AcousticModel,
        language_models: Sequence[LanguageModel] = (),
        internal_context: Tensor | None = None,
    ) -> None:
        self.acoustic = acoustic
        self.language_models = tuple(language_models)
        self.internal_context = internal_context

    @classmethod
    def from_pretrained(
        cls,
        asr: str | Path,
        lm: str | Path | Sequence[str | Path] | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
    ) -> FusionDecoder:
        """Load models by hub id or local directory.

        Args:
            asr: a Whisper-type model.
            lm: a causal language model (on another tokenizer: see fusion.delayed), an n-gram model of its pieces (a file NAME.arpa or
                NAME.arpa.gz, see `shallowfusion build-ngram --units tokens`), or several of them.
            device: "auto", "cpu", "cuda", "cuda:1".
            dtype: "auto" (float16 on CUDA, float32 on the CPU), "float32", "float16", "bfloat16".

        Raises:
            ModelError: a model cannot be loaded.
            VocabularyError: an n-gram model of something else than the acoustic model's pieces.
        """
        where = choose_device(device)
        number = choose_dtype(dtype, where)
        acoustic = load_whisper(str(asr), where, number)
        names = [lm] if isinstance(lm, (str, Path)) else list(lm or ())
        vocabulary = acoustic.scorer.vocabulary
        return cls(acoustic, [load_language_model(str(name), vocabulary, where, number) for name in names])

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the parts: "asr", then "lm", or "lm0", "lm1", ... for several."""
        count = len(self.language_models)
        return ("asr", "lm") if count == 1 else ("asr", *(f"lm{i}" for i in range(count)))

    def names_under(self, rule: Rule) -> tuple[str, ...]:
        """Names of the parts under a rule: `source_names`, and "ilm" where it subtracts the internal LM."""
        own = ("asr", "lm") if rule.lm_mixture else self.source_names
        return (*own, "ilm") if rule.ilm_weight else own

    def _models_under(self, rule: Rule) -> Sequence[Any]:
        """What the fused step hears beside the acoustic model."""
        if rule.delay is not None:
            return ()
        if not rule.lm_mixture:
            return self.language_models
        return [MixtureScorer(self.language_models, rule.lm_mixture, rule.forgetting)]

    def transcribe(self, recordings: Any, options: DecodingOptions | None = None, **names: Any) -> list[Transcription]:
        """Transcribe recordings of up to the model's window (30 s for Whisper).

        Args:
            recordings: one or a list of: path; float array or tensor [samples] or [channels, samples] at the model's
                rate; {"array": samples, "sampling_rate": rate}.
            options: or option names as keywords.

        Returns:
            One result per recording, in order. A recording that fails has `error` set, which its `text` raises;
            the others are transcribed all the same, and failures are logged.

        Raises:
            InvalidArgumentError: bad options, or no recordings.
            VocabularyError: a language model's tokenizer is another, and the rule is not delayed.
        """
        options = self._options(options, names)
        items = recordings if isinstance(recordings, (list, tuple)) else [recordings]
        require(len(items) > 0, "recordings must hold at least one recording, got an empty list.")
        results: list[Transcription | None] = [None] * len(items)
        for start in range(0, len(items), options.batch_size):
            batch = range(start, min(start + options.batch_size, len(items)))
            for i, result in zip(batch, self._batch([items[i] for i in batch], start, options), strict=True):
                results[i] = result
        done = [result for result in results if result is not None]
        failed = [result for result in done if result.error is not None]
        for result in failed:
            logger.error("%s was not transcribed: %s", result.source, result.error)
        return done

    def decode(self, inputs: Tensor, options: DecodingOptions | None = None, **names: Any) -> list[Transcription]:
        """Decode log-mel features [utterances, mels, frames] or encoder output [utterances, frames, size].

        Raises:
            InvalidArgumentError: a tensor that is neither, or bad options.
        """
        options = self._options(options, names)
        clock = StageClock()
        output = self._encoder_output(inputs, clock)
        searched = self._search(output, options, clock)
        seconds = float(self.acoustic.features.chunk_seconds)
        timing = Timing(dict(clock.seconds), seconds * len(output), dict(clock.counts))
        return [
            Transcription(f"array {i}", hypotheses, language, seconds, rule, timing)
            for i, (hypotheses, language, rule) in enumerate(searched)
        ]

    def _options(self, options: DecodingOptions | None, names: dict[str, Any]) -> DecodingOptions:
        require(
            options is None or isinstance(options, DecodingOptions),
            f"options must be DecodingOptions, got {type(options).__name__}.",
        )
        require(options is None or not names, "give either options or option names as keywords, got both.")
        chosen = DecodingOptions.of(**names) if options is None else options
        rule = chosen.resolved_rule(len(self.language_models))
        for model in self.language_models[0 if rule.delay is None else 1 :]:
            token_map(self.acoustic.scorer.vocabulary, model.vocabulary, include_end=True)
        return chosen

    def _batch(self, items: Sequence[Any], first: int, options: DecodingOptions) -> list[Transcription]:
        """Results of a few recordings; those that cannot be read fail alone."""
        clock = StageClock()
        sources = [str(item) if isinstance(item, (str, Path)) else f"array {first + i}" for i, item in enumerate(items)]
        results: list[Transcription | None] = [None] * len(items)
        samples: list[Tensor] = []
        with clock("audio"):
            for i, item in enumerate(items):
                try:
                    samples.append(self._samples(item, sources[i]))
                except ShallowFusionError as error:
                    results[i] = Transcription(sources[i], error=error)
        if samples:
            with clock("features"):
                features = log_mel(samples, self.acoustic.features)
            searched = self._search(self._encoder_output(features, clock), options, clock)
            rate = self.acoustic.features.sampling_rate
            timing = Timing(dict(clock.seconds), sum(len(s) for s in samples) / rate, dict(clock.counts))
            good = (i for i, result in enumerate(results) if result is None)
            for i, own, (hypotheses, language, rule) in zip(good, samples, searched, strict=True):
                results[i] = Transcription(sources[i], hypotheses, language, len(own) / rate, rule, timing)
        return [result for result in results if result is not None]

    def _samples(self, item: Any, source: str) -> Tensor:
        settings = self.acoustic.features
        samples = read_audio(item, settings.sampling_rate)
        if len(samples) > settings.chunk_samples:
            raise AudioError(
                f"{source} lasts {len(samples) / settings.sampling_rate:.1f} s, but this release decodes up to "
                f"{settings.chunk_seconds} s at once; cut it, or wait for the coming long-form support."
            )
        return samples

    def _encoder_output(self, inputs: Tensor, clock: StageClock) -> Tensor:
        model, settings = self.acoustic.scorer.model, self.acoustic.features
        features = (settings.feature_size, settings.chunk_frames)
        encoded = (model.config.max_source_positions, model.config.d_model)
        shape = tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) and inputs.dim() == 3 else None
        if shape not in (features, encoded) or not inputs.is_floating_point():
            got = list(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise InvalidArgumentError(
                f"inputs must be float log-mel features [utterances, {features[0]}, {features[1]}] or encoder output "
                f"[utterances, {encoded[0]}, {encoded[1]}], got {got}."
            )
        if shape == features:
            with clock("encoder"):
                return self.acoustic.scorer.encode(inputs)
        return inputs.to(self.acoustic.scorer.device, model.dtype)

    def _search(
        self, encoder_output: Tensor, options: DecodingOptions, clock: StageClock
    ) -> list[tuple[tuple[Hypothesis, ...], str | None, Any]]:
        languages = self._languages(encoder_output, options, clock)
        prefixes = [self._prefix(language, options) for language in languages]
        rule = options.resolved_rule(len(self.language_models))
        plan = self._plan(options, max(len(prefix) for prefix in prefixes))
        width, longest = options.beam_size, plan.settings.max_new_tokens
        models = self._models_under(rule)
        scorers: list[Scorer] = [self.acoustic.scorer, *models]
        heard = Context(prefixes, width, longest, encoder_output)
        contexts = [heard]
        contexts += [Context([model.prompt()] * len(prefixes), width, longest) for model in models]
        if plan.rule.ilm_weight:
            scorers.append(self._internal_lm(plan.rule.ilm_variant))
            contexts.append(heard)
        names = self.names_under(rule)
        late = late_sources(
            rule,
            self.language_models,
            names[1:],
            self.acoustic.scorer.vocabulary,
            Context(prefixes, width, longest),
            options.end_policy or rule.end_policy or DEFAULT_END_POLICY,
            clock,
            options.lm_temperature,
        )
        outcomes = search(scorers, contexts, (*names[:1], *names[1 + len(late.sources) :]), plan, clock, late.sources)
        outcomes = late.finished(outcomes, clock)
        names = names if not rule.ilm_weight or not late.sources else (names[0], names[-1], *names[1:-1])
        with clock("text"):
            return [
                (self._hypotheses(outcome, names, options.n_best), language, rule)
                for outcome, language in zip(outcomes, languages, strict=True)
            ]

    def _internal_lm(self, variant: IlmVariant) -> InternalLMScorer:
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
        policy = options.end_policy or rule.end_policy or DEFAULT_END_POLICY
        acoustic, tokens = self.acoustic.scorer, self.acoustic.tokens
        include_end = policy in ("lm", "end_factored")
        vocabularies = [model.vocabulary for model in self._models_under(rule)]
        maps = [token_map(acoustic.vocabulary, vocabulary, include_end) for vocabulary in vocabularies]
        nothing = Unmapped("floor", 0.0)
        unmapped = [nothing if policy == "asr_only" else Unmapped("neutral")] * (1 + len(maps))
        temperatures = [options.asr_temperature, *[options.lm_temperature] * len(maps)]
        if rule.ilm_weight:  # nothing is subtracted from the end and special tokens
            maps.append(text_map(acoustic.vocabulary))
            unmapped.append(nothing)
            temperatures.append(1.0)
        room = acoustic.window - prefix_length
        require(room >= 1, f"the prompt takes all {acoustic.window} positions of the model; shorten initial_prompt.")
        return SearchPlan(
            settings=options.beam_settings(tokens.end, room),
            rule=rule.at_once(),
            maps=(None, *maps),
            unmapped=tuple(unmapped),
            normalize=rule.normalize(policy) if self.language_models or rule.ilm_weight else "none",
            temperatures=tuple(temperatures),
            suppressed=self._suppressed(options),
            first_suppressed=tokens.first_suppressed if options.suppress_blank else (),
            min_new_tokens=options.min_new_tokens,
            end_threshold=options.end_threshold,
            length_bonus=options.length_bonus,
            class_sources=class_sources(
                class_factors(acoustic.vocabulary, dict(rule.class_factors)),
                (None, *maps),
                [len(acoustic.vocabulary), *map(len, vocabularies)],
                not include_end,
                tokens.end,
            ),
            no_repeat_ngram_size=options.no_repeat_ngram_size,
        )

    def _suppressed(self, options: DecodingOptions) -> tuple[int, ...]:
        given = options.suppress_tokens
        if given in ("-1", -1):
            return self.acoustic.tokens.suppressed
        if given is None:
            return ()
        require(
            isinstance(given, Sequence) and not isinstance(given, str),
            f"suppress_tokens must be token ids, '-1' or None, got {given!r}.",
        )
        size = len(self.acoustic.scorer.vocabulary)
        ids = tuple(int(token) for token in given)  # type: ignore[union-attr]
        require(all(0 <= i < size for i in ids), f"suppress_tokens must be ids from 0 to {size - 1}, got {ids}.")
        return ids

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
        """Previous text, start, language, task and no-timestamps tokens, as Whisper was trained on."""
        tokens = self.acoustic.tokens
        prefix = self._previous_text(options)
        prefix.append(tokens.start)
        if tokens.is_multilingual:
            prefix.append(tokens.languages[language])
            prefix.append(tokens.tasks[options.task])
        if tokens.no_timestamps is not None:
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

    def _hypotheses(self, outcome: SearchOutcome, names: Sequence[str], count: int) -> tuple[Hypothesis, ...]:
        return tuple(self._hypothesis(found, names, outcome.saw_nan) for found in outcome.hypotheses[:count])

    def _hypothesis(self, found: FinishedHypothesis, names: Sequence[str], saw_nan: bool) -> Hypothesis:
        tokenizer, end = self.acoustic.tokenizer, self.acoustic.tokens.end
        ids = list(found.token_ids)
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        texts = [tokenizer.decode([i], skip_special_tokens=True) for i in ids]
        if found.ended:
            ids, texts = [*ids, end], [*texts, ""]
        parts = found.parts.astype(float)
        tokens = tuple(
            Token(i, t, float(total), dict(zip(names, row.tolist(), strict=True)))
            for i, t, total, row in zip(ids, texts, found.token_totals, parts, strict=True)
        )
        sums = dict(zip(names, parts.sum(axis=0).tolist(), strict=True))
        flags = {
            "forced_finish": not found.ended,
            "truncation": found.ended and parts[-1, 0] < TRUNCATION_LOG_PROB,
            "repetition": compression_ratio(text) > LOOP_COMPRESSION_RATIO,
            "nan": saw_nan,
        }
        raised = tuple(name for name, is_raised in flags.items() if is_raised)
        return Hypothesis(text, tuple(found.token_ids), tokens, found.total, found.key, sums, raised)
