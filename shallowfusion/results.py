"""What a transcription gives back, and the shapes other libraries use for it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shallowfusion.config import Driver
from shallowfusion.errors import ShallowFusionError
from shallowfusion.fusion.rescore import rescore
from shallowfusion.fusion.rules import Rule
from shallowfusion.values import Hypothesis, Span, Token, Word

if TYPE_CHECKING:
    from shallowfusion.search.stage_clock import StageClock

__all__ = ["Segment", "Timing", "Transcription", "compression_ratio"]


@dataclass(frozen=True)
class Segment:
    """A stretch of the recording and its text; field names as in openai-whisper."""

    id: int
    start: float
    end: float
    text: str
    tokens: tuple[int, ...]
    avg_logprob: float
    compression_ratio: float


@dataclass(frozen=True)
class Timing:
    """Seconds of the batch an utterance was decoded in, by stage; shared by all utterances of the batch.

    On CUDA a stage is timed by events in its stream: model time counts where the model was called, though the host
    waits for it elsewhere. In a session it is one request's share of steps that it ran in with others.

    Args:
        stages: each apart from those within it, so that they add up.
            "audio": reading and resampling; "features": log-mel; "encoder"; "text": hypotheses and their texts.
            Driven by the host: "asr", and "lm" or "lm0", "lm1", ... (and "ilm"): prompts and passes of each model;
            "fusion": fused steps, and waiting for their candidates; "search": beams, stop rules, n-best.
            Driven by the device: "prefill": prompts, and on first use compiling and capturing; "device step": steps
            of both models, fusion and beams as one; "host": replay and n-best, as far as no step hid it.
        audio_seconds: length of all recordings of the batch.
        counts: "row_steps": rows that the acoustic model read for utterances that ran, over all steps; "live_rows":
            those of them that held a live hypothesis; "fused_steps"; "device steps": steps the device drove;
            "prefix_hits", "prefix_misses": prompts a language model had read before or had not, and
            "prefix_tokens_reused", "prefix_tokens_read" of them; of a delayed language model "llm_calls", and
            "llm_tokens" it read in them.
        driver: who drove the search, "host" or "device".
        host_reason: why the host did although the device was asked for; None where it was not or where it drove.
    """

    stages: Mapping[str, float]
    audio_seconds: float
    counts: Mapping[str, int] = field(default_factory=dict)
    driver: Driver = "host"
    host_reason: str | None = None

    @classmethod
    def of(cls, clock: StageClock, audio_seconds: float) -> Timing:
        """What a clock shows; waits for the device that it times."""
        clock.settle()
        return cls(dict(clock.seconds), audio_seconds, dict(clock.counts), clock.driver, clock.host_reason)

    @property
    def total_seconds(self) -> float:
        return sum(self.stages.values())

    @property
    def rtfx(self) -> float:
        """Seconds of audio per second of work."""
        return self.audio_seconds / max(self.total_seconds, 1e-9)


@dataclass(frozen=True)
class Transcription:
    """The result of one recording. A failed one has `error` set and raises it when its text is asked for.

    Args:
        source: the path as given, or "array 0", ... for samples.
        n_best: hypotheses, best first.
        language: code of the language.
        duration: seconds of audio.
        rule: the fusion rule in force.
        timing: of the batch.
    """

    source: str
    n_best: tuple[Hypothesis, ...] = ()
    language: str | None = None
    duration: float = 0.0
    rule: Rule | None = None
    timing: Timing | None = field(default=None, repr=False)
    error: ShallowFusionError | None = None

    @property
    def best(self) -> Hypothesis:
        if self.error is not None:
            raise self.error
        return self.n_best[0]

    @property
    def text(self) -> str:
        return self.best.text

    @property
    def flags(self) -> tuple[str, ...]:
        return self.best.flags

    @property
    def words(self) -> tuple[Word, ...]:
        """The words with their times; none where times are not known."""
        return self.best.words

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What lies between timestamps, their texts together the result's text; without timestamps the whole window.

        A segment that nothing closed lasts to the end of the recording.
        """
        best = self.best
        if best.spans is not None:
            return tuple(_segment(i, span, best, self.duration) for i, span in enumerate(best.spans))
        average = best.parts["asr"] / max(1, len(best.tokens))
        ratio = compression_ratio(best.text)
        return (Segment(0, 0.0, self.duration, best.text, best.token_ids, average, ratio),)

    def rerank(
        self, rule: Rule, length_penalty: float = 1.0, length_bonus: float = 0.0, ctc_weight: float | None = None
    ) -> Transcription:
        """The same hypotheses ranked under another rule from their stored parts (`rescore`); no model runs."""
        ranked = rescore(
            self.n_best, rule, length_penalty=length_penalty, length_bonus=length_bonus, ctc_weight=ctc_weight
        )
        return Transcription(self.source, tuple(ranked), self.language, self.duration, rule, self.timing, self.error)

    def to_whisper(self) -> dict[str, Any]:
        """openai-whisper's result: {"text", "segments", "language"}."""
        segments = [
            {**segment.__dict__, "tokens": list(segment.tokens), "seek": 0, "temperature": 0.0, "no_speech_prob": 0.0}
            for segment in self.segments
        ]
        if self.words:
            segments[0]["words"] = [dict(word.__dict__) for word in self.words]
        return {"text": self.text, "segments": segments, "language": self.language}

    def to_faster_whisper(self) -> tuple[tuple[Segment, ...], dict[str, Any]]:
        """faster-whisper's pair: segments and an information record."""
        return self.segments, {"language": self.language, "duration": self.duration}

    def to_transformers(self) -> dict[str, Any]:
        """The ASR pipeline's result: {"text", "chunks"}."""
        return {"text": self.text, "chunks": [{"timestamp": (s.start, s.end), "text": s.text} for s in self.segments]}

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        if self.error is not None:
            return {"source": self.source, "error": str(self.error)}
        return {
            "source": self.source,
            "text": self.text,
            "language": self.language,
            "duration": self.duration,
            "flags": list(self.flags),
            "words": [dict(word.__dict__) for word in self.words],
            "rule": repr(self.rule),
            **({} if self.best.spans is None else {"segments": [_segment_json(segment) for segment in self.segments]}),
            "n_best": [_hypothesis_json(hypothesis) for hypothesis in self.n_best],
            "timing": None if self.timing is None else _timing_json(self.timing),
        }


