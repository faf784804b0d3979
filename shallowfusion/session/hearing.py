"""From a list of recordings to encoder output, batch by batch; what cannot be read fails alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shallowfusion.audio.reading import read_audio
from shallowfusion.errors import AudioError, ShallowFusionError
from shallowfusion.features.log_mel import log_mel
from shallowfusion.results import Transcription
from shallowfusion.scorers.loading import AcousticModel
from shallowfusion.search.loop import StageClock
from shallowfusion.session.encoding import EncoderPass

__all__ = ["Heard", "hear", "named", "samples_of"]


@dataclass(frozen=True)
class Heard:
    """A few recordings that were read and encoded.

    Args:
        items: name and recording of each.
        found: of each the seconds of sound, or what failed.
        output, done: of those that were read, together, as `EncoderPass` gives them; None = none was.
        clock: of the work so far.
        samples: of those that were read.
    """

    items: Sequence[tuple[str, Any]]
    found: Sequence[Transcription | float]
    output: Tensor | None
    done: torch.cuda.Event | None
    clock: StageClock
    samples: Sequence[Tensor] = ()


def named(items: Sequence[Any], first: int) -> list[tuple[str, Any]]:
    """Each recording with the name of its result: the path, or its number."""
    return [(str(own) if isinstance(own, (str, Path)) else f"array {first + i}", own) for i, own in enumerate(items)]


def samples_of(acoustic: AcousticModel, item: Any, source: str) -> Tensor:
    """Samples at the model's rate.

    Raises:
        AudioError: the recording cannot be read, or is longer than the model's window.
    """
    settings = acoustic.features
    samples = read_audio(item, settings.sampling_rate)
    if len(samples) > settings.chunk_samples:
        raise AudioError(
            f"{source} lasts {len(samples) / settings.sampling_rate:.1f} s, but this release decodes up to "
            f"{settings.chunk_seconds} s at once; cut it into pieces."
        )
    return samples


def hear(acoustic: AcousticModel, encoder: EncoderPass, items: Sequence[tuple[str, Any]]) -> Heard:
    """Read and encode a few recordings; those that cannot be read fail alone."""
    clock, samples = StageClock.on(acoustic.scorer.device), []
    found: list[Transcription | float] = []
    with clock("audio"):
        for source, item in items:
            try:
                samples.append(samples_of(acoustic, item, source))
                found.append(len(samples[-1]) / acoustic.features.sampling_rate)
            except ShallowFusionError as error:
                found.append(Transcription(source, error=error))
    if not samples:
        return Heard(items, found, None, None, clock)
    with clock("features"):
        features = log_mel(samples, acoustic.features)
    with clock("encoder"):
        return Heard(items, found, *encoder(features), clock, samples)
