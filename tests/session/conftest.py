"""A tiny decoder with two language models and a session's worth of recordings, and what is left when all is over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from shallowfusion.decoder import FusionDecoder
from shallowfusion.features.log_mel import FeatureSettings
from shallowfusion.results import Transcription
from shallowfusion.scorers.base import Context
from shallowfusion.scorers.loading import AcousticModel
from shallowfusion.scorers.whisper import WhisperScorer
from shallowfusion.session.front import DecoderSession
from tests.tiny import random_encoder_output, tiny_lm, tiny_whisper

BASE = {"suppress_blank": False, "suppress_tokens": None, "max_new_tokens": 14}


@pytest.fixture(scope="session")
def two_lms() -> FusionDecoder:
    return FusionDecoder(tiny_whisper(1), [tiny_lm(2), tiny_lm(9)])


@pytest.fixture(scope="session")
def one_lm(two_lms: FusionDecoder) -> FusionDecoder:
    return FusionDecoder(two_lms.acoustic, two_lms.language_models[:1])


@pytest.fixture(scope="session")
def recordings(two_lms: FusionDecoder) -> torch.Tensor:
    return random_encoder_output(two_lms.acoustic, 12)


def alone(decoder: FusionDecoder, encoded: torch.Tensor, language_models: Any = None, **options: Any) -> Transcription:
    """The same request without a session."""
    chosen = range(len(decoder.language_models)) if language_models is None else map(_place, language_models)
    own = FusionDecoder(decoder.acoustic, [decoder.language_models[i] for i in chosen])
    return own.decode(encoded[None], **options)[0]


def _place(name: str) -> int:
    return int(name.removeprefix("lm") or 0)


def assert_same(one: Transcription, other: Transcription) -> None:
    assert [h.token_ids for h in one.n_best] == [h.token_ids for h in other.n_best]
    for own, wanted in zip(one.n_best, other.n_best, strict=True):
        assert own.total == pytest.approx(wanted.total, abs=1e-4)
        assert list(own.parts.values()) == pytest.approx(list(wanted.parts.values()), abs=1e-4)
        assert own.flags == wanted.flags


@pytest.fixture
def spied_pools(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every state that a scorer starts from now on, so that a test can look whether its slots are free again."""
    from shallowfusion.scorers.base import CachedScorer

    states: list[Any] = []
    start: Callable[..., Any] = CachedScorer.start

    def remembered(self: CachedScorer, context: Any) -> Any:
        state = start(self, context)
        states.append(list(state.slots._pools))
        return state

    monkeypatch.setattr(CachedScorer, "start", remembered)
    return states


def assert_nothing_is_left(session: DecoderSession) -> None:
    """After `close`: no job, no cohort, no model state."""
    engine = session._worker.engine
    assert engine.is_empty
    assert engine.jobs == []
    assert engine.reserved_bytes == 0
    assert session.statistics().queued == session.statistics().running == 0


class GatedScorer(WhisperScorer):
    """A Whisper whose encoder, or whose start of a search, can be held back and made to fail.

    Args:
        heard: sizes of the encoder's passes. `on_encode`, `on_start`: called before each pass or search.
    """

    def __init__(self, acoustic: AcousticModel) -> None:
        super().__init__(acoustic.scorer.model, acoustic.scorer.vocabulary)
        self.heard: list[int] = []
        self.num_starts = 0
        self.on_encode: Callable[[torch.Tensor], None] = lambda features: None
        self.on_start: Callable[[int], None] = lambda number: None

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        self.heard.append(len(features))
        self.on_encode(features)
        return super().encode(features)

    def start(self, context: Context) -> Any:
        self.num_starts += 1
        self.on_start(self.num_starts)
        return super().start(context)


@pytest.fixture
def hearing() -> FusionDecoder:
    """A decoder that hears a second of sound, with a gated scorer."""
    acoustic = tiny_whisper(1)
    features = FeatureSettings(feature_size=16, sampling_rate=9600, chunk_seconds=1)
    acoustic = dataclasses.replace(acoustic, scorer=GatedScorer(acoustic), features=features)
    return FusionDecoder(acoustic, [tiny_lm(2)])


@pytest.fixture(scope="session")
def sounds() -> list[torch.Tensor]:
    """Twelve recordings of up to a second."""
    draw = torch.Generator().manual_seed(3)
    return [0.1 * torch.randn(1000 + 700 * i, generator=draw) for i in range(12)]


def alone_on(decoder: FusionDecoder, sound: torch.Tensor, **options: Any) -> Transcription:
    """The same recording without a session."""
    (result,) = decoder.transcribe([sound], overlap_encoder=False, **options)
    return result