def _timing_json(timing: Timing) -> dict[str, Any]:
    who = {"driver": timing.driver, "host_reason": timing.host_reason}
    return {**timing.stages, **timing.counts, "rtfx": timing.rtfx, **who}


def compression_ratio(text: str) -> float:
    """Bytes of the text over bytes of its zlib compression; above 2.4 openai-whisper suspects a loop."""
    data = text.encode()
    return len(data) / len(zlib.compress(data)) if data else 0.0


def _segment(number: int, span: Span, hypothesis: Hypothesis, duration: float) -> Segment:
    said = hypothesis.tokens[span.first : span.last]
    average = sum(token.parts["asr"] for token in said) / len(said)
    end = max(span.start, duration) if span.end is None else span.end
    ids = hypothesis.token_ids[span.first : span.last]
    return Segment(number, span.start, end, span.text, ids, average, compression_ratio(span.text))


def _segment_json(segment: Segment) -> dict[str, Any]:
    return {"start": segment.start, "end": segment.end, "text": segment.text}


def _hypothesis_json(hypothesis: Hypothesis) -> dict[str, Any]:
    return {
        "text": hypothesis.text,
        "total": hypothesis.total,
        "score": hypothesis.score,
        "parts": dict(hypothesis.parts),
        "flags": list(hypothesis.flags),
        "words": [dict(word.__dict__) for word in hypothesis.words],
        "token_ids": list(hypothesis.token_ids),
        "tokens": [_token_json(token) for token in hypothesis.tokens],
    }


def _token_json(token: Token) -> dict[str, Any]:
    found = {"id": token.id, "text": token.text, "total": token.total, "parts": dict(token.parts)}
    return found if token.start is None else {**found, "start": token.start, "end": token.end}
