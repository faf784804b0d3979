"""Phrases as token sequences with what each beginning of them is worth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shallowfusion.checks import integer
from shallowfusion.config import require

__all__ = ["Patterns", "patterns", "spread"]

LARGEST_TOKEN = int(np.iinfo(np.int32).max)


@dataclass(frozen=True, eq=False)
class Patterns:
    """Token sequences to look for; several may spell one phrase.

    Args:
        tokens: int32 [tokens], of one pattern after the other.
        credits: float64 [tokens], nats: what a match of the pattern up to each token is worth.
        offsets: int64 [patterns + 1]; pattern i holds tokens[offsets[i] : offsets[i + 1]].
        phrases: int64 [patterns], which phrase each spells.
        texts: of the phrases.
    """

    tokens: npt.NDArray[np.int32]
    credits: npt.NDArray[np.float64]
    offsets: npt.NDArray[np.int64]
    phrases: npt.NDArray[np.int64]
    texts: tuple[str, ...] = ()

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
