"""What a transcription gives back, and the shapes other libraries use for it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shallowfusion.errors import ShallowFusionError
from shallowfusion.fusion.rescore import rescore
from shallowfusion.fusion.rules import Rule
from shallowfusion.values import Hypothesis, Token, Word

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

    Args:
        stages: "audio", "features", "encoder", "asr", "lm", "fusion", "search", "text".
        audio_seconds: length of all recordings of the batch.
        counts: of a delayed language model: "llm_calls", and "llm_tokens" it read in them.
    """

    stages: Mapping[str, float]
    audio_seconds: float
    counts: Mapping[str, int] = field(default_factory=dict)

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
        """One segment, the whole window; segments within it come with timestamps."""
        best = self.best
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
            "n_best": [_hypothesis_json(hypothesis) for hypothesis in self.n_best],
            "timing": None
            if self.timing is None
            else {**self.timing.stages, **self.timing.counts, "rtfx": self.timing.rtfx},
        }


def compression_ratio(text: str) -> float:
    """Bytes of the text over bytes of its zlib compression; above 2.4 openai-whisper suspects a loop."""
    data = text.encode()
    return len(data) / len(zlib.compress(data)) if data else 0.0


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
