"""Kernels that move a batch of beam searches one token on, on the device: stop rules, lanes, slots, end limit."""

from __future__ import annotations

import triton
import triton.language as tl

from shallowfusion.kernels.beam_advance_arrays import SLOT_ROUNDING
from shallowfusion.kernels.fused_step_device import IMPOSSIBLE, UNBOUNDED

__all__ = ["beam_advance", "follow_slots", "limit_end"]

HF = tl.constexpr(0)
WHISPER = tl.constexpr(1)
ESPNET = tl.constexpr(2)
FIRST = tl.constexpr(1)  # early stopping of HF: 0 heuristic, 1 first, 2 never

HEADER = tl.constexpr(8)  # 32-bit words in front of the candidates of a ring record
ACTIVE = tl.constexpr(1)
DONE = tl.constexpr(2)
FLAGGED = tl.constexpr(4)

SLOT_CHUNK = tl.constexpr(SLOT_ROUNDING)
END_LENGTHS = tl.constexpr(3)  # as in the beam state
END_LAG = tl.constexpr(2)
END_MARGIN = tl.constexpr(-10.0)

STRIDE = tl.constexpr(0x1E3779B97F4A7C15)  # odd numbers of 61 to 63 bits
CHAIN = tl.constexpr(0x5851F42D4C957F2D)
FIRST_FACTOR = tl.constexpr(0x3F58476D1CE4E5B9)
SECOND_FACTOR = tl.constexpr(0x14D049BB133111EB)


@triton.jit
def mixed(word):
    """A 64-bit word of which every bit depends on every bit of `word`; shifts are logical."""
    word = word ^ ((word >> 33) & 0x7FFFFFFF)
    word = word * FIRST_FACTOR
    word = word ^ ((word >> 29) & 0x7FFFFFFFF)
    word = word * SECOND_FACTOR
    return word ^ ((word >> 32) & 0xFFFFFFFF)


@triton.jit
def falls_behind(total, best):
    """Whether total - best < END_MARGIN in exact arithmetic: the rounded difference and its error decide."""
    difference = total - best
    back = difference - total
    error = (total - (difference - back)) + (-best - back)
    return (difference < END_MARGIN) | ((difference == END_MARGIN) & (error < 0.0))


@triton.jit
def pool_ranks(old, new, is_old, is_new):
    """Places of both kinds of keys in one list, best first; ties go to the earlier, old before new."""
    at_old = tl.arange(0, old.shape[0])
    at_new = tl.arange(0, new.shape[0])
    before = is_old[None, :] & (
        (old[None, :] > old[:, None]) | ((old[None, :] == old[:, None]) & (at_old[None, :] < at_old[:, None]))
    )
    above = is_new[None, :] & (new[None, :] > old[:, None])
    old_ranks = tl.sum(before.to(tl.int32), axis=1) + tl.sum(above.to(tl.int32), axis=1)
    before = is_new[None, :] & (
        (new[None, :] > new[:, None]) | ((new[None, :] == new[:, None]) & (at_new[None, :] < at_new[:, None]))
    )
    above = is_old[None, :] & (old[None, :] >= new[:, None])
    return old_ranks, tl.sum(before.to(tl.int32), axis=1) + tl.sum(above.to(tl.int32), axis=1)


@triton.jit
def choose(possible, ends, rank, finished, max_finished, at_limit, RULE: tl.constexpr, K: tl.constexpr):
    """Which candidates finish, which live on, and in which lane."""
    if RULE == HF:
        stops = ends | at_limit
        finishing = possible & stops & (rank < K)
        lives = possible & (stops == 0)
    elif RULE == WHISPER:
        lives = possible & (ends == 0)
        before = tl.cumsum(lives.to(tl.int32), axis=0) - lives.to(tl.int32)
        finishing = possible & ends & (before < K)
        finishing = finishing & (finished + tl.cumsum(finishing.to(tl.int32), axis=0) <= max_finished)
    else:
        finishing = possible & ends & (rank < K)
        lives = possible & (ends == 0) & (rank < K)
    place = tl.cumsum(lives.to(tl.int32), axis=0) - 1
    return finishing, lives & (place < K), place


@triton.jit
def end_detected(ended, best, length):
    """ESPnet's test: the best of each of three lengths is too far below the best of all."""
    detected = best > IMPOSSIBLE
    for age in tl.static_range(END_LENGTHS):
        past = length - END_LAG - age
        total = tl.load(ended + past, mask=past >= 1, other=IMPOSSIBLE)
        detected = detected & (total > IMPOSSIBLE) & falls_behind(total, best)
    return detected


