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
    MIXTURE,
    NOTHING,
    ONE_PASS,
    allowed_bit,
    decoded,
    fuse,
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
def insert(best, fresh):
    """`best` with its smallest packed keys replaced by the largest of `fresh`, as long as those are larger."""
    worst = tl.min(best, axis=0)
    top = tl.max(fresh, axis=0)
    while top > worst:
        best = tl.where(best == worst, top, best)
        fresh = tl.where(fresh == top, NOTHING, fresh)
        worst = tl.min(best, axis=0)
        top = tl.max(fresh, axis=0)
    return best


@triton.jit
def token_log_probs(source, mapping, odd_vocab, temperature, constants, tokens, inside):
    """Log-probs of one source, each token in its own row: `source` and `constants` point at those rows."""
    logits, known = load_logits(source, mapping, decoded(odd_vocab), tokens, inside)
    largest, log_sum, unmapped = tl.load(constants), tl.load(constants + 1), tl.load(constants + 2)
    return log_prob(logits, known, largest, log_sum, unmapped, temperature)


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
    candidate_tokens, gains, row_constants, flags,
    N: tl.constexpr, KEYS: tl.constexpr, EXTRAS: tl.constexpr,
    SPLITS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """The P best continuations of a row but its end, exactly, in any order, and what merge_rows needs besides.

    Selection is by ranking keys and group maxima. Reads per row vocab / 32 maxima, the partial statistics and 32 P
    logits of each source (all just written or read, so in L2); bound by the latency of dependent loads, not by bytes.
    `row_constants` [rows, 3 N + 4]: largest logit, log of the exp sum and unmapped log-prob of each source; what to add
    to the increments of words and of the end; the total or -inf; 1 where the end keeps its acoustic log-prob.
    `gains` [rows, P + 1]: bias and bonus of each candidate and of the end token (with EXTRAS).
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
        place = row_constants + row * (3 * N + 4) + 3 * s
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
            best = insert(best, pack(bonus_keys, ids))
            entry += ENTRIES

    possible = unpack_value(best) > IMPOSSIBLE
    tokens = tl.where(possible, unpack_index(best), -1)
    lane = tl.arange(0, P)
    tl.store(candidate_tokens + row * P + lane, tokens)
    ends = end_id + tl.arange(0, 1)
    end_gain = tl.zeros([1], tl.float32)
    if EXTRAS:
        gain = biased(tl.zeros([P], tl.float32), tokens, possible, row, masks)
        bonus = bonus_of(tokens, first, last, bonus_tokens, bonus_values, ENTRIES)
        tl.store(gains + row * (P + 1) + lane, gain + bonus)
        end_gain = biased(end_gain, ends, ends >= 0, row, masks)
        bonus = bonus_of(ends, first, last, bonus_tokens, bonus_values, ENTRIES)
        tl.store(gains + row * (P + 1) + P + tl.arange(0, 1), end_gain + bonus)

    # what the normaliser adds
    words = tl.zeros([], tl.float32)
    end = tl.zeros([], tl.float32)
    if normalize == END_FACTORED and fused_row:
        rest, rest_sum = merged_sum(partials, splits, temperatures[0] * LOG2_E, SPLITS)
        left_over = (rest - constants[0][0]) * temperatures[0] + safe_log(rest_sum) - constants[0][1]
        words = left_over - (fused_log_sum(partials + 2 * N * splits, splits, shift, SPLITS) - offset)
    if normalize == LOCAL:
        scores = fused_increment(rows, maps, vocabs, temperatures, constants, row_weights, ends, ends >= 0, N, KEYS)
        end_score = tl.max(scores + end_gain, axis=0)
        end = -log_add(fused_log_sum(partials + 2 * N * splits, splits, shift, SPLITS) - offset, end_score)
        words = end
    place = row_constants + row * (3 * N + 4) + 3 * N
    tl.store(place, words + tl.load(length_bonus + row))
    tl.store(place + 1, end)
    tl.store(place + 2, tl.where(bad, IMPOSSIBLE, total))
    tl.store(place + 3, tl.where((normalize == END_FACTORED) & fused_row, 1.0, 0.0))


@triton.jit(do_not_specialize=["vocab", "end_id"])
def merge_rows(
    sources, strides, vocabs, maps, temperatures, weights, candidate_tokens, gains, row_constants, vocab, end_id,
    totals, parent_rows, token_ids, parts,
    N: tl.constexpr, KEYS: tl.constexpr, EXTRAS: tl.constexpr,
    BEAM: tl.constexpr, P: tl.constexpr, TOP_K: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Totals of the BEAM * P candidates and BEAM ends of an utterance, and the TOP_K best with their parts.

    Totals come from true log-probs, computed anew; ties go to the lowest (row, token). Reads one logit per candidate
    and source; bound by launch and load latency.
    """
    utterance = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    ends = lane >= BEAM * P
    beam = tl.where(ends, lane - BEAM * P, lane // P)
    row = utterance * BEAM + tl.where(beam < BEAM, beam, 0)
    tokens = tl.load(candidate_tokens + utterance * BEAM * P + lane, mask=ends == 0, other=-1)
    tokens = tl.where(ends & (beam < BEAM), end_id, tokens)
    possible = tokens >= 0
    constants = row_constants + row * (3 * N + 4)
    scores = tl.full([LANES], IMPOSSIBLE if KEYS == MIXTURE else 0.0, tl.float32)
    acoustic = scores
    for s in tl.static_range(N):
        part = token_log_probs(
            sources[s] + row * strides[s], maps[s], vocabs[s], temperatures[s], constants + 3 * s, tokens, possible
        )
        if s == 0:
            acoustic = part
        scores = fuse(scores, part, tl.load(weights + row * N + s), KEYS)
    keeps_acoustic = ends & (tl.load(constants + 3 * N + 3) > 0.0)
    scores = tl.where(keeps_acoustic, acoustic, sanitized(scores))
    if EXTRAS:
        scores += tl.load(gains + row * (P + 1) + tl.where(ends, P, lane % P), mask=possible, other=0.0)
    scores += tl.load(constants + 3 * N + tl.where(ends, 1, 0))
    scores = sanitized(tl.load(constants + 3 * N + 2) + scores)
    possible = possible & (scores > IMPOSSIBLE)
    order = tl.where(possible, beam * vocab + tokens, LOW_BITS)
    best = tl.topk(pack(tl.where(possible, scores, IMPOSSIBLE), order), WIDTH)

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
    constants = row_constants + row * (3 * N + 4)
    for s in tl.static_range(N):
        part = token_log_probs(
            sources[s] + row * strides[s], maps[s], vocabs[s], temperatures[s], constants + 3 * s, tokens, possible
        )
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
