"""Recordings on disk: the demo's own synthetic clips, and AN4's real speech."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from shallowfusion.demo.corpus import Sentence, normalise
from shallowfusion.demo.synthesis import DEMO_FEATURES, Utterance, features_of, random_voice, synthesise
from shallowfusion.errors import AudioError, InvalidArgumentError

__all__ = ["an4_recordings", "read_an4", "read_clips", "write_clips"]

_MILDEST_NOISE_DB = 15.0
_MANIFEST = "manifest.jsonl"


def write_clips(directory: Path, sentences: list[Sentence], seed: int) -> None:
    """Speak sentences into numbered 16-bit FLAC files with a manifest of texts, sources and voices."""
    import soundfile

    directory.mkdir(parents=True, exist_ok=True)
    generator = random.Random(f"{seed}-{directory.name}")
    entries = []
    for number, sentence in enumerate(sentences, start=1):
        voice = random_voice(generator, quietest_snr_db=_MILDEST_NOISE_DB)
        samples = synthesise(sentence.text, voice, generator.getrandbits(32))
        name = f"{directory.name}_{number:03d}.flac"
        soundfile.write(directory / name, samples, DEMO_FEATURES.sampling_rate, subtype="PCM_16")
        entry = {
            "audio": name,
            "text": sentence.text,
            "source": sentence.source,
            "seconds": round(len(samples) / DEMO_FEATURES.sampling_rate, 3),
            "sampling_rate": DEMO_FEATURES.sampling_rate,
            "voice": asdict(voice),
        }
        entries.append(json.dumps(entry))
    (directory / _MANIFEST).write_text("\n".join(entries) + "\n", encoding="utf-8")


def read_clips(directory: Path) -> list[Utterance]:
    """Read clips written by `write_clips`, in the order of their manifest.

    Raises:
        AudioError: the manifest or a clip is missing.
    """
    entries = _read_manifest(directory / _MANIFEST)
    return [Utterance(entry["text"], features_of(_read_audio(directory / entry["audio"]))) for entry in entries]


def an4_recordings(data: Path, part: str) -> list[tuple[Path, str]]:
    """AN4's recordings and what is said in them, the one place that knows its split.

    Args:
        data: the data directory, holding `audio/manifest.jsonl`.
        part: "train", "test", or "dev": every tenth speaker of the train directory, who is not in "train" then.

    Raises:
        AudioError: the manifest is missing.
        InvalidArgumentError: the part has no recordings.
    """
    prefix = f"audio/an4/{'test' if part == 'test' else 'train'}/"
    entries = [entry for entry in _read_manifest(data / "audio" / _MANIFEST) if entry["path"].startswith(prefix)]
    held_out = set(sorted({entry["speaker"] for entry in entries})[::10]) if part != "test" else set()
    chosen = [entry for entry in entries if (entry["speaker"] in held_out) == (part == "dev")]
    if not chosen or part not in ("train", "dev", "test"):
        raise InvalidArgumentError(f"AN4 has no part {part!r}; use 'train', 'dev' or 'test'.")
    return [(data / entry["path"], entry["text"]) for entry in chosen]


def read_an4(data: Path, part: str, speeds: tuple[float, ...] = (1.0,)) -> list[Utterance]:
    """Read AN4's recordings with their normalised transcripts.

    Args:
        data: the data directory, holding `audio/manifest.jsonl`.
        part: of `an4_recordings`.
        speeds: every recording comes once at each of these playing speeds.

    Raises:
        AudioError: the manifest or a recording is missing.
        InvalidArgumentError: the part has no recordings.
    """
    utterances = []
    for path, said in an4_recordings(data, part):
        text = normalise(said)
        if text is not None:
            samples = _read_audio(path)
            utterances += [Utterance(text, features_of(_at_speed(samples, speed))) for speed in speeds]
    return utterances


def _at_speed(samples: NDArray[numpy.float32], speed: float) -> NDArray[numpy.float32]:
    if speed == 1.0:
        return samples
    import soxr

    changed: NDArray[numpy.float32] = soxr.resample(samples, speed, 1.0).astype(numpy.float32)
    return changed


def _read_manifest(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise AudioError(f"{path} is missing; it lists the recordings beside it.")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _read_audio(path: Path) -> NDArray[numpy.float32]:
    import soundfile

    try:
        samples, rate = soundfile.read(path, dtype="float32")
    except (OSError, soundfile.SoundFileError) as error:
        raise AudioError(f"{path} cannot be read: {error}.") from error
    if samples.ndim != 1 or rate != DEMO_FEATURES.sampling_rate:
        raise AudioError(f"{path} must be one channel at 16000 Hz, got {samples.shape} at {rate} Hz.")
    recording: NDArray[numpy.float32] = samples
    return recording
