"""Where the time of a decode goes: milliseconds per step of each stage, and against the floor of the bytes it reads.

Two decodes of different lengths are timed in turns; their difference over the steps between is a step, without the
reading of prompts and the cross-attention keys and values that every utterance pays once.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.decode import SHAPES, WEIGHT, Pair, encoder_output, make_pair
from bench.timing import Measurement

__all__ = ["run"]

SHORT, LONG, TURNS = 4, 16, 5
STAGES = ("asr", "lm", "fusion", "search", "text")


def run(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """Rows per stage of a step, beam 5; once per decode is what is not a step."""
    name = "tiny" if quick else "whisper-small.en+gpt2"
    pairs = {"float32" if device == "cpu" else "float16": make_pair(SHAPES[name], device)}
    if device == "cpu":
        pairs["int8"] = make_pair(SHAPES[name], device, torch.int8)
    else:
        for model in (pairs["float16"].whisper, pairs["float16"].lm):
            model.half()
    bandwidth = copy_bandwidth(device)
    for dtype, pair in pairs.items():
        for utterances in (2,) if quick else (1, 8):
            yield stage_rows(pair, name, utterances, dtype, bandwidth)


def copy_bandwidth(device: str) -> float:
    """Bytes per second that a large copy reads and writes, the best of five: the ceiling of this machine now."""
    source = torch.empty(256 * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        _synchronise(device)
        start = time.perf_counter()
        target.copy_(source)
        _synchronise(device)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best


def stage_rows(pair: Pair, name: str, utterances: int, dtype: str, bandwidth: float) -> list[Measurement]:
    states = encoder_output(SHAPES[name], utterances).to(next(pair.own_whisper.parameters()).device)
    spent: dict[int, dict[str, list[float]]] = {SHORT: defaultdict(list), LONG: defaultdict(list)}
    for turn in range(TURNS + 1):
        for tokens, own in spent.items():
            for stage, seconds in decode_once(pair, states, tokens).items():
                if turn:
                    own[stage].append(seconds)
    shape = f"{name} utterances={utterances} beams=5 threads={torch.get_num_threads()}"
    read = {"asr": acoustic_bytes(pair.own_whisper, states), "lm": weight_bytes(pair.own_lm)}
    rows = []
    for stage in STAGES:
        steps = (np.array(spent[LONG][stage]) - np.array(spent[SHORT][stage])) / (LONG - SHORT)
        once = float(np.median(np.array(spent[SHORT][stage]) - SHORT * steps))
        low, middle, high = np.percentile(steps * 1e3, [20, 50, 80])
        note, rate = f"once per decode {once * 1e3:.1f} ms", float("nan")
        if stage in read:
            floor = read[stage] / bandwidth * 1e3
            rate = read[stage] / middle / 1e6
            note += (
                f"; reads {read[stage] / 1e6:.0f} MB a step, {floor:.1f} ms at {bandwidth / 1e9:.1f} GB/s of copying: "
            )
            note += f"{floor / middle:.0%} of the floor's speed"
        rows.append(Measurement("stages", shape, dtype, stage, middle, low, high, gigabytes_per_second=rate, note=note))
    return rows


def decode_once(pair: Pair, states: Tensor, tokens: int) -> dict[str, float]:
    found: Any = pair.fused.decode(  # type: ignore[attr-defined]
        states, beam_size=5, min_new_tokens=tokens, max_new_tokens=tokens, lm_weight=WEIGHT, end_policy="asr_only",
        end_threshold=None, driver="host", suppress_blank=False, suppress_tokens=None,
    )  # fmt: skip
    return {stage: found[0].timing.stages.get(stage, 0.0) for stage in STAGES}


def weight_bytes(model: nn.Module) -> int:
    """Of the products of one decoder pass: linear layers and head."""
    total = 0
    for module in model.modules():
        packed = getattr(module, "num_bytes", None)
        if packed is not None:
            total += packed
        elif not isinstance(module, nn.Embedding):
            total += sum(own.nbytes for own in module.parameters(recurse=False))
    return total


def acoustic_bytes(whisper: Any, states: Tensor) -> int:
    """Decoder and head weights, less those of cross-attention's keys and values, plus what those hold per utterance."""
    decoder = whisper.model.decoder
    total = weight_bytes(decoder) + weight_bytes(nn.ModuleList([whisper.proj_out]))
    for layer in decoder.layers:
        projections = nn.ModuleList([layer.encoder_attn.k_proj, layer.encoder_attn.v_proj])
        total -= weight_bytes(projections)
        total += 2 * states.shape[0] * states.shape[1] * states.shape[2] * whisper.dtype.itemsize
    return total


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
