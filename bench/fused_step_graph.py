"""The fused step as a search runs it on CUDA: launches in a CUDA graph, on logits that lie in the L2 cache or do not.

One graph holds many steps and is timed as a whole, so that neither Python nor a launch is what is measured. Warm: every
step reads the same logits. Cold: they read copies in turn that together are four times the L2 cache. A step must read
its logits once; that over the bandwidth of a large copy, measured in the same run, is the floor.

    fused_step                    our kernels, as planned by `plan_fused_step`
    torch log_softmax+add+topk    what a beam search in plain torch does
    torch logsumexp+row topk      fewer passes
    ..., compiled                 the same through torch.compile
    three empty kernels           what launching alone costs in a graph
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from bench.fused_step import ACOUSTIC_VOCAB, DTYPES, END, LANGUAGE_VOCAB, SIZES, WEIGHT, best_torch, naive_torch
from bench.stages import copy_bandwidth
from bench.timing import Measurement, measurements, take_turns
from shallowfusion.kernels.fused_step import plan_fused_step
from shallowfusion.values import StepRequest, Unmapped

__all__ = ["Inputs", "fused_launches", "make_copies", "run"]

CACHES = 4  # cold copies together are so many times the L2 cache
LEAST_STEPS, MOST_STEPS = 8, 256  # in one graph
PADDING = 128  # rows of logits begin where those of a device-driven search do
Inputs = tuple[Tensor, Tensor, Tensor]
Call = Callable[[], object]


def run(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """Every size and dtype, cold and warm; totals are compared with torch's first."""
    bandwidth = copy_bandwidth(device)
    for utterances, beam_size in SIZES[:2] if quick else SIZES:
        for name, dtype in DTYPES.items():
            rows = utterances * beam_size
            size = rows * (ACOUSTIC_VOCAB + LANGUAGE_VOCAB) * dtype.itemsize
            copies = make_copies(steps_of(size), rows, dtype, device)
            for inputs in copies[:1]:
                check(inputs, beam_size)
            for heat, read in (("cold", copies), ("warm", copies[:1] * len(copies))):
                providers = {key: captured(calls) for key, calls in providers_of(read, beam_size).items()}
                seconds = take_turns(providers, 20 if quick else 200, warm_up=5, device=device)
                each = {key: [one / len(read) for one in own] for key, own in seconds.items()}
                shape = f"{heat} utterances={utterances} beams={beam_size} vocab={ACOUSTIC_VOCAB}+{LANGUAGE_VOCAB}"
                yield rows_of(f"{shape} steps={len(read)}", name, each, size, bandwidth)


def rows_of(shape: str, dtype: str, seconds: dict[str, list[float]], size: int, bandwidth: float) -> list[Measurement]:
    floor = size / bandwidth
    middle = {key: float(np.median(own)) for key, own in seconds.items()}
    note = {
        key: f"floor {floor * 1e6:.1f} us at {bandwidth / 1e9:.0f} GB/s of copying: {floor / own:.0%} of its speed"
        for key, own in middle.items()
    }
    note["three empty kernels"] = "launches alone"
    speed = {key: size / own / 1e9 for key, own in middle.items()}
    return measurements(
        "fused_step_graph", shape, dtype, seconds, "fused_step", gigabytes_per_second=speed, note=note
    )  # fmt: skip


def steps_of(size: int) -> int:
    """Steps in a graph whose logits of `size` bytes each do not stay in the cache from one replay to the next."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(MOST_STEPS, max(LEAST_STEPS, -(-CACHES * cache // size)))


def make_copies(
    count: int, rows: int, dtype: torch.dtype, device: str, vocabs: tuple[int, int] = (ACOUSTIC_VOCAB, LANGUAGE_VOCAB)
) -> list[Inputs]:
    """Logits like a model's, in rows that begin at aligned addresses, and totals; every copy has its own memory."""
    generator = torch.Generator().manual_seed(0)
    logits = []
    for vocab in vocabs:
        source = torch.randn((rows, vocab), generator=generator) * 2.5
        peaks = torch.randint(0, vocab, (rows, min(20, vocab)), generator=generator)
        logits.append(source.scatter_add(1, peaks, torch.rand(peaks.shape, generator=generator) * 14))
    totals = -torch.rand(rows, generator=generator) * 20
    copies = []
    for _ in range(count):
        own = []
        for source in logits:
            stored = torch.zeros((rows, -(-source.shape[1] // PADDING) * PADDING), dtype=dtype, device=device)
            own.append(stored[:, : source.shape[1]].copy_(source))
        copies.append((own[0], own[1], totals.to(device)))
    return copies


def fused_launches(inputs: Inputs, beam_size: int, end_id: int = END) -> tuple[Call, Tensor]:
    """Our kernels over one copy, and where the totals will be."""
    acoustic, language, totals = inputs
    rows = len(totals)
    request = StepRequest(
        sources=(acoustic, language),
        weights=torch.tensor([1.0, WEIGHT], device=totals.device).expand(rows, 2).contiguous(),
        totals=totals,
        beam_size=beam_size,
        top_k=2 * beam_size,
        end_id=end_id,
        temperatures=(1.0, 1.0),
        maps=(None, None),
        unmapped=(Unmapped("floor"), Unmapped("floor")),  # nothing is added, as in torch
        token_bias=None,
        allowed=None,
        bonus=None,
        length_bonus=torch.zeros(rows, device=totals.device),
        combine="log_linear",
        normalize="none",
    )
    launches, candidates = plan_fused_step(request)

    def step() -> None:
        for launch in launches:
            launch.run()

    return step, candidates.totals


def check(inputs: Inputs, beam_size: int) -> None:
    step, found = fused_launches(inputs, beam_size)
    step()
    torch.testing.assert_close(found, naive_torch(*inputs, beam_size)[0], atol=1e-3, rtol=0)


def providers_of(copies: Sequence[Inputs], beam_size: int) -> dict[str, list[Call]]:
    """Per provider one call for each copy."""
    known: dict[tuple[int, ...], Call] = {}  # warm steps share one copy, and so its plan

    def planned(inputs: Inputs) -> Call:
        key = tuple(id(own) for own in inputs)
        if key not in known:
            known[key] = fused_launches(inputs, beam_size)[0]
        return known[key]

    single = torch.zeros(1, device=copies[0][2].device)
    found: dict[str, list[Call]] = {
        "fused_step": [planned(inputs) for inputs in copies],
        "three empty kernels": [lambda: [single.zero_() for _ in range(3)]] * len(copies),
    }
    peers: dict[str, Callable[..., object]] = {
        "torch log_softmax+add+topk": naive_torch,
        "torch logsumexp+row topk": best_torch,
    }
    for name, peer in peers.items():
        compiled = torch.compile(peer, dynamic=False)
        found[name] = [lambda i=inputs, p=peer: p(*i, beam_size) for inputs in copies]  # type: ignore[misc]
        found[f"{name}, compiled"] = [lambda i=inputs, p=compiled: p(*i, beam_size) for inputs in copies]  # type: ignore[misc]
    return found


def captured(calls: Sequence[Call]) -> Call:
    """All calls one after the other as one CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            calls[0]()
            calls[-1]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay
