"""Normalisers: what they make equal, and what they must not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.evaluation.normalisation import NORMALISERS, normaliser


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("twenty-five milligrams", "25 mg"),
        ("3.5cm", "three point five centimeters"),
        ("Café-au-lait", "cafe au lait"),
        ("T2/T3", "t2 t3"),
        ("1,200 patients", "twelve hundred patients"),
        ("five percent", "5%"),
        ("It’s here.", "it's here"),
    ],
)
def test_the_article_rules_make_these_equal(said: str, written: str) -> None:
    normalise = normaliser("article")
    assert normalise(said) == normalise(written)


def test_units_are_abbreviated_behind_numbers_alone() -> None:
    normalise = normaliser("article")
    assert normalise("gray matter in the second hour") == "gray matter in the 2nd hour"
    assert normalise("2 hours") == "2 h"


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("Dr. Smith isn't here, um.", "doctor smith is not here"),
        ("twenty five dollars", "$25"),
        ("I can't", "i can not"),
    ],
)
def test_the_english_rules_make_these_equal(said: str, written: str) -> None:
    normalise = normaliser("english", {})
    assert normalise(said) == normalise(written)


def test_spellings_come_from_a_mapping_or_a_file_and_the_version_says_so(tmp_path: Path) -> None:
    table = {"colour": "color"}
    path = tmp_path / "normalizer.json"
    path.write_text(json.dumps(table))
    for given_table in (table, path):
        found = normaliser("english", given_table)
        assert found("Colour") == "color"
        assert "spelling table of 1 words" in found.version
    assert normaliser("english", {})("Colour") == "colour"


def test_english_equals_openai_whisper() -> None:
    theirs = pytest.importorskip("whisper.normalizers").EnglishTextNormalizer()
    ours = normaliser("english")
    for text in ("Mr. Brown's colour TV costs £1,200.50!", "uh, twenty-one (laughs) o'clock", "the 3rd of May, 1995"):
        assert ours(text) == " ".join(theirs(text).split())


@given(st.text(max_size=40))
@pytest.mark.parametrize("name", ["none", "basic"])
def test_once_is_enough(name: str, text: str) -> None:
    normalise = normaliser(name)
    once = normalise(text)
    assert normalise(once) == once


@pytest.mark.parametrize("name", ["none", "basic"])
def test_once_is_enough_for_every_character_there_is(name: str) -> None:
    normalise = normaliser(name)
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    once = [normalise(f"a{character}b") for character in characters]
    assert [normalise(text) for text in once] == once


@pytest.mark.parametrize("name", NORMALISERS)
def test_empty_stays_empty(name: str) -> None:
    assert normaliser(name)(" ") == ""


@pytest.mark.parametrize("content", ["[]", "{", '{"a": 1}'])
def test_bad_tables_and_names_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(InvalidArgumentError, match=r"table\.json"):
        normaliser("english", path)
    with pytest.raises(InvalidArgumentError, match="must be one of"):
        normaliser("klingon")
