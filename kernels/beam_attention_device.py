"""Kernels of attention for beams: over shared slots by ancestry bits, over frames, the merge of splits, the K/V write.

A program holds up to 128 query rows, the pairs (query, head) that share one key head, as the rows of its products, and
walks keys and values once with a running softmax. Rows that see nothing give zeros. Slots that nobody sees are not
loaded, so whatever lies in them does no harm.

A slot table is int32 [utterances, 2 + words, width]:

    row 0       the place of the utterance in the pool, the number of entries, then anything
    row 1       the slot of each entry
    row 2 + w   bit b of entry e: query 32 * w + b sees it
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attend_frames", "attend_slots", "merge_splits", "write_slots"]

IMPOSSIBLE = tl.constexpr(float("-inf"))
WORD = tl.constexpr(32)  # queries in one word of ancestry bits
FLOAT32 = tl.constexpr("tf32x3")  # float32 as three products on the matrix units: plain ones spill at head size 128
HEADER = tl.constexpr(2)  # rows of a slot table before the bits
RUN_TIME = ("queries", "heads", "splits", "width", "frames")


@triton.jit
def row_places(key_head, queries, GROUP: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr):
    """Query and head of each row of this program, and which of them exist."""
    row = tl.arange(0, ROWS)
    chosen = tl.program_id(2) * QUERIES + row // GROUP
    return chosen, key_head * GROUP + row % GROUP, (row < QUERIES * GROUP) & (chosen < queries)


@triton.jit
def load_queries(query, u_stride, q_stride, h_stride, chosen, head, exists, DIM: tl.constexpr, WIDE: tl.constexpr):
    """Query rows [ROWS, WIDE], 0 beyond DIM and in rows that do not exist."""
    feature = tl.arange(0, WIDE)
    rows = query + tl.program_id(1).to(tl.int64) * u_stride + chosen.to(tl.int64) * q_stride
    rows += head.to(tl.int64) * h_stride
    return tl.load(rows[:, None] + feature[None, :], mask=exists[:, None] & (feature < DIM)[None, :], other=0.0)


@triton.jit
def scored(queries, keys, scale, UPCAST: tl.constexpr):
    """Products of query rows [ROWS, WIDE] with keys [WIDE, BLOCK], in powers of two."""
    if UPCAST:  # the interpreter multiplies bfloat16 wrongly
        queries = queries.to(tl.float32)
        keys = keys.to(tl.float32)
    return tl.dot(queries, keys, input_precision=FLOAT32) * scale


@triton.jit
def softened(largest, total, weighed, scores, values, UPCAST: tl.constexpr):
    """A running softmax and one tile more; scores [ROWS, BLOCK] in powers of two, -inf where nothing is seen."""
    high = tl.maximum(largest, tl.max(scores, axis=1))
    reference = tl.where(high == IMPOSSIBLE, 0.0, high)
    shares = tl.exp2(scores - reference[:, None])
    shrunk = tl.exp2(largest - reference)
    total = total * shrunk + tl.sum(shares, axis=1)
    if UPCAST:
        values = values.to(tl.float32)
    high_part = shares.to(values.dtype)
    weighed = tl.dot(high_part, values, weighed * shrunk[:, None], input_precision=FLOAT32)
    if values.dtype != tl.float32:  # shares rounded once would be as large an error as the rounding of the output
        weighed = tl.dot((shares - high_part.to(tl.float32)).to(values.dtype), values, weighed)
    return high, total, weighed


@triton.jit
def store_rows(
    output, parts, statistics, largest, total, weighed, row, exists, split, splits, DIM: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The finished rows of the output, or with several splits what `merge_splits` needs of them."""
    feature = tl.arange(0, WIDE)
    inside = exists[:, None] & (feature < DIM)[None, :]
    if parts is None:
        found = weighed / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(output + row[:, None] * DIM + feature[None, :], found.to(output.dtype.element_ty), mask=inside)
    else:
        part = row * splits + split
        tl.store(parts + part[:, None] * DIM + feature[None, :], weighed, mask=inside)
        tl.store(statistics + part * 2, largest, mask=exists)
        tl.store(statistics + part * 2 + 1, total, mask=exists)


