"""What the words of an n-gram model are: words of a text, its characters, or a tokenizer's pieces."""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shallowfusion.errors import InvalidArgumentError, ModelError
from shallowfusion.ngrams.pieces import SPACE, spell_piece
from shallowfusion.text.vocabulary import vocabulary_of

__all__ = ["Units", "characters", "read_lines", "tokens", "words"]

BATCH_LINES = 1000


@dataclass(frozen=True)
class Units:
    """A way to split lines.

    Args:
        name: shown in summaries.
        split: lines -> the spellings of each.
        vocabulary: all spellings there are; None: as many as the text holds.
    """

    name: str
    split: Callable[[Iterable[str]], Iterator[list[str]]]
    vocabulary: Sequence[str] | None = None


def words() -> Units:
    """Words parted by white space."""
    return Units("words", lambda lines: (line.split() for line in lines))


def characters(leading_space: bool = False) -> Units:
    """Characters, runs of white space as one <space>; with `leading_space` a line that is not empty starts with one."""

    def split(lines: Iterable[str]) -> Iterator[list[str]]:
        for line in lines:
            text = " ".join(line.split())
            text = " " + text if leading_space and text else text
            yield [SPACE if letter == " " else letter for letter in text]

    return Units("characters", split)


def tokens(tokenizer_name: str, leading_space: bool = True) -> Units:
    """Pieces of a transformers tokenizer, spelled by `spell_piece`; models know every piece, seen in the text or not.

    Args:
        tokenizer_name: a model directory or hub id.
        leading_space: encode each line with a space in front, as Whisper's transcripts start.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{tokenizer_name} cannot be loaded as a tokenizer ({reason}); give a model directory or a hub id."
        ) from error
    vocabulary = vocabulary_of(tokenizer, len(tokenizer), end_id=0, name=tokenizer_name)
    spellings = [None if piece is None else spell_piece(piece) for piece in vocabulary.tokens]

    def split(lines: Iterable[str]) -> Iterator[list[str]]:
        texts = (" ".join(line.split()) for line in lines)
        texts = (" " + text if leading_space and text else text for text in texts)
        while batch := list(itertools.islice(texts, BATCH_LINES)):
            for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
                yield [spelling for i in ids if (spelling := spellings[i]) is not None]

    return Units(f"tokens of {tokenizer_name}", split, tuple(spelling for spelling in spellings if spelling))


def read_lines(paths: Sequence[str | Path], lower: bool = False) -> Iterator[str]:
    """Lines of UTF-8 text files, plain or gzipped, one after the other.

    Raises:
        InvalidArgumentError: a file is missing, cut short or not UTF-8.
    """
    for path in paths:
        try:
            with open(path, "rb") as stream:
                packed = stream.read(2) == b"\x1f\x8b"
            opened = gzip.open(path, "rt", encoding="utf-8") if packed else open(path, encoding="utf-8")  # noqa: SIM115
            with opened as text:
                for line in text:
                    yield line.lower() if lower else line
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise InvalidArgumentError(
                f"{path} cannot be read as text ({reason}); give UTF-8 text files, plain or gzipped, a sentence a line."
            ) from error
