"""The acoustic model alone, decoded greedily by either of its two outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from shallowfusion.demo.acoustic_model import JointModel
from shallowfusion.demo.acoustic_training import pad_features
from shallowfusion.demo.synthesis import DEMO_FEATURES, Utterance
from shallowfusion.demo.vocabulary import BLANK, decode

__all__ = ["transcribe_attention", "transcribe_ctc"]

_BATCH_SIZE = 16
# No voice says more characters in a second; a decoder that says more has lost its place.
_TOKENS_PER_SECOND = 20
_FRAME_SECONDS = DEMO_FEATURES.hop_length / DEMO_FEATURES.sampling_rate


def transcribe_attention(model: JointModel, utterances: list[Utterance], num_beams: int = 1) -> list[str]:
    """Decode with transformers' own `generate` on full 30 s windows."""
    texts: list[str] = []
    with torch.inference_mode():
        for start, features in enumerate(_windows(utterances)):
            chosen = utterances[start * _BATCH_SIZE : (start + 1) * _BATCH_SIZE]
            seconds = max(len(utterance.features) for utterance in chosen) * _FRAME_SECONDS
            limit = min(400, 10 + int(seconds * _TOKENS_PER_SECOND))
            ids = model.whisper.generate(features, num_beams=num_beams, max_new_tokens=limit)
            texts += [decode(row) for row in ids.tolist()]
    return texts


def transcribe_ctc(model: JointModel, utterances: list[Utterance]) -> list[str]:
    """Take the likeliest label of every frame on full 30 s windows, merge repeats, drop blanks."""
    texts: list[str] = []
    with torch.inference_mode():
        for features in _windows(utterances):
            best = model.ctc_head(model.whisper.model.encoder(features).last_hidden_state).argmax(dim=-1)
            for row in best:
                merged = torch.unique_consecutive(row).tolist()
                texts.append(decode([label for label in merged if label != BLANK]))
    return texts


def _windows(utterances: list[Utterance]) -> list[Tensor]:
    windows = []
    for start in range(0, len(utterances), _BATCH_SIZE):
        chosen = utterances[start : start + _BATCH_SIZE]
        features = [torch.tensor(utterance.features, dtype=torch.float32) for utterance in chosen]
        windows.append(pad_features(features, DEMO_FEATURES.chunk_frames))
    return windows
