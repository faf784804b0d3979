"""Logits as pyctcdecode takes them: logits, log-probabilities or probabilities become log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shallowfusion.config import require

__all__ = ["log_probs_of", "padded"]

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


def padded(scores: Sequence[npt.NDArray[np.float32]], frames: int) -> npt.NDArray[np.float32]:
    """float32 [utterances, frames, labels], zeros behind shorter ones."""
    batch = np.zeros((len(scores), frames, scores[0].shape[1]), dtype=np.float32)
    for row, own in zip(batch, scores, strict=True):
        row[: len(own)] = own
    return batch
