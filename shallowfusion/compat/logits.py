"""Logits as pyctcdecode takes them: logits, log-probabilities or probabilities become log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shallowfusion.config import require

__all__ = ["batch_of", "log_probs_of"]

SMALLEST_PROB = 1e-15


def log_probs_of(logits: Any, num_labels: int) -> npt.NDArray[np.float32]:
    """Log-probs of logits [frames, labels], floats or whole numbers; rows that sum to 1 are taken as probabilities."""
    array: npt.NDArray[Any] = np.asarray(logits.detach().cpu().numpy() if hasattr(logits, "detach") else logits)
    require(
        array.ndim == 2 and array.dtype.kind in "fiu" and array.shape[1] == num_labels,
        f"logits must have shape [frames, {num_labels}], one column for each label, got {array.dtype} "
        f"{list(array.shape)}.",
    )
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    elif array.dtype.kind != "f":
        array = array.astype(np.float64)
    if len(array) == 0:
        return array.astype(np.float32)
    with np.errstate(all="ignore"):
        if math.isclose(float(array.sum(axis=1).mean()), 1.0):
            array = np.log(np.clip(array, SMALLEST_PROB, 1.0))
            return array.astype(np.float32)
        largest = array.max(axis=1, keepdims=True)
        shifted = array - np.where(np.isfinite(largest), largest, 0)
        normal = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        array = np.clip(normal, math.log(SMALLEST_PROB), 0)
    return array.astype(np.float32)


def batch_of(logits_list: Sequence[Any], num_labels: int, blank: int) -> tuple[npt.NDArray[np.float32], list[int]]:
    """Log-probs float32 [utterances, frames, labels], zeros behind shorter ones, and the frames of each.

    One without frames gets a frame that is blank for sure, which says and scores what no frames do.
    """
    silence = np.full((1, num_labels), -np.inf, dtype=np.float32)
    silence[0, blank] = 0.0
    scores = [log_probs_of(logits, num_labels) for logits in logits_list]
    scores = [own if len(own) else silence for own in scores]
    lengths = [len(own) for own in scores]
    if len(scores) == 1:
        return scores[0][None], lengths
    batch = np.zeros((len(scores), max(lengths, default=0), num_labels), dtype=np.float32)
    for row, own in zip(batch, scores, strict=True):
        row[: len(own)] = own
    return batch, lengths
