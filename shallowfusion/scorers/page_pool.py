"""Ref-counted pages of key/value slots: which slot of a cache each token of each sequence lies in. Ids only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shallowfusion import _native
from shallowfusion.checks import LARGEST_INTEGER, integer, integer_array

__all__ = ["AppendResult", "PagePool", "PagePoolProtocol"]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class AppendResult:
    """Where appended tokens go.

    Args:
        slots: int32 [tokens], in order.
        copies: int32 [copies, 2], pairs (source slot, target slot) the owner of the cache must copy before it reads;
            the first tokens of a partly filled page that another sequence still sees. Empty with `page_size` 1.
    """

    slots: Int32Array
    copies: Int32Array


class PagePoolProtocol(Protocol):
    """Sequences of tokens over `num_pages` pages of `page_size` slots; slot = page * page_size + offset.

    Forks share pages. Free pages are handed out lowest first, so that the slots in use stay close together and the
    same calls give the same slots. Pages come back when the last sequence that sees them is released.

    Cost: fork, release and each reordered sequence O(1) plus pages freed; append O(tokens); slots and visibility
    O(length). Memory: 8 bytes per page ever used, 32 bytes per sequence.

    Every method raises `InvalidArgumentError` for sequences that are unknown or released and for arguments of the
    wrong type or shape, and `CapacityError` when pages run out; nothing is changed then.
    """

    @property
    def num_pages(self) -> int: ...

    @property
    def page_size(self) -> int: ...

    @property
    def num_free(self) -> int: ...

    @property
    def num_used(self) -> int: ...

    @property
    def num_sequences(self) -> int: ...

    @property
    def high_water(self) -> int:
        """1 + the largest slot in use since the pool was last empty; 0 for an empty pool."""
        ...

    def create(self) -> int:
        """Return the id of a new, empty sequence. Ids are never used again."""
        ...

    def fork(self, sequence: int) -> int:
        """Return the id of a new sequence that shares every page of `sequence`."""
        ...

    def release(self, sequence: int) -> None:
        """Forget a sequence; its pages that no other sequence sees become free."""
        ...

    def append(self, sequence: int, count: int = 1) -> AppendResult:
        """Lengthen a sequence by `count` >= 0 tokens."""
        ...

    def append_each(self, sequences: npt.ArrayLike) -> Int32Array:
        """Lengthen each of some distinct sequences by one token.

        Args:
            sequences: int64 [sequences]; none may need a copy: a partly filled last page must not be shared.

        Returns:
            int32 [sequences], the new slots.
        """
        ...

    def reorder(self, sequences: npt.ArrayLike, parents: npt.ArrayLike) -> Int64Array:
        """Return new sequences, the i-th a fork of sequences[parents[i]], and release the old ones. Moves no data.

        Args:
            sequences: int64 [sequences], distinct.
            parents: int64 [new sequences], indices into `sequences`.

        Returns:
            int64 [new sequences].
        """
        ...

    def length(self, sequence: int) -> int:
        """The number of tokens."""
        ...

    def slots(self, sequence: int) -> Int32Array:
        """int32 [length], the slot of each token."""
        ...

    def pages(self, sequence: int) -> Int32Array:
        """int32 [ceil(length / page_size)], in order."""
        ...

    def visibility(self, sequences: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """bool [sequences, high_water], which slots each sequence sees."""
        ...


class PagePool:
    """The C++ page pool; see `PagePoolProtocol`.

    Args:
        num_pages: at least 1; num_pages * page_size slots are numbered in int32.
        page_size: tokens per page; 1 never copies.
    """

    def __init__(self, num_pages: int, page_size: int = 16) -> None:
        self._native = _native.PagePool(
            num_pages=integer("num_pages", num_pages, 1, LARGEST_INTEGER),
            page_size=integer("page_size", page_size, 1, LARGEST_INTEGER),
        )

    @property
    def num_pages(self) -> int:
        return self._native.num_pages

    @property
    def page_size(self) -> int:
        return self._native.page_size

    @property
    def num_free(self) -> int:
        return self._native.num_free

    @property
    def num_used(self) -> int:
        return self._native.num_used

    @property
    def num_sequences(self) -> int:
        return self._native.num_sequences

    @property
    def high_water(self) -> int:
        return self._native.high_water

    def create(self) -> int:
        return self._native.create()

    def fork(self, sequence: int) -> int:
        return self._native.fork(sequence=_sequence(sequence))

    def release(self, sequence: int) -> None:
        self._native.release(sequence=_sequence(sequence))

    def append(self, sequence: int, count: int = 1) -> AppendResult:
        tokens = integer("count", count, 0, LARGEST_INTEGER)
        return AppendResult(*self._native.append(sequence=_sequence(sequence), count=tokens))

    def append_each(self, sequences: npt.ArrayLike) -> Int32Array:
        return self._native.append_each(sequences=integer_array("sequences", sequences, (None,)))

    def reorder(self, sequences: npt.ArrayLike, parents: npt.ArrayLike) -> Int64Array:
        old = integer_array("sequences", sequences, (None,))
        return self._native.reorder(sequences=old, parents=integer_array("parents", parents, (None,)))

    def length(self, sequence: int) -> int:
        return self._native.length(sequence=_sequence(sequence))

    def slots(self, sequence: int) -> Int32Array:
        return self._native.slots(sequence=_sequence(sequence))

    def pages(self, sequence: int) -> Int32Array:
        return self._native.pages(sequence=_sequence(sequence))

    def visibility(self, sequences: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        return self._native.visibility(sequences=integer_array("sequences", sequences, (None,)))


def _sequence(sequence: int) -> int:
    return integer("sequence", sequence, 0, LARGEST_INTEGER)
