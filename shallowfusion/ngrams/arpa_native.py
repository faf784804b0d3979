"""The C++ reader of ARPA files: some ten times as fast as the one in Python, for files with nothing unusual in them."""

from __future__ import annotations

from shallowfusion import _native
from shallowfusion.ngrams.model import NgramOrder

__all__ = ["read_plain_arpa"]


def read_plain_arpa(data: bytes) -> tuple[list[str], list[NgramOrder]] | None:
    """Words and n-grams of an ARPA file.

    Returns:
        None at anything unusual, right or wrong: a form this reader does not know, or an error, which the reader in
        Python words.
    """
    found = _native.read_arpa(text=data)
    if found is None:
        return None
    words, orders = found
    try:
        spellings = [word.decode() for word in words]
    except UnicodeDecodeError:
        return None
    return spellings, [
        NgramOrder(ids.reshape(-1, order), log_probs, back_offs)
        for order, (ids, log_probs, back_offs) in enumerate(orders, start=1)
    ]
