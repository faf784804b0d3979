"""Test sets and transcripts in files: JSON lines or tab-separated, refused where they could mislead."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shallowfusion.config import require
from shallowfusion.errors import InvalidArgumentError

__all__ = ["Recording", "check_disjoint", "paired_texts", "read_manifest", "read_transcripts"]

_AUDIO_NAMES = ("audio", "audio_filepath", "path")
_ID_NAMES = ("id", "utt", "source", *_AUDIO_NAMES)
_TEXT_NAMES = ("text", "reference", "ref")


@dataclass(frozen=True)
class Recording:
    """One utterance of a test set.

    Args:
        id: as the manifest names it, else the path as written there.
        audio: the file; relative paths start from the manifest's directory.
        text: what is said; "" for a recording marked as silence.
        speaker: for resampling whole speakers, if known.
    """

    id: str
    audio: Path
    text: str
    speaker: str | None = None

    @property
    def is_silence(self) -> bool:
        return not self.text


def read_manifest(path: Path) -> list[Recording]:
    """Read a test set.

    JSON lines hold {"audio", "text"} and, if wanted, "id", "speaker" and "silence": true in place of a text; names
    that other tools use for audio and text are known. Any other file holds audio<TAB>text.

    Raises:
        InvalidArgumentError: no such file, no rows, a row without audio or reference, an id twice.
    """
    recordings: list[Recording] = []
    known: set[str] = set()
    for where, row in _rows(path, ("audio", "text")):
        audio = _named(row, _AUDIO_NAMES)
        require(audio is not None, f"{where}: no recording, wanted 'audio'; got {', '.join(row)}.")
        text = _named(row, _TEXT_NAMES)
        is_silence = row.get("silence") is True
        require(
            is_silence or bool(text and text.strip()),
            f"{where}: the reference of {audio} is {'missing' if text is None else 'empty'}; "
            'transcribe it, take it out, or mark a recording without speech with "silence": true.',
        )
        require(
            not (is_silence and text and text.strip()), f"{where}: {audio} is marked as silence and has a reference."
        )
        id = _named(row, ("id", "utt")) or str(audio)
        require(id not in known, f"{where}: the id {id!r} was there before; give every recording its own.")
        known.add(id)
        speaker = row.get("speaker")
        words = "" if is_silence else str(text)
        recordings.append(Recording(id, path.parent / str(audio), words, None if speaker is None else str(speaker)))
    require(bool(recordings), f"{path} holds no recordings.")
    return recordings


def read_transcripts(path: Path, may_be_empty: bool) -> dict[str, str]:
    """Texts by id: JSON lines {"id", "text"} (the output of `transcribe --json` too), else lines id<TAB>text.

    Args:
        may_be_empty: hypotheses may hold no words, references may not.

    Raises:
        InvalidArgumentError: no such file, no rows, a row without id or text, an id twice, an empty reference.
    """
    texts: dict[str, str] = {}
    for where, row in _rows(path, ("id", "text")):
        id, text = _named(row, _ID_NAMES), _named(row, _TEXT_NAMES)
        require(id is not None, f"{where}: no id, wanted 'id'; got {', '.join(row)}.")
        require(text is not None, f"{where}: {id} has no 'text'.")
        require(may_be_empty or bool(str(text).strip()), f"{where}: the reference of {id} is empty; take it out.")
        require(id not in texts, f"{where}: the id {id!r} was there before.")
        texts[str(id)] = str(text)
    require(bool(texts), f"{path} holds no transcripts.")
    return texts


def paired_texts(references: Mapping[str, str], hypotheses: Mapping[str, str], name: str = "hypotheses") -> list[str]:
    """Hypotheses in the order of the references.

    Raises:
        InvalidArgumentError: ids that only one side has.
    """
    missing = [id for id in references if id not in hypotheses]
    extra = [id for id in hypotheses if id not in references]
    require(
        not missing and not extra,
        f"references and {name} do not pair: {len(missing)} of {len(references)} references have none"
        f"{_first(missing)}, {len(extra)} of {len(hypotheses)} have no reference{_first(extra)}; give both equal ids.",
    )
    return [hypotheses[id] for id in references]


def check_disjoint(dev: Sequence[Recording], test: Sequence[Recording]) -> None:
    """Refuse a development set that shares recordings with the test set: same id, same file or same bytes.

    Raises:
        InvalidArgumentError: it does.
    """
    own = {identity for recording in test for identity in _identities(recording)}
    shared = [recording.id for recording in dev if own & _identities(recording)]
    require(
        not shared,
        f"the development set shares {len(shared)} of its {len(dev)} recordings with the test set{_first(shared)}; "
        "weights chosen on test recordings prove nothing, take them out of one of the two.",
    )


def _identities(recording: Recording) -> set[str]:
    found = {f"id {recording.id}", f"file {recording.audio.resolve()}"}
    if recording.audio.is_file():
        found.add(f"bytes {hashlib.sha256(recording.audio.read_bytes()).hexdigest()}")
    return found


def _rows(path: Path, columns: tuple[str, str]) -> list[tuple[str, dict[str, Any]]]:
    """Rows with their place in the file, from JSON lines if the first begins with a brace, else from two columns."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(
            f"{path} cannot be read ({error}); wanted JSON lines or lines of two columns."
        ) from error
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    is_json = bool(filled) and filled[0][1].lstrip().startswith("{")
    rows = []
    for number, line in filled:
        where = f"{path}, line {number}"
        if is_json:
            rows.append((where, _object(line, where)))
            continue
        cells = line.split("\t")
        require(
            len(cells) <= 2, f"{where}: {len(cells)} columns, wanted {columns[0]}<TAB>{columns[1]}; or use JSON lines."
        )
        rows.append((where, dict(zip(columns, (cell.strip() for cell in cells), strict=False))))
    return rows


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{where} is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise InvalidArgumentError(f"{where} must be a JSON object, got {type(found).__name__}.")
    return found


def _named(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first text under one of the names; a whole number, as some tools write ids, becomes text."""
    found = (row.get(name) for name in names)
    return next((str(value) for value in found if isinstance(value, (str, int)) and not isinstance(value, bool)), None)


def _first(ids: Sequence[str]) -> str:
    return f" ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})" if ids else ""
