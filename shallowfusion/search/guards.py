"""Against loops: tokens that would repeat what a row has said are forbidden."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["RepeatGuard"]

Array = npt.NDArray[Any]


class RepeatGuard:
    """Forbids any token that would make a row hold the same `size` tokens twice, as transformers' search does.

    Price: O(tokens so far) per row and step.

    Args:
        size: of the token groups.
        prompts: token ids each utterance starts from; they count as said.
    """

    def __init__(self, size: int, prompts: Sequence[Sequence[int]]) -> None:
        self.size = size
        self._said = [[tuple(prompt)] for prompt in prompts]

    def forbidden(self) -> tuple[Array, Array]:
        """Rows of the whole batch and token ids, int64 [entries] each, of which no row may say its own."""
        rows: list[int] = []
        tokens: list[int] = []
        row = 0
        for utterance in self._said:
            for said in utterance:
                tail = said[len(said) - self.size + 1 :]
                for start in range(len(said) - self.size + 1):
                    if said[start : start + self.size - 1] == tail:
                        rows.append(row)
                        tokens.append(said[start + self.size - 1])
                row += 1
        return np.array(rows, dtype=np.int64), np.array(tokens, dtype=np.int64)

    def follow(self, parents: Array, tokens: Array) -> None:
        """Row k of utterance u now continues its old row parents[u, k] with tokens[u, k]."""
        self._said = [
            [(*said[parent], int(token)) for parent, token in zip(own_parents, own_tokens, strict=True)]
            for said, own_parents, own_tokens in zip(self._said, parents, tokens, strict=True)
        ]

    def keep(self, order: Sequence[int]) -> None:
        """Place i of the new batch holds what was at place order[i]."""
        self._said = [self._said[place] for place in order]
