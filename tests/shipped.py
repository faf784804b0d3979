"""The demo models that come with the package, loaded once for all tests that need a real model."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from shallowfusion.decoder import FusionDecoder
from shallowfusion.demo.shipped import HERE, model_directory

ASR = str(model_directory("asr"))
MEDICAL = str(model_directory("lm_medical"))
CLIPS = sorted((HERE / "clips").glob("*.flac"))


@cache
def decoder(with_lm: bool = True) -> FusionDecoder:
    return FusionDecoder.from_pretrained(ASR, MEDICAL if with_lm else None, device="cpu")


def clip(number: int) -> Path:
    return CLIPS[number]