@triton.jit
def lift(
    edit_words, edit_until, edit_bits, place_masks, row_masks, utterance, step, words,
    K: tl.constexpr, KP: tl.constexpr, EDITS: tl.constexpr,
):  # fmt: skip
    """Sets the bits of the tokens that one search may say from step number `step` on; a word changes once a step."""
    at = utterance * EDITS + tl.arange(0, EDITS)
    due = tl.load(edit_until + at) == step
    word = tl.load(edit_words + at, mask=due, other=0)
    allowed = tl.load(place_masks + utterance * words + word, mask=due, other=0)
    allowed = allowed | tl.load(edit_bits + at, mask=due, other=0)
    tl.store(place_masks + utterance * words + word, allowed, mask=due)
    lane = tl.arange(0, KP)[:, None]
    spread = tl.zeros([KP, EDITS], tl.int32) + allowed[None, :]
    tl.store(row_masks + (utterance * K + lane) * words + word[None, :], spread, mask=(lane < K) & due[None, :])


@triton.jit(do_not_specialize=["width", "mask_width", "dead_token"])
def beam_advance(
    candidates, state, tables, outputs, ring, width, mask_width, dead_token,
    RULE: tl.constexpr, EARLY: tl.constexpr, ENDS: tl.constexpr, PARTS: tl.constexpr, SOURCES: tl.constexpr,
    RING: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, EDITS: tl.constexpr,
):  # fmt: skip
    """One step of `BeamState`, without recombination, for the utterance of each program; a done one only leaves a mark.

    Bound by the latency of dependent loads: reads and writes about 100 bytes a lane. Keys are float32 quotients,
    correctly rounded, by scales tabled per length, as HF's rule has them; the other rules compare totals and counts.
    """
    cand_totals, cand_rows, cand_tokens, cand_parts, flags = candidates
    ticks, lengths, clocks, done_flags, finished_counts, keys, ended_totals, hashes = state
    end_ids, scales, stop_scales, weight_table, edit_words, edit_until, edit_bits, limits = tables
    tokens_out, parents_out, totals_out, weights_out, place_masks, masks = outputs
    utterance = tl.program_id(0).to(tl.int64)
    tick = tl.load(ticks + utterance)
    clock = tl.load(clocks + utterance)
    tl.store(ticks + utterance, (tick + 1) % RING)
    tl.store(clocks + utterance, clock + 1)
    record = ring + (tick * tl.num_programs(0) + utterance) * (HEADER + C * (3 + PARTS))
    lane = tl.arange(0, KP)
    in_beam = lane < K
    if tl.load(done_flags + utterance) != 0:
        tl.store(record, clock)
        tl.store(record + 1, DONE)
    else:
        # what is offered
        place = tl.arange(0, CP)
        inside = place < C
        totals = tl.load(cand_totals + utterance * C + place, mask=inside, other=IMPOSSIBLE)
        rows = tl.load(cand_rows + utterance * C + place, mask=inside, other=-1)
        tokens = tl.load(cand_tokens + utterance * C + place, mask=inside, other=-1).to(tl.int32)
        parents = tl.where(rows >= 0, rows - utterance * K, -1).to(tl.int32)
        flagged = tl.sum(tl.load(flags + utterance * K + lane, mask=in_beam, other=0).to(tl.int32), axis=0) > 0
        possible = inside & (rows >= 0) & (totals > IMPOSSIBLE) & (totals < UNBOUNDED)
        rank = tl.cumsum(possible.to(tl.int32), axis=0) - 1
        ends = tokens != tokens
        for e in tl.static_range(ENDS):
            ends = ends | (tokens == tl.load(end_ids + e))

        # who finishes and who lives
        max_new_tokens = tl.load(limits + utterance * 2)
        max_finished = tl.load(limits + utterance * 2 + 1)
        none_possible = tl.sum(possible.to(tl.int32), axis=0) == 0
        length = tl.load(lengths + utterance) + tl.where(none_possible, 0, 1)
        at_limit = length >= max_new_tokens
        row = utterance * width + length  # of the tables
        finished = tl.load(finished_counts + utterance)
        last = place * 0 + length >= max_new_tokens  # the interpreter makes numbers of a truth value it spreads
        finishing, lives, to_lane = choose(possible, ends, rank, finished, max_finished, last, RULE, K)
        num_live = tl.sum(lives.to(tl.int32), axis=0)
        finished += tl.sum(finishing.to(tl.int32), axis=0)
        stops = none_possible | (num_live == 0) | at_limit
        if RULE == HF:
            best_live = tl.max(tl.where(lives, totals, IMPOSSIBLE), axis=0)
            scale = tl.load(scales + row)
            fresh = tl.div_rn(totals, tl.zeros([CP], tl.float32) + scale)
            pool = tl.load(keys + utterance * K + lane, mask=in_beam, other=IMPOSSIBLE)
            old = in_beam & (lane < finished - tl.sum(finishing.to(tl.int32), axis=0))
            old_ranks, new_ranks = pool_ranks(pool, fresh, old, finishing)
            tl.debug_barrier()  # every thread has read the pool
            tl.store(keys + utterance * K + old_ranks, pool, mask=old & (old_ranks < K))
            tl.store(keys + utterance * K + new_ranks, fresh, mask=finishing & (new_ranks < K))
            worst = tl.max(tl.where(old & (old_ranks == K - 1), pool, IMPOSSIBLE), axis=0)
            worst = tl.maximum(worst, tl.max(tl.where(finishing & (new_ranks == K - 1), fresh, IMPOSSIBLE), axis=0))
            finished = tl.minimum(finished, K)
            hopeless = tl.div_rn(best_live, tl.load(stop_scales + row)) <= worst
            stops = stops | ((finished == K) & ((EARLY == FIRST) | (K == 1) | hopeless))
        elif RULE == WHISPER:
            stops = stops | (finished >= max_finished)
        else:
            fresh_best = tl.max(tl.where(finishing, totals, IMPOSSIBLE), axis=0)
            best = tl.maximum(tl.load(keys + utterance * K), fresh_best)
            ended = ended_totals + utterance * width
            stops = stops | end_detected(ended, best, length)
            tl.store(keys + utterance * K, best)
            tl.store(ended + length, fresh_best, mask=none_possible == 0)

        # the new lanes
        alive = lives & (stops == 0)
        chosen = alive[None, :] & (to_lane[None, :] == lane[:, None])  # [lanes, candidates]
        live_lane = tl.sum(chosen.to(tl.int32), axis=1) > 0
        new_totals = tl.max(tl.where(chosen, totals[None, :], IMPOSSIBLE), axis=1)
        new_parents = tl.sum(tl.where(chosen, parents[None, :], 0), axis=1)
        new_tokens = tl.where(live_lane, tl.sum(tl.where(chosen, tokens[None, :], 0), axis=1), dead_token)
        at = utterance * K + lane
        tl.store(tokens_out + at, new_tokens.to(tl.int64), mask=in_beam)
        tl.store(parents_out + at, new_parents.to(tl.int64), mask=in_beam)
        tl.store(totals_out + at, new_totals, mask=in_beam)
        tl.store(lengths + utterance, length)
        tl.store(finished_counts + utterance, finished)
        tl.store(done_flags + utterance, stops.to(tl.int32))
        for s in tl.static_range(SOURCES):
            weight = tl.load(weight_table + row * SOURCES + s)
            tl.store(weights_out + at * SOURCES + s, tl.zeros([KP], tl.float32) + weight, mask=in_beam)

        # the hash of what was decided
        status = ACTIVE + tl.where(stops, DONE, 0) + tl.where(flagged, FLAGGED, 0)
        bits = new_totals.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        words = ((new_tokens.to(tl.int64) << 32) | bits) + (lane * 1024 + new_parents + 1).to(tl.int64) * STRIDE
        # a vector of one word: the interpreter warns when single integers wrap
        total_word = tl.sum(tl.where(in_beam[None, :], mixed(words)[None, :], 0), axis=1)
        one = utterance + tl.arange(0, 1)
        code = mixed(tl.load(hashes + one) * CHAIN + total_word + (length * 8 + status).to(tl.int64))
        tl.store(hashes + one, code)

        # the ring record
        first = tl.arange(0, 1)
        tl.store(record, clock)
        tl.store(record + 1, status)
        tl.store(record + 2 + first, (code & 0xFFFFFFFF).to(tl.int32))
        tl.store(record + 3 + first, (code >> 32).to(tl.int32))
        tl.store(record + 4, length)
        body = record + HEADER
        tl.store(body + place, totals.to(tl.int32, bitcast=True), mask=inside)
        tl.store(body + C + place, parents, mask=inside)
        tl.store(body + 2 * C + place, tokens, mask=inside)
        for s in tl.static_range(PARTS):
            part = tl.load(cand_parts + (utterance * C + place) * PARTS + s, mask=inside, other=0.0)
            tl.store(body + 3 * C + place * PARTS + s, part.to(tl.int32, bitcast=True), mask=inside)
        lift(
            edit_words, edit_until, edit_bits, place_masks, masks, utterance, clock + 1, mask_width, K, KP, EDITS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["mapped", "chunks", "first_slot"])
