"""The texts the demo models learn from: reading, normalising, and choosing sentences no model has seen."""

from __future__ import annotations

import gzip
import random
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from shallowfusion.errors import InvalidArgumentError

__all__ = [
    "ACOUSTIC_SOURCES",
    "EVALUATION_SOURCES",
    "GENERAL_SOURCES",
    "MEDICAL_SOURCES",
    "Sentence",
    "choose_unseen",
    "held_out_sentences",
    "normalise",
    "read_sentences",
    "spell_number",
]

GENERAL_SOURCES = ("gen_gutenberg_train",)
MEDICAL_SOURCES = ("med_medquad_train", "med_pubmed_train", "med_mtsdialog_train", "med_acibench_train")
ACOUSTIC_SOURCES = ("gen_gutenberg_train", "med_mtsdialog_train", "med_acibench_train")
EVALUATION_SOURCES = ("med_medquad_test", "med_pubmed_valid", "med_mtsdialog_valid")

_ONES = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_LARGEST_SPELLED = 999_999

_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?")
_MIXED_WORD = re.compile(r"[a-z]\d|\d[a-z]")
_WORD_BREAK = re.compile("[-/\u2010-\u2015\u2026]|\\.\\.+")
_DROPPED_MARKS = re.compile('[.,;:!?"()\\[\\]{}*_<>\u201c\u201d]')
_ALLOWED = re.compile(r"[a-z' ]*")
_ACRONYM = re.compile(r"\b[A-Z]{2,}")
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+(?=[A-Z\"])")


@dataclass(frozen=True)
class Sentence:
    """A normalised sentence and the file it came from."""

    text: str
    source: str


def spell_number(number: str) -> str:
    """Spell a whole or decimal number up to 999,999 in English words, digit by digit after the point.

    Raises:
        InvalidArgumentError: the number is larger.
    """
    whole, _, fraction = number.replace(",", "").partition(".")
    if int(whole) > _LARGEST_SPELLED:
        raise InvalidArgumentError(f"numbers are spelled up to {_LARGEST_SPELLED}, got {number}.")
    words = _spell_whole(int(whole))
    if fraction:
        words += " point " + " ".join(_ONES[int(digit)] for digit in fraction)
    return words


def normalise(text: str) -> str | None:
    """Lower-case words of a-z and apostrophe with single spaces, numbers spelled out.

    Hyphens and slashes part words; other punctuation is dropped; accents are removed.

    Returns:
        the text, or None if it holds something that cannot be said plainly: a letter-digit mix,
        a number above 999,999, a foreign script, or any other symbol; or if nothing is left.
    """
    text = text.replace("\u2019", "'").replace("\u2018", "'").replace("`", "'")
    decomposed = unicodedata.normalize("NFKD", text.lower())
    text = "".join(character for character in decomposed if not unicodedata.combining(character))
    text = _WORD_BREAK.sub(" ", text.replace("%", " percent ").replace("&", " and "))
    if _MIXED_WORD.search(text):
        return None
    try:
        text = _NUMBER.sub(lambda match: f" {spell_number(match.group())} ", text)
    except InvalidArgumentError:
        return None
    text = _DROPPED_MARKS.sub(" ", text)
    text = " ".join(word for word in (word.strip("'") for word in text.split()) if word)
    return text if text and _ALLOWED.fullmatch(text) else None


def read_sentences(
    data: Path, sources: tuple[str, ...], speakable: bool, min_words: int = 1, max_words: int = 10_000
) -> list[Sentence]:
    """Read and normalise the lines of text files; a line above `max_words` is parted into its sentences.

    Args:
        data: the data directory, holding `text/<source>.txt.gz`.
        sources: names of text files, without their ending.
        speakable: drop lines with capitalised abbreviations, which a synthesiser may spell or read.
        min_words: shorter sentences are dropped.
        max_words: sentences that are still longer are dropped.

    Returns:
        distinct sentences in file order.

    Raises:
        InvalidArgumentError: a file is missing.
    """
    found: dict[str, Sentence] = {}
    for source in sources:
        for line in _read_lines(data, source):
            pieces = [line] if len(line.split()) <= max_words else _SENTENCE_END.split(line)
            for piece in pieces:
                if speakable and _ACRONYM.search(piece):
                    continue
                text = normalise(piece)
                if text is not None and min_words <= len(text.split()) <= max_words:
                    found.setdefault(text, Sentence(text, source))
    return list(found.values())


def choose_unseen(data: Path, count: int, seed: int) -> list[Sentence]:
    """Choose medical sentences of 6 to 16 words that occur in no training text, in a seeded random order.

    The evaluation sources take turns. Sentences with digits, brackets or abbreviations are not considered.

    Raises:
        InvalidArgumentError: fewer than `count` sentences qualify.
    """
    trained = GENERAL_SOURCES + MEDICAL_SOURCES + ACOUSTIC_SOURCES
    seen = "\n".join(_normalised_lines(data, tuple(dict.fromkeys(trained))))
    pools = []
    generator = random.Random(seed)
    for source in EVALUATION_SOURCES:
        plain = [line for line in _read_lines(data, source) if not re.search(r"[\d()\[\]]", line)]
        plain = [line for line in plain if not _ACRONYM.search(line)]
        texts = dict.fromkeys(text for text in map(normalise, plain) if text and 6 <= len(text.split()) <= 16)
        pool = list(texts)
        generator.shuffle(pool)
        pools.append((source, pool))
    chosen: dict[str, Sentence] = {}
    while len(chosen) < count and any(pool for _, pool in pools):
        for source, pool in pools:
            while pool and len(chosen) < count:
                text = pool.pop()
                if text not in chosen and text not in seen:
                    chosen[text] = Sentence(text, source)
                    break
    if len(chosen) < count:
        raise InvalidArgumentError(f"{count} unseen sentences were asked for, only {len(chosen)} qualify.")
    return list(chosen.values())


def held_out_sentences(data: Path, sources: tuple[str, ...], trained: tuple[str, ...]) -> list[str]:
    """Up to 600 sentences of held-out files, in a fixed random order, none of which is a training sentence."""
    seen = {sentence.text for sentence in read_sentences(data, trained, speakable=False)}
    found = [sentence.text for sentence in read_sentences(data, sources, speakable=False)]
    found = [text for text in found if text not in seen]
    random.Random(1).shuffle(found)
    return found[:600]


def _read_lines(data: Path, source: str) -> list[str]:
    path = data / "text" / f"{source}.txt.gz"
    if not path.exists():
        raise InvalidArgumentError(f"{path} is missing; --data must name the directory that holds text/ and audio/.")
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [line.strip() for line in stream if line.strip()]


def _normalised_lines(data: Path, sources: tuple[str, ...]) -> list[str]:
    lines = (normalise(line) for source in sources for line in _read_lines(data, source))
    return [line for line in lines if line is not None]


def _spell_whole(number: int) -> str:
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens - 2] + (f" {_ONES[ones]}" if ones else "")
    unit, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    quotient, remainder = divmod(number, unit)
    return f"{_spell_whole(quotient)} {name}" + (f" {_spell_whole(remainder)}" if remainder else "")
