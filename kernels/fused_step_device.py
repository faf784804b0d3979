"""Device functions that the kernels of the fused step share: packed keys, log-sum-exps, log-probs, increments.

Every ranking key is computed by one expression, written with explicit `fma` and compiled without further contraction,
so that a group maximum stored by one kernel equals bit for bit what another kernel finds when it re-reads the tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "END_FACTORED",
    "GROUP",
    "LOCAL",
    "LOG_LINEAR",
    "MIXTURE",
    "NORMALIZE_NONE",
    "ONE_PASS",
]

GROUP = tl.constexpr(32)  # tokens behind one stored maximum, and bits in a mask word
LOG2_E = tl.constexpr(1.4426950408889634)
IMPOSSIBLE = tl.constexpr(float("-inf"))
UNBOUNDED = tl.constexpr(float("inf"))
LOW_BITS = tl.constexpr(0x7FFFFFFF)
NOTHING = tl.constexpr(-(2**63 - 1))  # less than any packed key

NORMALIZE_NONE = tl.constexpr(0)
LOCAL = tl.constexpr(1)
END_FACTORED = tl.constexpr(2)
ONE_PASS = tl.constexpr(0)  # ranking keys are weighted logits; the other two are increments of true log-probs
LOG_LINEAR = tl.constexpr(1)
MIXTURE = tl.constexpr(2)


@triton.jit
def decoded(odd):
    """A size from 2 * size + 1: the compiler makes a variant for integers in tuples that are 1 or divide by 16."""
    return odd >> 1


@triton.jit
def sanitized(score):
    """NaN and +inf become -inf: both arise only from impossible tokens here, or in rows that are flagged."""
    return tl.where(score < UNBOUNDED, score, IMPOSSIBLE)


@triton.jit
def pack(value, index):
    """One int64 that orders by (value descending, index ascending) when sorted descending; -0 counts as +0.

    A negative index counts as the last one.
    """
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & LOW_BITS)
    return (ordered.to(tl.int64) << 32) | (~index & LOW_BITS).to(tl.int64)


@triton.jit
def unpack_value(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & LOW_BITS)).to(tl.float32, bitcast=True)


@triton.jit
def unpack_index(key):
    return (key & LOW_BITS).to(tl.int32) ^ LOW_BITS


@triton.jit
def exponent_sum(tile, scale):
    """Largest element of a two-dimensional tile and the sum of exp2((x - largest) * scale).

    The sum is NaN if and only if the tile holds NaN or +inf: that is how bad rows are found without a test per element.
    """
    largest = tl.max(tl.max(tile, axis=1), axis=0)
    reference = tl.where(largest == IMPOSSIBLE, 0.0, largest)
    return largest, tl.sum(tl.sum(tl.exp2((tile - reference) * scale), axis=1), axis=0)


@triton.jit
def log_add(first, second):
    """log(exp(first) + exp(second)), -inf safe."""
    high = tl.maximum(first, second)
    reference = tl.where(high == IMPOSSIBLE, 0.0, high)
    return high + tl.log(1.0 + tl.exp(tl.minimum(first, second) - reference))


@triton.jit
def merged_sum(statistics, splits, scale, SPLITS: tl.constexpr):
    """The partial (largest, sum) pairs at `statistics` as one pair; always added in the same order."""
    split = tl.arange(0, SPLITS)
    parts = tl.load(statistics + split, mask=split < splits, other=IMPOSSIBLE)
    sums = tl.load(statistics + splits + split, mask=split < splits, other=0.0)
    largest = tl.max(parts, axis=0)
    reference = tl.where(largest == IMPOSSIBLE, 0.0, largest)
    return largest, tl.sum(sums * tl.exp2((parts - reference) * scale), axis=0)


@triton.jit
def safe_log(total):
    """log(total), 0 for an empty sum: an impossible logit then stays -inf instead of NaN."""
    return tl.log(tl.where(total == 0.0, 1.0, total))


@triton.jit
def source_constants(statistics, splits, inverse_temperature, floor, left_out, SPLITS: tl.constexpr):
    """What one row needs of a source: (largest logit, log of the exp sum, log-prob of tokens without counterpart).

    `floor` is what the source says of a token without counterpart: NaN = as much as of its favourite, -inf = forbidden.
    `left_out` is the logit that the stream kept out of the sums, -inf if there is none.
    """
    scale = inverse_temperature * LOG2_E
    rest, total = merged_sum(statistics, splits, scale, SPLITS)
    largest = tl.maximum(rest, left_out)
    reference = tl.where(largest == IMPOSSIBLE, 0.0, largest)
    total = total * tl.exp2((rest - reference) * scale) + tl.exp2((left_out - reference) * scale)
    log_sum = safe_log(total)
    unmapped = tl.where(largest == IMPOSSIBLE, IMPOSSIBLE, -log_sum)
    return reference, log_sum, tl.where(floor == floor, floor, unmapped)


@triton.jit
def load_logits(source, mapping, vocab, tokens, inside):
    """Logits of one row by acoustic token, -inf without counterpart, and which tokens have one."""
    if mapping is None:
        known = inside & (tokens < vocab)
        logits = tl.load(source + tokens, mask=known, other=IMPOSSIBLE).to(tl.float32)
    else:
        ids = tl.load(mapping + tokens, mask=inside, other=-1)
        known = ids >= 0
        logits = tl.load(source + ids, mask=known, other=IMPOSSIBLE).to(tl.float32)
    return logits, known


@triton.jit
def log_prob(logits, known, largest, log_sum, unmapped, inverse_temperature):
    return tl.where(known, (logits - largest) * inverse_temperature - log_sum, unmapped)


@triton.jit
def fuse(increment, log_probs, weight, KEYS: tl.constexpr):
    """Adds one source to a running increment; a weight of 0 adds nothing, whatever the source says."""
    if KEYS == MIXTURE:
        return log_add(increment, tl.where(weight == 0.0, IMPOSSIBLE, log_probs + tl.log(weight)))
    return tl.fma(tl.where(weight == 0.0, 0.0, log_probs), weight, increment)


@triton.jit
def fused_increment(
    rows, maps, vocabs, temperatures, constants, weights, tokens, inside, N: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """Weighted log-probs of `tokens`, normaliser and rewards apart; -inf where a source of weight says impossible."""
    increment = tl.full(tokens.shape, IMPOSSIBLE if KEYS == MIXTURE else 0.0, tl.float32)
    for s in tl.static_range(N):
        logits, known = load_logits(rows[s], maps[s], decoded(vocabs[s]), tokens, inside)
        log_probs = log_prob(logits, known, constants[s][0], constants[s][1], constants[s][2], temperatures[s])
        increment = fuse(increment, log_probs, weights[s], KEYS)
    return tl.where(inside, sanitized(increment), IMPOSSIBLE)


@triton.jit
def weighted_logits(rows, vocabs, temperatures, floors, weights, tokens, inside, N: tl.constexpr):
    """The ranking key of the one-pass mode; tokens beyond a source take 0 from it, or -inf where that is forbidden."""
    key = tl.zeros(tokens.shape, tl.float32)
    for s in tl.static_range(N):
        logits, known = load_logits(rows[s], None, decoded(vocabs[s]), tokens, inside)
        logits = tl.where(known | (floors[s] == IMPOSSIBLE), logits, 0.0)
        key = tl.fma(tl.where(weights[s] == 0.0, 0.0, logits), weights[s] * temperatures[s], key)
    return tl.where(inside, sanitized(key), IMPOSSIBLE)


@triton.jit
def allowed_bit(words, index, limit, tokens, inside, default):
    """Bit of each token in the mask words of row `index`; `default` is the word of an absent mask (limit 0)."""
    word = tl.load(words + index * limit + tokens // GROUP, mask=inside & (tokens // GROUP < limit), other=default)
    return ((word >> (tokens & (GROUP - 1))) & 1) != 0
