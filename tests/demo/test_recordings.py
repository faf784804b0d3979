"""AN4's split, known in one place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shallowfusion.demo.recordings import an4_recordings
from shallowfusion.errors import AudioError, InvalidArgumentError

SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"


def made_data(tmp_path: Path) -> Path:
    rows = [
        {"path": f"audio/an4/train/{number}-s{number:02d}.flac", "speaker": f"s{number:02d}", "text": f"Word {number}"}
        for number in range(21)
    ]
    rows += [
        {"path": "audio/an4/test/a.flac", "speaker": "t", "text": "go"},
        {"path": "audio/misc/b.flac", "text": "no"},
    ]
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


def test_every_tenth_speaker_of_the_training_set_is_held_out(tmp_path: Path) -> None:
    data = made_data(tmp_path)
    assert [text for _, text in an4_recordings(data, "dev")] == ["Word 0", "Word 10", "Word 20"]
    assert len(an4_recordings(data, "train")) == 18
    assert an4_recordings(data, "test") == [(data / "audio/an4/test/a.flac", "go")]


def test_unknown_parts_and_missing_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="is missing"):
        an4_recordings(tmp_path, "test")
    with pytest.raises(InvalidArgumentError, match="no part 'eval'"):
        an4_recordings(made_data(tmp_path), "eval")


def test_the_published_recordings_are_parted_as_they_always_were() -> None:
    if not (SHARED_DATA / "audio" / "manifest.jsonl").exists():
        pytest.skip("the public recordings are not beside this checkout")
    parts = {part: an4_recordings(SHARED_DATA, part) for part in ("train", "dev", "test")}
    assert {part: len(pairs) for part, pairs in parts.items()} == {"train": 708, "dev": 85, "test": 65}
    assert sum(len(text.split()) for _, text in parts["dev"]) == 453
    speakers = {part: {path.stem.split("-")[1] for path, _ in pairs} for part, pairs in parts.items()}
    assert not speakers["train"] & speakers["dev"]
    assert not (speakers["train"] | speakers["dev"]) & speakers["test"]
