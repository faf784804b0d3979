"""One step of a fused search, rung by rung: what sharing, not copying, driving from the device and capturing bring.

Random weights of true shapes; end tokens are never reached, so every rung takes the same number of steps. A time is
that of a whole search from the encoder output divided by its tokens, prompts included.

    generate, cached LM      transformers: cross keys and values copied for every beam at every reorder
    reorder copies K/V       beams are query positions, cross keys and values once per utterance; after every step
                             as many bytes of self-attention keys and values are gathered as transformers gathers
    no reorder               the host-driven search
    prepared                 the same with models as `from_pretrained` makes them ready (CPU)
    prepared, int8           the same with int8 weights (CPU)
    device-driven            the device decides; on the CPU the same step through the readable twins, for the record
    captured                 one CUDA graph per step, the models one after the other
    two branches             the same with the models side by side
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.decode import SHAPES, Pair, Shape, encoder_output, generate, make_pair
from bench.timing import Measurement, measurements, take_turns

__all__ = ["run"]

WEIGHT = 0.3
LARGE = {
    "whisper-large-v3+gpt2-large": Shape(1280, 32, 20, 1280, 36, 20),
    "whisper-large-v3-turbo+gpt2-large": Shape(1280, 4, 20, 1280, 36, 20),
}
Tokens = list[tuple[int, ...]]
GENERATE = "generate, cached LM"
INT8 = "prepared, int8"


class CopyingScorer:
    """A cached scorer that also gathers, at every reorder, the keys and values that beams of their own would hold."""

    def __init__(self, scorer: Any) -> None:
        self.scorer = scorer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scorer, name)

    def fork(self, state: Any, parents: np.ndarray) -> Any:
        utterances = len(parents)
        rows = torch.from_numpy((np.arange(utterances)[:, None] * state.lengths.shape[1] + parents).reshape(-1))
        longest, own = int(state.lengths.max()), getattr(state.cache, "self_attention_cache", state.cache)
        for layer in own.layers:
            for stored in (layer.keys, layer.values):
                _, _, heads, dim = stored.shape
                held = stored.new_empty((utterances * state.lengths.shape[1], heads, longest, dim))
                held.index_select(0, rows.to(stored.device))
        return self.scorer.fork(state, parents)


def run(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """Every rung that the device has, at each shape; our own rungs must find the same hypotheses."""
    if quick:
        yield ladder("tiny", SHAPES["tiny"], 1, 5, 6, device, torch.float32)
        return
    if device == "cpu":
        for utterances in (1, 8):
            name = "whisper-base.en+gpt2"
            yield ladder(name, SHAPES[name], utterances, 5, 24, device, torch.float32)
        return
    yield [copy_ceiling()]
    small = "whisper-small.en+gpt2"
    for utterances in (1, 8, 32):
        yield ladder(small, SHAPES[small], utterances, 5, 48, device, torch.float32)
    for name, shape in LARGE.items():
        for utterances in (8, 32):
            yield ladder(name, shape, utterances, 5, 48, device, torch.float16)


def ladder(
    name: str, shape: Shape, utterances: int, beams: int, tokens: int, device: str, dtype: torch.dtype
) -> list[Measurement]:
    """Milliseconds per step of every rung, and the bytes of weights a step must read over that time."""
    pair = make_pair(shape, device, prepared=False)
    for model in (pair.whisper, pair.lm):
        model.to(dtype)
    states = encoder_output(shape, utterances).to(device, dtype)
    rungs = rungs_of(pair, states, beams, tokens, device)
    if device == "cpu":
        rungs |= prepared_rungs(shape, states, beams, tokens)
    found = {key: rung() for key, rung in rungs.items()}
    ours = {str(value) for key, value in found.items() if key not in (GENERATE, INT8)}
    if dtype == torch.float32 and len(ours) != 1:
        raise AssertionError(f"hypotheses of the rungs differ at {name}: no speed is reported")
    seconds = take_turns(rungs, repeats=3 if device == "cpu" else 5, warm_up=0 if device == "cpu" else 1, device=device)
    per_step = {key: [value / tokens for value in own] for key, own in seconds.items()}
    weights = weight_bytes(pair)
    rates = {key: weights / float(np.median(own)) / 1e9 for key, own in per_step.items()}
    described = f"{name} utterances={utterances} beams={beams} tokens={tokens} threads={torch.get_num_threads()}"
    kind = str(dtype).removeprefix("torch.")
    notes = {key: note_of(key, device) for key in rungs}
    return measurements("step", described, kind, per_step, "no reorder", gigabytes_per_second=rates, note=notes)


def prepared_rungs(shape: Shape, states: Tensor, beams: int, tokens: int) -> dict[str, Callable[[], Tokens]]:
    """Host-driven searches over prepared copies of the models."""
    rungs: dict[str, Callable[[], Tokens]] = {}
    for name, dtype in (("prepared", torch.float32), (INT8, torch.int8)):
        pair = make_pair(shape, dtype=dtype)
        heard = states.to(pair.own_whisper.dtype)  # type: ignore[arg-type]
        own = pair.fused.sources(heard, _options(beams, tokens))  # type: ignore[attr-defined]
        rungs[name] = lambda own=own: searched(own)  # type: ignore[misc]
    return rungs


def _options(beams: int, tokens: int) -> Any:
    from shallowfusion import DecodingOptions

    return DecodingOptions(
        beam_size=beams, min_new_tokens=tokens, max_new_tokens=tokens, lm_weight=WEIGHT, end_policy="asr_only",
        end_threshold=None, suppress_blank=False, suppress_tokens=None,
    )  # fmt: skip


def note_of(rung: str, device: str) -> str:
    if rung == GENERATE:
        return "per step; its own hypotheses, since its LM reads special tokens as end tokens"
    if rung == "device-driven" and device == "cpu":
        return "readable twins, not kernels; slots of the longest search are read"
    return "per step; weights read once are the floor"


def rungs_of(pair: Pair, states: Tensor, beams: int, tokens: int, device: str) -> dict[str, Callable[[], Tokens]]:
    from shallowfusion.search.device_loop import DevicePrograms

    own = pair.fused.sources(states, _options(beams, tokens))  # type: ignore[attr-defined]
    rungs: dict[str, Callable[[], Tokens]] = {
        GENERATE: lambda: generate(pair, states, beams, tokens, "cached"),
        "reorder copies K/V": lambda: searched(own, copies=True),
        "no reorder": lambda: searched(own),
    }
    plain = DevicePrograms(captures=False, branches=False)
    rungs["device-driven"] = lambda: searched(own, programs=plain)
    if device == "cuda":
        captured, branched = DevicePrograms(branches=False), DevicePrograms()
        rungs["captured"] = lambda: searched(own, programs=captured)
        rungs["two branches"] = lambda: searched(own, programs=branched)
    return rungs


def searched(own: Any, *, copies: bool = False, programs: Any = None) -> Tokens:
    """The best hypotheses of a search driven by the host, or with `programs` by the device."""
    from shallowfusion.search.device_loop import device_search
    from shallowfusion.search.loop import StageClock, search

    if programs is not None:
        outcomes = device_search(own.scorers, own.contexts, own.plan, StageClock(), programs)
    else:
        scorers: Sequence[Any] = [CopyingScorer(scorer) for scorer in own.scorers] if copies else own.scorers
        outcomes = search(scorers, own.contexts, own.names, own.plan, StageClock())
    return [outcome.hypotheses[0].token_ids for outcome in outcomes]


def weight_bytes(pair: Pair) -> int:
    """Bytes of the decoder's and the LM's weights, each read at least once in a step; tied heads count once."""
    modules = (pair.whisper.model.decoder, pair.lm)  # type: ignore[union-attr]
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


def copy_ceiling() -> Measurement:
    """The bandwidth of a large copy on this device, bytes read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = take_turns({"copy": lambda: target.copy_(source)}, repeats=20, device="cuda")
    (row,) = measurements("step", "ceiling: copy of 1 GiB", "uint8", seconds, "copy")
    rate = 2 * 2**30 / (row.median_ms / 1e3) / 1e9
    return Measurement(
        "step", row.shape, "uint8", "copy", row.median_ms, row.p20_ms, row.p80_ms, gigabytes_per_second=rate
    )
