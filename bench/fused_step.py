"""The fused step against torch, at the sizes of an English Whisper or large-v3 with GPT-2."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.timing import Measurement, measurements, take_turns
from shallowfusion import fused_step

__all__ = ["SIZES", "best_torch", "make_inputs", "naive_torch", "run"]

SIZES = ((1, 5), (8, 5), (32, 5), (64, 5), (64, 8), (64, 10))
ACOUSTIC_VOCAB, LANGUAGE_VOCAB, END = 51_866, 50_257, 50_256
WEIGHT = 0.3
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def make_inputs(rows: int, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits shaped like a model's: a normal body and a few tokens that stand out."""
    generator = torch.Generator().manual_seed(seed)
    logits = []
    for vocab in (ACOUSTIC_VOCAB, LANGUAGE_VOCAB):
        source = torch.randn((rows, vocab), generator=generator) * 2.5
        peaks = torch.randint(0, vocab, (rows, 20), generator=generator)
        source.scatter_add_(1, peaks, torch.rand((rows, 20), generator=generator) * 14)
        logits.append(source.to(device, dtype))
    totals = -torch.rand(rows, generator=generator) * 20
    return logits[0], logits[1], totals.to(device)


def naive_torch(acoustic: Tensor, language: Tensor, totals: Tensor, beam_size: int) -> tuple[Tensor, Tensor]:
    """What a beam search in plain torch does: two log-softmaxes, an addition, top-k over beam x vocabulary."""
    fused = torch.log_softmax(acoustic.float(), dim=-1)
    fused[:, :LANGUAGE_VOCAB] += WEIGHT * torch.log_softmax(language.float(), dim=-1)
    fused += totals[:, None]
    found = torch.topk(fused.view(-1, beam_size * ACOUSTIC_VOCAB), 2 * beam_size)
    return found.values, found.indices


def best_torch(acoustic: Tensor, language: Tensor, totals: Tensor, beam_size: int) -> tuple[Tensor, Tensor]:
    """Fewer passes: two log-sum-exps, one fused row, top-k per row, then a merge of the rows."""
    fused = acoustic.float().clone()
    fused[:, :LANGUAGE_VOCAB].add_(language, alpha=WEIGHT)
    constant = totals - torch.logsumexp(acoustic.float(), 1)
    fused[:, :LANGUAGE_VOCAB] -= WEIGHT * torch.logsumexp(language.float(), 1)[:, None]
    rows = torch.topk(fused, 2 * beam_size)
    merged = (rows.values + constant[:, None]).view(-1, beam_size * 2 * beam_size)
    found = torch.topk(merged, 2 * beam_size)
    return found.values, rows.indices.view_as(merged).gather(1, found.indices)


def ours(acoustic: Tensor, language: Tensor, totals: Tensor, weights: Tensor, beam_size: int) -> Tensor:
    found = fused_step(
        [acoustic, language], weights, totals, beam_size=beam_size, top_k=2 * beam_size, end_id=END, unmapped=0.0
    )
    return found.totals


def run(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """Every size and dtype; one thread on the CPU, both sides. Totals are compared with torch's first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for utterances, beam_size in SIZES[:2] if quick else SIZES:
        for name, dtype in DTYPES.items():
            count = utterances * beam_size
            acoustic, language, totals = make_inputs(count, dtype, device)
            weights = torch.tensor([1.0, WEIGHT], device=device).expand(count, 2).contiguous()
            expected = naive_torch(acoustic, language, totals, beam_size)[0]
            torch.testing.assert_close(
                ours(acoustic, language, totals, weights, beam_size), expected, atol=1e-3, rtol=0
            )
            inputs = (acoustic, language, totals)
            providers = {
                "fused_step": lambda i=inputs, w=weights, k=beam_size: ours(*i, w, k),
                "torch log_softmax+add+topk": lambda i=inputs, k=beam_size: naive_torch(*i, k),
                "torch logsumexp+row topk": lambda i=inputs, k=beam_size: best_torch(*i, k),
            }
            repeats = max(5, min(200, 4000 // (utterances * beam_size))) // (4 if quick else 1)
            seconds = take_turns(providers, max(5, repeats), device=device)
            size = sum(source.numel() * source.element_size() for source in (acoustic, language))
            speed = {n: size / 1e9 / sorted(own)[len(own) // 2] for n, own in seconds.items()}
            shape = f"utterances={utterances} beams={beam_size} vocab={ACOUSTIC_VOCAB}+{LANGUAGE_VOCAB} threads=1"
            yield measurements("fused_step", shape, name, seconds, "fused_step", gigabytes_per_second=speed)
    torch.set_num_threads(threads)
