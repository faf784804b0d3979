"""Normalisation and choice of sentences."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from shallowfusion.demo.corpus import (
    ACOUSTIC_SOURCES,
    EVALUATION_SOURCES,
    MEDICAL_SOURCES,
    choose_unseen,
    normalise,
    read_sentences,
    spell_number,
)
from shallowfusion.errors import InvalidArgumentError


@pytest.mark.parametrize(
    ("number", "words"),
    [
        ("0", "zero"),
        ("13", "thirteen"),
        ("40", "forty"),
        ("99", "ninety nine"),
        ("100", "one hundred"),
        ("1,205", "one thousand two hundred five"),
        ("999999", "nine hundred ninety nine thousand nine hundred ninety nine"),
        ("2.05", "two point zero five"),
    ],
)
def test_numbers_are_spelled(number: str, words: str) -> None:
    assert spell_number(number) == words


def test_numbers_above_the_limit_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="999999"):
        spell_number("1000000")


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("The patient\u2019s B. P. is 120/80 \u2013 fine!", "the patient's b p is one hundred twenty eighty fine"),
        ("Sj\u00f6gren's 'dry-eye' syndrome", "sjogren's dry eye syndrome"),
        ("about 5% better", "about five percent better"),
        ("...", None),
        ("", None),
        ("TP53 mutations", None),
        ("TNF-\u03b1 level", None),
        ("9999999 cells", None),
    ],
)
def test_normalise(raw: str, text: str | None) -> None:
    assert normalise(raw) == text


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    lines = {
        source: ["No one has seen this short line here. It ends."] for source in (*ACOUSTIC_SOURCES, *MEDICAL_SOURCES)
    }
    for number, source in enumerate(EVALUATION_SOURCES):
        word = ("first", "second", "third")[number]
        lines[source] = [
            "No one has seen this short line here.",
            f"The {word} source has words that nobody trained on.",
            "This one holds 3 digits and is not chosen at all.",
            "HIV is an abbreviation and is not chosen either.",
            "Too short.",
        ]
    for source, content in lines.items():
        with gzip.open(tmp_path / "text" / f"{source}.txt.gz", "wt", encoding="utf-8") as stream:
            stream.write("\n".join(content))
    return tmp_path


def test_chosen_sentences_occur_in_no_training_text(data: Path) -> None:
    chosen = choose_unseen(data, 3, seed=1)
    assert [sentence.source for sentence in chosen] == list(EVALUATION_SOURCES)
    assert all("nobody trained on" in sentence.text for sentence in chosen)
    assert chosen == choose_unseen(data, 3, seed=1)
    with pytest.raises(InvalidArgumentError, match="only 3"):
        choose_unseen(data, 4, seed=1)


def test_long_lines_are_parted_and_abbreviations_dropped(data: Path) -> None:
    sentences = read_sentences(data, ("med_medquad_test",), speakable=True, min_words=2, max_words=9)
    texts = [sentence.text for sentence in sentences]
    assert "hiv is an abbreviation and is not chosen either" not in texts
    assert "too short" in texts
    parted = read_sentences(data, ("med_medquad_train",), speakable=True, min_words=2, max_words=8)
    assert [sentence.text for sentence in parted] == ["no one has seen this short line here", "it ends"]


def test_missing_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="--data"):
        read_sentences(tmp_path, ("gen_gutenberg_train",), speakable=False)
