"""Which model a scorer runs, as sixteen digits: what was measured on one model is not applied to another."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

__all__ = ["fingerprint"]

_SAMPLES = 256  # weights read of each tensor
_NGRAM_ROWS = 16


def fingerprint(scorer: Any) -> str:
    """Sixteen hexadecimal digits over vocabulary, names, shapes and an even sample of the weights.

    Weights are read as float16, so that a model loaded as float32 or float16 is the same; bfloat16 keeps too few
    digits to tell. int8 weights count as the model they were rounded from. Of an n-gram model the log-probs after a
    few states are read.

    Price: a few hundred numbers per tensor; milliseconds, no pass of the model.
    """
    known: str | None = getattr(scorer, "known_fingerprint", None)
    if known is not None:
        return known
    digest = hashlib.sha256(scorer.vocabulary.fingerprint.encode())
    model = getattr(scorer, "model", None)
    if isinstance(model, torch.nn.Module):
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(_sample(tensor))
    else:
        digest.update(_ngram_sample(scorer))
    return digest.hexdigest()[:16]


def _sample(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    stride = max(1, len(flat) // _SAMPLES)
    # A zero may come with either sign.
    values = flat[::stride][:_SAMPLES].to(torch.float16) + 0.0
    data: bytes = values.cpu().numpy().tobytes()
    return data


def _ngram_sample(scorer: Any) -> bytes:
    table = scorer.table
    states = np.full(1, table.start_state, dtype=np.int64)
    rows = []
    for _ in range(_NGRAM_ROWS):
        row = table.dense(states)[0]
        rows.append(row)
        words = np.array([int(np.argmax(row))], dtype=np.int64)
        states = table.score(states, words)[1]
    return np.stack(rows).astype(np.float32).tobytes()
