"""Equal texts of different labels as one in the device search: their masses meet before the beam is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["candidates_of", "joined"]

LABEL_FACTOR = -0x61C8864680B583EB  # odd


def candidates_of(beam_size: int) -> int:
    """How many of the best candidates may meet; the C++ search keeps as many while it looks."""
    return beam_size + max(64, beam_size)


def joined(
    texts: Tensor, last: Tensor, blank: Tensor, label: Tensor, add: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Masses of candidates once those of equal texts and endings are one: the largest has all of it, the others none.

    Price: 2 * (8 + 4 * log2(candidates)) launches.

    Args:
        texts: int64 [utterances, candidates], equal where texts are.
        last: int64, last labels, which masses that end in a label must share to meet.
        blank, label: float64, logs of masses that end in blank and in the last label.
        add: of logs of masses.
    """
    return _joined(texts, blank, add), _joined(texts * LABEL_FACTOR + last, label, add)


def _joined(keys: Tensor, masses: Tensor, add: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    by_mass = masses.sort(dim=1, descending=True, stable=True).indices
    keys, by_key = keys.gather(1, by_mass).sort(dim=1, stable=True)
    order = by_mass.gather(1, by_key)
    sums = masses.gather(1, order)
    reach = 1
    while reach < keys.shape[1]:  # each place takes what lies behind it in its group, twice as far every time
        is_same = keys[:, reach:] == keys[:, :-reach]
        sums = torch.cat(
            [torch.where(is_same, add(sums[:, :-reach], sums[:, reach:]), sums[:, :-reach]), sums[:, -reach:]], 1
        )
        reach *= 2
    is_later = torch.zeros_like(keys, dtype=torch.bool)
    is_later[:, 1:] = keys[:, 1:] == keys[:, :-1]
    return torch.empty_like(sums).scatter_(1, order, sums.masked_fill(is_later, -math.inf))
