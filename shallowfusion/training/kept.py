"""Pieces of a long run on disk, so that a killed one goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from shallowfusion.errors import InvalidArgumentError

__all__ = ["Kept", "digest_of"]

Made = TypeVar("Made")


def digest_of(*parts: Any) -> str:
    """Sixteen hexadecimal digits of texts, numbers, and tensors by their values."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.cpu().numpy().tobytes() if isinstance(part, Tensor) else json.dumps(part).encode())
        digest.update(b"\n")
    return digest.hexdigest()[:16]


class Kept:
    """What was made under a key is read back instead of made again.

    Price: one file per piece. Pieces are plain data and tensors; nothing else is ever loaded from the files.

    Args:
        directory: of the pieces, made if it is not there; None keeps nothing.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        if directory is None:
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidArgumentError(f"{directory} cannot be made ({error}); name another directory.") from error

    def had(self, key: Sequence[Any], make: Callable[[], Made]) -> Made:
        """The piece of a key; made, stored under another name first and then renamed, if it is not there.

        A file that was cut short is made again.
        """
        if self._directory is None:
            return make()
        path = self._directory / f"{digest_of(*key)}.pt"
        if path.exists():
            try:
                found: Made = torch.load(path, weights_only=True)
                return found
            except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
                path.unlink()
        made = make()
        half = path.with_suffix(".part")
        torch.save(made, half)
        half.replace(path)
        return made
