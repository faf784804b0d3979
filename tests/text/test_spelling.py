"""What is complete in a transcript that is still being written, and how it is spelled for another tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shallowfusion.errors import VocabularyError
from shallowfusion.text.spelling import Retokenised, Said, SharedTokens
from shallowfusion.text.vocabulary import Vocabulary, vocabulary_of
from tests.delayed_world import tokenizer

SHARED_TOKENIZERS = Path(__file__).parents[2].parent / "shared" / "data" / "tokenizers"


class Letters:
    """Ids are code points; texts are kept."""

    def __init__(self, mark: str = "") -> None:
        self.mark, self.asked = mark, []

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        self.asked.append(text)
        return {"input_ids": [ord(letter) % 128 for letter in self.mark + text]}


LETTERS = Vocabulary(tuple(bytes([i]) for i in range(128)), end_id=0)


def said(text: str | bytes) -> Said:
    return Said((), text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("", []),
        (" ", []),
        (" the pat", [" the"]),
        (" the ", [" the"]),
        (" the  pat is ", [" the", " the  pat", " the  pat is"]),
        (" 医院 is", [" 医", " 医院"]),
        (" a医 ", [" a", " a医"]),
        (" ไทย", [" ไ", " ไท", " ไทย"]),
        (" don't go", [" don't"]),
    ],
)
def test_words_end_at_white_space_and_unspaced_scripts_at_every_character(text: str, units: list[str]) -> None:
    spelling = Retokenised(Letters(), LETTERS)
    assert spelling.complete(said(text)) == len(units)
    for count, unit in enumerate(units, start=1):
        assert spelling.reach(said(text), count) == len(unit.encode())
    assert spelling.reach(said(text), 0) == 0


def test_an_incomplete_character_is_not_there_yet() -> None:
    spelling = Retokenised(Letters(), LETTERS)
    whole = " 医院".encode()
    assert [spelling.complete(said(whole[:n])) for n in range(len(whole) + 1)] == [0, 0, 0, 0, 1, 1, 1, 2]
    assert spelling.whole(said(whole[:6])) == spelling.whole(said(whole[:4]))


def test_characters_as_units() -> None:
    spelling = Retokenised(Letters(), LETTERS, unit="characters")
    assert spelling.complete(said(" the p")) == 6
    assert spelling.reach(said(" the p"), 3) == 3


def test_a_text_is_tokenised_as_a_whole_with_one_leading_space_and_once() -> None:
    letters = Letters()
    spelling = Retokenised(letters, LETTERS, lower=True)
    letters.asked.clear()
    assert spelling.ids(said("  The PAT"), 1) == tuple(map(ord, " the"))
    assert spelling.ids(said(" The patient"), 1) == tuple(map(ord, " the"))
    assert spelling.whole(said(" The pat ")) == tuple(map(ord, " the pat"))
    assert letters.asked == [" the", " the pat"]
    assert spelling.whole(said("  ")) == spelling.ids(said("x"), 0) == ()
    assert Retokenised(letters, LETTERS, normalise=lambda text: text[::-1]).whole(said("ab")) == tuple(map(ord, " ba"))


def test_no_space_is_added_for_tokenizers_that_add_one_themselves() -> None:
    assert Retokenised(Letters(), LETTERS).prefix == " "
    assert Retokenised(Letters(" "), LETTERS).prefix == ""
    assert Retokenised(Letters(), LETTERS, prefix="\n").ids(said("a b"), 1) == (10, 97)


def test_special_tokens_in_a_text_are_plain_text() -> None:
    own = tokenizer()
    spelling = Retokenised(own, vocabulary_of(own, len(own), own.eos_token_id))
    ids = spelling.whole(said("a <|endoftext|> b"))
    assert own.eos_token_id not in ids
    assert own.decode(ids) == " a <|endoftext|> b"


def test_shared_tokens_are_complete_at_once() -> None:
    spelling = SharedTokens([4, -1, 6], [b"ab", None, b" c"])
    text = Said((0, 1, 2, 2), b"ab c c")
    assert spelling.complete(text) == 4
    assert spelling.ids(text, 3) == (4, 6)
    assert spelling.whole(text) == (4, 6, 6)
    assert [spelling.reach(text, units) for units in range(5)] == [0, 2, 2, 4, 6]
    assert text.and_then(1, None) == Said((0, 1, 2, 2, 1), b"ab c c")


def test_a_model_without_tokenizer_is_refused() -> None:
    with pytest.raises(VocabularyError, match="load it with load_causal_lm"):
        Retokenised(None, LETTERS)


def test_multilingual_whisper_pieces_are_spelled_for_gpt2() -> None:
    if not (SHARED_TOKENIZERS / "gpt2").is_dir():
        pytest.skip("the published tokenizers are not here")
    from transformers import GPT2Tokenizer

    folders = [SHARED_TOKENIZERS / name for name in ("gpt2", "whisper-large-v3")]
    gpt2, whisper = (GPT2Tokenizer(str(f / "vocab.json"), str(f / "merges.txt")) for f in folders)
    heard, read = (vocabulary_of(own, len(own.get_vocab()), 50256, 50256) for own in (whisper, gpt2))
    spelling = Retokenised(gpt2, read)
    sentence = " the patient's père has naïve expectations of 12,345 医院 and so on"
    now, before = Said((), b""), ()
    for token in whisper.encode(sentence, add_special_tokens=False):
        now = now.and_then(token, heard.tokens[token])
        units = spelling.complete(now)
        ids = spelling.ids(now, units)
        complete = now.text.decode("utf-8", "ignore").encode()[: spelling.reach(now, units)].decode()
        assert list(ids) == gpt2.encode(complete, add_special_tokens=False)
        assert len(ids) >= len(before)
        before = ids
    assert now.text.decode() == sentence
    assert list(spelling.whole(now)) == gpt2.encode(sentence, add_special_tokens=False)


class Lossy(Letters):
    """Knows small letters alone, as the tokenizers of uncased models do; others are lowered or unknown."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) if letter.islower() or letter == " " else 0 for letter in text.lower()]}


def test_a_tokenizer_that_does_not_keep_its_text_is_refused() -> None:
    vocabulary = Vocabulary((None, *LETTERS.tokens[1:]), end_id=0, name="uncased")
    Retokenised(Letters(), LETTERS).check("Any text, 100 %.")
    Retokenised(Lossy(), vocabulary).check("small letters")
    Retokenised(Lossy(), vocabulary, lower=True).check("Large Letters")
    with pytest.raises(VocabularyError, match=r"cannot write 3 of the 11 ASCII .*'L'.*lower=True"):
        Retokenised(Lossy(), vocabulary).check("Letters Lost in 1 go: no")
    with pytest.raises(VocabularyError, match="such as '1'"):
        Retokenised(Lossy(), vocabulary, lower=True).check("go 1")
