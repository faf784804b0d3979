"""The front of the library: recordings in, transcripts with every model's scores out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shallowfusion.audio.reading import read_audio
from shallowfusion.config import require
from shallowfusion.errors import AudioError, InvalidArgumentError, ShallowFusionError
from shallowfusion.features.log_mel import log_mel
from shallowfusion.fusion.rules import Rule
from shallowfusion.options import DecodingOptions
from shallowfusion.planning import SearchPlanner
from shallowfusion.results import Timing, Transcription
from shallowfusion.scorers.internal_lm import read_internal_context
from shallowfusion.scorers.loading import (
    AcousticModel,
    LanguageModel,
    choose_device,
    choose_dtype,
    load_language_model,
    load_whisper,
)
from shallowfusion.scorers.ngram import Lookups
from shallowfusion.scorers.prefixes import PrefixCache
from shallowfusion.search.bridging import LmBridge
from shallowfusion.search.device_loop import DevicePrograms
from shallowfusion.search.drivers import driven_search
from shallowfusion.search.late import finished
from shallowfusion.search.loop import StageClock
from shallowfusion.search.sources import Sources
from shallowfusion.session.encoding import EncoderPass, each_ahead, overlaps, received
from shallowfusion.session.front import DecoderSession
from shallowfusion.session.jobs import SessionSettings
from shallowfusion.transcripts import hypotheses_of, ranked_by_listening
from shallowfusion.trusting import Evidence, alone_options, flagged, given_up
from shallowfusion.values import Hypothesis

__all__ = ["FusionDecoder"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Heard:
    """A few recordings that were read and encoded.

    Args:
        items: name and recording of each.
        found: of each the seconds of sound, or what failed.
        output, done: of those that were read, together, as `EncoderPass` gives them; None = none was.
        clock: of the work so far.
    """

    items: Sequence[tuple[str, Any]]
    found: Sequence[Transcription | float]
    output: Tensor | None
    done: torch.cuda.Event | None
    clock: StageClock


class FusionDecoder:
    """Transcribes with a Whisper-type model and language models fused inside beam search.

    Args:
        acoustic: the acoustic model.
        language_models: one weight of the rule belongs to each; those on the acoustic model's tokenizer first, unless
            the rule is fusion.delayed, which takes the first on any; n-grams of words last.
        internal_context: float [frames, size], trained to stand for "no recording", for
            fusion.internal_lm(variant="trained").
        lm_bridge: "bytes": causal language models on another tokenizer score the bytes of each candidate token (see
            `ByteBridge`); None = they are refused, unless the rule delays them.
    """

    def __init__(
        self,
        acoustic: AcousticModel,
        language_models: Sequence[LanguageModel] = (),
        internal_context: Tensor | None = None,
        lm_bridge: LmBridge | None = None,
    ) -> None:
        self.acoustic = acoustic
        self.language_models = tuple(language_models)
        self.internal_context = internal_context
        self.lm_bridge = lm_bridge
        self._programs = DevicePrograms()
        self._planner = SearchPlanner(acoustic, self.language_models, internal_context, lm_bridge)

    @classmethod
    def from_pretrained(
        cls,
        asr: str | Path,
        lm: str | Path | Sequence[str | Path] | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        internal_context: str | Path | None = None,
        lm_bridge: LmBridge | None = None,
        ngram_lookups: Lookups = "auto",
    ) -> FusionDecoder:
        """Load models by hub id or local directory.

        Args:
            asr: a Whisper-type model.
            lm: a causal language model on the same tokenizer (for fusion.delayed on any), an n-gram model of its pieces
                or of words (a file NAME.arpa or NAME.arpa.gz, see `shallowfusion build-ngram`), or several of them.
                Words are scored as the model writes them, when the next word begins.
            device: "auto", "cpu", "cuda", "cuda:1".
            dtype: "auto" (float16 on CUDA, float32 on the CPU), "float32", "float16", "bfloat16", "int8" (on the CPU:
                weights of products as int8, the rest bfloat16 or float32; see docs/speed.md for what it costs).
            internal_context: file of `shallowfusion train-ilm`, for fusion.internal_lm(variant="trained").
            lm_bridge: "bytes" takes causal language models with any tokenizer; multilingual Whisper goes with GPT-2.
            ngram_lookups: of n-gram models of pieces: "rows" (every token, in the fused step), "candidates" (only what
                survives it) or "auto" (candidates on CUDA, where the rule allows it); see `NgramScorer`.

        Raises:
            ModelError: a model cannot be loaded.
            VocabularyError: an n-gram model of neither the acoustic model's pieces nor words it can spell.
        """
        where = choose_device(device)
        number = choose_dtype(dtype, where)
        acoustic = load_whisper(str(asr), where, number)
        names = [lm] if isinstance(lm, (str, Path)) else list(lm or ())
        vocabulary = acoustic.scorer.vocabulary
        models = [load_language_model(str(name), vocabulary, where, number, ngram_lookups) for name in names]
        context = None if internal_context is None else read_internal_context(internal_context)
        return cls(acoustic, models, context, lm_bridge)

    @cached_property
    def _alone(self) -> FusionDecoder:
        """The acoustic model without language models, for those a trusted rule gives up."""
        return FusionDecoder(self.acoustic)

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Of the acoustic model and each language model: which weights and vocabulary they have, see `fingerprint`."""
        return self._planner.fingerprints

    @property
    def prefixes(self) -> PrefixCache:
        """Prompts that the language models have read: its `resize` and `clear` are for callers."""
        return self._planner.prefixes

    def session(self, **settings: Any) -> DecoderSession:
        """A session, which takes requests while others are decoded: `with decoder.session() as session: ...`.

        Args:
            settings: names of `SessionSettings`: max_utterances, memory_budget, encoder_batch, admission_seconds,
                overlap_encoder.
        """
        known = {entry.name for entry in dataclasses.fields(SessionSettings)}
        unknown = ", ".join(sorted(set(settings) - known))
        require(not unknown, f"unknown setting {unknown} of a session; known are {', '.join(sorted(known))}.")
        return DecoderSession(self._planner, self._samples, SessionSettings(**settings))

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the parts: "asr", then "lm", or "lm0", "lm1", ... for several."""
        return self._planner.source_names

    def names_under(self, rule: Rule) -> tuple[str, ...]:
        """Names of the parts under a rule: `source_names`, and "ilm" where it subtracts the internal LM."""
        return self._planner.names_under(rule)

    def transcribe(
        self,
        recordings: Any,
        options: DecodingOptions | None = None,
        *,
        overlap_encoder: bool | None = None,
        **names: Any,
    ) -> list[Transcription]:
        """Transcribe recordings of up to the model's window (30 s for Whisper).

        Args:
            recordings: one or a list of: path; float array or tensor [samples] or [channels, samples] at the model's
                rate; {"array": samples, "sampling_rate": rate}.
            options: or option names as keywords.
            overlap_encoder: read and encode the next batch, in a thread of its own, while one is searched; None = on
                CUDA. Not under driver="device", which bears no other work while it captures.

        Returns:
            One result per recording, in order. A recording that fails has `error` set, which its `text` raises;
            the others are transcribed all the same, and failures are logged.

        Raises:
            InvalidArgumentError: bad options, or no recordings.
            VocabularyError: the rule needs language models on the acoustic model's tokenizer, and one is not.
        """
        options = self._options(options, names)
        items = recordings if isinstance(recordings, (list, tuple)) else [recordings]
        require(len(items) > 0, "recordings must hold at least one recording, got an empty list.")
        ahead = options.driver == "host" and overlaps(overlap_encoder, self.acoustic.scorer.device)
        encoder, evidence = EncoderPass(self.acoustic.scorer, ahead), Evidence()
        starts = range(0, len(items), options.batch_size)
        batches = [_named(items[start : start + options.batch_size], start) for start in starts]
        done: list[Transcription] = []
        for heard in each_ahead(lambda batch: self._heard(batch, encoder), batches, ahead):
            done += self._batch(heard, options, evidence)
        failed = [result for result in done if result.error is not None]
        for result in failed:
            logger.error("%s was not transcribed: %s", result.source, result.error)
        return done

    def decode(
        self,
        inputs: Tensor,
        options: DecodingOptions | None = None,
        *,
        seconds: Sequence[float] | None = None,
        evidence: Evidence | None = None,
        **names: Any,
    ) -> list[Transcription]:
        """Decode log-mel features [utterances, mels, frames] or encoder output [utterances, frames, size].

        Args:
            seconds: of sound in each utterance; the rest of the window is padding. None = the whole window.
            evidence: of the session the utterances belong to, for `fusion.trusted`; None = they are one of their own.

        Raises:
            InvalidArgumentError: a tensor that is neither, `seconds` that do not pair, or bad options.
        """
        options = self._options(options, names)
        clock = StageClock()
        output = self._encoder_output(inputs, clock)
        window = float(self.acoustic.features.chunk_seconds)
        lengths = [window] * len(output) if seconds is None else [float(own) for own in seconds]
        require(
            len(lengths) == len(output) and all(0 < own <= window for own in lengths),
            f"seconds must hold one length above 0 and up to {window:g} for each of the {len(output)} utterances, "
            f"got {lengths}.",
        )
        searched = self._search(output, options, clock, None if seconds is None else lengths, evidence)
        timing = Timing(dict(clock.seconds), sum(lengths), dict(clock.counts))
        return [
            Transcription(f"array {i}", hypotheses, language, lengths[i], rule, timing)
            for i, (hypotheses, language, rule) in enumerate(searched)
        ]

    def _options(self, options: DecodingOptions | None, names: dict[str, Any]) -> DecodingOptions:
        require(
            options is None or isinstance(options, DecodingOptions),
            f"options must be DecodingOptions, got {type(options).__name__}.",
        )
        require(options is None or not names, "give either options or option names as keywords, got both.")
        chosen = DecodingOptions.of(**names) if options is None else options
        self._planner.check(chosen.resolved_rule(len(self.language_models)))
        return chosen

    def _heard(self, items: Sequence[tuple[str, Any]], encoder: EncoderPass) -> Heard:
        """Read and encode a few recordings; those that cannot be read fail alone."""
        clock, samples = StageClock(), []
        found: list[Transcription | float] = []
        with clock("audio"):
            for source, item in items:
                try:
                    samples.append(self._samples(item, source))
                    found.append(len(samples[-1]) / self.acoustic.features.sampling_rate)
                except ShallowFusionError as error:
                    found.append(Transcription(source, error=error))
        if not samples:
            return Heard(items, found, None, None, clock)
        with clock("features"):
            features = log_mel(samples, self.acoustic.features)
        with clock("encoder"):
            return Heard(items, found, *encoder(features), clock)

    def _batch(self, heard: Heard, options: DecodingOptions, evidence: Evidence) -> list[Transcription]:
        """Results of a few recordings that were read."""
        seconds = [own for own in heard.found if isinstance(own, float)]
        if heard.output is None:
            return [own for own in heard.found if isinstance(own, Transcription)]
        output = received(heard.output, heard.done)
        searched = iter(self._search(output, options, heard.clock, seconds, evidence))
        timing = Timing(dict(heard.clock.seconds), sum(seconds), dict(heard.clock.counts))
        results = []
        for (source, _), own in zip(heard.items, heard.found, strict=True):
            if isinstance(own, float):
                hypotheses, language, rule = next(searched)
                own = Transcription(source, hypotheses, language, own, rule, timing)
            results.append(own)
        return results

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

    def encode(self, recordings: Sequence[Any]) -> Tensor:
        """Encoder output [recordings, frames, size], which `decode` takes any number of times.

        Raises:
            AudioError: a recording cannot be read, or is longer than the model's window.
        """
        require(len(recordings) > 0, "recordings must hold at least one recording, got an empty list.")
        samples = [self._samples(item, str(item) if isinstance(item, (str, Path)) else "array") for item in recordings]
        return self._encoder_output(log_mel(samples, self.acoustic.features), StageClock())

    def sources(self, encoder_output: Tensor, options: DecodingOptions) -> Sources:
        """What a search of these utterances would run: scorers with their contexts, and the plan."""
        return self._planner.sources(encoder_output, options, StageClock())

    def _search(
        self,
        encoder_output: Tensor,
        options: DecodingOptions,
        clock: StageClock,
        seconds: list[float] | None = None,
        evidence: Evidence | None = None,
    ) -> list[tuple[tuple[Hypothesis, ...], str | None, Any]]:
        own = self._planner.sources(encoder_output, options, clock, seconds)
        outcomes = driven_search(own, options.driver, clock, self._programs)
        outcomes = finished(outcomes, own.late, clock)
        with clock("text"):
            found = [hypotheses_of(outcome, own.part_names, self.acoustic) for outcome in outcomes]
        with clock("asr"):
            prefixes, window = own.contexts[0].prompts, float(self.acoustic.features.chunk_seconds)
            sound = [1.0 if seconds is None else seconds[i] / window for i in range(len(found))]
            found = [
                ranked_by_listening(listed, self.acoustic, encoder_output[i], prefixes[i], sound[i], options)
                for i, listed in enumerate(found)
            ]
        rule = own.rule or own.plan.rule
        results: list[tuple[tuple[Hypothesis, ...], str | None, Any]] = [
            (tuple(listed[: options.n_best]), language, rule)
            for listed, language in zip(found, own.languages, strict=True)
        ]
        if rule.trust is None or not self.language_models:
            return results
        names = [name for name in self.names_under(rule)[1:] if name != "ilm"]
        lost = given_up([listed[0] for listed, _, _ in results], rule, names, evidence or Evidence())
        if lost:
            lengths = None if seconds is None else [seconds[i] for i in lost]
            alone = self._alone._search(encoder_output[lost], alone_options(options), clock, lengths)
            for i, (listed, language, plain) in zip(lost, alone, strict=True):
                results[i] = (flagged(listed), language, plain)
        return results


def _named(items: Sequence[Any], first: int) -> list[tuple[str, Any]]:
    """Each recording with the name of its result: the path, or its number."""
    return [(str(own) if isinstance(own, (str, Path)) else f"array {first + i}", own) for i, own in enumerate(items)]
