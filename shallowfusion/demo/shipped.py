"""The models, clips and chosen weights that come with the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shallowfusion.decoder import FusionDecoder
from shallowfusion.errors import ModelError
from shallowfusion.scorers.loading import choose_device, choose_dtype, load_causal_lm, load_whisper

__all__ = ["LANGUAGE_MODELS", "Clip", "decoders", "lm_weights", "model_directory", "read_manifest", "terms"]

HERE = Path(__file__).resolve().parent
LANGUAGE_MODELS = ("general", "medical")


@dataclass(frozen=True)
class Clip:
    """One recording and what is said in it."""

    path: Path
    text: str
    seconds: float


def model_directory(name: str) -> Path:
    """Directory of a shipped model: "asr", "asr_an4", "lm_general", "lm_medical".

    Raises:
        ModelError: the package was built without it.
    """
    directory = HERE / "models" / name
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"the demo model {name!r} is not in {directory.parent}; train it with "
            "python -m shallowfusion.demo.train --data DIRECTORY, or install a complete package."
        )
    return directory


def decoders(device: str = "auto", dtype: str = "auto") -> dict[str, FusionDecoder]:
    """The acoustic model alone ("asr") and with each language model ("general", "medical"); it is loaded once."""
    where = choose_device(device)
    number = choose_dtype(dtype, where)
    acoustic = load_whisper(str(model_directory("asr")), where, number)
    loaded = {"asr": FusionDecoder(acoustic)}
    for name in LANGUAGE_MODELS:
        loaded[name] = FusionDecoder(acoustic, [load_causal_lm(str(model_directory(f"lm_{name}")), where, number)])
    return loaded


def read_manifest(directory: Path) -> list[Clip]:
    """Clips of a directory with a `manifest.jsonl` (keys audio, text, seconds).

    Raises:
        ModelError: there is no manifest.
    """
    manifest = directory / "manifest.jsonl"
    if not manifest.is_file():
        raise ModelError(f"{manifest} is missing; it lists the recordings beside it with their texts.")
    entries = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [Clip(directory / entry["audio"], entry["text"], float(entry["seconds"])) for entry in entries]


def lm_weights() -> dict[str, Any]:
    """What tuning on the development clips chose: {"medical": {"lm_weight": ..., "errors": ...}, ...}."""
    found: dict[str, Any] = json.loads((HERE / "lm_weights.json").read_text(encoding="utf-8"))
    return found


def terms() -> frozenset[str]:
    """Medical words whose recall the demo counts; fixed before any decoding."""
    return frozenset((HERE / "terms.txt").read_text(encoding="utf-8").split())
