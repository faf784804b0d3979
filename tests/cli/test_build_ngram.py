"""`shallowfusion build-ngram` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from shallowfusion.cli.main import main
from shallowfusion.ngrams.arpa import read_arpa
from shallowfusion.ngrams.table import NgramTable
from tests.shipped import ASR

TEXT = "The cat sat on the mat.\nthe dog sat\n\nA cat sat on a dog.\n" * 3


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main(["build-ngram", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_words_to_a_file_and_a_summary(capsys, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "lm.arpa.gz"
    code, shown, _ = run(
        capsys, text, "--order", 2, "--out", out, "--lower", "--held-out", text, "--vocab", 4, "--json"
    )
    assert code == 0
    summary = json.loads(shown)
    model = read_arpa(out)
    assert summary["ngrams"] == [len(ngrams) for ngrams in model.orders]
    assert model.words == ("<unk>", "<s>", "</s>", "sat", "the", "a", "cat")
    assert (summary["sentences"], summary["words"]) == (9, 45)
    assert summary["unknown_words"] == summary["held_out"]["unknown_words"] > 0
    assert 1 < summary["held_out"]["perplexity"] < 7
    assert len(summary["notes"]) == 2


def test_plain_words_are_told_on_standard_output(capsys, tmp_path: Path, text: Path) -> None:
    code, shown, _ = run(capsys, text, text, "--out", tmp_path / "lm.arpa", "--prune", 0, 0, 6, "--held-out", text)
    assert code == 0
    assert "3-grams from 90 words in 18 sentences" in shown
    assert "held-out perplexity" in shown
    assert len(read_arpa(tmp_path / "lm.arpa").orders[2]) < len(set(TEXT.split())) * 2


@pytest.mark.parametrize("units", [["characters", "--leading-space"], ["tokens", ASR]])
def test_pieces_start_with_a_space_and_sum_to_one(capsys, tmp_path: Path, text: Path, units: list[str]) -> None:
    code, _, _ = run(capsys, text, "--units", *units, "--order", 4, "--lower", "--out", tmp_path / "lm.arpa")
    assert code == 0
    table = NgramTable.from_arpa(tmp_path / "lm.arpa")
    space = table.model.id_of("<space>" if units[0] == "characters" else "Ġ")
    probs = np.exp(table.dense([table.start_state, table.null_state]).astype(float))
    probs[:, table.model.begin_word] = 0
    np.testing.assert_allclose(probs.sum(axis=1), 1.0, atol=1e-6)
    assert probs[0, space] > 0.8


BAD = {
    "cannot be read as text": ["nowhere.txt", "--out", "lm.arpa"],
    "order must be at least 1": ["TEXT", "--out", "lm.arpa", "--order", "0"],
    "must end in .arpa": ["TEXT", "--out", "lm.bin"],
    "no words": ["EMPTY", "--out", "lm.arpa"],
    "--units must be": ["TEXT", "--out", "lm.arpa", "--units", "syllables"],
    "cannot be loaded as a tokenizer": ["TEXT", "--out", "lm.arpa", "--units", "tokens", "./nowhere"],
    "prune must be": ["TEXT", "--out", "lm.arpa", "--prune", "1"],
    "vocab_limit must be": ["TEXT", "--out", "lm.arpa", "--vocab", "0"],
    "--leading-space is for": ["TEXT", "--out", "lm.arpa", "--leading-space"],
    "cannot be written": ["TEXT", "--out", "nowhere/lm.arpa"],
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, tmp_path: Path, text: Path, words: str) -> None:
    (tmp_path / "empty.txt").write_text("\n  \n")
    places = {"TEXT": text, "EMPTY": tmp_path / "empty.txt", "lm.arpa": tmp_path / "lm.arpa"}
    code, out, err = run(capsys, *(places.get(argument, argument) for argument in BAD[words]))
    assert code == 2
    assert out == ""
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "lm.arpa").exists()
