"""Synthetic speech and its cache."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from shallowfusion.demo.acoustic_training import pad_features
from shallowfusion.demo.corpus import Sentence
from shallowfusion.demo.synthesis import (
    DEMO_FEATURES,
    features_of,
    load_cache,
    random_voice,
    synthesise,
    write_cache,
)
from shallowfusion.errors import ModelError
from shallowfusion.features.log_mel import log_mel

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")


@needs_espeak
def test_speech_is_reproducible_and_noise_has_the_asked_power() -> None:
    voice = replace(random_voice(random.Random(1)), snr_db=20.0, peak=0.5)
    noisy = synthesise("good morning", voice, seed=3)
    assert numpy.array_equal(noisy, synthesise("good morning", voice, seed=3))
    clean = synthesise("good morning", replace(voice, snr_db=200.0), seed=3)
    measured = 10.0 * numpy.log10(numpy.square(clean).mean() / numpy.square(noisy - clean).mean())
    assert measured == pytest.approx(20.0, abs=0.5)
    assert numpy.abs(clean).max() == pytest.approx(0.5, abs=0.01)


@needs_espeak
def test_cache_is_read_back_in_order_and_kept(tmp_path: Path) -> None:
    sentences = [Sentence("good morning", "test"), Sentence("how are you", "test")]
    write_cache(tmp_path / "speech", sentences, seed=1, num_workers=1)
    utterances = load_cache(tmp_path / "speech")
    assert [utterance.text for utterance in utterances] == ["good morning", "how are you"]
    written = (tmp_path / "speech" / "0000.npy").stat().st_mtime_ns
    write_cache(tmp_path / "speech", sentences, seed=1, num_workers=1)
    assert (tmp_path / "speech" / "0000.npy").stat().st_mtime_ns == written
    with pytest.raises(ModelError, match="no spoken sentences"):
        load_cache(tmp_path / "elsewhere")


def test_padded_features_are_those_of_a_full_window() -> None:
    generator = numpy.random.default_rng(0)
    samples = (0.1 * generator.standard_normal(20000)).astype(numpy.float32)
    features = features_of(samples)
    assert features.shape == (63, 80)
    padded = pad_features([torch.from_numpy(features.astype(numpy.float32))], DEMO_FEATURES.chunk_frames)
    window = log_mel([torch.from_numpy(samples)], DEMO_FEATURES)
    # float16 storage costs up to 0.001; the frame in which the recording ends reaches into the padding.
    torch.testing.assert_close(padded[:, :, :62], window[:, :, :62], atol=2e-3, rtol=0.0)
    torch.testing.assert_close(padded[:, :, 65:], window[:, :, 65:], atol=2e-3, rtol=0.0)
