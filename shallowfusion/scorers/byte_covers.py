"""Ways to cut a text into a language model's tokens, and what of them a hypothesis keeps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from shallowfusion.scorers.token_tree import TokenNode
from shallowfusion.text.byte_order import ByteOrder

__all__ = ["ByteCover", "Segmenter", "last_word"]

WORDS_KEPT = 65_536
SPACE = 0x20


@dataclass(frozen=True, eq=False)
class ByteCover:
    """What a hypothesis keeps of the token sequences that agree with its text.

    Args:
        log_prob: log of the summed probability of all its covers: sequences whose bytes start with the text and that do
            not without their last token; nats.
        open: sequences whose bytes are a beginning of the text, with the bytes of the text after them.
        anchor: a sequence that the usual cut of the text goes through, whatever follows.
        tail: the text after the anchor.
        chain: the sequences that the usual cut of the tail goes through, the anchor first, the whole text last.
    """

    log_prob: float
    open: tuple[tuple[TokenNode, bytes], ...]
    anchor: TokenNode
    tail: bytes
    chain: tuple[TokenNode, ...]


class Segmenter:
    """The usual cut of a word: the tokenizer's own if there is one and it keeps the bytes, else the fewest tokens.

    Price: one call of the tokenizer per new word; words are remembered.

    Args:
        order: the vocabulary.
        tokens: bytes of each token.
        tokenizer: of transformers; None = fewest tokens.
    """

    def __init__(self, order: ByteOrder, tokens: Sequence[bytes | None], tokenizer: Any = None) -> None:
        self._order, self._tokens, self._tokenizer = order, tokens, tokenizer
        self.cut = lru_cache(WORDS_KEPT)(self._cut)

    def __call__(self, text: bytes) -> tuple[int, ...] | None:
        """Tokens whose bytes are `text`, word by word; None if no tokens are."""
        ids: list[int] = []
        for word in words(text):
            own = self.cut(word)
            if own is None:
                return None
            ids += own
        return tuple(ids)

    def _cut(self, word: bytes) -> tuple[int, ...] | None:
        if self._tokenizer is None:
            return self._fewest(word)
        text = word.decode(errors="ignore")  # a character that is cut at the end is left to single tokens
        whole = text.encode()
        if not word.startswith(whole):
            return self._fewest(word)
        ids = tuple(self._tokenizer.encode(text, add_special_tokens=False)) if text else ()
        spelled = [self._tokens[i] if i < len(self._tokens) else None for i in ids]
        if None in spelled or b"".join(spelled) != whole:  # type: ignore[arg-type]
            return self._fewest(word)
        rest = self._fewest(word[len(whole) :])
        return None if rest is None else ids + rest

    def _fewest(self, text: bytes) -> tuple[int, ...] | None:
        """The fewest tokens; the longest first among equals."""
        best: list[tuple[int, ...] | None] = [None] * len(text) + [()]
        for start in range(len(text) - 1, -1, -1):
            for stop in range(min(len(text), start + self._order.longest), start, -1):
                rest = best[stop]
                found = self._order.tokens_of(text[start:stop]) if rest is not None else ()
                if rest is not None and found:
                    shortest = best[start]
                    if shortest is None or len(rest) + 1 < len(shortest):
                        best[start] = (found[0], *rest)
        return best[0]


def words(text: bytes) -> list[bytes]:
    """`text` cut before each space that follows something else; the pieces joined are the text."""
    cuts = [0, *(i for i in range(1, len(text)) if text[i] == SPACE != text[i - 1]), len(text)]
    return [text[start:stop] for start, stop in itertools.pairwise(cuts) if start < stop]


def last_word(text: bytes) -> int:
    """Where the last word of `text` begins."""
    return len(text) - len(words(text)[-1]) if text else 0
