"""Stored hypotheses: nothing is decoded twice, nothing is lost, nothing stale is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from shallowfusion.errors import AudioError, InvalidArgumentError
from shallowfusion.evaluation.manifest import Recording
from shallowfusion.evaluation.stored import HypothesisStore, fingerprint_of, transcribe_set
from shallowfusion.options import DecodingOptions
from shallowfusion.results import Transcription
from shallowfusion.values import Hypothesis

OPTIONS = DecodingOptions(batch_size=2)


class FakeDecoder:
    """Hears the name of the file; can be interrupted after some batches; fails on files named bad."""

    def __init__(self, batches: int = 100) -> None:
        self.batches = batches
        self.heard: list[str] = []

    def transcribe(self, paths: Sequence[Path], options: DecodingOptions) -> list[Transcription]:
        if self.batches == 0:
            raise KeyboardInterrupt
        self.batches -= 1
        self.heard += [path.stem for path in paths]
        return [self._one(path) for path in paths]

    def _one(self, path: Path) -> Transcription:
        if path.stem == "bad":
            return Transcription(str(path), error=AudioError(f"{path.name} is no recording."))
        best = Hypothesis(path.stem, (1,), (), -1.0, -0.5, {"asr": -1.0, "lm": -2.0})
        return Transcription(str(path), (best, Hypothesis("other", (2,), (), -3.0, -1.5, {"asr": -3.0, "lm": -1.0})))


def recordings(directory: Path, *names: str) -> list[Recording]:
    for name in names:
        (directory / f"{name}.wav").write_bytes(b"x")
    return [Recording(name, directory / f"{name}.wav", "words") for name in names]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path, own = tmp_path / "results.jsonl", recordings(tmp_path, "a", "b", "c", "d", "e")
    with pytest.raises(KeyboardInterrupt), HypothesisStore(path) as store:
        transcribe_set(FakeDecoder(batches=1), own, OPTIONS, store, "s")  # type: ignore[arg-type]
    with path.open("a") as file:
        file.write('{"system": "s", "recording": "cut')  # as a crash leaves it
    second = FakeDecoder()
    with HypothesisStore(path) as store:
        found = transcribe_set(second, own, OPTIONS, store, "s")  # type: ignore[arg-type]
    assert second.heard == ["c", "d", "e"]
    assert [entry.first.text for entry in found.lists.values()] == ["a", "b", "c", "d", "e"]
    assert found.lists["a"].hypotheses[1].parts == {"asr": -3.0, "lm": -1.0}
    with HypothesisStore(path) as store:
        again = transcribe_set(FakeDecoder(0), own, OPTIONS, store, "s")  # type: ignore[arg-type]
    assert again == found


def test_failures_stop_nobody_and_are_tried_again(tmp_path: Path) -> None:
    path, own = tmp_path / "results.jsonl", recordings(tmp_path, "a", "bad", "c")
    for expected in (["a", "bad", "c"], ["bad"]):
        decoder = FakeDecoder()
        with HypothesisStore(path) as store:
            found = transcribe_set(decoder, own, OPTIONS, store, "s")  # type: ignore[arg-type]
        assert decoder.heard == expected
        assert list(found.lists) == ["a", "c"]
        assert found.failed == {"bad": "bad.wav is no recording."}


def test_another_system_or_a_changed_recording_is_decoded_anew(tmp_path: Path) -> None:
    path, own = tmp_path / "results.jsonl", recordings(tmp_path, "a", "b")
    with HypothesisStore(path) as store:
        transcribe_set(FakeDecoder(), own, OPTIONS, store, "s")  # type: ignore[arg-type]
        (tmp_path / "b.wav").write_bytes(b"longer")
        decoder = FakeDecoder()
        transcribe_set(decoder, own, OPTIONS, store, "s")  # type: ignore[arg-type]
        assert decoder.heard == ["b"]
        transcribe_set(decoder, own, OPTIONS, store, "t")  # type: ignore[arg-type]
        assert decoder.heard == ["b", "a", "b"]


def test_without_a_file_hypotheses_are_kept_in_memory(tmp_path: Path) -> None:
    own = recordings(tmp_path, "a")
    with HypothesisStore(None) as store:
        transcribe_set(FakeDecoder(), own, OPTIONS, store, "s")  # type: ignore[arg-type]
        assert transcribe_set(FakeDecoder(0), own, OPTIONS, store, "s").lists["a"].first.text == "a"  # type: ignore[arg-type]


def test_a_fingerprint_changes_with_models_and_options_but_not_with_the_batch(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = fingerprint_of([str(tmp_path)], OPTIONS, {})
    assert first == fingerprint_of([str(tmp_path)], DecodingOptions(batch_size=7), {})
    assert first != fingerprint_of([str(tmp_path)], DecodingOptions(beam_size=2), {})
    assert first != fingerprint_of([str(tmp_path)], OPTIONS, {"dtype": "float16"})
    assert first != fingerprint_of([str(tmp_path), "gpt2"], OPTIONS, {})
    (tmp_path / "model.safetensors").write_bytes(b"12")
    assert first != fingerprint_of([str(tmp_path)], OPTIONS, {})


def test_a_file_of_anything_else_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes\n")
    with pytest.raises(InvalidArgumentError, match="line 1 is no stored hypothesis"):
        HypothesisStore(path)
    assert path.read_text() == "my notes\n"
    with pytest.raises(InvalidArgumentError, match="cannot hold results"):
        HypothesisStore(tmp_path / "nowhere" / "results.jsonl")
