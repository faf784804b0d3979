"""Speech for the demo: espeak-ng voices, mild noise, and a cache of log-mel features."""

from __future__ import annotations

import io
import json
import multiprocessing
import random
import shutil
import subprocess
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from numpy.typing import NDArray

from shallowfusion.demo.corpus import Sentence
from shallowfusion.errors import AudioError, ModelError
from shallowfusion.features.log_mel import FeatureSettings, log_mel

__all__ = [
    "DEMO_FEATURES",
    "Utterance",
    "Voice",
    "features_of",
    "load_cache",
    "random_voice",
    "synthesise",
    "write_cache",
]

# 50 mel frames a second: half of Whisper's usual rate, which halves the encoder's work.
DEMO_FEATURES = FeatureSettings(feature_size=80, sampling_rate=16000, hop_length=320, n_fft=512, chunk_seconds=30)

_ACCENTS = ("en-us", "en-us", "en-us", "en-gb", "en-gb", "en-gb-x-rp")
_VARIANTS = ("", "+m1", "+m2", "+m3", "+m4", "+m7", "+f1", "+f2", "+f3", "+f4", "+f5")
_SHARD_SIZE = 500


@dataclass(frozen=True)
class Voice:
    """How one utterance is spoken and disturbed.

    Args:
        name: espeak-ng voice with its variant, as in "en-us+f2".
        words_per_minute: nominal speaking rate.
        pitch: espeak-ng pitch, 0..99.
        snr_db: power of speech over noise in decibels.
        noise_tilt: exponent of the noise spectrum over frequency; 0 is white, 1 pink, 2 brown.
        peak: largest sample of the clean speech, 0..1.
        lead_seconds: silence before the speech; as much again follows it.
    """

    name: str
    words_per_minute: int
    pitch: int
    snr_db: float
    noise_tilt: float
    peak: float
    lead_seconds: float


@dataclass(frozen=True)
class Utterance:
    """Log-mel features [frames, mels] float16 without padding, and what was said."""

    text: str
    features: NDArray[numpy.float16]


def random_voice(generator: random.Random, quietest_snr_db: float = 12.0) -> Voice:
    """Draw accent, variant, rate, pitch and noise."""
    return Voice(
        name=generator.choice(_ACCENTS) + generator.choice(_VARIANTS),
        words_per_minute=generator.randint(135, 180),
        pitch=generator.randint(25, 75),
        snr_db=round(generator.uniform(quietest_snr_db, 40.0), 2),
        noise_tilt=round(generator.uniform(0.0, 2.0), 2),
        peak=round(generator.uniform(0.1, 0.9), 3),
        lead_seconds=round(generator.uniform(0.02, 0.4), 3),
    )


def synthesise(text: str, voice: Voice, seed: int) -> NDArray[numpy.float32]:
    """Speak a normalised sentence.

    Returns:
        [samples] float32 at 16 kHz, in -1..1.

    Raises:
        AudioError: espeak-ng is not installed, or fails.
    """
    import soundfile
    import soxr

    if shutil.which("espeak-ng") is None:
        raise AudioError("espeak-ng is not on the path; install the package espeak-ng (apt-get install espeak-ng).")
    command = ["espeak-ng", "-v", voice.name, "-s", str(voice.words_per_minute), "-p", str(voice.pitch), "--stdout"]
    finished = subprocess.run([*command, text], capture_output=True, check=False)
    if finished.returncode != 0 or not finished.stdout:
        reason = finished.stderr.decode("utf-8", "replace").strip()
        raise AudioError(f"espeak-ng could not speak {text!r} as {voice.name}: {reason or 'no sound came back'}.")
    raw, rate = soundfile.read(io.BytesIO(finished.stdout), dtype="float32")
    speech = soxr.resample(raw, rate, DEMO_FEATURES.sampling_rate).astype(numpy.float32)
    speech *= voice.peak / max(float(numpy.abs(speech).max(initial=0.0)), 1e-6)
    silence = numpy.zeros(int(voice.lead_seconds * DEMO_FEATURES.sampling_rate), dtype=numpy.float32)
    speech = numpy.concatenate([silence, speech, silence])
    return numpy.clip(speech + _noise(speech, voice, seed), -1.0, 1.0).astype(numpy.float32)


def features_of(samples: NDArray[numpy.float32]) -> NDArray[numpy.float16]:
    """Log-mel features [frames, mels] float16, as they are when silence follows the recording."""
    tensor = torch.from_numpy(samples)
    num_frames = -(-tensor.shape[0] // DEMO_FEATURES.hop_length)
    followed = torch.nn.functional.pad(tensor, (0, 2 * DEMO_FEATURES.n_fft))
    features = log_mel([followed], DEMO_FEATURES, pad=False)[0, :, :num_frames]
    return features.T.contiguous().numpy().astype(numpy.float16)


def write_cache(directory: Path, sentences: list[Sentence], seed: int, num_workers: int = 2) -> None:
    """Speak every sentence once in a random voice and store the features in shards; finished shards are kept.

    Args:
        directory: made if missing; shard k holds sentences [500 k, 500 (k + 1)).
        sentences: what to say.
        seed: of voices and noise.
        num_workers: processes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    jobs = []
    for shard, start in enumerate(range(0, len(sentences), _SHARD_SIZE)):
        if not (directory / f"{shard:04d}.json").exists():
            texts = [sentence.text for sentence in sentences[start : start + _SHARD_SIZE]]
            jobs.append((directory, shard, texts, seed))
    if num_workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            _write_shard(*job)
        return
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(_write_shard, *job) for job in jobs]:
            print(f"shard {future.result():4d} of {directory.name} spoken", flush=True)


def load_cache(directory: Path) -> list[Utterance]:
    """Read the shards present, memory-mapped, in order.

    Raises:
        ModelError: there are none.
    """
    utterances = []
    for index in sorted(directory.glob("*.json")):
        features = numpy.load(index.with_suffix(".npy"), mmap_mode="r")
        for entry in json.loads(index.read_text(encoding="utf-8")):
            start = entry["start"]
            utterances.append(Utterance(entry["text"], features[start : start + entry["frames"]]))
    if not utterances:
        raise ModelError(f"{directory} holds no spoken sentences; run the synthesis stage first.")
    return utterances


def _write_shard(directory: Path, shard: int, texts: list[str], seed: int) -> int:
    torch.set_num_threads(1)
    generator = random.Random(f"{seed}-{shard}")
    pieces, index, start = [], [], 0
    for text in texts:
        samples = synthesise(text, random_voice(generator), generator.getrandbits(32))
        features = features_of(samples)
        index.append({"text": text, "start": start, "frames": len(features)})
        pieces.append(features)
        start += len(features)
    numpy.save(directory / f"{shard:04d}.npy", numpy.concatenate(pieces))
    (directory / f"{shard:04d}.json").write_text(json.dumps(index), encoding="utf-8")
    return shard


def _noise(speech: NDArray[numpy.float32], voice: Voice, seed: int) -> NDArray[numpy.float32]:
    generator = numpy.random.default_rng(seed)
    spectrum = numpy.fft.rfft(generator.standard_normal(len(speech)))
    spectrum /= numpy.maximum(numpy.arange(len(spectrum)), 10.0) ** (voice.noise_tilt / 2.0)
    noise = numpy.fft.irfft(spectrum, len(speech))
    wanted = float(numpy.square(speech).mean()) / 10.0 ** (voice.snr_db / 10.0)
    scaled: NDArray[numpy.float32] = (noise * (wanted / numpy.square(noise).mean()) ** 0.5).astype(numpy.float32)
    return scaled
