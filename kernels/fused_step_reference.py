"""The fused step and the row statistics in plain torch, float64: the definition of correct."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from shallowfusion.values import Candidates, RowStatistics, StepRequest, Unmapped, no_candidates

__all__ = ["fused_step_reference", "row_statistics_reference"]

IMPOSSIBLE = float("-inf")


def fused_step_reference(request: StepRequest) -> Candidates:
    """Score every continuation of every row and keep the best `top_k` of each utterance.

    log-linear: increment[r, v] = sum_s weights[r, s] * log_prob_s[r, map_s(v)]
    mixture:    increment[r, v] = log sum_s weights[r, s] * prob_s[r, map_s(v)]
    then the normaliser, then token_bias[v] + bonus[r, v] + length_bonus[r] * (v is not end).

    A weight of 0 contributes exactly 0, whatever its source says. A token that any source of non-zero weight
    calls impossible is impossible, whatever the sign of the weight (log-linear).
    Rows flagged for NaN or +inf in a source of non-zero weight, and dead rows, yield nothing.
    Reads each logit once; the float64 intermediates here are for clarity, not for speed.

    Returns:
        Candidates ordered by (total descending, row ascending, token ascending).
    """
    log_probs = [_mapped_log_probs(request, index) for index in range(len(request.sources))]
    increments = _combine(request, log_probs)
    increments = _normalize(request, increments, log_probs[0])
    increments = increments + _rewards(request)
    flags = _bad_rows(request)
    scores = request.totals.double()[:, None] + increments
    dead = flags | (request.totals == IMPOSSIBLE)
    scores = scores.masked_fill(dead[:, None], IMPOSSIBLE)
    return _select(request, scores, torch.stack(log_probs, dim=-1), flags)


def row_statistics_reference(source: Tensor, temperature: float = 1.0) -> RowStatistics:
    """Log-sum-exp, entropy, largest log-prob and margin of each row of `source` [rows, vocab].

    A row that holds NaN or +inf gives NaN everywhere; a row of -inf gives -inf, 0, -inf, 0.
    """
    logits = source.double() / temperature
    log_sum_exp = torch.logsumexp(logits, dim=1)
    log_probs = _log_softmax(logits)
    entropy = -torch.where(log_probs == IMPOSSIBLE, 0.0, log_probs.exp() * log_probs).sum(dim=1)
    best = log_probs.topk(min(2, source.shape[1]), dim=1).values
    margin = torch.full_like(log_sum_exp, float("inf")) if source.shape[1] == 1 else best[:, 0] - best[:, 1]
    impossible = log_sum_exp == IMPOSSIBLE
    broken = torch.isnan(logits).any(dim=1) | (logits == float("inf")).any(dim=1)
    values = {
        "log_sum_exp": log_sum_exp,
        "entropy": entropy.masked_fill(impossible, 0.0),
        "max_log_prob": best[:, 0],
        "margin": margin.masked_fill(impossible, 0.0),
    }
    return RowStatistics(**{name: value.masked_fill(broken, float("nan")).float() for name, value in values.items()})


def _log_softmax(logits: Tensor) -> Tensor:
    """Log-softmax that calls every token of an all -inf row impossible instead of NaN."""
    log_probs = torch.log_softmax(logits, dim=1)
    return log_probs.masked_fill((logits == IMPOSSIBLE).all(dim=1, keepdim=True), IMPOSSIBLE)


def _mapped_log_probs(request: StepRequest, index: int) -> Tensor:
    """Log-probs of one source by acoustic token, its unmapped policy applied; float64 [rows, vocab]."""
    source = request.sources[index]
    log_probs = _log_softmax(source.double() / request.temperatures[index])
    ids = token_map(request, index)
    mapped = log_probs[:, ids.clamp(min=0)]
    return torch.where(ids >= 0, mapped, _unmapped_value(log_probs, request.unmapped[index]))


def token_map(request: StepRequest, index: int) -> Tensor:
    """The id in source `index` of each acoustic token, int64 [vocab], -1 = no counterpart."""
    given = request.maps[index]
    if given is not None:
        return given.long()
    ids = torch.arange(request.vocab_size, device=request.totals.device)
    return torch.where(ids < request.sources[index].shape[1], ids, -1)


def _unmapped_value(log_probs: Tensor, unmapped: Unmapped) -> Tensor:
    """What the policy says of a token without counterpart, [rows, 1]."""
    if unmapped.policy == "neutral":
        return log_probs.max(dim=1, keepdim=True).values
    value = unmapped.floor if unmapped.policy == "floor" else IMPOSSIBLE
    return torch.full_like(log_probs[:, :1], value)


def _combine(request: StepRequest, log_probs: list[Tensor]) -> Tensor:
    weights = request.weights.double()
    if request.combine == "mixture":
        logged = [
            torch.where(weights[:, s : s + 1] == 0.0, IMPOSSIBLE, weights[:, s : s + 1].log() + log_prob)
            for s, log_prob in enumerate(log_probs)
        ]
        return torch.logsumexp(torch.stack(logged), dim=0)
    increments = torch.zeros_like(log_probs[0])
    for s, log_prob in enumerate(log_probs):
        weight = weights[:, s : s + 1]
        term = torch.where(log_prob == IMPOSSIBLE, IMPOSSIBLE, weight * log_prob)
        increments = increments + torch.where(weight == 0.0, 0.0, term)
    return increments


def _normalize(request: StepRequest, increments: Tensor, acoustic: Tensor) -> Tensor:
    """Static biases join here, since `local` normalises over what is allowed.

    `end_factored` (METHODS 1.5): the end token keeps its acoustic log-prob; the rest of the row shares what is left,
    log(1 - p_end), in proportion to the fused scores of all tokens but the end, masks and biases apart.
    A row where every source but the acoustic has weight 0 is the plain decoder and is left as it is.
    """
    if request.normalize == "end_factored":
        end = request.end_id
        words = torch.arange(request.vocab_size, device=increments.device) != end
        left_over = torch.logsumexp(acoustic[:, words], dim=1, keepdim=True)
        factored = left_over + increments - torch.logsumexp(increments[:, words], dim=1, keepdim=True)
        factored = factored.masked_fill(increments == IMPOSSIBLE, IMPOSSIBLE)
        factored[:, end] = acoustic[:, end]
        fused = (request.weights[:, 1:] != 0.0).any(dim=1, keepdim=True)
        increments = torch.where(fused, factored, increments)
    if request.token_bias is not None:
        increments = increments + request.token_bias.double()
    increments = increments.masked_fill(~allowed_tokens(request), IMPOSSIBLE)
    if request.normalize == "local":
        increments = _log_softmax(increments)
    return increments


def allowed_tokens(request: StepRequest) -> Tensor:
    """The bitmask of the request unpacked, bool [rows, vocab]."""
    rows, vocab = request.num_rows, request.vocab_size
    if request.allowed is None:
        return torch.ones((rows, vocab), dtype=torch.bool, device=request.totals.device)
    tokens = torch.arange(vocab, device=request.totals.device)
    words = request.allowed[:, tokens // 32].long()
    return (words >> (tokens % 32)) & 1 == 1


def _rewards(request: StepRequest) -> Tensor:
    rewards = request.length_bonus.double()[:, None].repeat(1, request.vocab_size)
    if request.end_id >= 0:
        rewards[:, request.end_id] = 0.0
    if request.bonus is not None:
        counts = request.bonus.row_offsets.diff().long()
        rows = torch.repeat_interleave(torch.arange(request.num_rows, device=counts.device), counts)
        rewards[rows, request.bonus.token_ids.long()] += request.bonus.values.double()
    return rewards


def _bad_rows(request: StepRequest) -> Tensor:
    """Rows with NaN or +inf in a source that counts; `end_factored` reads the acoustic one of a fused row always."""
    bad = torch.isnan(request.totals)
    counts = request.weights != 0.0
    if request.normalize == "end_factored":
        counts[:, 0] |= counts[:, 1:].any(dim=1)
    for s, source in enumerate(request.sources):
        broken = torch.isnan(source).any(dim=1) | (source == float("inf")).any(dim=1)
        bad = bad | (broken & counts[:, s])
    return bad


def _select(request: StepRequest, scores: Tensor, parts: Tensor, flags: Tensor) -> Candidates:
    rows, vocab, beam = request.num_rows, request.vocab_size, request.beam_size
    utterances = rows // beam
    flat = scores.float().reshape(utterances, beam * vocab)
    order = torch.sort(flat, dim=1, descending=True, stable=True).indices[:, : request.top_k]
    totals = flat.gather(1, order)
    possible = totals > IMPOSSIBLE
    first_row = torch.arange(utterances, device=flat.device)[:, None] * beam
    parent_rows = first_row + order // vocab
    token_ids = order % vocab
    chosen = parts[parent_rows, token_ids].float()
    found = no_candidates(utterances, request.top_k, len(request.sources), rows, flat.device)
    width = order.shape[1]  # smaller than top_k when beam_size * vocab is
    found.totals[:, :width] = totals
    found.parent_rows[:, :width] = torch.where(possible, parent_rows, -1)
    found.token_ids[:, :width] = torch.where(possible, token_ids, -1)
    found.parts[:, :width] = torch.where(possible[:, :, None], chosen, 0.0)
    return dataclasses.replace(found, flags=flags)