def follow_slots(
    advanced, memory, feed, mapping, mapped, chunks, first_slot,
    K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What one model reads next and what each lane sees of its slots (KERNELS 4.5); nothing is moved but bits.

    Lane k of step t writes slot first_slot + t * K + k. The list of slots that some lane sees stays in order and
    loses those that none sees; it is the slot table that `attend_slots` walks. `sight` holds the same bits by slot. A
    lane whose token the model lacks reads its last token anew in a fresh slot, so that its logits are what they were.
    Reads 8 and writes 12 bytes per listed slot. A table of one that is done keeps one entry.
    """
    tokens_in, parents_in, done_flags = advanced
    steps, seen, last_tokens, last_slots, table, sight = memory
    ids_out, positions_out, writes_out = feed
    utterance = tl.program_id(0).to(tl.int64)
    capacity = chunks * SLOT_CHUNK  # so that loads are known to be aligned
    listed = table + utterance * (3 * capacity) + capacity
    if tl.load(done_flags + utterance) != 0:
        held = tl.load(listed - capacity + 1)
        tl.store(listed - capacity + 1, tl.minimum(held, 1))
    else:
        step = tl.load(steps + utterance)
        own_bits = listed + capacity
        by_slot = sight + utterance * capacity
        count = tl.load(listed - capacity + 1)
        lane = tl.arange(0, KP)
        in_beam = lane < K
        at = utterance * K + lane
        parents = tl.load(parents_in + at, mask=in_beam, other=0).to(tl.int32)
        tokens = tl.load(tokens_in + at, mask=in_beam, other=0).to(tl.int32)
        if mapping is None:
            own = tl.where(tokens < mapped, tokens, -1)
        else:
            own = tl.load(mapping + tokens, mask=in_beam, other=-1)
        idle = own < 0
        ids = tl.where(idle, tl.load(last_tokens + utterance * K + parents, mask=in_beam, other=0), own)
        lengths = tl.load(seen + utterance * K + parents, mask=in_beam, other=1) + tl.where(idle, 0, 1)
        left = tl.load(last_slots + utterance * K + parents, mask=in_beam, other=-1)
        left = tl.where(idle, left, -1)

        kept = 0
        chunk = 0
        while chunk * BLOCK < count:
            place = chunk * BLOCK + tl.arange(0, BLOCK)
            is_listed = place < count
            slot = tl.load(listed + place, mask=place < capacity, other=0)  # a bound that leaves loads wide
            word = tl.where(is_listed, tl.load(own_bits + place, mask=place < capacity, other=0), 0)
            sees = (word[:, None] >> parents[None, :]) & 1
            sees = tl.where(in_beam[None, :] & (slot[:, None] != left[None, :]), sees << lane[None, :], 0)
            word = tl.sum(sees, axis=1)  # distinct bits: a sum is an or
            tl.store(by_slot + slot, word, mask=is_listed)
            stays = word != 0
            target = kept + tl.cumsum(stays.to(tl.int32), axis=0) - 1
            tl.debug_barrier()  # every thread has read its places
            tl.store(listed + target, slot, mask=stays)
            tl.store(own_bits + target, word, mask=stays)
            kept += tl.sum(stays.to(tl.int32), axis=0)
            chunk += 1
        fresh = first_slot + step * K + lane
        tl.debug_barrier()
        tl.store(listed + kept + lane, fresh, mask=in_beam)
        tl.store(own_bits + kept + lane, (lane * 0 + 1) << lane, mask=in_beam)
        tl.store(by_slot + fresh, (lane * 0 + 1) << lane, mask=in_beam)
        tl.store(listed - capacity + 1, kept + K)
        tl.store(steps + utterance, step + 1)
        tl.store(seen + at, lengths, mask=in_beam)
        tl.store(last_tokens + at, ids, mask=in_beam)
        tl.store(last_slots + at, fresh, mask=in_beam)
        tl.store(ids_out + at, ids.to(tl.int64), mask=in_beam)
        tl.store(positions_out + at, (lengths - 1).to(tl.int64), mask=in_beam)
        tl.store(writes_out + at, fresh.to(tl.int64), mask=in_beam)


@triton.jit(do_not_specialize=["stride", "words", "end_id", "word", "without_end"])
def limit_end(
    logits, stride, log_sum_exp, max_log_prob, masks, place_masks, words, end_id, word, without_end, temperature,
    threshold, K: tl.constexpr,
):  # fmt: skip
    """Writes mask word `word` of a row: the place's own, less the end where the acoustic model finds it too unlikely.

    One row a program; reads four numbers and writes one word. `without_end` has all bits but the end's.
    """
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(logits + row * stride + end_id).to(tl.float32)
    log_prob = tl.div_rn(end, temperature) - tl.load(log_sum_exp + row)
    refused = log_prob < threshold * tl.load(max_log_prob + row)
    allowed = tl.load(place_masks + row // K * words + word)
    tl.store(masks + row * words + word, tl.where(refused, allowed & without_end, allowed))
