"""Spelling tokens in the labels of a CTC model: case, accents, spaces, split characters, pieces, what has no label."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from shallowfusion.ctc.label_spelling import (
    FRESH,
    UNSAYABLE,
    LabelSpelling,
    LetterSpelling,
    PieceSpelling,
    TokenSpelling,
)
from shallowfusion.ctc.settings import CtcAlphabet
from shallowfusion.errors import InvalidArgumentError, VocabularyError
from shallowfusion.text.vocabulary import Vocabulary
from tests.ctc.tiny_models import PIECES, save_tiny_model

UPPER = ("<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ")
SILENCED = (1, 2, 3)
WORDS = CtcAlphabet(UPPER, 0, 4)
END = 0


def vocabulary(*texts: str | bytes | None) -> Vocabulary:
    """Token 0 ends."""
    own = [text.encode() if isinstance(text, str) else text for text in texts]
    return Vocabulary((None, *own), END, None, "toy")


def written_labels(spelling: LabelSpelling, tokens: Any) -> list[int]:
    found, state = [], FRESH
    for token in tokens:
        labels, state = spelling.spell(state, token)
        found += labels
    return [*found, *spelling.ahead(state)]


def letters(alphabet: CtcAlphabet, labels: list[int]) -> str:
    """As the prefix scores count them: delimiters only between words."""
    text = "".join("?" if label == UNSAYABLE else alphabet.labels[label] for label in labels)
    return "|".join(filter(None, text.split("|"))) if alphabet.delimiter is not None else text


def spelled(text: str, **options: Any) -> str:
    spelling = LetterSpelling(vocabulary("e", text), WORDS, SILENCED, **options)
    return letters(WORDS, written_labels(spelling, [2]))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Hello", "HELLO"),
        (" hello, world.", "HELLO|WORLD"),
        ("well-known \u2013 x", "WELL|KNOWN|X"),
        ("caf\u00e9 na\u00efve", "CAFE|NAIVE"),
        ("cafe\u0301", "CAFE"),
        ("it\u2019s it's", "IT'S|IT'S"),
        ("\ufb01t stra\u00dfe", "FIT|STRASSE"),
        ("a | b", "A|B"),
        ("<unk>", "UNK"),
        ("in 1998 we", "IN|WE"),
        ("a\n\t b  ", "A|B"),
        ("...", ""),
        ("\u4f60 a", "A"),
    ],
)
def test_text_is_written_in_the_alphabet(text: str, wanted: str) -> None:
    assert spelled(text) == wanted


def test_letters_and_digits_without_a_label_may_be_forbidden() -> None:
    assert spelled("in 1998", without_label="forbid") == "?"
    assert spelled("\u4f60", without_label="forbid") == "?"
    assert spelled("so, what?", without_label="forbid") == "SO|WHAT"
    with pytest.raises(InvalidArgumentError, match="without_label"):
        spelled("a", without_label="floor")


def test_an_alphabet_with_both_cases_keeps_them() -> None:
    alphabet = CtcAlphabet(("", " ", *"aAbB."), 0, 1)
    spelling = LetterSpelling(vocabulary("a", " A.", "b,B"), alphabet)
    assert letters(alphabet, written_labels(spelling, [1, 2, 3])) == "a A.bB"


def test_without_a_delimiter_a_space_is_a_label_or_nothing() -> None:
    with_space, without = CtcAlphabet(("", " ", "a"), 0), CtcAlphabet(("", "a"), 0)
    for alphabet, wanted in ((with_space, " a a "), (without, "aa")):
        spelling = LetterSpelling(vocabulary(" a", " "), alphabet)
        assert letters(alphabet, written_labels(spelling, [1, 1, 2])) == wanted


def test_a_delimiter_is_said_at_once_and_once_in_a_token() -> None:
    spelling = LetterSpelling(vocabulary("a ", " ", "-", "b", " - b"), WORDS, SILENCED)
    assert spelling.spell(FRESH, 1)[0] == (7, 4)
    assert spelling.spell(FRESH, 5)[0] == (4, UPPER.index("B"))
    assert letters(WORDS, written_labels(spelling, [1, 2, 3, 2])) == "A"
    assert letters(WORDS, written_labels(spelling, [1, 2, 3, 4])) == "A|B"


def test_characters_may_be_split_between_tokens() -> None:
    first, second = "\u00e9".encode()[:1], "\u00e9".encode()[1:]
    spelling = LetterSpelling(vocabulary(b"a" + first, second + b"t", b"t", b"\xff"), WORDS, SILENCED)
    assert letters(WORDS, written_labels(spelling, [1, 2])) == "AET"
    assert letters(WORDS, written_labels(spelling, [1, 3])) == "AT"
    assert letters(WORDS, written_labels(spelling, [4, 3])) == "T"
    assert letters(WORDS, written_labels(spelling, [1])) == "A"


@given(st.text(alphabet="aB \u00e9-1,'\u00df\u4f60\u2019", max_size=12), st.data())
def test_how_a_text_is_cut_into_tokens_does_not_matter(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=6)) | {0, len(raw)})
    parts = [raw[start:end] for start, end in itertools.pairwise(cuts)]
    whole = LetterSpelling(vocabulary("e", raw), WORDS, SILENCED)
    cut = LetterSpelling(vocabulary("e", *parts), WORDS, SILENCED)
    assert letters(WORDS, written_labels(cut, range(2, 2 + len(parts)))) == letters(WORDS, written_labels(whole, [2]))


def test_pieces_are_those_of_the_tokenizer_once_a_word_is_complete(tmp_path: Path) -> None:
    save_tiny_model("parakeet_ctc", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    alphabet = CtcAlphabet((*PIECES, "<blank>"), len(PIECES), None, "\u2581")
    spelling = PieceSpelling(vocabulary(" Th", "e", " cat", "s,", " 9"), alphabet, tokenizer, (0,))
    state, found = FRESH, []
    for token in (1, 2, 3, 4, 5):
        labels, state = spelling.spell(state, token)
        found.append([alphabet.labels[label] for label in labels])
    assert found == [[], [], ["\u2581the"], [], ["\u2581cat", "s"]]
    assert spelling.ahead(state) == ()
    strict = PieceSpelling(vocabulary(" the9", " the"), alphabet, tokenizer, (0,), "forbid")
    assert strict.spell(FRESH, 1)[0] == (UNSAYABLE,)
    assert strict.ahead(strict.spell(FRESH, 2)[1]) == (1,)
    with pytest.raises(VocabularyError, match="tokenizer"):
        PieceSpelling(vocabulary("a"), alphabet, None)


def test_tokens_that_are_labels_add_themselves() -> None:
    spelling = TokenSpelling([3, UNSAYABLE, -2, 1])
    assert [spelling.spell(FRESH, token)[0] for token in range(4)] == [(3,), (UNSAYABLE,), (), (1,)]


def test_labels_that_spell_nothing_are_refused() -> None:
    with pytest.raises(VocabularyError, match="same language"):
        LetterSpelling(vocabulary("\u0430", "\u0431"), WORDS, SILENCED)
    with pytest.raises(VocabularyError, match="neither characters nor pieces"):
        LetterSpelling(vocabulary("a"), CtcAlphabet(("", "th", "sh", "a"), 0))
