"""Border checks that the search classes share: arguments become what the core expects, or an error says why not."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shallowfusion.config import BeamSettings, require
from shallowfusion.errors import InvalidArgumentError

__all__ = ["BeamShape", "StepArrays", "integer", "integer_array"]

LARGEST_INTEGER = int(np.iinfo(np.int64).max)

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


def integer(name: str, value: object, lowest: int, highest: int) -> int:
    """Return `value` as an int in [lowest, highest].

    Raises:
        InvalidArgumentError: it is no integer, or outside the range.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidArgumentError(f"{name} must be an integer, got {value!r}.") from None
    require(lowest <= number <= highest, f"{name} must be from {lowest} to {highest}, got {number}.")
    return number


def integer_array(name: str, values: object, shape: tuple[int | None, ...]) -> Int64Array:
    """Return `values` as a contiguous int64 array; None in `shape` stands for any size.

    Raises:
        InvalidArgumentError: not integers, or another shape.
    """
    return np.ascontiguousarray(_array(name, values, shape, "iu", "integers"), dtype=np.int64)


def float_array(name: str, values: object, shape: tuple[int | None, ...]) -> Float32Array:
    """Return `values` as a contiguous float32 array; None in `shape` stands for any size.

    Raises:
        InvalidArgumentError: not real numbers, or another shape.
    """
    array = _array(name, values, shape, "fiu", "real numbers")
    if array.dtype == np.float32:
        return np.ascontiguousarray(array)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=np.float32)


def _array(name: str, values: object, shape: tuple[int | None, ...], kinds: str, wanted: str) -> npt.NDArray[Any]:
    # Runs five times a step: messages are only made when they are needed.
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        got = type(values).__name__
        raise InvalidArgumentError(f"{name} must be an array of {wanted}, got {got}: {error}.") from None
    if array.size == 0 and array.dtype == np.float64:  # what an empty list becomes
        array = array.astype(np.int64)
    if array.dtype.kind not in kinds:
        raise InvalidArgumentError(f"{name} must hold {wanted}, got dtype {array.dtype}.")
    if array.shape != shape and not _fits(array.shape, shape):
        axes = ", ".join("any" if size is None else str(size) for size in shape)
        raise InvalidArgumentError(f"{name} must have shape [{axes}], got {list(array.shape)}.")
    return array


def _fits(got: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(got) == len(wanted) and all(want in (None, size) for size, want in zip(got, wanted, strict=True))


@dataclass(frozen=True)
class BeamShape:
    """The checked numbers a beam state is made from."""

    num_utterances: int
    num_parts: int

    @classmethod
    def check(cls, settings: BeamSettings, num_utterances: object, num_parts: object) -> BeamShape:
        """Check the sizes of a beam state and the integers of its settings.

        Raises:
            InvalidArgumentError: a number is no integer or outside its range, or `settings` are no settings.
        """
        require(isinstance(settings, BeamSettings), f"settings must be BeamSettings, got {type(settings).__name__}.")
        integer("max_new_tokens", settings.max_new_tokens, 1, LARGEST_INTEGER)
        for token in settings.end_ids:
            integer("end_ids", token, 0, LARGEST_INTEGER)
        return cls(
            num_utterances=integer("num_utterances", num_utterances, 0, 1_000_000),
            num_parts=integer("num_parts", num_parts, 0, 4096),
        )


@dataclass(frozen=True)
class StepArrays:
    """The checked arguments of one `advance`.

    Args:
        utterances: int64 [active].
        totals: float32 [active, candidates].
        parents: int64 [active, candidates].
        tokens: int64 [active, candidates].
        parts: float32 [active, candidates, parts].
        flagged: bool [active].
    """

    utterances: Int64Array
    totals: Float32Array
    parents: Int64Array
    tokens: Int64Array
    parts: Float32Array
    flagged: npt.NDArray[np.bool_]

    @classmethod
    def check(
        cls,
        utterances: object,
        totals: object,
        parents: object,
        tokens: object,
        parts: object,
        flagged: object | None,
        *,
        num_parts: int,
    ) -> StepArrays:
        """Convert the arguments of one `advance` and check dtypes and shapes against each other.

        Raises:
            InvalidArgumentError: a dtype or shape does not fit.
        """
        ids = integer_array("utterances", utterances, (None,))
        scores = float_array("totals", totals, (ids.shape[0], None))
        shape = scores.shape
        if flagged is None:
            flags = np.zeros(shape[0], dtype=np.bool_)
        else:
            flags = np.ascontiguousarray(_array("flagged", flagged, (shape[0],), "b", "booleans"))
        return cls(
            utterances=ids,
            totals=scores,
            parents=integer_array("parents", parents, shape),
            tokens=integer_array("tokens", tokens, shape),
            parts=float_array("parts", parts, (*shape, num_parts)),
            flagged=flags,
        )
