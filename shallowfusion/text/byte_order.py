"""A vocabulary in the order of its tokens' bytes: the tokens that start with given bytes are neighbours."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["ByteOrder"]

EMPTY = (0, 0)


class ByteOrder:
    """Look-ups by bytes in one vocabulary; tokens without text come last and are never found.

    Price: O(log vocab) byte comparisons per look-up, kept for prefixes seen before; 16 bytes and the text per token.

    Args:
        tokens: the bytes of each token; None or empty for those without text.

    Source: the sorted vocabulary of 2405.14259 and 2506.14123.
    """

    def __init__(self, tokens: Sequence[bytes | None]) -> None:
        texts = sorted((token, i) for i, token in enumerate(tokens) if token)
        silent = [i for i, token in enumerate(tokens) if not token]
        self.order: npt.NDArray[np.int32] = np.array([*(i for _, i in texts), *silent], dtype=np.int32)
        self.places: npt.NDArray[np.int32] = np.empty_like(self.order)
        self.places[self.order] = np.arange(len(self.order), dtype=np.int32)
        self.longest = max((len(token) for token, _ in texts), default=0)
        self._texts = [token for token, _ in texts]
        self._known: dict[bytes, tuple[int, int]] = {b"": (0, len(self._texts))}
        self._same: dict[bytes, tuple[int, ...]] = {}

    def prefix_range(self, prefix: bytes) -> tuple[int, int]:
        """Places [first, last) of the tokens whose bytes start with `prefix`; (0, 0) if there are none."""
        found = self._known.get(prefix)
        if found is None:
            found = self._search(prefix) if len(prefix) <= self.longest else EMPTY
            if found != EMPTY:  # there is no end of others
                self._known[prefix] = found
        return found

    def tokens_of(self, text: bytes) -> tuple[int, ...]:
        """Ids of the tokens whose bytes are `text`, lowest first."""
        found = self._same.get(text)
        if found is None:
            first, last = self.prefix_range(text)
            stop = first
            while stop < last and self._texts[stop] == text:
                stop += 1
            found = tuple(self.order[first:stop].tolist())
            if found:
                self._same[text] = found
        return found

    def missing_bytes(self) -> set[int]:
        """The bytes that are no token by themselves."""
        return {byte for byte in range(256) if not self.tokens_of(bytes([byte]))}

    def _search(self, prefix: bytes) -> tuple[int, int]:
        first = bisect_left(self._texts, prefix)
        # the first text that does not start with the prefix and is not before it
        head = prefix.rstrip(b"\xff")
        last = len(self._texts) if not head else bisect_left(self._texts, head[:-1] + bytes([head[-1] + 1]))
        return (first, last) if first < last else EMPTY
