"""What a language model reads of a transcript that is still being written: its complete words in its own tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from shallowfusion.errors import VocabularyError
from shallowfusion.text.vocabulary import Vocabulary

__all__ = ["Retokenised", "Said", "SharedTokens", "Spelling", "Unit"]

Unit = Literal["words", "characters"]
Ids = tuple[int, ...]

MOST_REMEMBERED = 8192  # spellings
# Scripts written without spaces: Thai, Lao, Myanmar, Khmer, kana, Han and their full-width forms and marks.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uff9f"
    "\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+(?=[\s{UNSPACED}])")
CHARACTER = re.compile(r"(?s).")


class Said(NamedTuple):
    """A transcript so far: the acoustic tokens, and the bytes they spell."""

    tokens: Ids
    text: bytes

    def and_then(self, token: int, piece: bytes | None) -> Said:
        return Said((*self.tokens, token), self.text + (piece or b""))


class Spelling(Protocol):
    """Reads transcripts in units that no later token changes, and spells them for a language model."""

    def complete(self, said: Said) -> int:
        """How many units are complete."""
        ...

    def ids(self, said: Said, units: int) -> Ids:
        """The first units, at most as many as are complete, in the language model's tokens."""
        ...

    def whole(self, said: Said) -> Ids:
        """The transcript as if it ended here."""
        ...

    def reach(self, said: Said, units: int) -> int:
        """How many bytes of the transcript the first units take."""
        ...


class SharedTokens:
    """For a model on the acoustic tokens: every token is a unit as soon as it is said.

    Args:
        mapping: the model's id of each acoustic token; -1 = none, and then the model does not read it.
        pieces: bytes of each acoustic token.
    """

    def __init__(self, mapping: Sequence[int], pieces: Sequence[bytes | None]) -> None:
        self._mapping = tuple(mapping)
        self._lengths = [len(piece or b"") for piece in pieces]

    def complete(self, said: Said) -> int:
        return len(said.tokens)

    def ids(self, said: Said, units: int) -> Ids:
        mapped = (self._mapping[token] for token in said.tokens[:units])
        return tuple(token for token in mapped if token >= 0)

    def whole(self, said: Said) -> Ids:
        return self.ids(said, len(said.tokens))

    def reach(self, said: Said, units: int) -> int:
        return sum(self._lengths[token] for token in said.tokens[:units])


class Retokenised:
    """For a model with a tokenizer of its own: the text of the complete units is tokenised as a whole.

    A word is complete when white space follows it, so there is a lag of one word. In scripts written without spaces
    (Thai, Lao, Myanmar, Khmer, kana, Han) every character is a unit, complete as soon as all its bytes are there.
    With unit="characters" that holds for every script: then the tokens of a word in the making are scored and taken
    back as it grows, which costs passes and is the better the smaller the model's tokens are.

    Text that spells special tokens of the model is read as plain text.

    Price: one call of the tokenizer per distinct text, tens of microseconds.

    Args:
        tokenizer: of transformers.
        vocabulary: the model's.
        unit: see above.
        lower: lower-case the text first; language models read upper-case transcripts badly.
        prefix: put before every text that is not empty; None = a space, unless the tokenizer puts one itself.
        normalise: applied to a text in place of `lower`; must leave word boundaries where they are.

    Raises:
        VocabularyError: there is no tokenizer.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocabulary: Vocabulary,
        unit: Unit = "words",
        lower: bool = False,
        prefix: str | None = None,
        normalise: Callable[[str], str] | None = None,
    ) -> None:
        if tokenizer is None:
            raise VocabularyError(
                f"the language model {vocabulary.name} was made without a tokenizer, which fusion across tokenizers "
                "needs; load it with load_causal_lm, or pass tokenizer=... to CausalLMScorer."
            )
        self._tokenizer = tokenizer
        self._pattern = WORD if unit == "words" else CHARACTER
        self._vocabulary = vocabulary
        self._normalise = normalise or (str.lower if lower else str)
        self._known: dict[str, Ids] = {}
        self.prefix = self._own_prefix(vocabulary) if prefix is None else prefix

    def check(self, text: str) -> None:
        """Refuse a tokenizer that loses what a transcript may hold.

        Args:
            text: holds every character of the transcripts; those of ASCII are looked at.

        Raises:
            VocabularyError: tokenised and read back, one of them is another or gone.
        """
        letters = sorted({letter for letter in self._normalise(text) if letter.isascii() and not letter.isspace()})
        if self._read_back(" ".join(letters)) == " ".join(letters):
            return
        lost = [letter for letter in letters if self._read_back(letter) != letter]
        if lost:
            raise VocabularyError(
                f"the tokenizer of {self._vocabulary.name} cannot write {len(lost)} of the {len(letters)} ASCII "
                f"characters of the transcripts, such as {', '.join(map(repr, lost[:5]))}; use a language model whose "
                "tokenizer keeps its text, or, where it knows small letters alone, lower=True."
            )

    def _read_back(self, text: str) -> str:
        ids = self._tokenizer(self.prefix + text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return b"".join(self._vocabulary.tokens[i] or b"" for i in ids).decode("utf-8", "replace").strip()

    def complete(self, said: Said) -> int:
        return sum(1 for _ in self._pattern.finditer(_decoded(said.text)))

    def ids(self, said: Said, units: int) -> Ids:
        text = _decoded(said.text)
        return self._spelled(text[: self._end(text, units)])

    def whole(self, said: Said) -> Ids:
        return self._spelled(_decoded(said.text).rstrip())

    def reach(self, said: Said, units: int) -> int:
        text = _decoded(said.text)
        return len(text[: self._end(text, units)].encode())

    def _end(self, text: str, units: int) -> int:
        end = 0
        for count, match in enumerate(self._pattern.finditer(text)):
            if count == units:
                break
            end = match.end()
        return end

    def _spelled(self, text: str) -> Ids:
        text = self._normalise(text.lstrip())
        if not text:
            return ()
        known = self._known.get(text)
        if known is None:
            if len(self._known) >= MOST_REMEMBERED:
                self._known.clear()
            found = self._tokenizer(self.prefix + text, add_special_tokens=False, split_special_tokens=True)
            known = self._known[text] = tuple(found["input_ids"])
        return known

    def _own_prefix(self, vocabulary: Vocabulary) -> str:
        first = self._tokenizer("a", add_special_tokens=False)["input_ids"][:1]
        token = vocabulary.tokens[first[0]] if first else None
        return "" if token is not None and token.startswith(b" ") else " "


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", "ignore")  # an incomplete last character is not there yet
