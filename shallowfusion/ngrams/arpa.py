"""ARPA files, the text form of n-gram models: base-10 logs become nats where they enter."""

from __future__ import annotations

import gzip
import itertools
import logging
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shallowfusion.config import require
from shallowfusion.errors import ModelError
from shallowfusion.ngrams.model import (
    BEGIN,
    END,
    LOG_10,
    UNKNOWN,
    UNKNOWN_LOG_PROB,
    NgramModel,
    NgramOrder,
)

__all__ = ["is_arpa", "read_arpa", "write_arpa"]

logger = logging.getLogger(__name__)

ENDINGS = (".arpa", ".arpa.gz")
UNKNOWN_SPELLINGS = (UNKNOWN.encode(), b"<UNK>")
BEGIN_LOG10_PROB = -99.0  # of <s>, which is never predicted
MOST_ORDERS = 64
_COUNT = re.compile(rb"ngram\s+(\d{1,4})\s*=\s*(\d{1,15})")


def is_arpa(name: str | Path) -> bool:
    """Whether a name is that of an ARPA file: it ends in .arpa or .arpa.gz."""
    return str(name).lower().endswith(ENDINGS)


def read_arpa(path: str | Path, unknown_log_prob: float = UNKNOWN_LOG_PROB) -> NgramModel:
    """Read an ARPA file, plain or gzipped, of any order.

    Fields may be parted by tabs or spaces; missing back-offs are 0; text before the header is skipped. The unknown
    word may be spelled <unk> or <UNK>; a file without it gets one, as it gets missing <s> (never predicted) and </s>
    (scored like an unknown word).

    Args:
        unknown_log_prob: nats, of words outside a model that has no <unk>.

    Raises:
        ModelError: the file is missing, truncated or malformed; the message names the line.
    """
    require(unknown_log_prob <= 0, f"unknown_log_prob must be a log-probability (nats, <= 0), got {unknown_log_prob}.")
    return _Reader(str(path), _lines(Path(path))).model(unknown_log_prob)


def _lines(path: Path) -> list[bytes]:
    if not path.is_file():
        raise ModelError(f"{path} is not a file; give an ARPA file, plain or gzipped.")
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ModelError(f"{path} cannot be read ({error}); it may be cut short, fetch or write it again.") from error
    return data.split(b"\n")


@dataclass
class _Reader:
    """Walks over the lines of one file."""

    name: str
    lines: list[bytes]
    at: int = 0
    ids: dict[bytes, int] = field(default_factory=dict)
    spellings: list[str] = field(default_factory=list)

    def model(self, unknown_log_prob: float) -> NgramModel:
        counts = self._header()
        orders = [self._section(order, counts) for order in range(1, len(counts) + 1)]
        if self._next("the line \\end\\") != b"\\end\\":
            raise self._error(self.at, f"{self._shown(self.at)!r}", "\\end\\ after the n-grams the header counts")
        while len(orders) > 1 and len(orders[-1]) == 0:
            orders.pop()
        unigrams, specials = self._with_specials(orders[0], unknown_log_prob)
        return NgramModel(tuple(self.spellings), (unigrams, *orders[1:]), *specials, name=self.name)

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

    def _with_specials(self, unigrams: NgramOrder, unknown_log_prob: float) -> tuple[NgramOrder, tuple[int, int, int]]:
        """The unigrams with those of <s>, </s> and <unk> the file lacks, and the ids of the three."""
        unknown = next((self.ids[word] for word in UNKNOWN_SPELLINGS if word in self.ids), None)
        extra: list[float] = []
        if unknown is None:
            unknown = self._new_word(UNKNOWN, extra, unknown_log_prob)
        else:
            unknown_log_prob = float(unigrams.log_probs[unknown])
        begin, end = self.ids.get(BEGIN.encode()), self.ids.get(END.encode())
        if begin is None:
            begin = self._new_word(BEGIN, extra, BEGIN_LOG10_PROB * LOG_10)
        if end is None:
            end = self._new_word(END, extra, unknown_log_prob)
        added = np.array(extra, dtype=np.float32)
        words = np.arange(len(self.spellings), dtype=np.int32)[:, None]
        log_probs = np.concatenate([unigrams.log_probs, added])
        back_offs = np.concatenate([unigrams.back_offs, np.zeros_like(added)])
        return NgramOrder(words, log_probs, back_offs), (begin, end, unknown)

    def _new_word(self, word: str, log_probs: list[float], log_prob: float) -> int:
        logger.warning("%s has no %s; it is added with %.2f nats", self.name, word, log_prob)
        self.spellings.append(word)
        log_probs.append(log_prob)
        return len(self.spellings) - 1

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


def write_arpa(model: NgramModel, path: str | Path) -> None:
    """Write an ARPA file, gzipped if its name ends in .gz. Base-10 logs with 7 digits; back-offs of 0 are left out.

    Raises:
        ModelError: the file cannot be written, or a word holds white space and so cannot stand in one.
    """
    for word in model.words:
        if not word or word.encode().split() != [word.encode()]:
            raise ModelError(f"the word {word!r} cannot stand in an ARPA file, wanted words without white space.")
    target = Path(path)
    try:
        # No time of writing in the header of a gzip file: equal models give equal files.
        with open(target, "wb") as raw:
            if target.suffix == ".gz":
                with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
                    packed.writelines(_written(model))
            else:
                raw.writelines(_written(model))
    except OSError as error:
        raise ModelError(f"{target} cannot be written ({error.strerror}); give a place that can.") from error


def _written(model: NgramModel) -> Iterator[bytes]:
    counts = "".join(f"ngram {order}={len(ngrams)}\n" for order, ngrams in enumerate(model.orders, start=1))
    yield f"\\data\\\n{counts}".encode()
    for order, ngrams in enumerate(model.orders, start=1):
        yield f"\n\\{order}-grams:\n".encode()
        log_probs = (ngrams.log_probs.astype(np.float64) / LOG_10).tolist()
        back_offs = (ngrams.back_offs.astype(np.float64) / LOG_10).tolist()
        for words, log_prob, back_off in zip(ngrams.words.tolist(), log_probs, back_offs, strict=True):
            text = " ".join([model.words[word] for word in words])
            tail = f"\t{back_off:.7g}" if back_off != 0.0 and order < model.order else ""
            yield f"{log_prob:.7g}\t{text}{tail}\n".encode()
    yield b"\n\\end\\\n"
