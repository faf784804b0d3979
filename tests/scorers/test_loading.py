"""Which attention a loaded model has, by name."""

from __future__ import annotations

import pytest
import torch

from shallowfusion import FusionDecoder
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.scorers.attention import ATTENTION
from shallowfusion.scorers.loading import choose_attention, set_attention
from tests.shipped import ASR, MEDICAL, clip
from tests.tiny import tiny_lm, tiny_whisper


def attention_of(decoder: FusionDecoder) -> list[str]:
    models = [decoder.acoustic.scorer.model, *(lm.model for lm in decoder.language_models)]
    return [model.config._attn_implementation for model in models]


def test_torch_attention_where_asked_for_says_the_same() -> None:
    own, plain = (
        FusionDecoder.from_pretrained(ASR, MEDICAL, device="cpu", attention=name) for name in ("auto", "sdpa")
    )
    assert attention_of(own) == [ATTENTION, ATTENTION]
    assert attention_of(plain) == ["sdpa", "sdpa"]
    texts = [model.transcribe([clip(2)], beam_size=2, lm_weight=0.2)[0].text for model in (own, plain)]
    assert texts[0]
    assert texts[0] == texts[1]


def test_kernels_are_set_on_transformers_alone() -> None:
    acoustic, lm = tiny_whisper(1), tiny_lm(2)
    set_attention([acoustic.scorer, lm, object()], "triton")
    assert attention_of(FusionDecoder(acoustic, [lm])) == [f"{ATTENTION}_triton"] * 2


def test_attention_that_cannot_be_had_is_refused() -> None:
    assert choose_attention("triton", torch.device("cuda")) == "triton"
    for name, words in (("flash", "attention must be one of 'auto', 'triton', 'sdpa'"), ("triton", "CUDA device")):
        with pytest.raises(InvalidArgumentError, match=words):
            FusionDecoder.from_pretrained(ASR, device="cpu", attention=name)


@pytest.mark.gpu
@pytest.mark.parametrize("driver", ["host", "device"])
def test_kernels_give_the_transcripts_of_torch_attention(driver: str) -> None:
    kernels, plain = (
        FusionDecoder.from_pretrained(ASR, MEDICAL, device="cuda", dtype="float32", attention=name)
        for name in ("triton", "sdpa")
    )
    options = {"beam_size": 4, "lm_weight": 0.2, "end_policy": "neutral", "driver": driver}
    ours, theirs = (model.transcribe([clip(2), clip(3)], **options) for model in (kernels, plain))
    assert [result.text for result in ours] == [result.text for result in theirs]
