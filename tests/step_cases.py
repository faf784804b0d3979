"""Requests of the fused step for tests, and the check that a backend agrees with the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shallowfusion.kernels.fused_step_reference import fused_step_reference
from shallowfusion.values import Candidates, SparseBonus, StepRequest, Unmapped

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
IMPOSSIBLE = float("-inf")


def make_request(
    *,
    utterances: int = 2,
    beam_size: int = 3,
    vocabs: Sequence[int] = (255, 200),
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    spread: float = 3.0,
    padding: int = 0,
    seed: int = 0,
    **changes: Any,
) -> StepRequest:
    """Random logits of standard deviation `spread` under a plain log-linear rule; `changes` replace fields.

    With `padding` the rows lie that many elements apart beyond their vocabulary, and the gap holds NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = utterances * beam_size
    sources = []
    for index, vocab in enumerate(vocabs):
        logits = torch.full((rows, vocab + padding), float("nan"))
        logits[:, :vocab] = torch.randn((rows, vocab), generator=generator) * spread
        sources.append(logits.to(dtypes[index % len(dtypes)])[:, :vocab])
    request = StepRequest(
        sources=tuple(sources),
        weights=torch.tensor([1.0, 0.3, 0.2, 0.7, 0.1, 0.4, 0.25, 0.9][: len(vocabs)]).repeat(rows, 1),
        totals=torch.randn(rows, generator=generator) * 2 - 5,
        beam_size=beam_size,
        top_k=2 * beam_size,
        end_id=vocabs[0] // 2,
        temperatures=(1.0,) * len(vocabs),
        maps=(None,) * len(vocabs),
        unmapped=(Unmapped("neutral"),) * len(vocabs),
        token_bias=None,
        allowed=None,
        bonus=None,
        length_bonus=torch.zeros(rows),
        combine="log_linear",
        normalize="none",
    )
    return dataclasses.replace(request, **changes)


def random_map(vocab: int, source_vocab: int, seed: int = 0, unmapped_share: float = 0.3) -> Tensor:
    """An int32 map of `vocab` tokens into a source, a share of them without counterpart."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, source_vocab, (vocab,), generator=generator, dtype=torch.int32)
    return torch.where(torch.rand(vocab, generator=generator) < unmapped_share, -1, ids).to(torch.int32)


def random_bias(vocab: int, seed: int = 0, forbidden_share: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(vocab, generator=generator)
    return bias.masked_fill(torch.rand(vocab, generator=generator) < forbidden_share, IMPOSSIBLE)


def packed_mask(allowed: Tensor) -> Tensor:
    """bool [rows, vocab] as the int32 words of StepRequest.allowed."""
    rows, vocab = allowed.shape
    bits = torch.zeros((rows, (vocab + 31) // 32 * 32), dtype=torch.int64)
    bits[:, :vocab] = allowed.long()
    words = (bits.view(rows, -1, 32) << torch.arange(32)).sum(dim=2)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def random_mask(rows: int, vocab: int, seed: int = 0, share: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return packed_mask(torch.rand((rows, vocab), generator=generator) < share)


def random_bonus(rows: int, vocab: int, per_row: int, seed: int = 0) -> SparseBonus:
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randperm(vocab, generator=generator)[:per_row].to(torch.int32) for _ in range(rows)]
    per_row = min(per_row, vocab)
    return SparseBonus(
        row_offsets=torch.arange(0, rows * per_row + 1, max(per_row, 1), dtype=torch.int32)
        if per_row
        else torch.zeros(rows + 1, dtype=torch.int32),
        token_ids=torch.cat(tokens),
        values=torch.randn(rows * per_row, generator=generator) * 3,
    )


def reference_table(request: StepRequest) -> tuple[Tensor, Tensor, Candidates]:
    """The reference's total [rows, vocab] and parts [rows, vocab, sources] of every continuation."""
    whole = dataclasses.replace(request, top_k=request.beam_size * request.vocab_size)
    every = fused_step_reference(whole)
    totals = torch.full((request.num_rows, request.vocab_size), IMPOSSIBLE)
    parts = torch.zeros((request.num_rows, request.vocab_size, len(request.sources)))
    possible = every.parent_rows >= 0
    at = (every.parent_rows[possible], every.token_ids[possible])
    totals[at] = every.totals[possible]
    parts[at] = every.parts[possible]
    return totals, parts, every


def assert_matches_reference(request: StepRequest, found: Candidates) -> None:
    """Same scores in the same places of the ranking, in an order the contract allows, with the same parts.

    The tolerance, 1e-5 and one spacing of float32, lies within the error budget of the project's style page.
    """
    totals, parts, every = reference_table(request)
    assert torch.equal(found.flags, every.flags)
    width = min(request.top_k, every.totals.shape[1])
    wanted = torch.full_like(found.totals, IMPOSSIBLE)
    wanted[:, :width] = every.totals[:, :width]
    assert_close(found.totals, wanted)
    possible = found.totals > IMPOSSIBLE
    assert torch.equal(possible, wanted > IMPOSSIBLE)
    assert (found.parent_rows[~possible] == -1).all()
    assert (found.token_ids[~possible] == -1).all()
    assert (found.parts[~possible] == 0).all()
    at = (found.parent_rows[possible], found.token_ids[possible])
    assert_close(found.totals[possible], totals[at])
    assert_close(found.parts[possible], parts[at])
    utterance_of = torch.arange(found.totals.shape[0])[:, None].expand_as(found.parent_rows)
    assert torch.equal(at[0] // request.beam_size, utterance_of[possible])
    for utterance in range(found.totals.shape[0]):
        kept = possible[utterance]
        keys = list(
            zip(
                (-found.totals[utterance][kept]).tolist(),
                found.parent_rows[utterance][kept].tolist(),
                found.token_ids[utterance][kept].tolist(),
                strict=True,
            )
        )
        assert keys == sorted(set(keys))


def assert_close(found: Tensor, wanted: Tensor) -> None:
    spacing = torch.where(wanted.isfinite(), wanted, 0.0).abs() * 2.0**-23
    same = (found == wanted) | (found.isnan() & wanted.isnan()) | ((found - wanted).abs() <= 1e-5 + spacing)
    assert same.all(), f"largest difference {(found - wanted)[~same].abs().max()}"


def assert_same_bits(one: Candidates, other: Candidates) -> None:
    for name in ("totals", "parent_rows", "token_ids", "parts", "flags"):
        first, second = getattr(one, name), getattr(other, name)
        assert torch.equal(first.nan_to_num(nan=1e30), second.nan_to_num(nan=1e30)), name
