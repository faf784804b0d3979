"""The device-driven step in plain Python, written for reading: the same arrays in, the same bits out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shallowfusion.kernels.beam_advance_arrays import (
    HEADER_WORDS,
    RING_ENTRIES,
    AdvanceTables,
    BeamArrays,
    SlotArrays,
)
from shallowfusion.values import Candidates, RowStatistics

__all__ = ["beam_advance_reference", "follow_slots_reference", "hash_of_step", "limit_end_reference"]

ACTIVE, DONE, FLAGGED = 1, 2, 4
END_LENGTHS, END_LAG, END_MARGIN = 3, 2, -10.0
IMPOSSIBLE = float("-inf")
WORD = 2**64
STRIDE, CHAIN = 0x1E3779B97F4A7C15, 0x5851F42D4C957F2D
FIRST_FACTOR, SECOND_FACTOR = 0x3F58476D1CE4E5B9, 0x14D049BB133111EB


@dataclass(frozen=True)
class Offer:
    """A possible candidate: what it is and where it stands among the possible ones."""

    rank: int
    total: np.float32
    parent: int
    token: int


def mixed(word: int) -> int:
    """A 64-bit word of which every bit depends on every bit of `word`."""
    word ^= word >> 33
    word = word * FIRST_FACTOR % WORD
    word ^= word >> 29
    word = word * SECOND_FACTOR % WORD
    return word ^ word >> 32


def hash_of_step(
    before: int, tokens: list[int], parents: list[int], totals: npt.NDArray[np.float32], length: int, status: int
) -> int:
    """Hash of everything decided so far; lanes and steps count in their order.

    Args:
        before: the hash after the step before, 0 to 2^64 - 1.
        totals: float32 [beam_size], bit for bit.
        length: tokens of the live hypotheses now.
        status: ACTIVE, with DONE and FLAGGED where they hold.
    """
    bits = totals.view(np.uint32).tolist()
    words = 0
    for lane, (token, parent, total) in enumerate(zip(tokens, parents, bits, strict=True)):
        words += mixed(((token % 2**32 << 32 | total) + (lane * 1024 + parent + 1) * STRIDE) % WORD)
    return mixed((before * CHAIN + words + length * 8 + status) % WORD)


def beam_advance_reference(tables: AdvanceTables, arrays: BeamArrays, candidates: Candidates) -> None:
    """Move every search that is not done one token on, as `BeamState` would; leave a record in the ring."""
    for utterance in range(len(arrays.lengths)):
        tick, clock = int(arrays.ticks[utterance]), int(arrays.clocks[utterance])
        arrays.ticks[utterance], arrays.clocks[utterance] = (tick + 1) % RING_ENTRIES, clock + 1
        record = arrays.ring[tick, utterance].numpy()
        if arrays.done[utterance]:
            record[:2] = clock, DONE
        else:
            _advance(tables, arrays, candidates, utterance, record)
            record[0] = clock
            _edit(tables, arrays, utterance, clock + 1)


def _edit(tables: AdvanceTables, arrays: BeamArrays, utterance: int, step: int) -> None:
    """Let the tokens be said that were forbidden until the coming step."""
    masks = arrays.masks.view(len(arrays.lengths), -1, arrays.masks.shape[1])
    edits = (memory[utterance].tolist() for memory in (tables.edit_words, tables.edit_until, tables.edit_bits))
    for word, until, bits in zip(*edits, strict=True):
        if until == step:
            arrays.place_masks[utterance, word] |= bits
            masks[utterance, :, word] = arrays.place_masks[utterance, word]


def _advance(
    tables: AdvanceTables, arrays: BeamArrays, candidates: Candidates, utterance: int, record: npt.NDArray[np.int32]
) -> None:
    settings, beam_size, most = tables.settings, tables.settings.beam_size, int(tables.limits[utterance, 0])
    lanes = _lanes(candidates, utterance, beam_size)
    offers = _offers(candidates, utterance, lanes)
    length = int(arrays.lengths[utterance]) + bool(offers)
    finishing, living = _choose(tables, utterance, offers, length, int(arrays.finished[utterance]))
    living = living[:beam_size]
    stops = _finish(tables, arrays, utterance, finishing, living, length) or not living
    stops = stops or length >= most
    chosen = [] if stops else living
    dead = settings.end_ids[0] if settings.end_ids else 0
    missing = beam_size - len(chosen)
    tokens = [offer.token for offer in chosen] + [dead] * missing
    parents = [offer.parent for offer in chosen] + [0] * missing
    totals = np.array([offer.total for offer in chosen] + [IMPOSSIBLE] * missing, dtype=np.float32)
    rows = slice(utterance * beam_size, (utterance + 1) * beam_size)
    arrays.tokens[utterance] = torch.tensor(tokens)
    arrays.parents[utterance] = torch.tensor(parents)
    arrays.totals[rows] = torch.from_numpy(totals)
    arrays.weights[rows] = tables.weights[utterance, length]
    arrays.lengths[utterance], arrays.done[utterance] = length, int(stops)
    status = ACTIVE + DONE * stops + FLAGGED * bool(candidates.flags[rows].any())
    before = int(arrays.hashes[utterance]) % WORD
    code = hash_of_step(before, tokens, parents, totals, length, status)
    arrays.hashes[utterance] = code - WORD if code >= WORD // 2 else code
    low, high = np.array([code % 2**32, code >> 32], dtype=np.uint32).view(np.int32)
    record[1:5] = status, low, high, length
    parts = candidates.parts[utterance].numpy().reshape(-1).view(np.int32)
    bits = candidates.totals[utterance].numpy().view(np.int32)
    record[HEADER_WORDS:] = np.concatenate([bits, lanes, candidates.token_ids[utterance].numpy(), parts])


def _lanes(candidates: Candidates, utterance: int, beam_size: int) -> npt.NDArray[np.int64]:
    rows = candidates.parent_rows[utterance].numpy()
    return np.where(rows >= 0, rows - utterance * beam_size, -1)


def _offers(candidates: Candidates, utterance: int, lanes: npt.NDArray[np.int64]) -> list[Offer]:
    offers: list[Offer] = []
    totals, tokens = candidates.totals[utterance].numpy(), candidates.token_ids[utterance].tolist()
    for total, lane, token in zip(totals, lanes.tolist(), tokens, strict=True):
        if lane >= 0 and np.isfinite(total):
            offers.append(Offer(len(offers), total, lane, token))
    return offers


def _choose(
    tables: AdvanceTables, utterance: int, offers: list[Offer], length: int, finished: int
) -> tuple[list[Offer], list[Offer]]:
    """Which offers finish and which live on, best first."""
    settings, beam_size = tables.settings, tables.settings.beam_size
    most, most_finished = tables.limits[utterance].tolist()
    ends = [offer for offer in offers if offer.token in settings.end_ids]
    words = [offer for offer in offers if offer.token not in settings.end_ids]
    if settings.stop_rule == "hf":
        at_limit = length >= most
        stopping = offers if at_limit else ends
        return [offer for offer in stopping if offer.rank < beam_size], [] if at_limit else words
    if settings.stop_rule == "whisper":
        # ends met before beam_size others are in place
        enough = words[beam_size - 1].rank if len(words) >= beam_size else len(offers)
        met = [offer for offer in ends if offer.rank < enough]
        return met[: max(0, most_finished - finished)], words
    return [offer for offer in ends if offer.rank < beam_size], [offer for offer in words if offer.rank < beam_size]


def _finish(
    tables: AdvanceTables, arrays: BeamArrays, utterance: int, finishing: list[Offer], living: list[Offer], length: int
) -> bool:
    """Put what finishes into the pool; whether the stop rule is content."""
    settings, beam_size = tables.settings, tables.settings.beam_size
    count = int(arrays.finished[utterance])
    if settings.stop_rule == "hf":
        with np.errstate(over="ignore"):
            fresh = [float(offer.total / tables.scales[utterance, length].numpy()) for offer in finishing]
            pool = sorted([*arrays.keys[utterance, :count].tolist(), *fresh], reverse=True)[:beam_size]
            arrays.keys[utterance, : len(pool)] = torch.tensor(pool)
            arrays.finished[utterance] = len(pool)
            if len(pool) < beam_size or not living:
                return False
            if settings.early_stopping == "first" or beam_size == 1:
                return True
            return float(living[0].total / tables.stop_scales[utterance, length].numpy()) <= pool[-1]
    arrays.finished[utterance] = count + len(finishing)
    if settings.stop_rule == "whisper":
        return count + len(finishing) >= int(tables.limits[utterance, 1])
    if living or finishing:
        own = max((float(offer.total) for offer in finishing), default=IMPOSSIBLE)
        arrays.ended_totals[utterance, length] = own
        arrays.keys[utterance, 0] = max(float(arrays.keys[utterance, 0]), own)
    return _end_detected(arrays.ended_totals[utterance].double(), float(arrays.keys[utterance, 0]), length)


def _end_detected(ended: Tensor, best: float, length: int) -> bool:
    past = [length - END_LAG - age for age in range(END_LENGTHS)]
    return best > IMPOSSIBLE and all(
        at >= 1 and float(ended[at]) > IMPOSSIBLE and float(ended[at]) - best < END_MARGIN for at in past
    )


def follow_slots_reference(arrays: BeamArrays, slots: SlotArrays, mapping: Tensor | None, vocab: int) -> None:
    """What the lanes of every utterance that is not done read next, and which slots each sees then.

    A table of one that is done keeps one entry, so that attention reads no more for it.
    """
    beam_size = arrays.parents.shape[1]
    slots.counts[arrays.done != 0] = slots.counts[arrays.done != 0].clamp(max=1)
    for utterance in (arrays.done == 0).nonzero().view(-1).tolist():
        parents, tokens = arrays.parents[utterance].tolist(), arrays.tokens[utterance].tolist()
        own = [int(mapping[t]) if mapping is not None else t if t < vocab else -1 for t in tokens]
        seen, last, places = (
            memory[utterance].tolist() for memory in (slots.seen, slots.last_tokens, slots.last_slots)
        )
        count = int(slots.counts[utterance])
        listed = zip(slots.slots[utterance, :count].tolist(), slots.bits[utterance, :count].tolist(), strict=True)
        kept: list[tuple[int, int]] = []
        for slot, bits in listed:
            word = 0
            for lane, parent in enumerate(parents):
                replaced = own[lane] < 0 and slot == places[parent]
                word |= 0 if replaced else (bits >> parent & 1) << lane
            if word:
                kept.append((slot, word))
        first = slots.first_slot + int(slots.steps[utterance]) * beam_size
        fresh = list(range(first, first + beam_size))
        kept += [(slot, 1 << lane) for lane, slot in enumerate(fresh)]
        places_now = torch.tensor([slot for slot, _ in kept])
        words = torch.from_numpy(np.array([word for _, word in kept], dtype=np.uint32).view(np.int32))
        slots.slots[utterance, : len(kept)], slots.bits[utterance, : len(kept)] = places_now.int(), words
        slots.sight[utterance] = 0
        slots.sight[utterance, places_now] = words
        slots.counts[utterance], slots.steps[utterance] = len(kept), int(slots.steps[utterance]) + 1
        ids = torch.tensor([last[parent] if mine < 0 else mine for mine, parent in zip(own, parents, strict=True)])
        lengths = torch.tensor([seen[parent] + (mine >= 0) for mine, parent in zip(own, parents, strict=True)])
        slots.ids[utterance], slots.last_tokens[utterance] = ids, ids
        slots.seen[utterance], slots.positions[utterance] = lengths, lengths - 1
        slots.writes[utterance] = slots.last_slots[utterance] = torch.tensor(fresh)


def limit_end_reference(
    logits: Tensor,
    statistics: RowStatistics,
    masks: Tensor,
    place_masks: Tensor,
    end_id: int,
    temperature: float,
    threshold: float,
) -> None:
    """Forbid the end where its acoustic log-prob is below threshold times that of the best token, or it is already."""
    refused = logits[:, end_id].float() / temperature - statistics.log_sum_exp < threshold * statistics.max_log_prob
    word, bit = divmod(end_id, 32)
    allowed = place_masks[:, word].repeat_interleave(len(masks) // len(place_masks))
    masks[:, word] = torch.where(refused, allowed & ~(1 << bit if bit < 31 else -(1 << 31)), allowed)
