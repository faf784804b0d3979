"""Slot tables: which slots the queries of an utterance see, as bits, in one small integer tensor on any device.

Row 0 holds the place of the utterance in the pool and the number of entries; row 1 the slot of each entry; row 2 + w in
bit b whether query 32 * w + b sees it. An attention kernel walks the entries once for all queries (KERNELS 4.5).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["HEADER", "WORD", "advance_table", "slot_table"]

WORD = 32  # queries in one word of bits
HEADER = 2  # rows before the bits


def slot_table(visible: Tensor, places: Tensor | None = None) -> Tensor:
    """The slots that somebody sees, and by whom, as int32 [utterances, 2 + words, width].

    Row 0 holds the place of the utterance in the pool and the number of entries; row 1 the slot of each entry; row
    2 + w in bit b whether query 32 * w + b sees it. The width is a multiple of 16.

    Args:
        visible: bool [utterances, queries, slots].
        places: integers [utterances]; None = in order.
    """
    utterances, queries, slots = visible.shape
    words, device = -(-queries // WORD), visible.device
    padded = torch.nn.functional.pad(visible, (0, 0, 0, words * WORD - queries)).view(utterances, words, WORD, slots)
    shifts = torch.arange(WORD, dtype=torch.int32, device=device)[:, None]
    bits = (padded.to(torch.int32) << shifts).sum(dim=2, dtype=torch.int32)
    live = visible.any(dim=1)
    order = torch.argsort(live.to(torch.int8), dim=1, descending=True, stable=True)
    table = torch.zeros((utterances, HEADER + words, -(-max(slots, 2) // 16) * 16), dtype=torch.int32, device=device)
    table[:, 0, 0] = torch.arange(utterances, device=device) if places is None else places.to(device)
    table[:, 0, 1] = live.sum(dim=1)
    table[:, 1, :slots] = order
    table[:, HEADER:, :slots] = bits.gather(2, order[:, None].expand(-1, words, -1))
    return table


def advance_table(table: Tensor, parents: Tensor, slots: Tensor) -> Tensor:
    """The table after one step of a search: row k descends from row parents[u, k] and writes to slots[u, k].

    Bits are permuted, slots that nobody sees any more drop out, the new slots follow. Shapes do not depend on values
    and nothing synchronises, so that it can be captured. The caller knows that the live slots fit the width.

    Args:
        table: int32 [utterances, 3, width], of at most 32 rows.
        parents: integers [utterances, rows].
        slots: integers [utterances, rows]; -1 = this row writes nothing.
    """
    width, rows = table.shape[2], parents.shape[1]
    number = torch.arange(rows, dtype=torch.int32, device=table.device)
    entry = torch.arange(width, device=table.device)
    old = torch.where(entry < table[:, 0, 1:2], table[:, HEADER], 0)
    inherited = ((old[:, None] >> parents[:, :, None].to(torch.int32)) & 1) << number[:, None]
    fresh = torch.where(slots >= 0, torch.ones_like(number) << number, 0)
    bits = torch.cat([inherited.sum(dim=1, dtype=torch.int32), fresh], dim=1)
    live = bits != 0
    order = torch.argsort(live.to(torch.int8), dim=1, descending=True, stable=True)[:, :width]
    found = table.clone()
    found[:, 0, 1] = live.sum(dim=1)
    found[:, 1] = torch.cat([table[:, 1], slots.to(torch.int32)], dim=1).gather(1, order)
    found[:, HEADER] = bits.gather(1, order)
    return found
