"""Device-driven steps of a beam search: launches; the kernels are in beam_advance_device.py, their twins in
beam_advance_reference.py, the memory in beam_advance_arrays.py.

    fused step -> beam_advance -> follow_slots (once per model)

Nothing allocates or synchronises, so a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import triton
from torch import Tensor

from shallowfusion.kernels import beam_advance_device as device
from shallowfusion.kernels.beam_advance_arrays import (
    RING_ENTRIES,
    SLOT_ROUNDING,
    AdvanceTables,
    BeamArrays,
    SlotArrays,
)
from shallowfusion.kernels.fused_step import Launch
from shallowfusion.values import Candidates, RowStatistics

__all__ = ["plan_beam_advance", "plan_follow_slots", "plan_limit_end"]

RULES = {"hf": device.HF.value, "whisper": device.WHISPER.value, "espnet": device.ESPNET.value}


def plan_beam_advance(tables: AdvanceTables, arrays: BeamArrays, candidates: Candidates) -> Launch:
    """The launch that takes the candidates of one step; the contract is that of `beam_advance_reference`."""
    settings = tables.settings
    utterances, count = candidates.totals.shape
    arguments = (
        (candidates.totals, candidates.parent_rows, candidates.token_ids, candidates.parts, candidates.flags),
        (
            arrays.ticks, arrays.lengths, arrays.clocks, arrays.done, arrays.finished, arrays.keys,
            arrays.ended_totals, arrays.hashes,
        ),
        (
            tables.end_ids, tables.scales, tables.stop_scales, tables.weights,
            tables.edit_words, tables.edit_until, tables.edit_bits, tables.limits,
        ),
        (arrays.tokens, arrays.parents, arrays.totals, arrays.weights, arrays.place_masks, arrays.masks),
        arrays.ring, tables.longest + 1, arrays.masks.shape[1], settings.end_ids[0] if settings.end_ids else 0,
    )  # fmt: skip
    constants = {
        "RULE": RULES[settings.stop_rule],
        "EARLY": device.FIRST.value if settings.early_stopping == "first" else 0,
        "ENDS": len(settings.end_ids),
        "PARTS": candidates.parts.shape[2],
        "SOURCES": tables.weights.shape[2],
        "RING": RING_ENTRIES,
        "C": count,
        "CP": max(2, triton.next_power_of_2(count)),
        "K": settings.beam_size,
        "KP": max(2, triton.next_power_of_2(settings.beam_size)),
        "EDITS": tables.edit_words.shape[1],
        "num_warps": 1,
        "enable_fp_fusion": False,
    }
    return Launch(device.beam_advance, (utterances,), arguments, constants)


def plan_follow_slots(arrays: BeamArrays, slots: SlotArrays, mapping: Tensor | None, vocab: int) -> Launch:
    """The launch that tells one model what its lanes read next.

    Args:
        mapping: int32 [acoustic vocab], the model's id of each acoustic token, -1 = it has none; None = the same ids,
            of which it has the first `vocab`.
    """
    beam_size = arrays.parents.shape[1]
    arguments = (
        (arrays.tokens, arrays.parents, arrays.done),
        (slots.steps, slots.seen, slots.last_tokens, slots.last_slots, slots.table, slots.sight),
        (slots.ids, slots.positions, slots.writes),
        mapping, vocab, slots.capacity // SLOT_ROUNDING, slots.first_slot,
    )  # fmt: skip
    constants = {
        "K": beam_size,
        "KP": max(2, triton.next_power_of_2(beam_size)),
        "BLOCK": 512 if beam_size <= 8 else 256,
        "num_warps": 4,
    }
    return Launch(device.follow_slots, (arrays.parents.shape[0],), arguments, constants)


def plan_limit_end(
    logits: Tensor,
    statistics: RowStatistics,
    masks: Tensor,
    place_masks: Tensor,
    end_id: int,
    temperature: float,
    threshold: float,
) -> Launch:
    """The launch that forbids the end where its acoustic log-prob is below threshold times that of the best token.

    Args:
        masks: int32 [rows, words], of which the end's word is written; place_masks: int32 [places, words], see
            `BeamArrays`.
    """
    bit = end_id % 32
    without_end = ~(1 << bit if bit < 31 else -(1 << 31))
    arguments = (
        logits, logits.stride(0), statistics.log_sum_exp, statistics.max_log_prob, masks, place_masks, masks.shape[1],
        end_id, end_id // 32, without_end, temperature, threshold,
    )  # fmt: skip
    constants = {"K": len(masks) // len(place_masks), "num_warps": 1, "enable_fp_fusion": False}
    return Launch(device.limit_end, (logits.shape[0],), arguments, constants)
