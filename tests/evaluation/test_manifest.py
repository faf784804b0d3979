"""Test sets and transcripts in files: what is read, and what is refused with its line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.evaluation.manifest import check_disjoint, paired_texts, read_manifest, read_transcripts
from tests.shipped import clip


def written(path: Path, *rows: object) -> Path:
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", encoding="utf-8"
    )
    return path


def test_json_lines_and_columns_name_the_same_set(tmp_path: Path) -> None:
    rows = [{"audio": "a.wav", "text": "hello there"}, {"audio": "sub/b.wav", "text": "ja"}]
    from_json = read_manifest(written(tmp_path / "set.jsonl", *rows))
    from_columns = read_manifest(written(tmp_path / "set.tsv", "a.wav\thello there", "", "sub/b.wav\tja"))
    assert from_json == from_columns
    assert [recording.id for recording in from_json] == ["a.wav", "sub/b.wav"]
    assert from_json[1].audio == tmp_path / "sub" / "b.wav"


def test_names_of_other_tools_ids_speakers_and_silence(tmp_path: Path) -> None:
    path = written(
        tmp_path / "set.jsonl",
        {"audio_filepath": "a.wav", "text": "x", "id": "u1", "speaker": 7, "duration": 1.5},
        {"path": "/data/b.wav", "silence": True},
    )
    first, second = read_manifest(path)
    assert (first.id, first.speaker, first.is_silence) == ("u1", "7", False)
    assert (second.audio, second.is_silence) == (Path("/data/b.wav"), True)


BAD_MANIFESTS = {
    "line 2: the reference of b.wav is missing": ['{"audio": "a.wav", "text": "x"}', '{"audio": "b.wav"}'],
    "line 1: the reference of a.wav is empty": ['{"audio": "a.wav", "text": " "}'],
    "line 2: the reference of b.wav is empty": ["a.wav\tx", "b.wav\t"],
    "line 1: the reference of a.wav is missing": ["a.wav"],
    "no recording": ['{"text": "x"}'],
    "3 columns": ["a\tb\tc"],
    "marked as silence and has a reference": ['{"audio": "a.wav", "text": "x", "silence": true}'],
    "was there before": ["a.wav\tx", "a.wav\ty"],
    "is no JSON": ['{"audio": '],
    "must be a JSON object": ['{"audio": "a.wav", "text": "x"}', "3"],
    "holds no recordings": [""],
}


@pytest.mark.parametrize("words", BAD_MANIFESTS)
def test_bad_manifests_are_refused(tmp_path: Path, words: str) -> None:
    path = written(tmp_path / "set.txt", *BAD_MANIFESTS[words])
    with pytest.raises(InvalidArgumentError, match=r"set\.txt") as raised:
        read_manifest(path)
    assert words in str(raised.value)


def test_transcripts_by_id(tmp_path: Path) -> None:
    columns = written(tmp_path / "a.tsv", "u1\thello", "u2\t")
    lines = written(tmp_path / "a.jsonl", {"source": "u1", "text": "hello", "n_best": []}, {"id": "u2", "text": ""})
    assert read_transcripts(written(tmp_path / "n.jsonl", {"id": 7, "text": "x"}), may_be_empty=False) == {"7": "x"}
    assert read_transcripts(columns, may_be_empty=True) == read_transcripts(lines, may_be_empty=True)
    with pytest.raises(InvalidArgumentError, match="line 2: the reference of u2 is empty"):
        read_transcripts(columns, may_be_empty=False)
    for rows, words in (
        (["u1"], "has no 'text'"),
        (['{"text": "x"}'], "no id"),
        (["u\tx", "u\ty"], "was there before"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            read_transcripts(written(tmp_path / "bad", *rows), may_be_empty=True)
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        read_transcripts(tmp_path / "nowhere", may_be_empty=True)
    with pytest.raises(InvalidArgumentError, match="no transcripts"):
        read_transcripts(written(tmp_path / "empty", ""), may_be_empty=True)


def test_pairs_follow_the_references_and_strangers_are_refused() -> None:
    references = {"b": "x", "a": "y"}
    assert paired_texts(references, {"a": "1", "b": "2"}) == ["2", "1"]
    with pytest.raises(
        InvalidArgumentError, match=r"1 of 2 references have none \(a\), 1 of 2 have no reference \(c\)"
    ):
        paired_texts(references, {"b": "1", "c": "2"})


def test_sets_that_share_a_recording_are_refused_under_any_name(tmp_path: Path) -> None:
    shutil.copy(clip(0), tmp_path / "one.flac")
    shutil.copy(clip(0), tmp_path / "renamed.flac")
    shutil.copy(clip(1), tmp_path / "two.flac")
    test = read_manifest(written(tmp_path / "test.tsv", "one.flac\tx"))
    check_disjoint(read_manifest(written(tmp_path / "dev.tsv", "two.flac\tx")), test)
    for row in ("renamed.flac\tx", "./one.flac\tx", '{"audio": "two.flac", "text": "x", "id": "one.flac"}'):
        with pytest.raises(InvalidArgumentError, match="shares 1 of its 1 recordings"):
            check_disjoint(read_manifest(written(tmp_path / "dev.tsv", row)), test)
