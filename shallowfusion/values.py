"""The records that pass between the parts: numbers only, no models, no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "Candidates", "Hypothesis", "RowStatistics", "SparseBonus", "Span", "StepRequest", "Token", "Unmapped", "Word",
]  # fmt: skip

Combine = Literal["log_linear", "mixture"]
Normalize = Literal["none", "local", "end_factored"]


@dataclass(frozen=True)
class SparseBonus:
    """Per-row additions to a few tokens, in compressed sparse rows.

    Args:
        row_offsets: int32 [rows + 1]; entries of row r are row_offsets[r] .. row_offsets[r + 1] - 1.
        token_ids: int32 [entries]; acoustic token ids, each at most once in a row.
        values: float32 [entries]; nats, negative values are refunds.
    """

    row_offsets: Tensor
    token_ids: Tensor
    values: Tensor


@dataclass(frozen=True)
class TokenRanges:
    """Ranges of places in an order of the vocabulary; row r has the ranges from row_offsets[r] to row_offsets[r + 1].

    Args:
        row_offsets: int32 [rows + 1], rising from 0 to the number of ranges.
        first: int32 [ranges], the first place.
        last: int32 [ranges], one past the last place; a range whose last is not above its first is empty.
    """

    row_offsets: Tensor
    first: Tensor
    last: Tensor


@dataclass(frozen=True)
class RangeLogProbs:
    """Log of the summed probability of ranges of tokens, nats.

    Args:
        log_probs: float32 [ranges]; -inf for an empty range.
        log_sums: float32 [rows], the log-sum-exp of the whole row, which was taken off; NaN for a row without ranges
            unless it was given.
        backend: which implementation ran.
    """

    log_probs: Tensor
    log_sums: Tensor
    backend: str = field(default="", compare=False)


@dataclass(frozen=True)
class Unmapped:
    """What a source says of an acoustic token it has no counterpart for.

    `neutral`: the source's largest log-prob in that row, so the token neither gains nor loses against the
    source's own favourite. `floor`: the constant `floor` (nats). `forbid`: -inf.
    """

    policy: Literal["neutral", "floor", "forbid"]
    floor: float = 0.0


@dataclass(frozen=True)
class StepRequest:
    """One checked call of the fused step; what every backend receives.

    Args:
        sources: logits [rows, vocab_s] of source s, float32 | float16 | bfloat16, unit stride along the vocabulary,
            any row stride. Source 0 is acoustic and defines the token ids; vocab = sources[0].shape[1].
        weights: float32 [rows, sources], contiguous.
        totals: float32 [rows], -inf marks a dead row.
        temperatures: one per source; logits are divided by it before the softmax.
        maps: per source None or int32 [vocab]: the id in that source of each acoustic token, -1 = no counterpart.
            None means same ids; acoustic ids past that source's vocabulary have no counterpart.
        unmapped: one policy per source.
        token_bias: float32 [vocab] added to every row, -inf forbids; None = zeros.
        allowed: int32 [rows, ceil(vocab / 32)] bit b of word w allows token 32 * w + b; None = all.
        bonus: sparse additions per row.
        length_bonus: float32 [rows], added to every token but end_id.
        end_id: acoustic id of the end token, -1 = none.
    """

    sources: tuple[Tensor, ...]
    weights: Tensor
    totals: Tensor
    beam_size: int
    top_k: int
    end_id: int
    temperatures: tuple[float, ...]
    maps: tuple[Tensor | None, ...]
    unmapped: tuple[Unmapped, ...]
    token_bias: Tensor | None
    allowed: Tensor | None
    bonus: SparseBonus | None
    length_bonus: Tensor
    combine: Combine
    normalize: Normalize

    @property
    def num_rows(self) -> int:
        return self.sources[0].shape[0]

    @property
    def vocab_size(self) -> int:
        return self.sources[0].shape[1]


@dataclass(frozen=True)
class Candidates:
    """The best continuations of each utterance, best first.

    Args:
        totals: float32 [utterances, top_k]; -inf where fewer than top_k possible continuations exist.
        parent_rows: int64 [utterances, top_k], row of the whole batch; -1 beside a total of -inf.
        token_ids: int64 [utterances, top_k], acoustic ids; -1 beside a total of -inf.
        parts: float32 [utterances, top_k, sources]: each source's own log-prob of that token, unweighted.
        flags: bool [rows]: NaN or +inf was seen in that row, which therefore has no candidates.
        backend: which implementation ran, and why when it was chosen automatically.
    """

    totals: Tensor
    parent_rows: Tensor
    token_ids: Tensor
    parts: Tensor
    flags: Tensor
    backend: str = field(default="", compare=False)


@dataclass(frozen=True)
class RowStatistics:
    """What a gate may know of each row of one source; float32 [rows] each, in nats.

    `margin` is the log-prob of the best token minus that of the second (+inf with a vocabulary of one).
    """

    log_sum_exp: Tensor
    entropy: Tensor
    max_log_prob: Tensor
    margin: Tensor


@dataclass(frozen=True)
class Token:
    """One token of a hypothesis.

    Args:
        id: in the acoustic vocabulary.
        text: what it adds to the text; "" for the end token.
        total: its increment of the hypothesis's total, nats.
        parts: each source's own log-prob of it, unweighted, by source name ("asr", "lm", ...); where a source has no
            counterpart for it, or the end policy sets it apart, what was charged in its place.
        start, end: seconds into the recording; None = not known.
    """

    id: int
    text: str
    total: float
    parts: Mapping[str, float]
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Word:
    """A word and where it is said; field names as in openai-whisper.

    Args:
        start, end: seconds into the recording, from the first frame of the word's first label to the end of its last.
    """

    word: str
    start: float
    end: float


@dataclass(frozen=True)
class Span:
    """A stretch of a hypothesis between two timestamps.

    Args:
        start, end: seconds from the beginning of the window; end is None where nothing closed it.
        text: of its tokens; that of the first span of a hypothesis without its leading space, so that all together are
            the hypothesis's text.
        first, last: its text tokens are token_ids[first:last].
    """

    start: float
    end: float | None
    text: str
    first: int
    last: int


@dataclass(frozen=True)
class Hypothesis:
    """One transcript of an utterance.

    Args:
        text: stripped of the leading space.
        token_ids: text tokens, and timestamps where they were asked for, without prefix and end token.
        tokens: the same with scores, the end token last if the hypothesis has one.
        total: sum of the token totals, nats.
        score: what hypotheses are ranked by: the total after the length rule.
        parts: sum over tokens of each source's log-prob, unweighted, by source name.
        flags: "forced_finish" (stopped without an end token), "truncation" (ended although the acoustic model gave
            the end little chance), "repetition" (the text repeats itself), "nan" (a model returned NaN),
            "lm_distrusted" (decoded without language models, which found the fused one too unlikely).
        spans: what lies between timestamps, in order; None if they were not asked for.
        words: with times, of a CTC search whose frames have a length; else none.
    """

    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[Token, ...]
    total: float
    score: float
    parts: Mapping[str, float]
    flags: tuple[str, ...] = ()
    spans: tuple[Span, ...] | None = None
    words: tuple[Word, ...] = ()

    @property
    def ended(self) -> bool:
        return "forced_finish" not in self.flags


def no_candidates(utterances: int, top_k: int, sources: int, rows: int, device: torch.device) -> Candidates:
    """Candidates with nothing possible in them, for a backend to fill."""
    return Candidates(
        totals=torch.full((utterances, top_k), float("-inf"), device=device),
        parent_rows=torch.full((utterances, top_k), -1, dtype=torch.int64, device=device),
        token_ids=torch.full((utterances, top_k), -1, dtype=torch.int64, device=device),
        parts=torch.zeros((utterances, top_k, sources), device=device),
        flags=torch.zeros(rows, dtype=torch.bool, device=device),
    )
