"""Recordings of any common kind as mono float samples at the rate a model wants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shallowfusion.errors import AudioError

__all__ = ["read_audio", "to_mono"]


def read_audio(source: Any, sampling_rate: int = 16000) -> Tensor:
    """Samples of one recording.

    Args:
        source: a path (wav, flac, mp3, ogg and what else libsndfile reads, any rate, any channels); or an array or
            tensor of samples at `sampling_rate`, [samples] or [channels, samples], float in -1..1 or integer PCM;
            or {"array": samples, "sampling_rate": rate} for samples at another rate.
        sampling_rate: samples per second wanted.

    Returns:
        float32 [samples].

    Raises:
        AudioError: missing, empty, not audio, no samples, or samples that are not finite.
    """
    if isinstance(source, (str, Path)):
        return _read_file(Path(source), sampling_rate)
    if isinstance(source, dict):
        return _from_mapping(source, sampling_rate)
    if isinstance(source, Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, (list, tuple)):
        source = np.asarray(source)
    if not isinstance(source, np.ndarray):
        raise AudioError(f"a recording must be a path, an array or a tensor of samples, got {type(source).__name__}.")
    return _checked(to_mono(source), "the array of samples")


def _from_mapping(source: dict[str, Any], sampling_rate: int) -> Tensor:
    if set(source) - {"array", "sampling_rate", "path"} or not {"array", "sampling_rate"} <= set(source):
        raise AudioError(f"a recording given as a mapping needs 'array' and 'sampling_rate', got {sorted(source)}.")
    rate = source["sampling_rate"]
    if not isinstance(rate, int) or not 1000 <= rate <= 768_000:
        raise AudioError(f"sampling_rate must be samples per second from 1000 to 768000, got {rate!r}.")
    samples = read_audio(source["array"], sampling_rate)
    return samples if rate == sampling_rate else _resampled(samples, rate, sampling_rate)


def to_mono(samples: np.ndarray) -> np.ndarray:
    """Mean over channels, float32; integer PCM is scaled to -1..1.

    Raises:
        AudioError: not [samples] or [channels, samples] with at most 64 channels, or not numbers.
    """
    if samples.dtype.kind not in "fiu":
        raise AudioError(f"samples must be floats or integers, got dtype {samples.dtype}.")
    if samples.dtype.kind == "u":
        raise AudioError(f"samples must be signed, got dtype {samples.dtype}; subtract the offset first.")
    scale = 1.0 if samples.dtype.kind == "f" else 1.0 / (np.iinfo(samples.dtype).max + 1)
    if samples.ndim == 2 and samples.shape[0] <= 64:
        samples = samples.astype(np.float32).mean(axis=0)
    if samples.ndim != 1:
        raise AudioError(
            f"samples must be [samples] or [channels, samples], got shape {list(samples.shape)}; transpose them."
        )
    return samples.astype(np.float32) * np.float32(scale)


def _read_file(path: Path, sampling_rate: int) -> Tensor:
    import soundfile

    if not path.exists():
        raise AudioError(f"{path} does not exist; check the path.")
    if path.is_dir():
        raise AudioError(f"{path} is a directory, wanted a recording (wav, flac, mp3, ogg).")
    if path.stat().st_size == 0:
        raise AudioError(f"{path} is empty (0 bytes), wanted a recording (wav, flac, mp3, ogg).")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise AudioError(
            f"{path} cannot be read as audio ({error}); convert it to wav or flac, for instance with ffmpeg."
        ) from error
    mono = samples.mean(axis=1)
    checked = _checked(mono, str(path))
    return checked if rate == sampling_rate else _resampled(checked, rate, sampling_rate)


def _resampled(samples: Tensor, rate: int, wanted: int) -> Tensor:
    import soxr

    return torch.from_numpy(np.ascontiguousarray(soxr.resample(samples.numpy(), rate, wanted), dtype=np.float32))


def _checked(samples: np.ndarray, name: str) -> Tensor:
    if samples.size == 0:
        raise AudioError(f"{name} holds no samples (zero length), wanted at least one.")
    if not np.isfinite(samples).all():
        bad = int((~np.isfinite(samples)).sum())
        raise AudioError(f"{name} holds {bad} samples that are NaN or infinite; repair or re-export the recording.")
    return torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))