@triton.jit
def share_of(count, split, splits, BLOCK: tl.constexpr):
    """First and last entry of a split; whole blocks, as even as they come."""
    size = tl.cdiv(tl.cdiv(count, BLOCK), splits) * BLOCK
    return tl.minimum(split * size, count), tl.minimum((split + 1) * size, count)


@triton.jit(do_not_specialize=RUN_TIME)
def attend_slots(
    query, q_u_stride, q_stride, q_h_stride, keys, k_place_stride, k_stride, k_h_stride,
    values, v_place_stride, v_stride, v_h_stride, table, table_stride, width, output, parts, statistics, scale, queries,
    heads, splits,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (key heads * splits, utterances, blocks of queries).

    Reads key and value of each entry that somebody of the word sees once per key head and block of queries, and 8 bytes
    of the table. The number of entries is read from the table, so that a captured launch serves every step.
    """
    utterance = tl.program_id(1).to(tl.int64)
    split = tl.program_id(0) % splits
    key_head = tl.program_id(0) // splits
    chosen, head, exists = row_places(key_head, queries, GROUP, QUERIES, ROWS)
    tile = load_queries(query, q_u_stride, q_stride, q_h_stride, chosen, head, exists, DIM, WIDE)
    here = table + utterance * table_stride
    place = tl.load(here).to(tl.int64)
    first, last = share_of(tl.load(here + 1), split, splits, BLOCK)
    words = here + (HEADER + tl.program_id(2) * QUERIES // WORD) * width
    own_keys = keys + place * k_place_stride + key_head.to(tl.int64) * k_h_stride
    own_values = values + place * v_place_stride + key_head.to(tl.int64) * v_h_stride
    feature = tl.arange(0, WIDE)
    real = feature < DIM
    bit = chosen % WORD
    largest = tl.full([ROWS], IMPOSSIBLE, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighed = tl.zeros([ROWS, WIDE], tl.float32)
    for start in tl.range(first, last, BLOCK, num_stages=STAGES):
        entry = start + tl.arange(0, BLOCK)
        word = tl.load(words + entry, mask=entry < last, other=0)
        slot = tl.load(here + width + entry, mask=entry < last, other=0).to(tl.int64)
        live = word != 0
        key = tl.load(
            own_keys + (slot * k_stride)[None, :] + feature[:, None], mask=live[None, :] & real[:, None], other=0.0
        )
        scores = scored(tile, key, scale, UPCAST)
        seen = ((word[None, :] >> bit[:, None]) & 1) != 0
        scores = tl.where(seen, scores, IMPOSSIBLE)
        value = tl.load(
            own_values + (slot * v_stride)[:, None] + feature[None, :], mask=live[:, None] & real[None, :], other=0.0
        )
        largest, total, weighed = softened(largest, total, weighed, scores, value, UPCAST)
    row = (utterance * queries + chosen) * heads + head
    store_rows(output, parts, statistics, largest, total, weighed, row, exists, split, splits, DIM, WIDE)


@triton.jit(do_not_specialize=RUN_TIME)
def attend_frames(
    query, q_u_stride, q_stride, q_h_stride, keys, k_u_stride, k_stride, k_h_stride,
    values, v_u_stride, v_stride, v_h_stride, lengths, output, parts, statistics, scale, queries, heads, frames, splits,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (key heads * splits, utterances, blocks of queries). Reads keys and values once per block of queries.

    `lengths` says how many frames of each utterance count; None = all.
    """
    utterance = tl.program_id(1).to(tl.int64)
    split = tl.program_id(0) % splits
    key_head = tl.program_id(0) // splits
    chosen, head, exists = row_places(key_head, queries, GROUP, QUERIES, ROWS)
    tile = load_queries(query, q_u_stride, q_stride, q_h_stride, chosen, head, exists, DIM, WIDE)
    count = frames
    if lengths is not None:
        count = tl.minimum(frames, tl.load(lengths + utterance))
    first, last = share_of(count, split, splits, BLOCK)
    own_keys = keys + utterance * k_u_stride + key_head.to(tl.int64) * k_h_stride
    own_values = values + utterance * v_u_stride + key_head.to(tl.int64) * v_h_stride
    feature = tl.arange(0, WIDE)
    real = feature < DIM
    largest = tl.full([ROWS], IMPOSSIBLE, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighed = tl.zeros([ROWS, WIDE], tl.float32)
    for start in tl.range(first, last, BLOCK, num_stages=STAGES):
        frame = start + tl.arange(0, BLOCK)
        inside = frame < last
        step = frame.to(tl.int64)
        key = tl.load(
            own_keys + (step * k_stride)[None, :] + feature[:, None], mask=inside[None, :] & real[:, None], other=0.0
        )
        scores = tl.where(inside[None, :], scored(tile, key, scale, UPCAST), IMPOSSIBLE)
        value = tl.load(
            own_values + (step * v_stride)[:, None] + feature[None, :], mask=inside[:, None] & real[None, :], other=0.0
        )
        largest, total, weighed = softened(largest, total, weighed, scores, value, UPCAST)
    row = (utterance * queries + chosen) * heads + head
    store_rows(output, parts, statistics, largest, total, weighed, row, exists, split, splits, DIM, WIDE)


@triton.jit(do_not_specialize=("splits",))
def merge_splits(parts, statistics, output, splits, DIM: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr):
    """Grid (rows of the output,). Splits as one row, always added in the same order.

    Reads splits * (DIM + 2) float32 of each row, writes DIM elements.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    feature = tl.arange(0, WIDE)
    exists = split < splits
    largest = tl.load(statistics + (row * splits + split) * 2, mask=exists, other=IMPOSSIBLE)
    total = tl.load(statistics + (row * splits + split) * 2 + 1, mask=exists, other=0.0)
    part = tl.load(
        parts + (row * splits + split)[:, None] * DIM + feature[None, :],
        mask=exists[:, None] & (feature < DIM)[None, :],
        other=0.0,
    )
    high = tl.max(largest, axis=0)
    share = tl.exp2(largest - tl.where(high == IMPOSSIBLE, 0.0, high))
    sum_of_all = tl.sum(total * share, axis=0)
    found = tl.sum(part * share[:, None], axis=0) / tl.where(sum_of_all == 0.0, 1.0, sum_of_all)
    tl.store(output + row * DIM + feature, found.to(output.dtype.element_ty), mask=feature < DIM)


@triton.jit(do_not_specialize=("s_u_stride", "s_q_stride"))
def write_slots(
    new_keys, k_u_stride, k_q_stride, k_h_stride, new_values, v_u_stride, v_q_stride, v_h_stride,
    keys, k_place_stride, k_stride, k_pool_h_stride, values, v_place_stride, v_stride, v_pool_h_stride,
    slots, s_u_stride, s_q_stride, places,
    HEADS: tl.constexpr, ALL: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (queries, utterances). Copies the new key and value of all heads of a query to its slot; none if negative.

    Reads and writes 2 * HEADS * DIM elements per query. `places` is where in the pool each utterance lies; None = in
    order.
    """
    utterance = tl.program_id(1).to(tl.int64)
    query = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + utterance * s_u_stride + query * s_q_stride).to(tl.int64)
    place = utterance
    if places is not None:
        place = tl.load(places + utterance).to(tl.int64)
    head = tl.arange(0, ALL)
    feature = tl.arange(0, WIDE)
    inside = (head < tl.where(slot >= 0, HEADS, 0))[:, None] & (feature < DIM)[None, :]
    from_keys = new_keys + utterance * k_u_stride + query * k_q_stride
    from_values = new_values + utterance * v_u_stride + query * v_q_stride
    to_keys = keys + place * k_place_stride + slot * k_stride
    to_values = values + place * v_place_stride + slot * v_stride
    key = tl.load(from_keys + head[:, None] * k_h_stride + feature[None, :], mask=inside)
    tl.store(to_keys + head[:, None] * k_pool_h_stride + feature[None, :], key, mask=inside)
    value = tl.load(from_values + head[:, None] * v_h_stride + feature[None, :], mask=inside)
    tl.store(to_values + head[:, None] * v_pool_h_stride + feature[None, :], value, mask=inside)
