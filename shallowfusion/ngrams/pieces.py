"""How the pieces of a tokenizer are spelled in ARPA files, whose words are parted by white space."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from shallowfusion.text.vocabulary import byte_alphabet, token_bytes

__all__ = ["SPACE", "piece_bytes", "spell_piece"]

SPACE = "<space>"


def spell_piece(piece: bytes) -> str:
    """Spell a piece in the alphabet of byte-level tokenizers (GPT-2, Whisper): each byte is one printable character.

    A space is \u0120; a character beyond ASCII is several. `piece_bytes` reads it back.
    """
    letters = _letters()
    return "".join(letters[byte] for byte in piece)


def piece_bytes(words: Sequence[str]) -> list[bytes]:
    """The bytes that all the words of one model stand for, special words apart.

    The words are byte-level spellings, as `spell_piece` makes them, if every one of them can be. A model that holds
    <space> or \u2581 cannot: its words are plain text, <space> a space, \u2581 (SentencePiece) too, <0x0A> a byte.
    """
    alphabet = byte_alphabet()
    if SPACE in words or not all(letter in alphabet for word in words for letter in word):
        return [b" " if word == SPACE else token_bytes(word, {}) for word in words]
    return [bytes(alphabet[letter] for letter in word) for word in words]


@cache
def _letters() -> dict[int, str]:
    return {byte: letter for letter, byte in byte_alphabet().items()}
