"""Hypotheses kept on disk as they come, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from shallowfusion.config import require
from shallowfusion.decoder import FusionDecoder
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.evaluation.manifest import Recording
from shallowfusion.evaluation.nbest import ListedHypothesis, NBestList, list_of
from shallowfusion.options import DecodingOptions

__all__ = ["HypothesisStore", "TranscribedSet", "fingerprint_of", "transcribe_set"]

Progress = Callable[[Sequence[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class TranscribedSet:
    """What a system heard: n-best lists by id, and why the others failed."""

    lists: dict[str, NBestList]
    failed: dict[str, str]


class HypothesisStore:
    """One line per recording and system in a file, written and flushed at once; without a file in memory only.

    A line counts only for the same models, options and recording (by size and date), so a file may serve several
    runs. A last line that was cut is dropped.

    Raises:
        InvalidArgumentError: the file holds anything else, or cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._known: dict[tuple[str, str], NBestList] = {}
        self._file: TextIO | None = None
        if path is None:
            return
        try:
            if path.exists():
                self._read(path)
            self._file = path.open("a", encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgumentError(
                f"{path} cannot hold results ({error}); name a file that can be written."
            ) from error

    def __enter__(self) -> HypothesisStore:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def find(self, system: str, recording: Recording) -> NBestList | None:
        """What a system, named by its fingerprint, made of a recording, if it is known."""
        return self._known.get((system, _identity(recording)))

    def add(self, system: str, recording: Recording, found: NBestList) -> None:
        self._known[system, _identity(recording)] = found
        if self._file is not None:
            hypotheses = [asdict(hypothesis) for hypothesis in found.hypotheses]
            line = {"system": system, "recording": _identity(recording), "id": found.id, "hypotheses": hypotheses}
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.decode("utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                listed = tuple(ListedHypothesis(**hypothesis) for hypothesis in row["hypotheses"])
                self._known[row["system"], row["recording"]] = NBestList(row["id"], listed)
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidArgumentError(
                    f"{path}, line {number} is no stored hypothesis ({error}); name another file for the results."
                ) from error
        if len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))


def transcribe_set(
    decoder: FusionDecoder,
    recordings: Sequence[Recording],
    options: DecodingOptions,
    store: HypothesisStore,
    system: str,
    progress: Progress = lambda batches, _: batches,
    title: str = "",
) -> TranscribedSet:
    """Transcribe what the store does not hold yet; recordings that fail do not stop the others and are not stored.

    Args:
        system: fingerprint of models and options.
        progress: wraps the batches still to be done, for instance with a bar.
    """
    done = {recording.id: store.find(system, recording) for recording in recordings}
    todo = [recording for recording in recordings if done[recording.id] is None]
    batches = [todo[start : start + options.batch_size] for start in range(0, len(todo), options.batch_size)]
    failed: dict[str, str] = {}
    for batch in progress(batches, title):
        for recording, result in zip(batch, decoder.transcribe([r.audio for r in batch], options), strict=True):
            if result.error is not None:
                failed[recording.id] = str(result.error)
                continue
            found = list_of(result, recording.id)
            store.add(system, recording, found)
            done[recording.id] = found
    return TranscribedSet({id: found for id, found in done.items() if found is not None}, failed)


def fingerprint_of(models: Sequence[str], options: DecodingOptions, more: Mapping[str, str]) -> str:
    """Sixteen digits that change with the models (files by size and date), the options or anything in `more`."""
    parts = [repr(replace(options, batch_size=1)), repr(sorted(more.items()))]  # results do not depend on the batch
    for name in models:
        parts.append(name)
        directory = Path(name)
        if directory.is_dir():
            files = sorted(path for path in directory.iterdir() if path.is_file())
            parts += [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _identity(recording: Recording) -> str:
    require("\n" not in recording.id, f"an id must be one line, got {recording.id!r}.")
    if not recording.audio.is_file():
        return f"{recording.id} (no file)"
    status = recording.audio.stat()
    return f"{recording.id} {recording.audio.resolve()} {status.st_size} {status.st_mtime_ns}"
