"""How tokens of an attention decoder are said in the labels of a CTC model that has labels of its own."""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

from shallowfusion.config import require
from shallowfusion.ctc.settings import CtcAlphabet
from shallowfusion.errors import VocabularyError
from shallowfusion.text.vocabulary import Vocabulary

__all__ = [
    "FRESH",
    "UNSAYABLE",
    "LabelSpelling",
    "LetterSpelling",
    "PieceSpelling",
    "TokenSpelling",
    "WithoutLabel",
    "Written",
]

UNSAYABLE = -3  # in the place of a label: nothing says this
PARTS = " "  # what parts words, once a character is in the alphabet's hand

Labels = tuple[int, ...]
WithoutLabel = Literal["neutral", "forbid"]

APOSTROPHES = "\u2018\u2019\u02bc\uff07"
MOST_REMEMBERED = 1 << 18  # spellings


class Written(NamedTuple):
    """What of a text is not in labels yet.

    Args:
        rest: bytes of a character that is not complete.
        word: the word in the making, for spellings that wait for its end.
    """

    rest: bytes = b""
    word: str = ""


FRESH = Written()


class LabelSpelling(Protocol):
    """Says token by token which labels a text adds; a pure function of what is written."""

    @property
    def delimiter(self) -> int | None:
        """The label between words."""
        ...

    def spell(self, written: Written, token: int) -> tuple[Labels, Written]:
        """The labels that a text token adds, none for special tokens, and what is then left; UNSAYABLE may be one."""
        ...

    def ahead(self, written: Written) -> Labels:
        """The labels of what is written and not said yet, as if it were complete."""
        ...


class Handwriting:
    """Characters of a text as the characters of an alphabet.

    A character is written as itself where the alphabet has it; else in the other case; else without accents and other
    marks, ligatures in their letters; typographic apostrophes as "'". White space and dashes part words. Punctuation
    and symbols that are left are no sound, so they add nothing. Letters and digits that are left add nothing either
    under "neutral": CTC does not hear them, and what it hears in their place it misses; under "forbid" a text that
    holds one is impossible.

    Args:
        characters: of the alphabet, without what parts its words.
    """

    def __init__(self, characters: frozenset[str], without_label: WithoutLabel) -> None:
        require(
            without_label in ("forbid", "neutral"),
            f"without_label must be 'forbid' or 'neutral', got {without_label!r}.",
        )
        self.characters = characters
        self.without_label = without_label
        self._known: dict[str, str | None] = {}

    def __call__(self, text: str) -> str | None:
        """The text in the alphabet's characters and spaces; None = it cannot be said."""
        found = []
        for character in text:
            if character not in self._known:
                self._known[character] = self._one(character)
            own = self._known[character]
            if own is None:
                return None
            found.append(own)
        return "".join(found)

    def _one(self, character: str) -> str | None:
        direct = self._cased(character)
        if direct is not None:
            return direct
        if character.isspace() or unicodedata.category(character) == "Pd":
            return PARTS
        if character in APOSTROPHES:
            return self._cased("'") or ""
        plain = [part for part in unicodedata.normalize("NFKD", character) if not unicodedata.combining(part)]
        cased = [self._cased(part) for part in plain]
        if plain and all(part is not None for part in cased):
            return "".join(filter(None, cased))
        is_sound = unicodedata.category(character)[0] in "LN"
        return None if is_sound and self.without_label == "forbid" else ""

    def _cased(self, character: str) -> str | None:
        for form in (character, character.upper(), character.lower()):
            if form and all(part in self.characters for part in form):
                return form
        return None


class TokenSpelling:
    """For labels that are the tokens themselves.

    Args:
        labels: of each token; UNSAYABLE = none, and other negative numbers add nothing.
    """

    delimiter = None

    def __init__(self, labels: Sequence[int]) -> None:
        self._labels: list[Labels] = [(label,) if label >= 0 or label == UNSAYABLE else () for label in labels]

    def spell(self, written: Written, token: int) -> tuple[Labels, Written]:
        return self._labels[token], written

    def ahead(self, written: Written) -> Labels:
        return ()


