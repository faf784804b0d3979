"""The labels of a CTC model as pyctcdecode reads them: which one is blank, which one parts words."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from shallowfusion.config import require
from shallowfusion.ctc.settings import WORD_START, CtcAlphabet
from shallowfusion.errors import VocabularyError

__all__ = ["Alphabet"]

UNKNOWN = "⁇"
NO_LABEL = "\0"  # a mark that no label starts with
_BLANK = re.compile(r"^[<\[]pad[>\]]$", re.IGNORECASE)
_UNKNOWN = re.compile(r"^[<\[]unk[>\]]$", re.IGNORECASE)
_SPECIAL = re.compile(r"^[<\[].+[>\]]$")
_CONTINUED = "##"


class Alphabet:
    """Labels in one form: "" is the blank, " " the space; in a word-piece alphabet "▁" marks the start of a word.

    Args:
        labels: normalised labels, one of them "".
        is_bpe: whether they are word pieces.
    """

    def __init__(self, labels: Sequence[str], is_bpe: bool) -> None:
        self._labels = list(labels)
        self._is_bpe = is_bpe

    @classmethod
    def build_alphabet(cls, labels: Sequence[str]) -> Alphabet:
        """Normalise a model's labels.

        Word pieces are known by "##" or "▁" at the start of a label. <pad> and [PAD] are the blank, in other alphabets
        "_" as well; where there is none, a blank is appended. "|" is the space if " " is missing. <unk> is "⁇".

        Raises:
            VocabularyError: the same label twice, or a space among word pieces.
        """
        given = list(labels)
        is_bpe = any(label.startswith((_CONTINUED, WORD_START)) for label in given)
        twice = sorted({label for label in given if given.count(label) > 1}) if len(set(given)) < len(given) else []
        if twice:
            raise VocabularyError(f"labels must differ, got twice: {', '.join(map(repr, twice))}.")
        if is_bpe and any(" " in label for label in given):
            raise VocabularyError("word pieces must not hold spaces; mark the start of a word with '▁'.")
        return cls(_word_pieces(given) if is_bpe else _characters(given), is_bpe)

    @property
    def labels(self) -> list[str]:
        return self._labels[:]

    @property
    def is_bpe(self) -> bool:
        return self._is_bpe

    def dumps(self) -> str:
        """As JSON text."""
        return json.dumps({"labels": self._labels, "is_bpe": self._is_bpe})

    @classmethod
    def loads(cls, text: str) -> Alphabet:
        """From what `dumps` gave.

        Raises:
            VocabularyError: not that.
        """
        try:
            record = json.loads(text)
        except ValueError as error:
            raise VocabularyError(f"a stored alphabet must be JSON, got another text: {error}.") from None
        if not isinstance(record, dict) or set(record) != {"labels", "is_bpe"}:
            raise VocabularyError("a stored alphabet must hold the keys labels and is_bpe, and no others.")
        labels = record["labels"]
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise VocabularyError(f"the labels of a stored alphabet must be a list of texts, got {labels!r}.")
        return cls(labels, bool(record["is_bpe"]))

    def to_ctc(self) -> CtcAlphabet:
        """The alphabet of the search."""
        labels = self._labels
        require("" in labels, "labels must hold a blank (''), got none; use Alphabet.build_alphabet.")
        blank = labels.index("")
        if self._is_bpe:
            return CtcAlphabet(tuple(labels), blank, word_start=WORD_START)
        if " " in labels:
            return CtcAlphabet(tuple(labels), blank, delimiter=labels.index(" "))
        return CtcAlphabet(tuple(labels), blank, word_start=NO_LABEL)  # the whole text is one word


def _characters(labels: list[str]) -> list[str]:
    if "|" in labels and " " not in labels:
        labels = [" " if label == "|" else label for label in labels]
    labels = ["" if _BLANK.match(label) else label for label in labels]
    if "_" in labels and "" not in labels:
        labels = ["" if label == "_" else label for label in labels]
    if "" not in labels:
        labels = [*labels, ""]
    return [UNKNOWN if _UNKNOWN.match(label) else label for label in labels]


def _word_pieces(labels: list[str]) -> list[str]:
    if any(label.startswith(_CONTINUED) for label in labels):
        labels = [_marked(label) for label in labels]
    labels = ["" if _BLANK.match(label) else label for label in labels]
    if "" not in labels:
        labels = [*labels, ""]
    return [f"{WORD_START}{UNKNOWN}{WORD_START}" if _UNKNOWN.match(label) else label for label in labels]


def _marked(label: str) -> str:
    """From "##" on pieces inside a word to "▁" on those at its start."""
    if label.startswith(_CONTINUED):
        return label[len(_CONTINUED) :]
    is_special = _SPECIAL.match(label) or label in ("", WORD_START, f"{WORD_START}{UNKNOWN}{WORD_START}")
    return label if is_special else WORD_START + label
