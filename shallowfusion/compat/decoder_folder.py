"""Folders in which pyctcdecode keeps a decoder: alphabet.json and, with a language model, language_model/.

The language model's folder holds attrs.json (its weights), unigrams.txt (one known word a line) and its ARPA file or
KenLM binary. Either library reads what the other wrote.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shallowfusion.errors import ModelError
from shallowfusion.ngrams.arpa import write_arpa
from shallowfusion.ngrams.model import NgramModel

__all__ = ["StoredModel", "read_alphabet", "read_model_folder", "write_decoder_folder", "write_model_folder"]

ALPHABET, LANGUAGE_MODEL = "alphabet.json", "language_model"
ATTRIBUTES, UNIGRAMS = "attrs.json", "unigrams.txt"
NUMBERS, FLAG = ("alpha", "beta", "unk_score_offset"), "score_boundary"


@dataclass(frozen=True)
class StoredModel:
    """What a language model's folder says.

    Args:
        path: of the n-gram file.
        unigrams: the known words, None = those of the file.
        attributes: alpha, beta, unk_score_offset, score_boundary.
    """

    path: Path
    unigrams: list[str] | None
    attributes: dict[str, Any]


def write_decoder_folder(folder: str | Path, alphabet: str) -> Path:
    """Write the alphabet; returns where a language model goes.

    Raises:
        ModelError: the folder cannot be written.
    """
    _write(Path(folder) / ALPHABET, alphabet)
    return Path(folder) / LANGUAGE_MODEL


def read_alphabet(folder: str | Path) -> tuple[str, Path | None]:
    """The alphabet's text, and the language model's folder if there is one.

    Raises:
        ModelError: no folder of a decoder.
    """
    model = Path(folder) / LANGUAGE_MODEL
    return _read(Path(folder) / ALPHABET), model if model.is_dir() else None


def write_model_folder(
    folder: str | Path, model: NgramModel | Path, known: Collection[str], attributes: Mapping[str, Any],
    encoding: str | None = None,
) -> None:  # fmt: skip
    """Write a language model; a KenLM binary or plain ARPA file it was read from is copied, else an ARPA is written.

    Args:
        model: or the path of a KenLM binary.
        known: the known words.

    Raises:
        ModelError: the folder cannot be written.
    """
    where = Path(folder)
    _write(where / ATTRIBUTES, json.dumps(dict(attributes)))
    _write(where / UNIGRAMS, "".join(f"{word}\n" for word in sorted(known)), encoding)
    source = model if isinstance(model, Path) else Path(model.name)
    if isinstance(model, Path) or (source.suffix.lower() == ".arpa" and source.is_file()):
        # pyctcdecode knows a binary by its ending.
        is_named = source.suffix.lower() in (".arpa", ".bin", ".binary")
        try:
            shutil.copy2(source, where / (source.name if is_named else f"{source.name}.bin"))
        except OSError as error:
            raise ModelError(
                f"{source} cannot be copied to {where} ({error.strerror}); give a place that can."
            ) from error
    else:
        write_arpa(model, where / "lm.arpa")


def read_model_folder(folder: str | Path, encoding: str | None = None) -> StoredModel:
    """Read a language model's folder.

    Raises:
        ModelError: a file is missing or says what it should not.
    """
    where = Path(folder)
    text = _read(where / ATTRIBUTES)
    try:
        attributes = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{where / ATTRIBUTES} is no JSON ({error}); save the decoder again.") from None
    keys = {*NUMBERS, FLAG}
    if not isinstance(attributes, dict) or set(attributes) != keys or not _are_sound(attributes):
        raise ModelError(f"{where / ATTRIBUTES} must give numbers {', '.join(NUMBERS)} and a {FLAG}, got {text!r}.")
    words = _read(where / UNIGRAMS, encoding).splitlines()
    others = [
        path for path in sorted(where.iterdir())
        if path.name not in (ATTRIBUTES, UNIGRAMS) and not path.name.startswith((".", "__"))
    ]  # fmt: skip
    if len(others) != 1:
        names = ", ".join(path.name for path in others) or "none"
        raise ModelError(f"{where} must hold one ARPA file beside {ATTRIBUTES} and {UNIGRAMS}, got {names}.")
    return StoredModel(others[0], words or None, attributes)


def _are_sound(attributes: Mapping[str, Any]) -> bool:
    numbers = [attributes[name] for name in NUMBERS]
    return isinstance(attributes[FLAG], bool) and all(
        isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
        for number in numbers
    )


def _write(path: Path, text: str, encoding: str | None = None) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding=encoding or "utf-8")
    except (OSError, UnicodeError, LookupError) as error:
        raise ModelError(f"{path} cannot be written ({error}); give a folder and an encoding that can.") from error


def _read(path: Path, encoding: str | None = None) -> str:
    try:
        return path.read_text(encoding=encoding or "utf-8")
    except (OSError, UnicodeError, LookupError) as error:
        raise ModelError(f"{path} cannot be read ({error}); give a folder that save_to_dir wrote.") from error
