"""The errors this package raises on bad input: what, got, wanted, cure."""

from __future__ import annotations

__all__ = [
    "AcousticScoresError",
    "AudioError",
    "CapacityError",
    "DivergenceError",
    "InvalidArgumentError",
    "ModelError",
    "SessionError",
    "ShallowFusionError",
    "VocabularyError",
]


class ShallowFusionError(Exception):
    """Base of every error raised on purpose by this package."""


class InvalidArgumentError(ShallowFusionError, ValueError):
    """An argument has a value, shape or dtype outside its contract."""


class AcousticScoresError(ShallowFusionError, ValueError):
    """The scores of an utterance are no log-probabilities of frames that could be decoded."""


class AudioError(ShallowFusionError, ValueError):
    """A recording cannot be read, or holds samples that cannot be decoded."""


class ModelError(ShallowFusionError, ValueError):
    """A model directory or hub id cannot be loaded as the model that was asked for."""


class VocabularyError(ShallowFusionError, ValueError):
    """Two vocabularies that must agree token by token do not."""


class CapacityError(ShallowFusionError, RuntimeError):
    """A fixed-size resource (pages, slots, bytes) is exhausted."""


class DivergenceError(ShallowFusionError, RuntimeError):
    """A device-driven search decided otherwise than the host's replay of the same candidates."""


class SessionError(ShallowFusionError, RuntimeError):
    """A session is closed and takes no more requests."""
