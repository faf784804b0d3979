"""log_mel agrees with Whisper's own feature extractor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch

from shallowfusion.errors import AudioError, InvalidArgumentError, ModelError
from shallowfusion.features.log_mel import FeatureSettings, log_mel, slaney_mel_filters

SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"
TOLERANCE = 1e-4


def speech_like(num_samples: int, seed: int) -> torch.Tensor:
    """A sum of gliding tones in noise: loud and quiet stretches, all bands in use."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(num_samples) / 16000.0
    tone = torch.sin(2 * torch.pi * (200.0 + 900.0 * time) * time) * torch.sin(3.0 * time).clamp(min=0.0)
    return 0.3 * tone + 0.01 * torch.randn(num_samples, generator=generator)


def transformers_features(samples: list[torch.Tensor], settings: FeatureSettings) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=settings.feature_size,
        sampling_rate=settings.sampling_rate,
        hop_length=settings.hop_length,
        n_fft=settings.n_fft,
        chunk_length=settings.chunk_seconds,
    )
    arrays = [recording.numpy() for recording in samples]
    return extractor(arrays, sampling_rate=settings.sampling_rate, return_tensors="pt").input_features


@pytest.mark.parametrize("feature_size", [80, 128])
def test_padded_features_equal_transformers(feature_size: int) -> None:
    settings = FeatureSettings(feature_size=feature_size)
    samples = [speech_like(16000 * 3 + 7, seed=1), speech_like(1, seed=2), speech_like(16000 * 31, seed=3)]
    ours = log_mel(samples, settings)
    assert ours.shape == (3, feature_size, 3000)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, transformers_features(samples, settings), atol=TOLERANCE, rtol=0.0)


def test_demo_settings_equal_transformers() -> None:
    settings = FeatureSettings(hop_length=320, n_fft=512)
    samples = [speech_like(54321, seed=4)]
    ours = log_mel(samples, settings)
    assert ours.shape == (1, 80, 1500)
    torch.testing.assert_close(ours, transformers_features(samples, settings), atol=TOLERANCE, rtol=0.0)


@pytest.mark.parametrize("feature_size", [80, 128])
def test_filters_equal_the_published_ones(feature_size: int) -> None:
    path = SHARED_DATA / "tokenizers" / "openai-whisper" / "mel_filters.npz"
    if not path.exists():
        pytest.skip("the published mel filters are not beside this checkout")
    published = torch.from_numpy(numpy.load(path)[f"mel_{feature_size}"])
    torch.testing.assert_close(
        slaney_mel_filters(FeatureSettings(feature_size=feature_size)), published, atol=1e-6, rtol=0.0
    )


def test_without_padding_frames_follow_the_longest_recording() -> None:
    settings = FeatureSettings()
    short, long = speech_like(8000, seed=5), speech_like(16001, seed=6)
    batched = log_mel([short, long], settings, pad=False)
    assert batched.shape == (2, 80, 101)
    padded = log_mel([short, long], settings)
    # Away from the end, where one signal is reflected and the other continued by zeros, both agree.
    torch.testing.assert_close(batched[:, :, :98], padded[:, :, :98], atol=TOLERANCE, rtol=0.0)


def test_silence_and_one_sample_are_finite() -> None:
    for recording in (torch.zeros(0), torch.zeros(1), torch.zeros(400)):
        features = log_mel([recording], FeatureSettings(), pad=False)
        assert features.shape[2] >= 1
        assert torch.isfinite(features).all()


def test_bad_recordings_are_refused() -> None:
    settings = FeatureSettings()
    with pytest.raises(AudioError, match="at least one recording"):
        log_mel([], settings)
    with pytest.raises(AudioError, match="one channel"):
        log_mel([torch.zeros(2, 16000)], settings)
    with pytest.raises(AudioError, match="not finite"):
        log_mel([torch.tensor([0.0, float("nan")])], settings)


def test_settings_are_read_and_checked(tmp_path: Path) -> None:
    stored = {"feature_size": 80, "sampling_rate": 16000, "hop_length": 320, "n_fft": 512, "chunk_length": 30}
    with pytest.raises(ModelError, match="missing"):
        FeatureSettings.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    settings = FeatureSettings.from_pretrained(tmp_path)
    assert (settings.hop_length, settings.n_fft, settings.chunk_frames) == (320, 512, 1500)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ModelError, match="feature_size"):
        FeatureSettings.from_pretrained(tmp_path)
    with pytest.raises(InvalidArgumentError, match="hop_length"):
        FeatureSettings(hop_length=0)
