"""Random searches that may neither leak nor grow, for as long as one likes: `python -m tests.session.soak 10000`."""

from __future__ import annotations

import dataclasses
import gc
import random
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from shallowfusion import FusionDecoder, fusion
from shallowfusion.results import Transcription
from tests.ctc.joint import tiny_head
from tests.session.conftest import BASE, alone, assert_nothing_is_left, assert_same
from tests.tiny import random_encoder_output, tiny_lm, tiny_whisper

__all__ = ["soak"]

RULES = [
    fusion.static([0.3, 0.1]),
    fusion.piecewise([0.5, 0.2], initial_steps=2, ramp=2),
    fusion.entropy_gate([0.4, 0.2]),
    fusion.internal_lm([0.4, 0.2], 0.2),
    fusion.mixture([0.5, 0.5], weight=0.4, forgetting=0.9),
]
LEFT_OUT = 0.1  # share of the requests that are cancelled
COMPARED = 0.1  # share that is decoded again alone


def soak(searches: int, seed: int = 0) -> dict[str, float]:
    """Run random requests through one session and compare some of them; returns what there is to report.

    Returns:
        "finished", "cancelled", "compared", and "growth_mb": resident memory at the end less that after a third.
    """
    draw = random.Random(seed)
    decoder = FusionDecoder(dataclasses.replace(tiny_whisper(1), ctc_head=tiny_head(1)), [tiny_lm(2), tiny_lm(9)])
    decoder.prefixes.resize(200_000)
    recordings = random_encoder_output(decoder.acoustic, 20)
    recordings[7, 3] = float("nan")
    session = decoder.session(max_utterances=6, memory_budget=3_000_000)
    waiting: list[tuple[Future[Transcription], int, dict[str, Any]]] = []
    compared, early = 0, 0
    for number in range(searches):
        if number == searches // 3:
            early = resident_bytes()
        if number % 500 == 499 and searches > 1000:
            print(f"{number + 1} searches, {resident_bytes() / 1e6:.1f} MB resident", flush=True)
        place, options = draw.randrange(len(recordings)), random_options(draw)
        future = session.submit(recordings[place], **options)
        if draw.random() < LEFT_OUT:
            draw.choice([future, waiting[-1][0] if waiting else future]).cancel()
        waiting.append((future, place, options))
        if len(waiting) >= 24:
            compared += checked(decoder, recordings, waiting.pop(0), draw)
    while waiting:
        compared += checked(decoder, recordings, waiting.pop(0), draw)
    session.close()
    assert_nothing_is_left(session)
    told = session.statistics()
    assert told.failed == 0
    assert told.finished + told.cancelled == searches
    assert decoder.prefixes.used_bytes <= 200_000
    growth = (resident_bytes() - early) / 1e6
    return {"finished": told.finished, "cancelled": told.cancelled, "compared": compared, "growth_mb": growth}


def random_options(draw: random.Random) -> dict[str, Any]:
    width = draw.randint(1, 6)
    prompt = "".join(chr(97 + draw.randrange(26)) for _ in range(draw.choice([0, 3, 20, 40])))
    rule = draw.choice(RULES)
    return {
        **BASE,
        "rule": rule,
        "ctc_weight": draw.choice([0.0, 0.4]) if rule.mixture is None and rule.normalize("lm") == "none" else 0.0,
        "driver": draw.choice(["host", "device"]),
        "beam_size": width,
        "n_best": draw.randint(1, width),
        "max_new_tokens": draw.randint(1, 16),
        "stop_rule": draw.choice(["hf", "whisper", "espnet"]),
        "end_policy": draw.choice(["lm", "asr_only"]),
        "length_penalty": draw.choice([0.0, 1.0]),
        "no_repeat_ngram_size": draw.choice([0, 2]),
        "hotwords": draw.choice([None, None, {"0712": 1.0, "33": 0.5}]),
        "hotwords_inside_words": True,
        "lm_prompt": prompt or None,
    }


def checked(
    decoder: FusionDecoder,
    recordings: torch.Tensor,
    request: tuple[Future[Transcription], int, dict[str, Any]],
    draw: random.Random,
) -> bool:
    """Wait for a result and, for some, decode the same alone; whether it was compared."""
    future, place, options = request
    if draw.random() >= COMPARED:
        if not future.cancelled():
            future.exception(timeout=120)
        return False
    if future.cancelled():
        return False
    assert_same(future.result(timeout=120), alone(decoder, recordings[place], **{**options, "driver": "host"}))
    return True


def resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(soak(int(sys.argv[1])))