class LetterSpelling:
    """For labels that are characters: every character is said at once.

    Where words are parted more than once, or before the first, the prefix scores see to it that it does not count.

    Args:
        tokens: text tokens; the end token is the search's business.
        silenced: labels that are never said.
        without_label: see `Handwriting`.

    Raises:
        VocabularyError: most labels are no single characters, or none is a letter of the tokens.
    """

    def __init__(
        self,
        tokens: Vocabulary,
        alphabet: CtcAlphabet,
        silenced: Sequence[int] = (),
        without_label: WithoutLabel = "neutral",
    ) -> None:
        self._labels = _said(alphabet, silenced)
        single = {text: label for text, label in self._labels.items() if len(text) == 1}
        if alphabet.delimiter is not None:
            single.pop(PARTS, None)
        if 2 * len(single) < len(self._labels):
            raise VocabularyError(
                f"{len(self._labels) - len(single)} of the {len(self._labels)} labels of the CTC model, such as "
                f"{_some(text for text in self._labels if len(text) > 1)}, are neither characters nor pieces that mark "
                "where words begin, so text cannot be spelled in them; take a model of letters or of such pieces."
            )
        self.delimiter = alphabet.delimiter
        self._labels = single
        self._write = Handwriting(frozenset(single), without_label)
        self._tokens = tokens.tokens
        self._known: dict[tuple[Written, int], tuple[Labels, Written]] = {}
        _check_letters(tokens, self._write)

    def spell(self, written: Written, token: int) -> tuple[Labels, Written]:
        key = written, token
        found = self._known.get(key)
        if found is None:
            found = self._spelled(written, self._tokens[token] or b"")
            if len(self._known) >= MOST_REMEMBERED:
                self._known.clear()
            self._known[key] = found
        return found

    def _spelled(self, written: Written, piece: bytes) -> tuple[Labels, Written]:
        text, rest = _decoded(written.rest + piece)
        own = self._write(text)
        if own is None:
            return (UNSAYABLE,), FRESH
        labels: list[int] = []
        for character in own:
            label = self._labels.get(character, self.delimiter)  # what parts words may be a label, a delimiter, nothing
            if label is not None and (label != self.delimiter or labels[-1:] != [label]):
                labels.append(label)
        return tuple(labels), Written(rest)

    def ahead(self, written: Written) -> Labels:
        return ()


class PieceSpelling:
    """For labels that are pieces of words: a word is said when it is complete, as the CTC model's tokenizer cuts it.

    The word in the making is lent the score of its letters so far, cut as if they were the word.

    Args:
        tokenizer: of the CTC model.
        others: as of `LetterSpelling`.

    Raises:
        VocabularyError: no tokenizer, or no label holds a letter of the tokens.
    """

    delimiter = None

    def __init__(
        self,
        tokens: Vocabulary,
        alphabet: CtcAlphabet,
        tokenizer: Any,
        silenced: Sequence[int] = (),
        without_label: WithoutLabel = "neutral",
    ) -> None:
        if tokenizer is None:
            raise VocabularyError(
                "the labels of the CTC model are pieces of words, which only its tokenizer can spell, and it came "
                "without one; load it with load_ctc_model, or set CtcModel.tokenizer."
            )
        mark = alphabet.word_start or ""
        pieces = _said(alphabet, silenced)
        characters = frozenset("".join(pieces)) - frozenset(mark)
        self._sayable = frozenset(pieces.values())
        self._write = Handwriting(characters, without_label)
        self._tokenizer, self._tokens = tokenizer, tokens.tokens
        self._words: dict[str, Labels] = {}
        _check_letters(tokens, self._write)

    def spell(self, written: Written, token: int) -> tuple[Labels, Written]:
        text, rest = _decoded(written.rest + (self._tokens[token] or b""))
        own = self._write(text)
        if own is None:
            return (UNSAYABLE,), FRESH
        *complete, word = (written.word + own).split(PARTS)
        return tuple(label for each in complete for label in self._word(each)), Written(rest, word)

    def ahead(self, written: Written) -> Labels:
        return self._word(written.word)

    def _word(self, word: str) -> Labels:
        if not word:
            return ()
        found = self._words.get(word)
        if found is None:  # threads share this: another may forget all words between two lines
            ids = self._tokenizer(word, add_special_tokens=False)["input_ids"]
            is_whole = all(label in self._sayable for label in ids)
            own = tuple(label for label in ids if label in self._sayable)
            found = own if is_whole or self._write.without_label == "neutral" else (UNSAYABLE,)
            if len(self._words) >= MOST_REMEMBERED:
                self._words.clear()
            self._words[word] = found
        return found


def _said(alphabet: CtcAlphabet, silenced: Sequence[int]) -> dict[str, int]:
    """Labels that are text, by their text; of equal ones the first."""
    unsaid = {alphabet.blank, alphabet.delimiter, *silenced}
    found: dict[str, int] = {}
    for label, text in enumerate(alphabet.labels):
        if label not in unsaid and text:
            found.setdefault(text, label)
    return found


def _check_letters(tokens: Vocabulary, write: Handwriting) -> None:
    said = b" ".join(token for token in tokens.tokens if token).decode("utf-8", "ignore")
    letters = sorted({character for character in said if character.isalnum()})
    if not any(write(letter) for letter in letters):
        raise VocabularyError(
            f"none of the {len(letters)} letters and digits of {tokens.name}, such as {_some(letters)}, is among the "
            f"characters of the CTC model, such as {_some(sorted(write.characters))}; take a CTC model of the same "
            "language and script."
        )


def _some(texts: Any) -> str:
    return ", ".join(map(repr, list(texts)[:5])) or "none"


def _decoded(piece: bytes) -> tuple[str, bytes]:
    """The complete characters, and the bytes of one that is not."""
    text, used = codecs.utf_8_decode(piece, "replace", False)
    return text, piece[used:]
