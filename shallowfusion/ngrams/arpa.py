"""ARPA files, the text form of n-gram models: base-10 logs become nats where they enter."""

from __future__ import annotations

import gzip
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shallowfusion.config import require
from shallowfusion.errors import ModelError
from shallowfusion.ngrams.arpa_native import read_plain_arpa
from shallowfusion.ngrams.arpa_reference import read_any_arpa
from shallowfusion.ngrams.model import BEGIN, END, LOG_10, UNKNOWN, UNKNOWN_LOG_PROB, NgramModel, NgramOrder

__all__ = ["is_arpa", "read_arpa", "write_arpa"]

logger = logging.getLogger(__name__)

ENDINGS = (".arpa", ".arpa.gz")
UNKNOWN_SPELLINGS = (UNKNOWN, "<UNK>")
BEGIN_LOG10_PROB = -99.0  # of <s>, which is never predicted


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
    name, data = str(path), _data(Path(path))
    found = read_plain_arpa(data)
    if found is None:
        logger.info("%s is read in Python, as the faster reader knows only plain ARPA files", name)
        found = read_any_arpa(data, name)
    spellings, orders = found
    while len(orders) > 1 and len(orders[-1]) == 0:
        orders.pop()
    return _with_specials(spellings, orders, unknown_log_prob, name)


def _data(path: Path) -> bytes:
    if not path.is_file():
        raise ModelError(f"{path} is not a file; give an ARPA file, plain or gzipped.")
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise ModelError(f"{path} cannot be read ({error}); it may be cut short, fetch or write it again.") from error


def _with_specials(spellings: list[str], orders: list[NgramOrder], unknown_log_prob: float, name: str) -> NgramModel:
    """The model, with unigrams of <s>, </s> and <unk> where the file lacks them."""
    ids = {word: i for i, word in enumerate(spellings)}
    unigrams, log_probs = orders[0], list[float]()

    def place(word: str, log_prob: float) -> int:
        if word not in ids:
            logger.warning("%s has no %s; it is added with %.2f nats", name, word, log_prob)
            ids[word] = len(ids)
            log_probs.append(log_prob)
        return ids[word]

    unknown = place(next((word for word in UNKNOWN_SPELLINGS if word in ids), UNKNOWN), unknown_log_prob)
    begin = place(BEGIN, BEGIN_LOG10_PROB * LOG_10)
    end = place(END, float(unigrams.log_probs[unknown]) if unknown < len(unigrams) else unknown_log_prob)
    added = np.array(log_probs, dtype=np.float32)
    completed = NgramOrder(
        np.arange(len(ids), dtype=np.int32)[:, None],
        np.concatenate([unigrams.log_probs, added]),
        np.concatenate([unigrams.back_offs, np.zeros_like(added)]),
    )
    return NgramModel(tuple(ids), (completed, *orders[1:]), begin, end, unknown, name)


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
