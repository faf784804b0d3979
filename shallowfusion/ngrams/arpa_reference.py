"""The reader of ARPA files in Python: knows every form they have, and words every error."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shallowfusion.errors import ModelError
from shallowfusion.ngrams.model import LOG_10, NgramOrder

__all__ = ["read_any_arpa"]

MOST_ORDERS = 64
_COUNT = re.compile(rb"ngram\s+(\d{1,4})\s*=\s*(\d{1,15})")


def read_any_arpa(data: bytes, name: str) -> tuple[list[str], list[NgramOrder]]:
    """Words and n-grams of an ARPA file; see `read_arpa`.

    Args:
        name: of the file, for errors.

    Raises:
        ModelError: the file is malformed; the message names the line.
    """
    return _Reader(name, data.split(b"\n")).read()


@dataclass
class _Reader:
    """Walks over the lines of one file."""

    name: str
    lines: list[bytes]
    at: int = 0
    ids: dict[bytes, int] = field(default_factory=dict)
    spellings: list[str] = field(default_factory=list)

    def read(self) -> tuple[list[str], list[NgramOrder]]:
        counts = self._header()
        orders = [self._section(order, counts) for order in range(1, len(counts) + 1)]
        if self._next("the line \\end\\") != b"\\end\\":
            raise self._error(self.at, f"{self._shown(self.at)!r}", "\\end\\ after the n-grams the header counts")
        return self.spellings, orders

    def _next(self, wanted: str) -> bytes:
        """The next line that is not blank, stripped; `at` stands on it."""
        self.at += 1
        while self.at <= len(self.lines):
            line = self.lines[self.at - 1].strip()
            if line:
                return line
            self.at += 1
        raise self._error(len(self.lines), "the end of the file", wanted, "it is cut short, write it again")

    def _header(self) -> list[int]:
        try:
            while self._next("") != b"\\data\\":
                pass
        except ModelError:
            raise self._error(len(self.lines), "no line \\data\\ up to here", "an ARPA file") from None
        counts: list[int] = []
        while not (line := self._next("the n-grams")).startswith(b"\\"):
            found = _COUNT.fullmatch(line)
            if found is None or int(found[1]) != len(counts) + 1 or len(counts) == MOST_ORDERS:
                raise self._error(self.at, f"{self._shown(self.at)!r}", f"'ngram {len(counts) + 1}=COUNT'")
            counts.append(int(found[2]))
        if not counts:
            raise self._error(self.at, f"{self._shown(self.at)!r}", "'ngram 1=COUNT'")
        self.at -= 1
        return counts

    def _section(self, order: int, counts: Sequence[int]) -> NgramOrder:
        title = b"\\%d-grams:" % order
        if self._next(f"{title.decode()!r}") != title:
            raise self._error(
                self.at, f"{self._shown(self.at)!r}", f"{title.decode()!r} after {sum(counts[: order - 1])} n-grams"
            )
        first, count = self.at + 1, counts[order - 1]
        rows = [line.split() for line in self.lines[first - 1 : first - 1 + count]]
        self._check_rows(rows, first, order, count, order < len(counts))
        self.at = first + count - 1
        log_probs = self._numbers([row[0] for row in rows], first, "a log10 probability")
        if order == 1:
            self._add_words([row[1] for row in rows], first)
            words = np.arange(count, dtype=np.int32)[:, None]
        else:
            words = self._words(rows, first, order)
        back_offs = self._numbers(
            [row[order + 1] if len(row) == order + 2 else b"0" for row in rows], first, "a log10 back-off"
        )
        self._refuse_where(log_probs > 1e-6, first, "a log10 probability above 0", "one of at most 0")
        return NgramOrder(words, *(self._nats(values) for values in (log_probs, back_offs)))

    def _check_rows(self, rows: list[list[bytes]], first: int, order: int, count: int, may_back_off: bool) -> None:
        allowed = (order + 1, order + 2) if may_back_off else (order + 1,)
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        wrong = np.flatnonzero(~np.isin(lengths, allowed))
        wanted = f"a log10 probability, {order} word{'s' * (order > 1)}" + " and perhaps a back-off" * may_back_off
        if len(wrong):
            line = first + int(wrong[0])
            heading = self.lines[line - 1].strip()
            if not heading or heading.startswith(b"\\"):
                raise self._error(
                    line, f"only {wrong[0]} {order}-grams", f"{count} as the header counts", "it is cut short or edited"
                )
            raise self._error(line, f"{lengths[wrong[0]]} fields in {self._shown(line)!r}", wanted)
        if len(rows) < count:
            raise self._error(
                len(self.lines), f"only {len(rows)} {order}-grams", f"{count} as the header counts", "it is cut short"
            )

    def _numbers(self, fields: list[bytes], first: int, wanted: str) -> npt.NDArray[np.float64]:
        try:
            numbers = np.array(list(map(float, fields)), dtype=np.float64)
        except ValueError:
            wrong = next(i for i, text in enumerate(fields) if not _is_number(text))
            line = first + wrong
            raise self._error(line, f"{fields[wrong].decode(errors='replace')!r}", wanted) from None
        self._refuse_where(np.isnan(numbers) | (numbers == math.inf), first, "NaN or infinity", wanted)
        return numbers

    def _add_words(self, words: list[bytes], first: int) -> None:
        for i, word in enumerate(words):
            if word in self.ids:
                raise self._error(first + i, f"the unigram {word.decode(errors='replace')!r} twice", "each word once")
            self.ids[word] = i
            try:
                self.spellings.append(word.decode())
            except UnicodeDecodeError:
                raise self._error(first + i, f"{word!r}", "UTF-8 text", "convert the file to UTF-8") from None

    def _words(self, rows: list[list[bytes]], first: int, order: int) -> npt.NDArray[np.int32]:
        named = itertools.chain.from_iterable(row[1 : order + 1] for row in rows)
        ids = np.fromiter((self.ids.get(word, -1) for word in named), dtype=np.int32, count=len(rows) * order)
        ids = ids.reshape(len(rows), order)
        unknown = np.argwhere(ids < 0)
        if len(unknown):
            row, place = (int(i) for i in unknown[0])
            word = rows[row][place + 1].decode(errors="replace")
            raise self._error(first + row, f"the word {word!r}", "words that are unigrams too", "add it to the 1-grams")
        return ids

    def _nats(self, log10_values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        with np.errstate(over="ignore"):
            return (log10_values * LOG_10).astype(np.float32)

    def _refuse_where(self, wrong: npt.NDArray[np.bool_], first: int, got: str, wanted: str) -> None:
        if wrong.any():
            line = first + int(wrong.argmax())
            raise self._error(line, f"{got} in {self._shown(line)!r}", wanted)

    def _shown(self, line: int) -> str:
        text = self.lines[line - 1].strip().decode(errors="replace")
        return text if len(text) <= 80 else text[:77] + "..."

    def _error(
        self, line: int, got: str, wanted: str, cure: str = "correct the line or write the file again"
    ) -> ModelError:
        return ModelError(f"{self.name}, line {line}: got {got}, wanted {wanted}; {cure}.")


def _is_number(text: bytes) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
