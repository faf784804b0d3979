"""The spellings of many words as one tree of bytes, in arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shallowfusion.config import require

__all__ = ["OUTSIDE", "ROOT", "ByteTrie"]

IntArray = npt.NDArray[np.int64]

ROOT, OUTSIDE = 0, -1
NO_BYTE = 256  # pads spellings and pieces; no node has such a child


class ByteTrie:
    """A node is the beginning of one or more words; `OUTSIDE` stands for all that begins none.

    Price: `descend` is one binary search per row over all nodes. Memory: 16 bytes per node.

    Args:
        words: spellings, none of them empty, no white space in them; each stands for its place.

    Raises:
        InvalidArgumentError: an empty word, or one given twice.
    """

    def __init__(self, words: Sequence[str]) -> None:
        spellings = padded([word.encode() for word in words])
        lengths = (spellings != NO_BYTE).sum(axis=1)
        require(len(words) == 0 or int(lengths.min()) > 0, "words of a trie must not be empty, got one that is.")
        nodes = np.full(len(words), ROOT, dtype=np.int64)
        keys: list[IntArray] = []
        count = 1
        for place in range(spellings.shape[1]):
            live = np.flatnonzero(lengths > place)
            found, which = np.unique(nodes[live] * NO_BYTE + spellings[live, place], return_inverse=True)
            keys.append(found)
            nodes[live] = count + which
            count += len(found)
        self._keys = np.concatenate(keys) if keys else np.zeros(0, dtype=np.int64)
        self._word_of_node = np.full(count, -1, dtype=np.int64)
        self._word_of_node[nodes] = np.arange(len(words))
        require(int((self._word_of_node >= 0).sum()) == len(words), "words of a trie must be distinct, got one twice.")

    def __len__(self) -> int:
        return len(self._word_of_node)

    def descend(self, nodes: IntArray, letters: IntArray) -> IntArray:
        """The node of each spelling with one more byte, `OUTSIDE` if no word begins so.

        Args:
            nodes: int64 [rows], `OUTSIDE` allowed; letters: int64 [rows], 0..255.
        """
        if len(self._keys) == 0:
            return np.full(len(nodes), OUTSIDE, dtype=np.int64)
        wanted = nodes * NO_BYTE + letters
        # Nodes are numbered level by level in the order of their keys, and keys grow with the node they start from.
        found = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        hit = (nodes >= 0) & (self._keys[found] == wanted)
        return np.where(hit, found + 1, OUTSIDE)

    def word(self, nodes: IntArray) -> IntArray:
        """int64 [rows], the word spelled from the root to each node, -1 if it is only the beginning of one."""
        return np.where(nodes >= 0, self._word_of_node[nodes], -1)


def padded(spellings: Sequence[bytes]) -> IntArray:
    """int64 [spellings, longest], bytes filled up with `NO_BYTE`."""
    longest = max(map(len, spellings), default=0)
    filled = np.full((len(spellings), longest), NO_BYTE, dtype=np.int64)
    lengths = np.fromiter(map(len, spellings), dtype=np.int64, count=len(spellings))
    filled[np.arange(longest)[None, :] < lengths[:, None]] = np.frombuffer(b"".join(spellings), dtype=np.uint8)
    return filled
