"""Whisper's log-mel features, computed in plain torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from shallowfusion.errors import AudioError, InvalidArgumentError, ModelError

__all__ = ["FeatureSettings", "log_mel", "slaney_mel_filters"]

_FILE_NAME = "preprocessor_config.json"
_POWER_FLOOR = 1e-10
_DYNAMIC_RANGE = 8.0  # decades below the loudest point that are kept

# Slaney's mel scale: linear up to 1 kHz (mel 15), logarithmic above.
_HERTZ_PER_MEL = 200.0 / 3.0
_BREAK_HERTZ = 1000.0
_BREAK_MEL = 15.0
_LOG_STEP = math.log(6.4) / 27.0


@dataclass(frozen=True)
class FeatureSettings:
    """How samples become log-mel frames.

    Args:
        feature_size: number of mel bands.
        sampling_rate: samples per second the model was trained on.
        hop_length: samples between two frames.
        n_fft: samples per analysis window, also the FFT size.
        chunk_seconds: seconds of the model's fixed window.

    Raises:
        InvalidArgumentError: a value is not positive, or the window is not longer than the hop.
    """

    feature_size: int = 80
    sampling_rate: int = 16000
    hop_length: int = 160
    n_fft: int = 400
    chunk_seconds: int = 30

    def __post_init__(self) -> None:
        for name in ("feature_size", "sampling_rate", "hop_length", "n_fft", "chunk_seconds"):
            value = getattr(self, name)
            if value <= 0:
                raise InvalidArgumentError(f"{name} must be a positive whole number, got {value!r}.")
        if self.n_fft < self.hop_length:
            raise InvalidArgumentError(
                f"n_fft must be at least hop_length, got {self.n_fft} < {self.hop_length}: samples would be skipped."
            )

    @property
    def chunk_samples(self) -> int:
        """Samples of the fixed window."""
        return self.chunk_seconds * self.sampling_rate

    @property
    def chunk_frames(self) -> int:
        """Frames of the fixed window."""
        return self.chunk_samples // self.hop_length

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> FeatureSettings:
        """Read the settings of a `WhisperFeatureExtractor` from its `preprocessor_config.json`.

        Raises:
            ModelError: the file is missing, is not JSON, or lacks a setting.
        """
        path = Path(directory) / _FILE_NAME
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                feature_size=int(stored["feature_size"]),
                sampling_rate=int(stored["sampling_rate"]),
                hop_length=int(stored["hop_length"]),
                n_fft=int(stored["n_fft"]),
                chunk_seconds=int(stored["chunk_length"]),
            )
        except FileNotFoundError as error:
            raise ModelError(f"{path} is missing; a Whisper model directory holds one.") from error
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ModelError(f"{path} does not describe a Whisper feature extractor: {error!r}.") from error


def log_mel(samples: list[Tensor], settings: FeatureSettings, pad: bool = True) -> Tensor:
    """Turn recordings into Whisper's log-mel features.

    Every recording is followed by silence, so the frames of the shorter ones are those of a recording
    with zeros appended. A recording longer than the window is cut at the window's end if `pad` is set.
    Per recording: log10 of the mel power, raised to 8 decades below its loudest point, then (x + 4) / 4.

    Args:
        samples: one float tensor [samples] per recording, at `settings.sampling_rate`, in -1..1.
        settings: window, hop and mel bands.
        pad: True: exactly `settings.chunk_frames` frames, as the model's own window asks.
            False: as many frames as the longest recording needs.

    Returns:
        [utterances, mels, frames] float32, on the device of the samples.

    Raises:
        AudioError: no recording was given, or one is not a finite one-dimensional float tensor.

    Source: Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", section 2.2.
    """
    if not samples:
        raise AudioError("log_mel needs at least one recording, got an empty list.")
    for position, recording in enumerate(samples):
        _check_recording(recording, position)
    if pad:
        num_samples = settings.chunk_samples
    else:
        longest = max(recording.shape[0] for recording in samples)
        num_frames = max(1, math.ceil(longest / settings.hop_length))
        # torch.stft reflects half a window at either end, so the signal must be longer than that.
        num_samples = max(num_frames * settings.hop_length, settings.n_fft)
    padded = torch.stack([_fit(recording.to(torch.float32), num_samples) for recording in samples])
    window = torch.hann_window(settings.n_fft, device=padded.device)
    spectrum = torch.stft(padded, settings.n_fft, settings.hop_length, window=window, return_complex=True)
    power = spectrum[..., :-1].abs().square().contiguous()
    filters = slaney_mel_filters(settings).to(padded.device)
    logarithm = (filters @ power).clamp(min=_POWER_FLOOR).log10()
    loudest = logarithm.amax(dim=(1, 2), keepdim=True)
    return (torch.maximum(logarithm, loudest - _DYNAMIC_RANGE) + 4.0) / 4.0


@lru_cache(maxsize=8)
def slaney_mel_filters(settings: FeatureSettings) -> Tensor:
    """Triangular filters from 0 Hz to half the sampling rate, evenly spaced on Slaney's mel scale, each of area one.

    Returns:
        [mels, bins] float32 with bins = n_fft // 2 + 1; shared between callers, so do not write to it.

    Source: Slaney 1998, "Auditory Toolbox", as librosa's default and Whisper use it.
    """
    top_hertz = min(8000.0, settings.sampling_rate / 2.0)
    bins = torch.linspace(0.0, settings.sampling_rate / 2.0, settings.n_fft // 2 + 1, dtype=torch.float64)
    mels = torch.linspace(0.0, _hertz_to_mel(top_hertz), settings.feature_size + 2, dtype=torch.float64)
    edges = _mel_to_hertz(mels)
    lower, centre, upper = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (bins - lower) / (centre - lower)
    falling = (upper - bins) / (upper - centre)
    triangles = torch.minimum(rising, falling).clamp(min=0.0)
    return (triangles * (2.0 / (upper - lower))).to(torch.float32)


def _check_recording(recording: Tensor, position: int) -> None:
    if recording.dim() != 1 or not recording.is_floating_point():
        raise AudioError(
            f"recording {position} must be a float tensor [samples], got {recording.dtype} "
            f"of shape {list(recording.shape)}; mix it down to one channel first."
        )
    if not bool(torch.isfinite(recording).all()):
        raise AudioError(f"recording {position} holds samples that are not finite; check how it was read.")


def _fit(recording: Tensor, num_samples: int) -> Tensor:
    missing = num_samples - recording.shape[0]
    return functional.pad(recording, (0, missing)) if missing > 0 else recording[:num_samples]


def _hertz_to_mel(hertz: float) -> float:
    if hertz < _BREAK_HERTZ:
        return hertz / _HERTZ_PER_MEL
    return _BREAK_MEL + math.log(hertz / _BREAK_HERTZ) / _LOG_STEP


def _mel_to_hertz(mels: Tensor) -> Tensor:
    logarithmic = _BREAK_HERTZ * torch.exp(_LOG_STEP * (mels - _BREAK_MEL))
    return torch.where(mels < _BREAK_MEL, mels * _HERTZ_PER_MEL, logarithmic)
