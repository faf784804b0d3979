"""Slot tables: which slots the queries of an utterance see, as bits, in one small integer tensor on any device.

Row 0 holds the place of the utterance in the pool and the number of entries; row 1 the slot of each entry; row 2 + w in
bit b whether query 32 * w + b sees it. An attention kernel walks the entries once for all queries (KERNELS 4.5). A
device-driven search keeps its tables itself: `follow_slots` permutes bits, drops slots that nobody sees and appends
those just written.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["HEADER", "WORD", "slot_table"]

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
