"""Kernels of the fused step that read the vocabulary: one tile per program, each logit loaded once.

Partial statistics are float32 [rows, planes, fields, splits]. Planes are the sources, then the fused scores below
`boundary`, then those from `boundary` on. Fields are (largest, sum of exponentials[, weighted sum, second largest]).
Group maxima are float32 [rows, 2, groups]: tokens below `boundary`, and from `boundary` on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shallowfusion.kernels.fused_step_device import (
    END_FACTORED,
    GROUP,
    IMPOSSIBLE,
    LOCAL,
    LOG2_E,
    MIXTURE,
    NORMALIZE_NONE,
    decoded,
    exponent_sum,
    fuse,
    log_prob,
    sanitized,
    source_constants,
)

__all__ = ["fuse_increments", "fuse_logits", "mark_bonus", "source_statistics"]

# sizes and ids that change between calls: a variant for each would recompile in the middle of a service
RUN_TIME = (
    *("vocab", "boundary", "end_id", "left_out"),
    *("splits", "groups", "allowed_words", "marked_words"),
)


@triton.jit
def tile_tokens(BLOCK: tl.constexpr):
    """Token ids of this program's tile, [BLOCK / 32, 32]."""
    start = tl.program_id(0) * BLOCK
    return start + tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def store_partial(statistics, plane, largest, total):
    """Stores one plane of this program's two-field statistics; `plane` counts over all rows."""
    splits = tl.num_programs(0)
    place = statistics + plane * 2 * splits + tl.program_id(0)
    tl.store(place, largest)
    tl.store(place + splits, total)


@triton.jit
def keep(scores, condition):
    return tl.where(condition, scores, IMPOSSIBLE)


@triton.jit
def store_fused_statistics(statistics, plane, scores, tokens, stop, boundary):
    """Log-sum-exp partials of the fused scores, apart for tokens below `boundary` and from it on, which lack a row
    constant in the one-pass mode. `stop` is one past the tile's last token."""
    high_largest = tl.full([], IMPOSSIBLE, tl.float32)
    high_total = tl.zeros([], tl.float32)
    low = scores
    if stop > boundary:
        high_largest, high_total = exponent_sum(keep(scores, tokens >= boundary), LOG2_E)
        low = keep(scores, tokens < boundary)
    low_largest, low_total = exponent_sum(low, LOG2_E)
    store_partial(statistics, plane, low_largest, low_total)
    store_partial(statistics, plane + 1, high_largest, high_total)


