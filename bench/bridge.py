"""Probabilities of ranges of tokens against torch, and the byte bridge's steps beside token-synchronous fusion."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from bench.timing import Measurement, measurements, take_turns
from shallowfusion.scorers.base import Context
from shallowfusion.scorers.byte_bridge import BridgeSettings, ByteBridge, ByteLanguage
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.scorers.token_ranges import range_log_probs
from shallowfusion.text.vocabulary import Vocabulary
from shallowfusion.values import TokenRanges

__all__ = ["run"]

VOCAB, ROWS = 50_257, 40
COUNTS = (20, 100, 1000)
STEPS, UTTERANCES, BEAMS, CANDIDATES = 12, 8, 5, 20


def run(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """Rows of logits like GPT-2's, ranges like those of prefixes: most short, some of a tenth of the vocabulary."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for count in COUNTS[:2] if quick else COUNTS:
            for dtype in (torch.float32, torch.float16):
                yield _ranges(count, dtype, device, 5 if quick else 30)
        if device == "cpu":
            yield _steps(2 if quick else 5)
    finally:
        torch.set_num_threads(threads)


def make_ranges(count: int, device: str, seed: int = 0) -> TokenRanges:
    rng = np.random.default_rng(seed)
    spans = np.minimum(np.exp(rng.uniform(0, np.log(VOCAB / 10), ROWS * count)), VOCAB).astype(np.int64)
    first = rng.integers(0, VOCAB - spans)
    offsets = np.arange(0, ROWS * count + 1, count)
    return TokenRanges(*(torch.from_numpy(values).int().to(device) for values in (offsets, first, first + spans)))


def by_cumulative_sum(logits: Tensor, ranges: TokenRanges, order: Tensor) -> Tensor:
    """Fast in torch, but a range of probability 1e-16 or less comes out as anything, and nearly so are those above."""
    sums = torch.softmax(logits.float(), dim=1)[:, order].double().cumsum(dim=1)
    sums = torch.nn.functional.pad(sums, (1, 0))
    first, last = (places.view(len(logits), -1).long() for places in (ranges.first, ranges.last))
    return (sums.gather(1, last) - sums.gather(1, first)).log().float().view(-1)


def by_gathering(logits: Tensor, ranges: TokenRanges, order: Tensor) -> Tensor:
    """Exact in torch: one log-sum-exp per range of the log-softmax put in order."""
    ordered = torch.log_softmax(logits.float(), dim=1)[:, order]
    per_row = len(ranges.first) // len(logits)
    pairs = zip(ranges.first.tolist(), ranges.last.tolist(), strict=True)
    return torch.stack([torch.logsumexp(ordered[i // per_row, a:b], dim=0) for i, (a, b) in enumerate(pairs)])


def _ranges(count: int, dtype: torch.dtype, device: str, repeats: int) -> list[Measurement]:
    generator = torch.Generator().manual_seed(count)
    logits = (torch.randn((ROWS, VOCAB), generator=generator) * 3).to(device, dtype)
    order = torch.randperm(VOCAB, generator=generator).int().to(device)
    ranges, places = make_ranges(count, device), order.long()
    exact = by_gathering(logits, ranges, places)
    torch.testing.assert_close(range_log_probs(logits, ranges, order=order).log_probs, exact, atol=1e-4, rtol=0)
    log_sums = range_log_probs(logits, ranges, order=order).log_sums
    providers = {
        "range_log_probs": lambda: range_log_probs(logits, ranges, order=order),
        "range_log_probs, log-sums given": lambda: range_log_probs(logits, ranges, order=order, log_sums=log_sums),
        "torch softmax+cumsum": lambda: by_cumulative_sum(logits, ranges, places),
        "torch gather+logsumexp": lambda: by_gathering(logits, ranges, places),
    }
    seconds = take_turns(providers, repeats, device=device)
    shape = f"rows={ROWS} vocab={VOCAB} ranges per row={count} threads=1"
    return measurements("range log-sum-exp", shape, str(dtype).split(".")[-1], seconds, "range_log_probs")


def _steps(repeats: int) -> list[Measurement]:
    """The same steps by the bridge and token-synchronously; a vocabulary of GPT-2's size over the same small model."""
    letters = [bytes([i]) for i in range(256)]
    rng = np.random.default_rng(0)
    pieces = {bytes(rng.integers(97, 123, rng.integers(2, 8)).astype(np.uint8)) for _ in range(80_000)}
    pieces |= {b" " + piece for piece in sorted(pieces)[:25_000]}
    tokens = (*letters, *sorted(pieces, key=lambda piece: (len(piece), piece))[: VOCAB - 257], None)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=256, n_layer=4, n_head=4, n_positions=128)
    model = CausalLMScorer(GPT2LMHeadModel(config).eval(), Vocabulary(tokens, VOCAB - 1, VOCAB - 1, "bench"))
    language = ByteLanguage(model, Vocabulary(tokens, VOCAB - 1, name="bench"))
    said = rng.integers(256, VOCAB - 1, (STEPS, UTTERANCES, CANDIDATES))
    prompts = [model.prompt()] * UTTERANCES

    def bridged() -> None:
        bridge = ByteBridge(language, prompts, VOCAB - 1, 0.3, BridgeSettings())
        for step, candidates in enumerate(said):
            lanes = np.arange(CANDIDATES) % (1 if step == 0 else BEAMS) + np.zeros((UTTERANCES, 1), dtype=np.int64)
            bridge.increments(lanes, candidates)
            bridge.follow(lanes[:, :BEAMS], candidates[:, :BEAMS])

    def synchronous() -> None:
        state = model.start(Context(prompts, BEAMS, STEPS))
        for step, candidates in enumerate(said):
            lanes = np.arange(BEAMS) % (1 if step == 0 else BEAMS) + np.zeros((UTTERANCES, 1), dtype=np.int64)
            state = model.fork(state, lanes)
            model.score(state, candidates[:, :BEAMS])

    seconds = take_turns({"byte bridge": bridged, "token-synchronous scorer": synchronous}, repeats, warm_up=1)
    shape = f"utterances={UTTERANCES} beams={BEAMS} candidates={CANDIDATES} steps={STEPS} vocab={VOCAB} model=4x256"
    return measurements("byte bridge", shape, "float32", seconds, "token-synchronous scorer")
