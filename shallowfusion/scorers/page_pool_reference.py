"""`PagePool` in plain Python, written for reading: the definition of correct for the native class."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shallowfusion.checks import LARGEST_INTEGER, integer, integer_array
from shallowfusion.config import require
from shallowfusion.errors import CapacityError
from shallowfusion.scorers.page_pool import AppendResult, Int32Array, Int64Array

__all__ = ["ReferencePagePool"]

MOST_SLOTS = int(np.iinfo(np.int32).max)


@dataclass
class Sequence:
    """The pages of one sequence in order, all full but perhaps the last."""

    pages: list[int] = field(default_factory=list)
    length: int = 0


class ReferencePagePool:
    """Sequences of tokens over ref-counted pages; see `PagePoolProtocol`. Here each sequence lists all its pages."""

    def __init__(self, num_pages: int, page_size: int = 16) -> None:
        self._num_pages = integer("num_pages", num_pages, 1, LARGEST_INTEGER)
        self._page_size = integer("page_size", page_size, 1, LARGEST_INTEGER)
        require(
            num_pages * page_size <= MOST_SLOTS,
            f"num_pages * page_size must be from 1 to 2^31 - 1, got {num_pages} * {page_size}.",
        )
        self._sequences: dict[int, Sequence] = {}
        self._next_sequence = 0
        self._references: Counter[int] = Counter()  # sequences that see each page
        self._high_water = 0

    @property
    def num_pages(self) -> int:
        return self._num_pages

    @property
    def page_size(self) -> int:
        return self._page_size

    @property
    def num_free(self) -> int:
        return self._num_pages - self.num_used

    @property
    def num_used(self) -> int:
        return len(self._references)

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    @property
    def high_water(self) -> int:
        return self._high_water

    def create(self) -> int:
        return self._add(Sequence())

    def fork(self, sequence: int) -> int:
        parent = self._at(sequence)
        return self._add(Sequence(list(parent.pages), parent.length))

    def _add(self, sequence: Sequence) -> int:
        self._sequences[self._next_sequence] = sequence
        self._references.update(sequence.pages)
        self._next_sequence += 1
        return self._next_sequence - 1

    def release(self, sequence: int) -> None:
        pages = self._at(sequence).pages
        del self._sequences[sequence]
        for page in pages:
            self._give_back(page)

    def _give_back(self, page: int) -> None:
        self._references[page] -= 1
        if not self._references[page]:
            del self._references[page]
        if not self._references:
            self._high_water = 0

    def _take(self) -> int:
        """The lowest free page."""
        page = next(page for page in range(self._num_pages) if page not in self._references)
        self._references[page] = 1
        return page

    def append(self, sequence: int, count: int = 1) -> AppendResult:
        target = self._at(sequence)
        count = integer("count", count, 0, LARGEST_INTEGER)
        shared = count > 0 and self._must_copy(target)
        room = len(target.pages) * self._page_size - target.length
        missing = max(0, count - room)
        self._check_capacity(-(-missing // self._page_size) + shared)
        copies: list[tuple[int, int]] = []
        if shared:
            old, new = target.pages[-1], self._take()
            target.pages[-1] = new
            filled = range(target.length % self._page_size)
            copies = [(old * self._page_size + at, new * self._page_size + at) for at in filled]
            self._give_back(old)
        slots = [self._push(target) for _ in range(count)]
        return AppendResult(np.array(slots, dtype=np.int32), np.array(copies, dtype=np.int32).reshape(-1, 2))

    def append_each(self, sequences: npt.ArrayLike) -> Int32Array:
        targets = self._distinct(integer_array("sequences", sequences, (None,)))
        require(
            not any(self._must_copy(target) for target in targets),
            "a sequence shares its partly filled last page; use append, which tells what to copy, or page_size 1.",
        )
        self._check_capacity(sum(target.length % self._page_size == 0 for target in targets))
        return np.array([self._push(target) for target in targets], dtype=np.int32)

    def _must_copy(self, sequence: Sequence) -> bool:
        return sequence.length % self._page_size != 0 and self._references[sequence.pages[-1]] > 1

    def _push(self, sequence: Sequence) -> int:
        """Append one token; return its slot."""
        offset = sequence.length % self._page_size
        if offset == 0:
            sequence.pages.append(self._take())
        sequence.length += 1
        slot = sequence.pages[-1] * self._page_size + offset
        self._high_water = max(self._high_water, slot + 1)
        return slot

    def _check_capacity(self, wanted: int) -> None:
        if wanted > self.num_free:
            raise CapacityError(
                f"the pool needs {wanted} more pages and has {self.num_free} of {self._num_pages} free; "
                "release sequences or make a larger pool."
            )

    def reorder(self, sequences: npt.ArrayLike, parents: npt.ArrayLike) -> Int64Array:
        old = integer_array("sequences", sequences, (None,))
        indices = integer_array("parents", parents, (None,))
        self._distinct(old)
        for index in indices:
            require(0 <= index < len(old), f"parents must be from 0 to {len(old) - 1}, got {index}.")
        new = [self.fork(int(old[index])) for index in indices]
        for sequence in old:
            self.release(int(sequence))
        return np.array(new, dtype=np.int64)

    def length(self, sequence: int) -> int:
        return self._at(sequence).length

    def slots(self, sequence: int) -> Int32Array:
        found = self._at(sequence)
        tokens = np.arange(found.length)
        pages = np.array(found.pages, dtype=np.int64)
        return (pages[tokens // self._page_size] * self._page_size + tokens % self._page_size).astype(np.int32)

    def pages(self, sequence: int) -> Int32Array:
        return np.array(self._at(sequence).pages, dtype=np.int32)

    def visibility(self, sequences: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        rows = integer_array("sequences", sequences, (None,))
        visible = np.zeros((len(rows), self._high_water), dtype=np.bool_)
        for row, sequence in enumerate(rows):
            visible[row, self.slots(int(sequence))] = True
        return visible

    def _at(self, sequence: int) -> Sequence:
        number = integer("sequence", sequence, 0, LARGEST_INTEGER)
        require(number in self._sequences, f"sequence {number} is unknown; it was released or never created.")
        return self._sequences[number]

    def _distinct(self, sequences: Int64Array) -> list[Sequence]:
        found = [self._at(int(sequence)) for sequence in sequences]
        require(len(np.unique(sequences)) == len(sequences), "sequences must be distinct.")
        return found
