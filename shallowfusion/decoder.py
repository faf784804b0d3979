"""The front of the library: recordings in, transcripts with every model's scores out."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shallowfusion.config import require
from shallowfusion.ctc.joint import CtcFrames, JointCtc
from shallowfusion.ctc.models import CtcModel, load_ctc_model
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.features.log_mel import log_mel
from shallowfusion.fusion.rules import Rule
from shallowfusion.options import DecodingOptions
from shallowfusion.planning import SearchPlanner
from shallowfusion.results import Timing, Transcription
from shallowfusion.scorers.internal_lm import read_internal_context
from shallowfusion.scorers.loading import AcousticModel, Attention, LanguageModel, choose_dtype, load_models
from shallowfusion.scorers.ngram import Lookups
from shallowfusion.scorers.prefixes import PrefixCache
from shallowfusion.scorers.preparation import loading_dtype
from shallowfusion.search.bridging import LmBridge
from shallowfusion.search.device_loop import DevicePrograms
from shallowfusion.search.drivers import driven_search, warm_up
from shallowfusion.search.late import finished
from shallowfusion.search.loop import StageClock
from shallowfusion.search.sources import Sources
from shallowfusion.session.encoding import EncoderPass, each_ahead, overlaps, received
from shallowfusion.session.front import DecoderSession
from shallowfusion.session.hearing import Heard, hear, named, samples_of
from shallowfusion.session.jobs import SessionSettings
from shallowfusion.transcripts import hypotheses_of, ranked_by_listening
from shallowfusion.trusting import Evidence, alone_options, flagged, given_up
from shallowfusion.values import Hypothesis

__all__ = ["FusionDecoder"]

logger = logging.getLogger(__name__)


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
        ctc: a CTC model that hears the recordings too; `ctc_weight` gives it its say, as it does an acoustic model's
            own head, which is not heard then (see `JointCtc`).

    `programs` holds what driver="device" has compiled and captured: `programs.resize(8)` keeps more than 4.
    """

    def __init__(
        self,
        acoustic: AcousticModel,
        language_models: Sequence[LanguageModel] = (),
        internal_context: Tensor | None = None,
        lm_bridge: LmBridge | None = None,
        ctc: CtcModel | None = None,
    ) -> None:
        self.acoustic = acoustic
        self.language_models = tuple(language_models)
        self.internal_context = internal_context
        self.lm_bridge = lm_bridge
        self.programs = DevicePrograms()
        self.ctc = None if ctc is None else JointCtc(ctc, acoustic)
        self._planner = SearchPlanner(acoustic, self.language_models, internal_context, lm_bridge, joint=self.ctc)

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
        ctc: str | Path | CtcModel | None = None,
        attention: Attention = "auto",
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
            ctc: a CTC model of transformers (wav2vec2, HuBERT, WavLM, Parakeet, ...) or one that is loaded, for
                `ctc_weight`; on any labels that the acoustic model's tokens can be spelled in.
            attention: "sdpa" (torch's), "triton" (kernels that read each live key of an utterance once for all its
                beams; on CUDA) or "auto" (torch's; on the CPU, over frames, C++ where that is faster).

        Raises:
            ModelError: a model cannot be loaded.
            VocabularyError: an n-gram model of neither the acoustic model's pieces nor words it can spell, or a CTC
                model whose labels spell none of the acoustic model's letters.
            InvalidArgumentError: a CTC model that hears at another rate.
        """
        names = [str(lm)] if isinstance(lm, (str, Path)) else [str(name) for name in lm or ()]
        acoustic, models = load_models(str(asr), names, device, dtype, ngram_lookups, attention)
        context = None if internal_context is None else read_internal_context(internal_context)
        where = acoustic.scorer.device
        number = loading_dtype(choose_dtype(dtype, where))
        heard = load_ctc_model(str(ctc), where, number) if isinstance(ctc, (str, Path)) else ctc
        return cls(acoustic, models, context, lm_bridge, heard)

    @cached_property
    def _alone(self) -> FusionDecoder:
        """The acoustic model without language models, for those a trusted rule gives up."""
        return FusionDecoder(self.acoustic, ctc=None if self.ctc is None else self.ctc.model)

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Of the acoustic model and each language model: which weights and vocabulary they have, see `fingerprint`."""
        return self._planner.fingerprints

    @property
    def prefixes(self) -> PrefixCache:
        """Prompts that the language models have read: its `resize` and `clear` are for callers."""
        return self._planner.prefixes

    def warm_up(
        self, utterances: int | Sequence[int] = 1, options: DecodingOptions | None = None, **names: Any
    ) -> dict[int, float]:
        """Do ahead what the first decode of so many utterances would: compile kernels, capture the step's CUDA graph.

        Later decodes whose options differ in weights and other numbers share it (`structure` in search/device_step.py).

        Args:
            options: of the decodes to come, prompts and driver included; or option names as keywords.

        Returns:
            Seconds it took, by number of utterances.
        """
        options, scorer = self._options(options, names), self.acoustic.scorer
        sizes, found = scorer.model.config, {}
        for count in [utterances] if isinstance(utterances, int) else utterances:
            require(count >= 1, f"utterances must be at least 1, got {count}.")
            start = time.perf_counter()
            silence = torch.zeros((count, sizes.num_mel_bins, 2 * sizes.max_source_positions))
            warm_up(self.sources(scorer.encode(silence), options), options.driver, self.programs)
            found[count] = time.perf_counter() - start
        return found

    def session(self, **settings: Any) -> DecoderSession:
        """A session, which takes requests while others are decoded: `with decoder.session() as session: ...`.

        Args:
            settings: names of `SessionSettings`: max_utterances, memory_budget, encoder_batch, admission_seconds,
                overlap_encoder.
        """
        known = {entry.name for entry in dataclasses.fields(SessionSettings)}
        unknown = ", ".join(sorted(set(settings) - known))
        require(not unknown, f"unknown setting {unknown} of a session; known are {', '.join(sorted(known))}.")
        return DecoderSession(self._planner, partial(samples_of, self.acoustic), SessionSettings(**settings))

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
        batches = [named(items[start : start + options.batch_size], start) for start in starts]
        done: list[Transcription] = []
        for heard in each_ahead(partial(hear, self.acoustic, encoder), batches, ahead):
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
        ctc_frames: CtcFrames | None = None,
        **names: Any,
    ) -> list[Transcription]:
        """Decode log-mel features [utterances, mels, frames] or encoder output [utterances, frames, size].

        Args:
            seconds: of sound in each utterance; the rest of the window is padding. None = the whole window.
            evidence: of the session the utterances belong to, for `fusion.trusted`; None = they are one of their own.
            ctc_frames: what the CTC model heard of each utterance, for `ctc_weight`: `decoder.ctc.frames(samples)`.

        Raises:
            InvalidArgumentError: a tensor that is neither, `seconds` that do not pair, or bad options.
        """
        options = self._options(options, names)
        clock = StageClock.on(self.acoustic.scorer.device)
        output = self._encoder_output(inputs, clock)
        window = float(self.acoustic.features.chunk_seconds)
        lengths = [window] * len(output) if seconds is None else [float(own) for own in seconds]
        require(
            len(lengths) == len(output) and all(0 < own <= window for own in lengths),
            f"seconds must hold one length above 0 and up to {window:g} for each of the {len(output)} utterances, "
            f"got {lengths}.",
        )
        searched = self._search(output, options, clock, None if seconds is None else lengths, evidence, ctc_frames)
        timing = Timing.of(clock, sum(lengths))
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

    def _batch(self, heard: Heard, options: DecodingOptions, evidence: Evidence) -> list[Transcription]:
        """Results of a few recordings that were read."""
        seconds = [own for own in heard.found if isinstance(own, float)]
        if heard.output is None:
            return [own for own in heard.found if isinstance(own, Transcription)]
        output = received(heard.output, heard.done)
        frames = self._ctc_frames(heard.samples, options, heard.clock)
        searched = iter(self._search(output, options, heard.clock, seconds, evidence, frames))
        timing = Timing.of(heard.clock, sum(seconds))
        results = []
        for (source, _), own in zip(heard.items, heard.found, strict=True):
            if isinstance(own, float):
                hypotheses, language, rule = next(searched)
                own = Transcription(source, hypotheses, language, own, rule, timing)
            results.append(own)
        return results

    def _ctc_frames(self, samples: Sequence[Tensor], options: DecodingOptions, clock: StageClock) -> CtcFrames | None:
        """What the CTC model hears of a batch; None if nobody asks it."""
        if self.ctc is None or options.ctc_weight == 0:
            return None
        with clock("ctc"):
            return self.ctc.frames(samples)

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
        samples = [samples_of(self.acoustic, item, name) for name, item in named(recordings, 0)]
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
        ctc_frames: CtcFrames | None = None,
    ) -> list[tuple[tuple[Hypothesis, ...], str | None, Any]]:
        own = self._planner.sources(encoder_output, options, clock, seconds, ctc_frames)
        outcomes = driven_search(own, options.driver, clock, self.programs)
        outcomes = finished(outcomes, own.late, clock)
        with clock("text"):
            found = [hypotheses_of(out, own.part_names, self.acoustic, own.plan.timestamps) for out in outcomes]
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
            heard = None if ctc_frames is None else ctc_frames.at(lost)
            alone = self._alone._search(encoder_output[lost], alone_options(options), clock, lengths, ctc_frames=heard)
            for i, (listed, language, plain) in zip(lost, alone, strict=True):
                results[i] = (flagged(listed), language, plain)
        return results
