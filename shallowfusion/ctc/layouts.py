"""Log-probabilities as callers have them: one utterance, several of different lengths, or axes in another order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shallowfusion.config import require
from shallowfusion.errors import InvalidArgumentError

__all__ = ["batch_of"]

BATCH, SINGLE = "UFL", "FL"  # utterances, frames, labels
LAYOUTS = ("".join(axes) for layout in (BATCH, SINGLE) for axes in permutations(layout))
KNOWN = tuple(LAYOUTS)


def batch_of(log_probs: Any, lengths: Any, num_labels: int, layout: str | None = None) -> tuple[Any, Any]:
    """Scores as [utterances, frames, labels] where they are, and the frames of each utterance; None = all.

    Time-major scores of one utterance, [frames, 1, labels], look like many utterances of one frame, and are refused
    unless `layout` says which they are; so are lengths that fit the frames' axis alone.

    Args:
        log_probs: array or tensor [utterances, frames, labels] or [frames, labels], or axes as `layout` says; or a
            sequence of arrays [frames, labels], all of one kind.
        lengths: int [utterances]; not for a sequence, which says them itself.
        num_labels: of the alphabet.
        layout: "UFL", "FUL", ... or "FL", "LF", one letter for each axis; None = as above.

    Raises:
        InvalidArgumentError: no array of real numbers, or of another shape.
    """
    if layout is not None:
        require(layout in KNOWN, f"layout must be one of {', '.join(KNOWN)}, got {layout!r}.")
    if isinstance(log_probs, (list, tuple)):
        return _joined(log_probs, lengths, num_labels, layout)
    array = _array(log_probs)
    if layout is not None:
        axes = len(layout)
        require(array.ndim == axes, f"log_probs in layout {layout!r} must have {axes} axes, got {list(array.shape)}.")
        order = [layout.index(axis) for axis in (BATCH if axes == 3 else SINGLE)]
        array = array.permute(*order) if isinstance(array, Tensor) else array.transpose(*order)
    if array.ndim == 2:
        array = array[None]
    require(
        array.ndim == 3,
        f"log_probs must have shape [utterances, frames, {num_labels}] or [frames, {num_labels}], got "
        f"{list(array.shape)}.",
    )
    if layout is None:
        _check_order(tuple(array.shape), lengths, num_labels)
    return array, lengths


def _array(given: Any) -> Any:
    if isinstance(given, Tensor):
        return given
    try:
        return np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidArgumentError(f"log_probs must be an array, got {type(given).__name__}: {error}.") from None


def _check_order(shape: tuple[int, ...], lengths: Any, num_labels: int) -> None:
    """Refuse what would be decoded as something else than was meant."""
    require(
        not (shape[1] == 1 and shape[0] > 1),
        f"log_probs of shape {list(shape)} may be one utterance of {shape[0]} frames, time first, or {shape[0]} "
        "utterances of one frame; say layout='FUL' or layout='UFL'.",
    )
    count = len(lengths) if hasattr(lengths, "__len__") else shape[0]
    require(
        count == shape[0] or count != shape[1],
        f"lengths are of {count} utterances, and log_probs of shape {list(shape)} hold {shape[0]}, with {shape[1]} "
        "frames; if time comes first say layout='FUL'.",
    )
    require(
        shape[2] == num_labels or num_labels not in shape[:2],
        f"log_probs have shape {list(shape)}, [utterances, frames, labels], but the alphabet has {num_labels} labels; "
        "if the axes stand in another order say it, for instance layout='ULF'.",
    )


def _joined(given: Sequence[Any], lengths: Any, num_labels: int, layout: str | None) -> tuple[Any, Any]:
    """Several utterances side by side, zeros behind shorter ones, and their lengths."""
    require(lengths is None, "lengths go with one array; a list of arrays says the frames of each itself.")
    require(
        layout is None or len(layout) == 2,
        f"arrays in a list have two axes, in layout 'FL' or 'LF', got layout {layout!r}.",
    )
    arrays = [_array(own) for own in given]
    if layout == "LF":
        arrays = [own.T if own.ndim == 2 else own for own in arrays]
    for place, own in enumerate(arrays):
        is_number = not isinstance(own, Tensor) and own.dtype.kind not in "fiu"
        require(
            own.ndim == 2 and own.shape[1] == num_labels and not is_number,
            f"log_probs[{place}] must be real numbers of shape [frames, {num_labels}], got {own.dtype} "
            f"{list(own.shape)}; give one utterance as an array, several as a list of arrays.",
        )
    counts = np.array([len(own) for own in arrays], dtype=np.int64)
    shape = (len(arrays), int(counts.max(initial=0)), num_labels)
    if arrays and all(isinstance(own, Tensor) for own in arrays):
        arrays = [own.detach() for own in arrays]
        batch = arrays[0].new_zeros(shape, dtype=reduce(torch.promote_types, (own.dtype for own in arrays)))
    else:
        arrays = [own.detach().float().cpu().numpy() if isinstance(own, Tensor) else own for own in arrays]
        batch = np.zeros(shape, dtype=np.result_type(np.float16, *(own.dtype for own in arrays)))
    for place, own in enumerate(arrays):
        batch[place, : len(own)] = own
    return batch, counts
