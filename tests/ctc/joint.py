"""A tiny joint CTC-attention model: a random head on the encoder of `tests.tiny`, blank first."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from shallowfusion.decoder import FusionDecoder
from shallowfusion.scorers.ctc_head import CtcHead
from tests import tiny

BLANK = 0
BLANK_BIAS = 9.0  # most of the 30 frames are silent, so that texts of a few tokens are likely
NUM_LABELS = tiny.TEXT_TOKENS + 1  # label i is token i - 1


def tiny_head(seed: int = 0, sharpness: float = 0.5) -> CtcHead:
    generator = torch.Generator().manual_seed(seed)
    labels = ("", *(tiny.piece(token).decode() for token in range(tiny.TEXT_TOKENS)))
    tokens = np.arange(-1, tiny.TEXT_TOKENS)
    weight = torch.randn((NUM_LABELS, 32), generator=generator) * sharpness
    bias = torch.zeros(NUM_LABELS)
    bias[BLANK] = BLANK_BIAS
    return CtcHead(weight, bias, labels, BLANK, tokens, 0.02)


def joint_decoder(seed: int = 0, lm: bool = False) -> FusionDecoder:
    acoustic = dataclasses.replace(tiny.tiny_whisper(seed), ctc_head=tiny_head(seed))
    return FusionDecoder(acoustic, [tiny.tiny_lm(seed + 1)] if lm else [])


def ctc_log_prob(decoder: FusionDecoder, encoder_output: torch.Tensor, tokens: list[int]) -> float:
    """torch's own CTC loss of a text of one utterance [1, frames, size]."""
    head = decoder.acoustic.ctc_head
    assert head is not None
    log_probs = head.log_probs(encoder_output).double().transpose(0, 1)
    targets = torch.tensor([[token + 1 for token in tokens]], dtype=torch.long)
    loss = torch.nn.functional.ctc_loss(
        log_probs, targets, torch.tensor([len(log_probs)]), torch.tensor([len(tokens)]), blank=BLANK, reduction="sum"
    )
    return -float(loss)
