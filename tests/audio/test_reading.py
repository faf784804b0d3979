"""Recordings of every kind in, samples at 16 kHz out; bad ones get one clear sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from shallowfusion.audio import read_audio
from shallowfusion.errors import AudioError


def tone(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_common_formats_at_any_rate_become_16_khz(tmp_path: Path, suffix: str, rate: int) -> None:
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, tone(1.0, rate), rate)
    samples = read_audio(path)
    assert samples.dtype == torch.float32
    assert abs(len(samples) - 16000) <= 1600  # mp3 pads
    spectrum = np.abs(np.fft.rfft(samples.numpy()[2000:14000] * np.hanning(12000)))
    assert abs(np.argmax(spectrum) * 16000 / 12000 - 440) < 5
    assert 0.4 < float(samples.abs().max()) < 0.6


def test_stereo_is_mixed_down(tmp_path: Path) -> None:
    left, right = tone(0.5, 16000), np.zeros(8000, dtype=np.float32)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], axis=1), 16000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "stereo.wav").numpy(), left / 2, atol=1e-6)
    np.testing.assert_allclose(read_audio(np.stack([left, right])).numpy(), left / 2, atol=1e-6)


def test_arrays_tensors_and_integer_samples_are_the_same() -> None:
    samples = tone(0.1, 16000)
    expected = read_audio(samples)
    assert torch.equal(read_audio(torch.from_numpy(samples)), expected)
    assert torch.equal(read_audio(samples.astype(np.float64)), expected)
    pcm = (samples * 32768).astype(np.int16)
    torch.testing.assert_close(read_audio(pcm), expected, atol=1e-4, rtol=0)
    assert torch.equal(read_audio(samples.tolist()), expected)


def test_a_mapping_tells_the_rate() -> None:
    found = read_audio({"array": tone(1.0, 48000), "sampling_rate": 48000})
    assert abs(len(found) - 16000) <= 1


BAD_ARRAYS = {
    "no samples": np.zeros(0, dtype=np.float32),
    "NaN": np.array([0.1, np.nan]),
    "infinite": np.array([0.1, np.inf]),
    "dtype": np.array(["a"]),
    "got shape": np.zeros((100, 2)),
    "signed": np.zeros(10, dtype=np.uint8),
}


@pytest.mark.parametrize("words", BAD_ARRAYS)
def test_bad_arrays_are_refused_with_a_reason(words: str) -> None:
    with pytest.raises(AudioError, match=words):
        read_audio(BAD_ARRAYS[words])


@pytest.mark.parametrize("rate", [0, -16000, 16000.5, "16k", None])
def test_a_wrong_rate_is_refused(rate: object) -> None:
    with pytest.raises(AudioError, match="sampling_rate"):
        read_audio({"array": tone(0.1, 16000), "sampling_rate": rate})


def test_bad_files_are_refused_with_the_path_and_a_cure(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("this is not audio" * 100)
    soundfile.write(tmp_path / "zero.wav", np.zeros(0, dtype=np.float32), 16000)
    cases = {
        "missing.wav": "does not exist",
        "empty.wav": "is empty",
        "text.wav": "cannot be read as audio",
        "zero.wav": "no samples",
        ".": "is a directory",
    }
    for name, words in cases.items():
        with pytest.raises(AudioError, match=words):
            read_audio(tmp_path / name)


def test_something_else_is_refused() -> None:
    with pytest.raises(AudioError, match="path, an array or a tensor"):
        read_audio(3.5)
    with pytest.raises(AudioError, match="'array' and 'sampling_rate'"):
        read_audio({"samples": [0.0]})
