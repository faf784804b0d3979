"""Attention for beams in plain torch, float64: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["frame_attention_reference", "slot_attention_reference", "write_slots_reference"]

HEADER = 2
WORD = 32


def slot_attention_reference(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, scale: float) -> Tensor:
    """softmax over the entries a query sees of (scale * query . key), times their values; nothing seen gives zeros.

    Args:
        query: [utterances, queries, heads, dim].
        keys, values: [places, slots, key_heads, dim]; heads is a multiple of key_heads, which share neighbours.
        table: int32 [utterances, 2 + words, width]: row 0 holds the place of the utterance and the number of entries,
            row 1 the slot of each entry, row 2 + w in bit b whether query 32 * w + b sees it.

    Returns:
        [utterances, queries, heads, dim] in the dtype of the queries.
    """
    found = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    for i, rows in enumerate(table.tolist()):
        place, count = rows[0][:2]
        for q in range(query.shape[1]):
            word = rows[HEADER + q // WORD][:count]
            slots = [slot for slot, bits in zip(rows[1], word, strict=False) if bits >> (q % WORD) & 1]
            if slots:
                found[i, q] = _attended(query[i, q], keys[place, slots], values[place, slots], scale)
    return found.to(query.dtype)


def frame_attention_reference(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None, scale: float
) -> Tensor:
    """Every query of an utterance sees its frames [0, lengths[utterance]); nothing to see gives zeros.

    Args:
        query: [utterances, queries, heads, dim].
        keys, values: [utterances, frames, key_heads, dim].
        lengths: int32 [utterances]; None = all frames.

    Returns:
        [utterances, queries, heads, dim] in the dtype of the queries.
    """
    found = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    counts = [keys.shape[1]] * len(query) if lengths is None else lengths.tolist()
    for i, count in enumerate(counts):
        if count:
            for q in range(query.shape[1]):
                found[i, q] = _attended(query[i, q], keys[i, :count], values[i, :count], scale)
    return found.to(query.dtype)


def write_slots_reference(
    new_keys: Tensor, new_values: Tensor, keys: Tensor, values: Tensor, slots: Tensor, places: Tensor | None = None
) -> None:
    """Copies the key and the value of each query into its slot; those of slot -1 nowhere.

    Args:
        new_keys, new_values: [utterances, queries, key_heads, dim].
        keys, values: [places, slots, key_heads, dim], written in place.
        slots: integers [utterances, queries]; no two alike in an utterance, but those nobody reads.
        places: integers [utterances], where in the pool each utterance lies; None = in order.
    """
    order = range(len(slots)) if places is None else places.tolist()
    for i, (place, own) in enumerate(zip(order, slots.tolist(), strict=True)):
        for q, slot in enumerate(own):
            if slot >= 0:
                keys[place, slot] = new_keys[i, q]
                values[place, slot] = new_values[i, q]


def _attended(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """[heads, dim] over [seen, key_heads, dim], float64."""
    group = query.shape[0] // keys.shape[1]
    spread = [part.double().repeat_interleave(group, dim=1) for part in (keys, values)]
    scores = scale * torch.einsum("hd,shd->hs", query.double(), spread[0])
    return torch.einsum("hs,shd->hd", torch.softmax(scores, dim=1), spread[1])
