"""Phrases as token sequences with what each beginning of them is worth."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shallowfusion.checks import integer
from shallowfusion.config import require
from shallowfusion.text.spelling import UNSPACED

__all__ = ["WORD_BOUNDARY", "Patterns", "patterns", "spread", "whole_words"]

WORD_BOUNDARY = int(np.iinfo(np.int32).max)
LARGEST_TOKEN = WORD_BOUNDARY - 1
BEGINS_INSIDE, ENDS_INSIDE = 1, 2
NO_CLASSES = np.zeros(0, dtype=np.uint8)
UNSPACED_START, UNSPACED_END = re.compile(f"[{UNSPACED}]"), re.compile(f"[{UNSPACED}]$")


@dataclass(frozen=True, eq=False)
class Patterns:
    """Token sequences to look for; several may spell one phrase.

    Args:
        tokens: int32 [tokens], of one pattern after the other.
        credits: float64 [tokens], nats: what a match of the pattern up to each token is worth.
        offsets: int64 [patterns + 1]; pattern i holds tokens[offsets[i] : offsets[i + 1]].
        phrases: int64 [patterns], which phrase each spells.
        texts: of the phrases.
        classes: uint8 [tokens of the vocabulary], 1 where a token begins inside a word and 2 where it ends inside one,
            added up; empty = texts have no word boundaries. With them patterns hold `WORD_BOUNDARY` where texts do.
    """

    tokens: npt.NDArray[np.int32]
    credits: npt.NDArray[np.float64]
    offsets: npt.NDArray[np.int64]
    phrases: npt.NDArray[np.int64]
    texts: tuple[str, ...] = ()
    classes: npt.NDArray[np.uint8] = field(default_factory=NO_CLASSES.copy)

    def __len__(self) -> int:
        return len(self.phrases)


def patterns(
    phrases: Mapping[str, float],
    segment: Callable[[str], Iterable[Sequence[int]]],
    depth_scaling: float = 1.0,
    depth_bonus: bool = False,
) -> Patterns:
    """Spell phrases in tokens.

    The first token of a phrase of weight w is worth w, the i-th (from 2 on) w * depth_scaling, and log(i + 1) more with
    `depth_bonus`; the credit of a beginning is the sum of its tokens'.

    Args:
        phrases: text -> weight in nats per token; negative weights make phrases less likely.
        segment: the token sequences that spell a text, such as those with and without a leading space, or samples of a
            tokenizer with dropout; equal ones count once.
        depth_scaling: at least 0.

    Raises:
        InvalidArgumentError: an empty phrase, a weight that is not finite, or a text no tokens spell.

    Source: weights by depth as TurboBias (2508.07014) and NeMo describe them.
    """
    require(
        math.isfinite(depth_scaling) and depth_scaling >= 0,
        f"depth_scaling must be finite and at least 0, got {depth_scaling}.",
    )
    tokens: list[int] = []
    credits: list[float] = []
    offsets, owners = [0], []
    for number, (text, weight) in enumerate(phrases.items()):
        require(bool(text.strip()), f"phrases must not be empty, got {text!r}.")
        require(math.isfinite(weight), f"the weight of {text!r} must be finite (nats per token), got {weight}.")
        found = dict.fromkeys(tuple(spelling) for spelling in segment(text))
        require(
            len(found) > 0 and all(found), f"no tokens spell the phrase {text!r}; write it in the tokenizer's letters."
        )
        for spelling in found:
            tokens += [integer(f"tokens of {text!r}", token, 0, LARGEST_TOKEN) for token in spelling]
            worth = [
                weight * (1.0 if depth == 1 else depth_scaling)
                + (math.log(depth + 1) if depth_bonus and depth > 1 else 0.0)
                for depth in range(1, len(spelling) + 1)
            ]
            credits += np.cumsum(worth).tolist()
            offsets.append(len(tokens))
            owners.append(number)
    return Patterns(
        np.array(tokens, dtype=np.int32),
        np.array(credits, dtype=np.float64),
        np.array(offsets, dtype=np.int64),
        np.array(owners, dtype=np.int64),
        tuple(phrases),
    )


def spread(found: Patterns) -> Patterns:
    """The same patterns with the weight of a phrase spread over its tokens: a complete match is worth the weight once.

    Then a weight means the same whether a tokenizer spells the phrase in one token or in ten.
    """
    lengths = np.diff(found.offsets)
    return dataclasses.replace(found, credits=found.credits / np.repeat(lengths, lengths))


def whole_words(found: Patterns, pieces: Sequence[bytes | None]) -> Patterns:
    """The same patterns, to be matched where a text has a word boundary before and behind the phrase.

    Letters and digits make words, and all bytes beyond ASCII count as letters; so a phrase that begins or ends with a
    letter of a script without spaces needs no boundary on that side. White space in front of a phrase is no part of it.

    Args:
        pieces: bytes of each token of the vocabulary; None for special ones, which part words.

    Raises:
        InvalidArgumentError: a token outside the vocabulary.
    """
    classes = np.array([_class(piece or b"") for piece in pieces], dtype=np.uint8)
    tokens: list[int] = []
    credits: list[float] = []
    offsets = [0]
    for start, stop in itertools.pairwise(found.offsets.tolist()):
        own, worth = found.tokens[start:stop].tolist(), found.credits[start:stop].tolist()
        require(max(own) < len(pieces), f"phrases hold the token {max(own)}, the vocabulary {len(pieces)} tokens.")
        while len(own) > 1 and (pieces[own[0]] or b" ").isspace():
            own, worth = own[1:], worth[1:]
        symbols, values = _with_boundaries(own, worth, classes)
        text = b"".join(pieces[token] or b"" for token in own).decode("utf-8", "replace").strip()
        span = slice(int(bool(UNSPACED_START.match(text))), len(symbols) - bool(UNSPACED_END.search(text)))
        symbols, values = symbols[span], values[span]
        tokens += symbols
        credits += values
        offsets.append(len(tokens))
    return dataclasses.replace(
        found,
        tokens=np.array(tokens, dtype=np.int32),
        credits=np.array(credits, dtype=np.float64),
        offsets=np.array(offsets, dtype=np.int64),
        classes=classes,
    )


def _with_boundaries(
    tokens: Sequence[int], credits: Sequence[float], classes: npt.NDArray[np.uint8]
) -> tuple[list[int], list[float]]:
    """The tokens as a text holds them that begins and ends with a boundary, and the credit up to each."""
    symbols, values = [WORD_BOUNDARY], [0.0]
    for token, credit in zip(tokens, credits, strict=True):
        if symbols[-1] != WORD_BOUNDARY and not classes[token] & BEGINS_INSIDE:
            symbols.append(WORD_BOUNDARY)
            values.append(values[-1])
        symbols.append(token)
        values.append(credit)
        if not classes[token] & ENDS_INSIDE:
            symbols.append(WORD_BOUNDARY)
            values.append(credit)
    if symbols[-1] != WORD_BOUNDARY:
        symbols.append(WORD_BOUNDARY)
        values.append(values[-1])
    return symbols, values


def _class(piece: bytes) -> int:
    if not piece:
        return 0
    return BEGINS_INSIDE * _is_letter(piece[0]) + ENDS_INSIDE * _is_letter(piece[-1])


def _is_letter(byte: int) -> bool:
    return byte >= 128 or chr(byte).isalnum()