@triton.jit
def finish_tile(
    scores, tokens, row, bias, bias_limit, allowed, allowed_words, marked, marked_words, statistics, plane, maxima,
    groups, vocab, boundary, end_id,
    NORMALIZE: tl.constexpr, EXTRAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Masks, biases, fused statistics and group maxima of a tile of scores; the end token is left out of them all."""
    start = tl.program_id(0) * BLOCK
    stop = start + BLOCK
    scores = sanitized(scores)
    if (stop > vocab) | ((end_id >= start) & (end_id < stop)):
        scores = keep(scores, (tokens < vocab) & (tokens != end_id))
    if NORMALIZE == END_FACTORED:
        store_fused_statistics(statistics, plane, scores, tokens, stop, boundary)
    if EXTRAS:
        scores = scores + tl.load(bias + tokens, mask=(tokens < bias_limit) & (tokens < vocab), other=0.0)
        bit = tl.arange(0, GROUP)[None, :]
        word_index = start // GROUP + tl.arange(0, BLOCK // GROUP)
        word = tl.load(allowed + row * allowed_words + word_index, mask=word_index < allowed_words, other=-1)
        scores = keep(scores, ((word[:, None] >> bit) & 1) != 0)
    if NORMALIZE == LOCAL:
        store_fused_statistics(statistics, plane, scores, tokens, stop, boundary)
    if EXTRAS:
        word = tl.load(marked + row * marked_words + word_index, mask=word_index < marked_words, other=0)
        scores = keep(scores, ((word[:, None] >> bit) & 1) == 0)
    group = start // GROUP + tl.arange(0, BLOCK // GROUP)
    place = maxima + row * 2 * groups + group
    low = scores
    if stop > boundary:
        tl.store(place + groups, tl.max(keep(scores, tokens >= boundary), axis=1), mask=group < groups)
        low = keep(scores, tokens < boundary)
    tl.store(place, tl.max(low, axis=1), mask=group < groups)


@triton.jit(do_not_specialize=RUN_TIME)
def fuse_logits(
    sources, strides, limits, vocabs, temperatures, floors, weights,
    bias, bias_limit, allowed, allowed_words, marked, marked_words,
    statistics, maxima, groups, vocab, boundary, end_id, left_out,
    N: tl.constexpr, NORMALIZE: tl.constexpr, EXTRAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics of every source and group maxima of sum_s weight * logit / temperature, in one pass.

    Reads rows * sum_s vocab_s logits once and writes rows * (vocab / 32 + 2 * (N + 2) * splits) floats: bandwidth
    bound, 3.8 us for 40 rows of 51,866 + 50,257 float32 logits at 4.3 TB/s.
    `limits` bound the loads (a multiple of 16 where padding may be read, so that they are 16 bytes wide), `vocabs`,
    encoded, the values. Tokens from `boundary` on have no counterpart in some source and lack one row constant, which
    row_select adds.
    `left_out` is a token kept out of the acoustic statistics, -1 = none.
    """
    row = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK
    stop = start + BLOCK
    tokens = tile_tokens(BLOCK)
    tiles = ()
    for s in tl.static_range(N):
        tile = tl.load(sources[s] + row * strides[s] + tokens, mask=tokens < limits[s], other=IMPOSSIBLE)
        tiles = tiles + (tile.to(tl.float32),)  # noqa: RUF005
    keys = tl.zeros([BLOCK // GROUP, GROUP], tl.float32)
    for s in tl.static_range(N):
        weight = tl.load(weights + row * N + s)
        logits = tiles[s]
        known = decoded(vocabs[s])
        if stop > known:
            logits = keep(logits, tokens < known)
        if s == 0:  # noqa: SIM102
            if left_out >= start:
                logits = keep(logits, tokens != left_out)
        largest, total = exponent_sum(logits, temperatures[s] * LOG2_E)
        store_partial(statistics, row * (N + 2) + s, largest, total)
        if (stop > known) & (floors[s] != IMPOSSIBLE):
            logits = tl.where(tokens < known, logits, 0.0)
        keys = tl.fma(tl.where(weight == 0.0, 0.0, logits), weight * temperatures[s], keys)
    if start < groups * GROUP:
        finish_tile(
            keys, tokens, row, bias, bias_limit, allowed, allowed_words, marked, marked_words, statistics,
            row * (N + 2) + N, maxima, groups, vocab, boundary, end_id, NORMALIZE, EXTRAS, BLOCK,
        )  # fmt: skip
    elif NORMALIZE != NORMALIZE_NONE:
        store_partial(statistics, row * (N + 2) + N, IMPOSSIBLE, 0.0)
        store_partial(statistics, row * (N + 2) + N + 1, IMPOSSIBLE, 0.0)


@triton.jit(do_not_specialize=["left_out", "planes"])
def source_statistics(
    sources, strides, limits, vocabs, temperatures, statistics, planes, left_out,
    N: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics of every source alone: before fuse_increments, or (FULL, N = 1) for row_statistics.

    Reads every logit once; writes 2 (FULL: 4) floats per source, row and split.
    """
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    tokens = tile_tokens(BLOCK)
    for s in tl.static_range(N):
        logits = tl.load(sources[s] + row * strides[s] + tokens, mask=tokens < limits[s], other=IMPOSSIBLE)
        logits = keep(logits.to(tl.float32), tokens < decoded(vocabs[s]))
        if s == 0:
            logits = keep(logits, tokens != left_out)
        largest, total = exponent_sum(logits, temperatures[s] * LOG2_E)
        if FULL:
            place = statistics + (row * planes + s) * 4 * splits + split
            tl.store(place, largest)
            tl.store(place + splits, total)
            below = tl.where(largest == IMPOSSIBLE, 0.0, logits - largest)
            exponential = tl.exp2(below * (temperatures[s] * LOG2_E))
            weighted = tl.where(exponential == 0.0, 0.0, exponential * below)
            tl.store(place + 2 * splits, tl.sum(tl.sum(weighted, axis=1), axis=0) * temperatures[s])
            at_top = logits == largest
            second = tl.max(tl.max(keep(logits, at_top == 0), axis=1), axis=0)
            repeats = tl.sum(tl.sum(at_top.to(tl.int32), axis=1), axis=0)
            tl.store(place + 3 * splits, tl.where(repeats > 1, largest, second))
        else:
            store_partial(statistics, row * planes + s, largest, total)


@triton.jit(do_not_specialize=RUN_TIME)
def fuse_increments(
    sources, strides, limits, vocabs, maps, temperatures, floors, weights,
    bias, bias_limit, allowed, allowed_words, marked, marked_words,
    statistics, splits, maxima, groups, vocab, end_id, left_out,
    N: tl.constexpr, KEYS: tl.constexpr, NORMALIZE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Group maxima of the true increments, after source_statistics: mixtures, vocabulary maps, several unmapped sets.

    Reads every logit once more (twice in all with source_statistics) and vocab map entries per mapped source; the byte
    bound is twice that of fuse_logits. Its grid must have as many splits as source_statistics.
    """
    row = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK
    tokens = tile_tokens(BLOCK)
    scores = tl.full([BLOCK // GROUP, GROUP], IMPOSSIBLE if KEYS == MIXTURE else 0.0, tl.float32)
    for s in tl.static_range(N):
        source = sources[s] + row * strides[s]
        left = tl.full([], IMPOSSIBLE, tl.float32)
        if s == 0:
            left = tl.load(source + left_out, mask=left_out >= 0, other=IMPOSSIBLE).to(tl.float32)
        largest, log_sum, unmapped = source_constants(
            statistics + (row * (N + 2) + s) * 2 * splits, splits, temperatures[s], floors[s], left, SPLITS
        )
        if maps[s] is None:
            known = tokens < decoded(vocabs[s])
            logits = tl.load(source + tokens, mask=tokens < limits[s], other=IMPOSSIBLE)
        else:
            ids = tl.load(maps[s] + tokens, mask=tokens < vocab, other=-1)
            known = ids >= 0
            logits = tl.load(source + ids, mask=known, other=IMPOSSIBLE)
        log_probs = log_prob(logits.to(tl.float32), known, largest, log_sum, unmapped, temperatures[s])
        scores = fuse(scores, log_probs, tl.load(weights + row * N + s), KEYS)
    if start < groups * GROUP:
        finish_tile(
            scores, tokens, row, bias, bias_limit, allowed, allowed_words, marked, marked_words, statistics,
            row * (N + 2) + N, maxima, groups, vocab, vocab, end_id, NORMALIZE, 1, BLOCK,
        )  # fmt: skip
    elif NORMALIZE != NORMALIZE_NONE:
        store_partial(statistics, row * (N + 2) + N, IMPOSSIBLE, 0.0)
        store_partial(statistics, row * (N + 2) + N + 1, IMPOSSIBLE, 0.0)


@triton.jit(do_not_specialize=["words"])
def mark_bonus(row_offsets, token_ids, marked, words, BLOCK: tl.constexpr):
    """Sets the bit of every token with a bonus in `marked` [rows, words]; 8 bytes an entry, bound by launch latency."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.load(row_offsets + row)
    end = tl.load(row_offsets + row + 1)
    while entry < end:
        entries = entry + tl.arange(0, BLOCK)
        tokens = tl.load(token_ids + entries, mask=entries < end, other=0)
        bits = tl.full([BLOCK], 1, tl.int32) << (tokens % GROUP)
        tl.atomic_or(marked + row * words + tokens // GROUP, bits, mask=entries < end)
        entry += BLOCK
