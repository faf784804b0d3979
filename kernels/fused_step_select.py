"""Kernels of the fused step that select: per row, per utterance, and the last step of the row statistics."""

from __future__ import annotations

import triton
import triton.language as tl

from shallowfusion.kernels.fused_step_device import (
    END_FACTORED,
    GROUP,
    IMPOSSIBLE,
    LOCAL,
    LOG2_E,
    LOW_BITS,
    ONE_PASS,
    allowed_bit,
    decoded,
    fused_increment,
    load_logits,
    log_add,
    log_prob,
    merged_sum,
    pack,
    safe_log,
    sanitized,
    source_constants,
    unpack_index,
    unpack_value,
    weighted_logits,
)

__all__ = ["finish_row_statistics", "merge_rows", "row_select"]

RUN_TIME = (  # as in fused_step_stream
    *("bias_limit", "vocab", "boundary", "end_id", "left_out"),
    *("splits", "groups", "allowed_words", "marked_words", "has_bonus", "normalize"),
)
FAN_OUT = tl.constexpr(16)  # groups in a supergroup


@triton.jit
def group_maximum(maxima, groups, boundary, shift, group):
    """Largest ranking key of each group; `maxima` points at a row, `shift` lifts the tokens from `boundary` on."""
    low = tl.load(maxima + group, mask=group < groups, other=IMPOSSIBLE)
    beyond = (group < groups) & (group >= boundary // GROUP)
    return tl.maximum(low, tl.load(maxima + groups + group, mask=beyond, other=IMPOSSIBLE) + shift)


@triton.jit
def best_groups(maxima, groups, boundary, shift, GROUPS: tl.constexpr, P: tl.constexpr):
    """Indices of P groups by (maximum descending, index ascending), by way of supergroups where there are many.

    The P best tokens by (key descending, token ascending) lie in them: a token outside has P groups before its own,
    each with a token of a larger key, or of an equal key and a lower id. The same holds for groups in supergroups.
    """
    if GROUPS >= FAN_OUT * P:
        every = tl.arange(0, GROUPS // FAN_OUT)[:, None] * FAN_OUT + tl.arange(0, FAN_OUT)[None, :]
        largest = tl.max(group_maximum(maxima, groups, boundary, shift, every), axis=1)
        chosen = unpack_index(tl.topk(pack(largest, tl.arange(0, GROUPS // FAN_OUT)), P))
        inner = tl.reshape(chosen[:, None] * FAN_OUT + tl.arange(0, FAN_OUT)[None, :], [P * FAN_OUT])
    else:
        inner = tl.arange(0, GROUPS)
    return unpack_index(tl.topk(pack(group_maximum(maxima, groups, boundary, shift, inner), inner), P))


@triton.jit
def biased(scores, tokens, inside, row, masks):
    """Scores with the static bias added and what is not allowed taken out."""
    bias, bias_limit, allowed, allowed_words = masks
    scores = scores + tl.load(bias + tokens, mask=inside & (tokens < bias_limit), other=0.0)
    return tl.where(allowed_bit(allowed, row, allowed_words, tokens, inside, -1), scores, IMPOSSIBLE)


@triton.jit
def entry_bounds(row_offsets, row, has_bonus):
    first = tl.load(row_offsets + row, mask=has_bonus != 0, other=0)
    return first, tl.load(row_offsets + row + 1, mask=has_bonus != 0, other=0)


@triton.jit
def bonus_of(tokens, entry, end, token_ids, values, BLOCK: tl.constexpr):
    """Bonus of each of `tokens`; scans the row's entries."""
    bonus = tl.zeros(tokens.shape, tl.float32)
    while entry < end:
        entries = entry + tl.arange(0, BLOCK)
        ids = tl.load(token_ids + entries, mask=entries < end, other=-1)
        value = tl.load(values + entries, mask=entries < end, other=0.0)
        bonus += tl.sum(tl.where(tokens[:, None] == ids[None, :], value[None, :], 0.0), axis=1)
        entry += BLOCK
    return bonus


@triton.jit
def fused_log_sum(statistics, splits, shift, SPLITS: tl.constexpr):
    """Log-sum-exp of the fused scores of a row, the end token apart; `statistics` points at its two planes."""
    low, low_sum = merged_sum(statistics, splits, LOG2_E, SPLITS)
    high, high_sum = merged_sum(statistics + 2 * splits, splits, LOG2_E, SPLITS)
    return log_add(low + safe_log(low_sum), high + safe_log(high_sum) + shift)


@triton.jit
def ranking_keys(
    tokens, inside, row, view, masks, boundary, shift, N: tl.constexpr, KEYS: tl.constexpr, EXTRAS: tl.constexpr
):  # fmt: skip
    """The keys whose group maxima the stream stored, the row constant of tokens from `boundary` on added."""
    rows, maps, vocabs, temperatures, floors, constants, weights = view
    if KEYS == ONE_PASS:
        keys = weighted_logits(rows, vocabs, temperatures, floors, weights, tokens, inside, N)
    else:
        keys = fused_increment(rows, maps, vocabs, temperatures, constants, weights, tokens, inside, N, KEYS)
    if EXTRAS:
        keys = biased(keys, tokens, inside, row, masks)
    return tl.where(tokens >= boundary, keys + shift, keys)


@triton.jit(do_not_specialize=RUN_TIME)
def row_select(
    sources, strides, vocabs, maps, temperatures, floors, weights, totals, length_bonus,
    bias, bias_limit, allowed, allowed_words, marked, marked_words, row_offsets, bonus_tokens, bonus_values, has_bonus,
    statistics, splits, maxima, groups, vocab, boundary, end_id, left_out, normalize,
    candidate_totals, candidate_tokens, row_constants, flags,
    N: tl.constexpr, KEYS: tl.constexpr, EXTRAS: tl.constexpr,
    SPLITS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """The P best continuations of a row, exactly, with their totals; any order among them.

    Selection is by ranking keys and group maxima; totals are then computed anew from true log-probs. Reads per row
    vocab / 32 maxima, the partial statistics and 32 P logits of each source (all just written or read, so in L2); bound
    by the latency of its dependent loads, not by bytes.
    """
    row = tl.program_id(0).to(tl.int64)
    total = tl.load(totals + row)
    bad = total != total
    partials = statistics + row * (N + 2) * 2 * splits
    rows = ()
    row_weights = ()
    constants = ()
    offset = tl.zeros([], tl.float32)
    shift = tl.zeros([], tl.float32)
    fused_row = total != total
    for s in tl.static_range(N):
        source = sources[s] + row * strides[s]
        weight = tl.load(weights + row * N + s)
        left = tl.full([], IMPOSSIBLE, tl.float32)
        if s == 0:
            left = tl.load(source + left_out, mask=left_out >= 0, other=IMPOSSIBLE).to(tl.float32)
        else:
            fused_row = fused_row | (weight != 0.0)
        largest, log_sum, unmapped = source_constants(
            partials + s * 2 * splits, splits, temperatures[s], floors[s], left, SPLITS
        )
        place = row_constants + (row * N + s) * 3
        tl.store(place, largest)
        tl.store(place + 1, log_sum)
        tl.store(place + 2, unmapped)
        bad = bad | ((weight != 0.0) & (log_sum != log_sum))
        if KEYS == ONE_PASS:
            constant = tl.where(weight == 0.0, 0.0, weight * (largest * temperatures[s] + log_sum))
            lacking = (weight != 0.0) & (decoded(vocabs[s]) < vocab) & (floors[s] != IMPOSSIBLE)
            shift += tl.where(lacking, weight * unmapped + constant, 0.0)
            offset += constant
        rows = rows + (source,)  # noqa: RUF005
        row_weights = row_weights + (weight,)  # noqa: RUF005
        constants = constants + ((largest, log_sum, unmapped),)  # noqa: RUF005
    shift = sanitized(shift)
    tl.store(flags + row, bad)

    # selection by ranking keys; the end token and tokens with a bonus do not count in groups
    view = (rows, maps, vocabs, temperatures, floors, constants, row_weights)
    masks = (bias, bias_limit, allowed, allowed_words)
    group = best_groups(maxima + row * 2 * groups, groups, boundary, shift, GROUPS, P)
    tokens = tl.reshape(group[:, None] * GROUP + tl.arange(0, GROUP)[None, :], [P * GROUP])
    inside = (tokens < vocab) & (tokens != end_id)
    if EXTRAS:
        inside = inside & (allowed_bit(marked, row, marked_words, tokens, inside, 0) == 0)
    best = tl.topk(pack(ranking_keys(tokens, inside, row, view, masks, boundary, shift, N, KEYS, EXTRAS), tokens), P)
    first = 0
    last = 0
    if EXTRAS:
        first, last = entry_bounds(row_offsets, row, has_bonus)
        entry = first
        while entry < last:
            entries = entry + tl.arange(0, ENTRIES)
            ids = tl.load(bonus_tokens + entries, mask=entries < last, other=-1)
            counted = (ids >= 0) & (ids != end_id)
            bonus_keys = ranking_keys(ids, counted, row, view, masks, boundary, shift, N, KEYS, EXTRAS)
            bonus_keys += tl.load(bonus_values + entries, mask=entries < last, other=0.0)
            if tl.max(bonus_keys, axis=0) >= tl.min(unpack_value(best), axis=0):
                best = tl.topk(tl.reshape(tl.join(best, tl.topk(pack(bonus_keys, ids), P)), [2 * P]), P)
            entry += ENTRIES

    # totals of the chosen and of the end token
    possible = unpack_value(best) > IMPOSSIBLE
    tokens = tl.where(possible, unpack_index(best), 0)
    ends = end_id + tl.arange(0, 1)
    has_end = ends >= 0
    scores = fused_increment(rows, maps, vocabs, temperatures, constants, row_weights, tokens, possible, N, KEYS)
    end_scores = fused_increment(rows, maps, vocabs, temperatures, constants, row_weights, ends, has_end, N, KEYS)
    if normalize == END_FACTORED and fused_row:
        fused_sum = fused_log_sum(partials + 2 * N * splits, splits, shift, SPLITS) - offset
        words, words_sum = merged_sum(partials, splits, temperatures[0] * LOG2_E, SPLITS)
        left_over = (words - constants[0][0]) * temperatures[0] + safe_log(words_sum) - constants[0][1]
        scores = left_over + (scores - fused_sum)
        logits, known = load_logits(rows[0], None, decoded(vocabs[0]), ends, has_end)
        end_scores = log_prob(logits, known, constants[0][0], constants[0][1], IMPOSSIBLE, temperatures[0])
    if EXTRAS:
        scores = biased(scores, tokens, possible, row, masks)
        end_scores = biased(end_scores, ends, has_end, row, masks)
    if normalize == LOCAL:
        fused_sum = fused_log_sum(partials + 2 * N * splits, splits, shift, SPLITS) - offset
        fused_sum = log_add(fused_sum, tl.max(end_scores, axis=0))
        scores -= fused_sum
        end_scores -= fused_sum
    if EXTRAS:
        scores += bonus_of(tokens, first, last, bonus_tokens, bonus_values, ENTRIES)
        end_scores += bonus_of(ends, first, last, bonus_tokens, bonus_values, ENTRIES)
    alive = (bad == 0) & (total > IMPOSSIBLE)
    scores = tl.where(possible & alive, sanitized(total + (scores + tl.load(length_bonus + row))), IMPOSSIBLE)
    end_scores = tl.where(has_end & alive, sanitized(total + end_scores), IMPOSSIBLE)

    # the end token takes the place of the worst of the P where it is better
    lane = tl.arange(0, P)
    keys = pack(scores, tl.where(possible, tokens, lane + (LOW_BITS - P)))
    worst = tl.min(keys, axis=0)
    end_key = tl.max(pack(end_scores, tl.where(has_end, ends, LOW_BITS)), axis=0)
    keys = tl.where((keys == worst) & (end_key > worst), end_key, keys)
    tl.store(candidate_totals + row * P + lane, unpack_value(keys))
    tl.store(candidate_tokens + row * P + lane, unpack_index(keys))


@triton.jit(do_not_specialize=["vocab"])
def merge_rows(
    sources, strides, vocabs, maps, temperatures, row_constants, candidate_totals, candidate_tokens, vocab,
    totals, parent_rows, token_ids, parts,
    N: tl.constexpr, BEAM: tl.constexpr, P: tl.constexpr, TOP_K: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The TOP_K best of the BEAM * P candidates of an utterance, ties to the lowest (row, token), with their parts.

    Reads 8 bytes per candidate and TOP_K logits per source; bound by launch and load latency.
    """
    utterance = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    place = utterance * BEAM * P + lane
    scores = tl.load(candidate_totals + place, mask=lane < BEAM * P, other=IMPOSSIBLE)
    tokens = tl.load(candidate_tokens + place, mask=lane < BEAM * P, other=0)
    possible = scores > IMPOSSIBLE
    order = tl.where(possible, (lane // P) * vocab + tokens, LOW_BITS)
    best = tl.topk(pack(scores, order), WIDTH)
    scores = unpack_value(best)
    possible = scores > IMPOSSIBLE
    order = tl.where(possible, unpack_index(best), 0)
    row = utterance * BEAM + order // vocab
    tokens = order % vocab
    rank = tl.arange(0, WIDTH)
    wanted = rank < TOP_K
    out = utterance * TOP_K + rank
    tl.store(totals + out, scores, mask=wanted)
    tl.store(parent_rows + out, tl.where(possible, row, -1), mask=wanted)
    tl.store(token_ids + out, tl.where(possible, tokens, -1).to(tl.int64), mask=wanted)
    for s in tl.static_range(N):
        logits, known = load_logits(sources[s] + row * strides[s], maps[s], decoded(vocabs[s]), tokens, possible)
        constants = row_constants + (row * N + s) * 3
        largest = tl.load(constants)
        log_sum = tl.load(constants + 1)
        part = log_prob(logits, known, largest, log_sum, tl.load(constants + 2), temperatures[s])
        tl.store(parts + out * N + s, tl.where(possible, part, 0.0), mask=wanted)


@triton.jit(do_not_specialize=["splits"])
def finish_row_statistics(
    statistics, splits, temperature, log_sum_exp, entropy, max_log_prob, margin, SPLITS: tl.constexpr
):  # fmt: skip
    """Merges the partial statistics of a row of source_statistics; reads 16 bytes a split, bound by launch latency."""
    row = tl.program_id(0).to(tl.int64)
    place = statistics + row * 4 * splits
    split = tl.arange(0, SPLITS)
    tops = tl.load(place + split, mask=split < splits, other=IMPOSSIBLE)
    sums = tl.load(place + splits + split, mask=split < splits, other=0.0)
    weighted = tl.load(place + 2 * splits + split, mask=split < splits, other=0.0)
    seconds = tl.load(place + 3 * splits + split, mask=split < splits, other=IMPOSSIBLE)
    largest = tl.max(tops, axis=0)
    reference = tl.where(largest == IMPOSSIBLE, 0.0, largest)
    below = (tops - reference) * temperature
    scale = tl.exp2(below * LOG2_E)
    total = tl.sum(sums * scale, axis=0)
    weighted = tl.where(scale == 0.0, 0.0, scale * (weighted + sums * below))
    log_sum = safe_log(total)
    at_top = tops == largest
    second = tl.max(tl.where(at_top, seconds, tops), axis=0)
    second = tl.where(tl.sum(at_top.to(tl.int32), axis=0) > 1, largest, second)
    impossible = largest == IMPOSSIBLE
    gap = tl.where(impossible, 0.0, (largest - second) * temperature)
    broken = total != total
    nothing = total * 0.0  # NaN in a broken row
    tl.store(log_sum_exp + row, tl.where(impossible, IMPOSSIBLE, reference * temperature + log_sum) + nothing)
    spread = log_sum - tl.sum(weighted, axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(entropy + row, tl.where(impossible, 0.0, spread) + nothing)
    tl.store(max_log_prob + row, tl.where(impossible, IMPOSSIBLE, -log_sum) + nothing)
    tl.store(margin + row, tl.where(broken, nothing, gap))
