"""A tiny decoder with two language models and a session's worth of recordings, and what is left when all is over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from shallowfusion.decoder import FusionDecoder
from shallowfusion.results import Transcription
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
    engine = session._engine
    assert engine.is_empty
    assert engine.jobs == []
    assert engine.reserved_bytes == 0
    assert session.statistics().queued == session.statistics().running == 0
