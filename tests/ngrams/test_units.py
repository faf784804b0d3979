from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from shallowfusion.errors import InvalidArgumentError, ModelError
from shallowfusion.ngrams import units
from shallowfusion.ngrams.pieces import piece_bytes, spell_piece
from tests.shipped import ASR


def test_words_and_characters() -> None:
    lines = ["the  cat\n", "\n", "ça va\t!\n"]
    assert list(units.words().split(lines)) == [["the", "cat"], [], ["ça", "va", "!"]]
    assert next(units.characters().split(lines)) == ["t", "h", "e", "<space>", "c", "a", "t"]
    assert list(units.characters(leading_space=True).split(lines))[1:] == [
        [],
        ["<space>", "ç", "a", "<space>", "v", "a", "<space>", "!"],
    ]


def test_tokens_are_the_pieces_of_a_tokenizer() -> None:
    found = units.tokens(ASR)
    assert list(found.split(["the cat", "", "it's"])) == [["Ġ", *"the", "Ġ", *"cat"], [], ["Ġ", *"it's"]]
    assert list(units.tokens(ASR, leading_space=False).split(["a"])) == [["a"]]
    assert found.vocabulary == ("Ġ", *"abcdefghijklmnopqrstuvwxyz'")
    with pytest.raises(ModelError, match="nowhere"):
        units.tokens("./nowhere")


def test_every_byte_can_be_spelled_and_read_back() -> None:
    pieces = [bytes([byte]) for byte in range(256)] + [b" the", "é".encode(), "日".encode()[:2]]
    spelled = [spell_piece(piece) for piece in pieces]
    assert all(word.encode().split() == [word.encode()] for word in spelled)
    assert len(set(spelled)) == len(spelled)
    assert piece_bytes(spelled) == pieces


def test_plain_spellings_are_told_by_their_space() -> None:
    assert piece_bytes(["<space>", "é", "a"]) == [b" ", "é".encode(), b"a"]
    assert piece_bytes(["\u2581the", "é", "<0x0A>"]) == [b" the", "é".encode(), b"\n"]
    assert piece_bytes(["Ġthe", "Ã©"]) == [b" the", "é".encode()]


def test_lines_of_plain_and_packed_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Ab\nc", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(gzip.compress("É\n".encode()))
    assert list(units.read_lines([tmp_path / "a.txt", tmp_path / "b.txt"], lower=True)) == ["ab\n", "c", "é\n"]


def test_unreadable_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("é\n".encode("latin-1"))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"some text\n" * 50)[:-12])
    for name in ("latin", "cut.gz", "missing"):
        with pytest.raises(InvalidArgumentError, match=f"{name} cannot be read as text"):
            list(units.read_lines([tmp_path / name]))
