"""Whether a difference between two systems on the same utterances is more than luck (METHODS 10.4)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from shallowfusion.config import require
from shallowfusion.evaluation.alignment import align

__all__ = [
    "PairedBootstrap",
    "SegmentTest",
    "bootstrap_interval",
    "holm",
    "mapsswe",
    "paired_bootstrap",
    "segment_differences",
    "segment_test",
    "sign_flip_test",
]

Alternative = Literal["two-sided", "less", "greater"]
Array = npt.NDArray[Any]

RESAMPLES = 10_000
FEWEST_SEGMENTS = 50  # below, MAPSSWE's normal approximation is not to be trusted
BOUNDARY_WORDS = 2
_CHUNK = 2_000_000  # indices drawn at once


@dataclass(frozen=True)
class PairedBootstrap:
    """The resampled difference of two error rates, second minus first: below 0 the second system is better.

    Args:
        difference: of the rates as measured.
        low, high: 2.5 and 97.5 percentiles.
        probability_of_improvement: share of resamples in which the second system has the lower rate.
    """

    difference: float
    low: float
    high: float
    probability_of_improvement: float


@dataclass(frozen=True)
class SegmentTest:
    """Matched-pairs test over segments: W = mean / sqrt(variance / segments), two-sided normal p."""

    num_segments: int
    mean: float
    variance: float
    statistic: float
    p_value: float

    @property
    def enough(self) -> bool:
        """Whether there are the 50 segments the normal approximation asks for."""
        return self.num_segments >= FEWEST_SEGMENTS


def bootstrap_interval(
    errors: Sequence[int], lengths: Sequence[int], groups: Sequence[Hashable] | None = None, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of sum(errors) / sum(lengths) over resampled utterances (Bisani and Ney 2004), 10,000 resamples.

    Args:
        groups: speaker or session of each utterance; whole groups are drawn instead of utterances.
    """
    table = _grouped([errors, lengths], groups)
    sums = _resampled_sums(table, seed)
    low, high = np.percentile(sums[0] / np.maximum(sums[1], 1), [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap(
    first: Sequence[int],
    second: Sequence[int],
    lengths: Sequence[int],
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> PairedBootstrap:
    """Difference of pooled rates over utterances resampled together for both systems; denominators are summed anew.

    Args:
        first, second: errors of each utterance.
        lengths: reference words of each utterance.
        groups: as in `bootstrap_interval` (blockwise: 1912.09508).

    Raises:
        InvalidArgumentError: lists of different lengths, or empty ones.
    """
    require(
        0 < len(first) == len(second) == len(lengths),
        f"systems can be compared only on the same utterances, got {len(first)}, {len(second)} and "
        f"{len(lengths)} of them; evaluate both on the same set.",
    )
    table = _grouped([first, second, lengths], groups)
    sums = _resampled_sums(table, seed)
    differences = (sums[1] - sums[0]) / np.maximum(sums[2], 1)
    low, high = np.percentile(differences, [2.5, 97.5])
    measured = (sum(second) - sum(first)) / max(1, sum(lengths))
    return PairedBootstrap(measured, float(low), float(high), float((differences < 0).mean()))


def sign_flip_test(
    differences: Sequence[float], alternative: Alternative = "two-sided", seed: int = 0, shuffles: int = RESAMPLES
) -> float:
    """Permutation test: p = (1 + as extreme) / (1 + shuffles), the systems swapped in each utterance by a fair coin.

    With errors of equal references the statistic is the difference of pooled rates; with differences of per-utterance
    rates it is that of the mean rates.

    Args:
        differences: second minus first, one per utterance.
        alternative: "less" asks whether the second system makes fewer errors.

    Raises:
        InvalidArgumentError: no differences, numbers that are not finite, or an unknown alternative.
    """
    values = np.asarray(differences, dtype=np.float64)
    require(
        values.ndim == 1 and len(values) > 0 and bool(np.isfinite(values).all()),
        f"differences must be finite numbers, one per utterance, got {differences!r}.",
    )
    require(
        alternative in ("two-sided", "less", "greater"),
        f"alternative must be 'two-sided', 'less' or 'greater', got {alternative!r}.",
    )
    measured = float(values.sum())
    generator = np.random.default_rng(seed)
    changing = values[values != 0]
    # Sums of the same numbers in another order differ in the last bits; equal must count as equal.
    slack = 1e-9 * max(1.0, float(np.abs(values).sum()))
    extreme, done = 0, 0
    while done < shuffles:
        size = min(shuffles - done, max(1, _CHUNK // max(1, len(changing))))
        flips = 1.0 - 2.0 * generator.integers(0, 2, (size, len(changing)))
        sums = flips @ changing
        if alternative == "two-sided":
            extreme += int((np.abs(sums) >= abs(measured) - slack).sum())
        elif alternative == "less":
            extreme += int((sums <= measured + slack).sum())
        else:
            extreme += int((sums >= measured - slack).sum())
        done += size
    return (1 + extreme) / (1 + shuffles)


def mapsswe(references: Sequence[str], first: Sequence[str], second: Sequence[str]) -> SegmentTest:
    """Matched pairs sentence segment word error test of two systems' transcripts (Gillick and Cox 1989; sclite)."""
    differences: list[int] = []
    for reference, one, other in zip(references, first, second, strict=True):
        differences += segment_differences(reference, one, other)
    return segment_test(differences)


def segment_test(differences: Sequence[float]) -> SegmentTest:
    """Normal test that segment differences have mean 0; fewer than two segments or no difference give p = 1."""
    values = np.asarray(differences, dtype=np.float64)
    count = len(values)
    if count < 2 or not values.any():
        return SegmentTest(count, float(values.mean()) if count else 0.0, 0.0, 0.0, 1.0)
    mean, variance = float(values.mean()), float(values.var(ddof=1))
    statistic = mean / math.sqrt(variance / count) if variance > 0 else math.copysign(math.inf, mean)
    return SegmentTest(count, mean, variance, statistic, math.erfc(abs(statistic) / math.sqrt(2.0)))


def segment_differences(reference: str, first: str, second: str) -> list[int]:
    """Errors of the first minus errors of the second system in each segment of one utterance.

    Segments are parted by at least two words running that both systems have right, with nothing inserted between;
    only segments with an error of either system count.
    """
    words = reference.split()
    errors = np.zeros((2, 2 * len(words) + 1), dtype=np.int64)  # gap, word, gap, word, ..., gap
    for system, text in enumerate((first, second)):
        for step in align(words, text.split()):
            if step.kind == "insert":
                errors[system, 2 * step.reference] += 1
            elif step.kind != "equal":
                errors[system, 2 * step.reference + 1] += 1
    wrong = errors.sum(axis=0) > 0
    found: list[int] = []
    correct_words, is_open = BOUNDARY_WORDS, False
    for place, is_wrong in enumerate(wrong.tolist()):
        if is_wrong:
            if not is_open:
                found.append(0)
            found[-1] += int(errors[0, place] - errors[1, place])
            correct_words, is_open = 0, True
        elif place % 2:
            correct_words += 1
            is_open = is_open and correct_words < BOUNDARY_WORDS
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction for several tests, for instance one per weight tried; in the order given."""
    for value in p_values:
        require(0 <= value <= 1, f"p_values must be from 0 to 1, got {value!r}.")
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def _grouped(columns: Sequence[Sequence[int]], groups: Sequence[Hashable] | None) -> Array:
    """Columns as float64 [columns, utterances], or summed over each group."""
    table = np.array(columns, dtype=np.float64)
    if groups is None:
        return table
    require(
        len(groups) == table.shape[1], f"groups must hold one entry per utterance, {table.shape[1]}, got {len(groups)}."
    )
    numbers: dict[Hashable, int] = {}
    own = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
    return np.stack([np.bincount(own, weights=column) for column in table])


def _resampled_sums(table: Array, seed: int) -> Array:
    """Sums of each column over utterances drawn with replacement, [columns, resamples]."""
    generator = np.random.default_rng(seed)
    size = table.shape[1]
    sums = []
    for start in range(0, RESAMPLES, step := max(1, _CHUNK // size)):
        chosen = generator.integers(0, size, (min(step, RESAMPLES - start), size))
        sums.append(table[:, chosen].sum(axis=2))
    return np.concatenate(sums, axis=1)
