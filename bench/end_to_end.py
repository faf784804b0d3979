"""Seconds of audio per second of work, encoder included: beam 5 with and without a language model in the beam.

Random weights of true shapes on windows of 30 s; every hypothesis has the same number of tokens, ends are never
reached. From log-mel features to texts: encoder, prompts, cross keys and values, search. Making features, which runs
on the CPU and may run ahead, is not in it.

    host-driven              plain attention
    device-driven            plain attention over all slots
    ..., slot tables         our kernels over the slots that hypotheses see
    generate                 transformers, its LM cached, encoder by its own modules
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.decode import SHAPES, WEIGHT, Pair, Shape, decoders, generate, make_pair
from bench.step_ladder import LARGE, Tokens
from bench.timing import Measurement, measurements, take_turns

__all__ = ["run"]

MELS, FRAMES, WINDOW_SECONDS = 80, 3000, 30.0
TOKENS = 80  # of half a minute of speech
TRUE_ENCODERS = {
    "whisper-small.en+gpt2": 12,
    "whisper-large-v3+gpt2-large": 32,
    "whisper-large-v3-turbo+gpt2-large": 32,
}


def run(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """Each shape at 8 and 32 windows, float16; on the CPU, for a look at the code, a tiny one in float32."""
    if quick:
        tiny = replace(SHAPES["tiny"], frames=FRAMES // 2)
        yield from compared("tiny", tiny, (1,), 6, device, torch.float32)
        return
    for name, layers in TRUE_ENCODERS.items():
        shape = replace({**SHAPES, **LARGE}[name], encoder_layers=layers)
        yield from compared(name, shape, (8, 32), TOKENS, device, torch.float16)


def compared(
    name: str, shape: Shape, sizes: tuple[int, ...], tokens: int, device: str, dtype: torch.dtype
) -> Iterator[list[Measurement]]:
    pair = make_pair(shape, device, prepared=False)
    for model in (pair.whisper, pair.lm):
        model.to(dtype)
    ours = {"": own_decoders(pair, dtype, None), ", slot tables": own_decoders(pair, dtype, device)}
    for utterances in sizes:
        features = torch.randn((utterances, MELS, FRAMES), generator=torch.Generator().manual_seed(2))
        for with_lm in (True, False):
            providers = providers_of(pair, ours, features, tokens, with_lm)
            found = {key: run_once() for key, run_once in providers.items()}
            same = {str(own) for key, own in found.items() if not key.startswith("generate")}
            if dtype == torch.float32 and len(same) != 1:
                raise AssertionError(f"hypotheses differ at {name}, {utterances} windows: no speed is reported")
            seconds = take_turns(providers, repeats=3, warm_up=1, device=device)
            lm = "with LM" if with_lm else "no LM"
            described = f"{name} {lm} windows={utterances} beams=5 tokens={tokens}"
            audio = utterances * WINDOW_SECONDS
            note = {key: f"RTFx {audio / float(np.median(own)):.0f}, encoder included" for key, own in seconds.items()}
            yield measurements("end_to_end", described, str(dtype)[6:], seconds, "host-driven", note=note)


def own_decoders(pair: Pair, dtype: torch.dtype, slots_on: str | None) -> tuple[Any, Any]:
    """Ours with and without the LM, over copies made ready as `from_pretrained` makes them.

    Args:
        slots_on: attention by slot tables on that device; None = plain attention.
    """
    from shallowfusion.scorers.attention import set_slot_attention
    from shallowfusion.scorers.preparation import prepare

    models = (copy.deepcopy(pair.whisper), copy.deepcopy(pair.lm))
    for model in models:
        prepare(model, dtype)
        if slots_on is not None:
            set_slot_attention(model, "triton" if slots_on == "cuda" else "sdpa")
    return decoders(*models)


def providers_of(
    pair: Pair, ours: dict[str, tuple[Any, Any]], features: Tensor, tokens: int, with_lm: bool
) -> dict[str, Callable[[], Tokens]]:
    providers: dict[str, Callable[[], Tokens]] = {}
    for attention, (fused, alone) in ours.items():
        decoder = fused if with_lm else alone
        for driver in ("host", "device") if not attention else ("device",):
            providers[f"{driver}-driven{attention}"] = lambda d=decoder, by=driver: decoded(  # type: ignore[misc]
                d, features, tokens, with_lm, by
            )
    providers["generate"] = lambda: generated(pair, features, tokens, with_lm)
    return providers


def decoded(decoder: Any, features: Tensor, tokens: int, with_lm: bool, driver: str) -> Tokens:
    results = decoder.decode(
        features, beam_size=5, min_new_tokens=tokens, max_new_tokens=tokens, lm_weight=WEIGHT if with_lm else 0.0,
        end_policy="asr_only", end_threshold=None, driver=driver, suppress_blank=False, suppress_tokens=None,
    )  # fmt: skip
    return [result.n_best[0].token_ids for result in results]


@torch.inference_mode()
def generated(pair: Pair, features: Tensor, tokens: int, with_lm: bool) -> Tokens:
    encoder: Any = pair.whisper.model.encoder  # type: ignore[union-attr]
    weight = encoder.conv1.weight
    states = encoder(features.to(weight.device, weight.dtype)).last_hidden_state
    return generate(pair, states, 5, tokens, "cached" if with_lm else "none")
