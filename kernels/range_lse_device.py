"""Kernels of the range log-sum-exp: sums of groups of tokens once per row, then a few sums for each range.

Groups of 32 places of the order are stored as (largest, sum of exponentials from there), float32 [rows, 2, groups]:
a range adds whole groups and re-reads at most 62 tokens at its edges. Nothing is ever subtracted, so an improbable
range is as exact as a probable one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shallowfusion.kernels.fused_step_device import IMPOSSIBLE, LOG2_E, safe_log

__all__ = ["group_sums", "range_sums", "row_sums"]

GROUP = tl.constexpr(32)  # places behind one stored pair
RUN_TIME = ("vocab", "groups")


@triton.jit
def load_places(row, order, places, inside):
    """Logits of one row at places of the order, -inf outside."""
    tokens = places
    if order is not None:
        tokens = tl.load(order + places, mask=inside, other=0)
    return tl.load(row + tokens, mask=inside, other=IMPOSSIBLE).to(tl.float32)


@triton.jit
def load_tile(row, order, places, vocab, limit):
    """`load_places` of a tile: what is contiguous is loaded up to `limit`, which may divide by 16, then cut."""
    if order is None:
        tile = tl.load(row + places, mask=places < limit, other=IMPOSSIBLE).to(tl.float32)
        tile = tl.where(places < vocab, tile, IMPOSSIBLE)
    else:
        tokens = tl.load(order + places, mask=places < limit, other=0)
        tile = tl.load(row + tokens, mask=places < vocab, other=IMPOSSIBLE).to(tl.float32)
    return tile


@triton.jit
def powers(values, largest, scale):
    """2 ** ((values - largest) * scale), 0 where everything is impossible."""
    return tl.exp2((values - tl.where(largest == IMPOSSIBLE, 0.0, largest)) * scale)


@triton.jit(do_not_specialize=RUN_TIME)
def group_sums(
    logits, stride, order, row_offsets, pairs, vocab, limit, groups, inverse_temperature, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid (splits, rows). Reads rows * vocab logits once (and the order, from L2), writes 8 bytes per 32 of them.

    `limit` is how many places may be loaded (see load_tile).
    """
    row = tl.program_id(1)
    if tl.load(row_offsets + row) == tl.load(row_offsets + row + 1):
        return
    start = tl.program_id(0) * BLOCK
    places = start + tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tile = load_tile(logits + row.to(tl.int64) * stride, order, places, vocab, limit)
    largest = tl.max(tile, axis=1)
    total = tl.sum(powers(tile, largest[:, None], inverse_temperature * LOG2_E), axis=1)
    group = start // GROUP + tl.arange(0, BLOCK // GROUP)
    here = pairs + row.to(tl.int64) * 2 * groups + group
    tl.store(here, largest, mask=group < groups)
    tl.store(here + groups, total, mask=group < groups)


@triton.jit(do_not_specialize=("groups",))
def row_sums(row_offsets, pairs, log_sums, groups, inverse_temperature, WIDTH: tl.constexpr):
    """Grid (rows,). The log-sum-exp of each row; NaN if it holds NaN or +inf, or if nothing is asked of the row."""
    row = tl.program_id(0)
    group = tl.arange(0, WIDTH)
    here = pairs + row.to(tl.int64) * 2 * groups + group
    asked = tl.load(row_offsets + row) != tl.load(row_offsets + row + 1)
    inside = group < tl.where(asked, groups, 0)
    parts = tl.load(here, mask=inside, other=IMPOSSIBLE)
    sums = tl.load(here + groups, mask=inside, other=0.0)
    largest = tl.max(parts, axis=0)
    total = tl.sum(sums * powers(parts, largest, inverse_temperature * LOG2_E), axis=0)
    log_sum = largest * inverse_temperature + safe_log(total)
    tl.store(log_sums + row, tl.where(asked, log_sum, float("nan")))


@triton.jit
def joined(largest, total, values, sums, scale):
    """A running (largest, sum) and a tile of such pairs as one."""
    high = tl.maximum(largest, tl.max(values, axis=0))
    return high, total * powers(largest, high, scale) + tl.sum(sums * powers(values, high, scale), axis=0)


@triton.jit(do_not_specialize=("groups",))
def range_sums(
    logits, stride, order, rows, first, last, pairs, log_sums, log_probs, groups, inverse_temperature,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (ranges,), one warp each. Reads 8 bytes per whole group and up to 62 tokens at the edges."""
    index = tl.program_id(0)
    row = tl.load(rows + index).to(tl.int64)
    start, stop = tl.load(first + index), tl.load(last + index)
    scale = inverse_temperature * LOG2_E
    first_group = (start + GROUP - 1) // GROUP
    last_group = stop // GROUP
    edge = tl.arange(0, GROUP)
    head, tail = start + edge, tl.maximum(last_group * GROUP, start) + edge
    # a range within one group is all head; a tail begins at or after the first whole group
    in_head = (head < stop) & (head < first_group * GROUP)
    in_tail = (tail < stop) & (tail >= first_group * GROUP)
    source = logits + row * stride
    ones = tl.full([GROUP], 1.0, tl.float32)
    largest = tl.full([], IMPOSSIBLE, tl.float32)
    total = tl.zeros([], tl.float32)
    largest, total = joined(
        largest, total, load_places(source, order, head, in_head), tl.where(in_head, ones, 0.0), scale
    )
    largest, total = joined(
        largest, total, load_places(source, order, tail, in_tail), tl.where(in_tail, ones, 0.0), scale
    )
    here = pairs + row * 2 * groups
    for chunk in range(first_group, last_group, CHUNK):
        group = chunk + tl.arange(0, CHUNK)
        parts = tl.load(here + group, mask=group < last_group, other=IMPOSSIBLE)
        sums = tl.load(here + groups + group, mask=group < last_group, other=0.0)
        largest, total = joined(largest, total, parts, sums, scale)
    log_sum = tl.load(log_sums + row)
    found = largest * inverse_temperature + safe_log(total)
    impossible = (largest == IMPOSSIBLE) & (log_sum == log_sum)
    tl.store(log_probs + index, tl.where(impossible, IMPOSSIBLE, found - log_sum))
