"""What is done to reference and hypothesis alike before their words are compared (METHODS 1.3, 10.1)."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from shallowfusion.errors import InvalidArgumentError, ShallowFusionError

__all__ = ["NORMALISERS", "Normaliser", "normaliser"]

logger = logging.getLogger(__name__)

NORMALISERS = ("none", "basic", "english", "article")
_ARTICLE_VERSION = "1"

_UNITS = {
    "milligram": "mg", "microgram": "mcg", "kilogram": "kg", "gram": "g", "milliliter": "ml", "millilitre": "ml",
    "deciliter": "dl", "decilitre": "dl", "liter": "l", "litre": "l", "millimeter": "mm", "millimetre": "mm",
    "centimeter": "cm", "centimetre": "cm", "kilometer": "km", "kilometre": "km", "meter": "m", "metre": "m",
    "millisecond": "ms", "second": "s", "minute": "min", "hour": "h", "millimole": "mmol", "milliequivalent": "meq",
    "kilohertz": "khz", "megahertz": "mhz", "hertz": "hz", "millisievert": "msv", "gray": "gy", "kilovolt": "kv",
}  # fmt: skip
# Ambiguous in running text ("the second lesion", "gray matter"): abbreviated only behind a number.
_UNIT = re.compile(r"(?<=\d )(" + "|".join(sorted(_UNITS, key=len, reverse=True)) + r")s?\b")
_GLUED_UNIT = re.compile(r"(\d)(" + "|".join(sorted(set(_UNITS.values()), key=len, reverse=True)) + r")\b")
_BREAKS = re.compile(r"[-\u2010-\u2015\u2212/]")
_APOSTROPHES = re.compile(r"[\u2018\u2019`\u00b4]")
_LONE_POINT = re.compile(r"(?<!\d)\.|\.(?!\d)")
_DIGIT_COMMA = re.compile(r"(?<=\d),(?=\d{3}\b)")


@dataclass(frozen=True)
class Normaliser:
    """A function of text that knows its name and version, which a report must state.

    Args:
        name: one of NORMALISERS.
        version: changes whenever the same text may come out otherwise.
    """

    name: str
    version: str
    function: Callable[[str], str] = field(repr=False, compare=False)

    def __call__(self, text: str) -> str:
        return self.function(text)

    def __str__(self) -> str:
        return f"{self.name} ({self.version})" if self.version else self.name


def normaliser(name: str, spellings: Path | Mapping[str, str] | None = None) -> Normaliser:
    """The normaliser of a name.

    `none`: white space only. `basic`: lower case, accents and punctuation dropped, apostrophes within words kept.
    `english`: Whisper's English rules as transformers has them, the ones public leaderboards use. `article`: the rules
    of the Whisper + GPT-2 article: lower case, ASCII, number words to digits, units behind numbers abbreviated,
    hyphens and slashes split, punctuation dropped.

    Args:
        spellings: British to American words for `english`: a mapping or a JSON file (a Whisper tokenizer's
            normalizer.json). None = the table of openai-whisper where that package is installed, else none; which
            of them was used is in `version`.

    Raises:
        InvalidArgumentError: an unknown name, or a table that cannot be read.
    """
    if name == "none":
        return Normaliser(name, "", lambda text: " ".join(text.split()))
    if name == "basic":
        return Normaliser(name, _ARTICLE_VERSION, _basic)
    if name == "article":
        return _article()
    if name == "english":
        return _english(spellings)
    raise InvalidArgumentError(f"normaliser must be one of {', '.join(NORMALISERS)}, got {name!r}.")


def _basic(text: str) -> str:
    return _plain_words(_folded(text))


def _article() -> Normaliser:
    numbers = _whisper_rules().EnglishNumberNormalizer()

    def apply(text: str) -> str:
        text = _BREAKS.sub(" ", _folded(text))
        text = _DIGIT_COMMA.sub("", text)
        text = _LONE_POINT.sub(" ", re.sub(r"[,;:!?()\[\]\"]", " ", text))
        text = " ".join(str(numbers(text)).split())
        text = _GLUED_UNIT.sub(r"\1 \2", text)
        text = _UNIT.sub(lambda match: _UNITS[match.group(1)], text)
        return _plain_words(text.replace("%", " percent "))

    return Normaliser("article", f"{_ARTICLE_VERSION}, numbers of {_transformers_version()}", _remembering(apply))


def _english(spellings: Path | Mapping[str, str] | None) -> Normaliser:
    table, origin = _spelling_table(spellings)
    rules = _whisper_rules().EnglishTextNormalizer(table)
    version = f"{_transformers_version()}, {origin}"
    return Normaliser("english", version, _remembering(lambda text: " ".join(str(rules(text)).split())))


def _remembering(function: Callable[[str], str]) -> Callable[[str], str]:
    """The rules take a millisecond a text, and an evaluation asks for each text several times."""
    return lru_cache(maxsize=100_000)(function)


def _folded(text: str) -> str:
    """Lower-case ASCII where a letter has one; compatibility forms and accents are taken apart."""
    text = _APOSTROPHES.sub("'", text)
    # Before and after: a compatibility form may hide a capital (U+1D756 is a bold Greek Alpha), and a small letter
    # may have parts of its own.
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).lower())
    return "".join(character for character in decomposed if not unicodedata.combining(character))


def _plain_words(text: str) -> str:
    """Letters, digits, apostrophes within words and points within numbers; anything else parts words."""
    kept = _LONE_POINT.sub(" ", "".join(c if c.isalnum() or c in "'." else " " for c in text))
    return " ".join(word for word in (word.strip("'") for word in kept.split()) if word)


def _spelling_table(given: Path | Mapping[str, str] | None) -> tuple[dict[str, str], str]:
    if isinstance(given, Mapping):
        return dict(given), f"spelling table of {len(given)} words"
    path = given
    if path is None:
        package = importlib.util.find_spec("whisper")
        locations = package.submodule_search_locations if package is not None else None
        path = Path(locations[0]) / "normalizers" / "english.json" if locations else None
        if path is None or not path.is_file():
            logger.warning("no table of British spellings was found: colour and color will count as different words")
            return {}, "no spelling table"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"{path} cannot be read as a spelling table ({error}); wanted a JSON object."
        ) from error
    if not isinstance(table, dict) or not all(isinstance(word, str) for word in table.values()):
        raise InvalidArgumentError(f"{path} is no spelling table, wanted a JSON object of word to word.")
    return table, f"spelling table of {len(table)} words"


def _whisper_rules() -> Any:
    try:
        from transformers.models.whisper import english_normalizer
    except ImportError as error:
        raise ShallowFusionError(f"transformers' English normaliser cannot be imported: {error}.") from error
    return english_normalizer


def _transformers_version() -> str:
    import transformers

    return f"transformers {transformers.__version__}"
