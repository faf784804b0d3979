"""Word error rate with counts, an interval and recall of listed terms (METHODS 10); alignment by jiwer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shallowfusion.config import require
from shallowfusion.errors import ShallowFusionError

__all__ = ["WordErrors", "marked_words", "word_errors"]

RESAMPLES = 10_000


@dataclass(frozen=True)
class WordErrors:
    """Errors of one system on a test set.

    Args:
        errors: substitutions + deletions + insertions of each utterance.
        words: reference words of each utterance.
        terms_found, terms: reference words on the term list, and those of them recognised.
    """

    errors: tuple[int, ...]
    words: tuple[int, ...]
    terms_found: int = 0
    terms: int = 0

    @property
    def rate(self) -> float:
        """All errors over all reference words."""
        return sum(self.errors) / sum(self.words)

    @property
    def term_recall(self) -> float | None:
        return self.terms_found / self.terms if self.terms else None

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """95 % bootstrap interval over utterances (Bisani and Ney 2004), 10,000 resamples, fixed seed."""
        rates = self._resampled(np.array(self.errors), seed)
        low, high = np.percentile(rates, [2.5, 97.5])
        return float(low), float(high)

    def difference_interval(self, other: WordErrors, seed: int = 0) -> tuple[float, float]:
        """95 % paired bootstrap interval of this rate minus the other's on the same utterances."""
        require(self.words == other.words, "systems can be compared only on the same references.")
        rates = self._resampled(np.array(self.errors) - np.array(other.errors), seed)
        low, high = np.percentile(rates, [2.5, 97.5])
        return float(low), float(high)

    def _resampled(self, errors: np.ndarray, seed: int) -> np.ndarray:
        chosen = np.random.default_rng(seed).integers(0, len(errors), (RESAMPLES, len(errors)))
        rates: np.ndarray = errors[chosen].sum(axis=1) / np.array(self.words)[chosen].sum(axis=1)
        return rates


def word_errors(references: Sequence[str], hypotheses: Sequence[str], terms: Collection[str] = ()) -> WordErrors:
    """Count word errors of hypotheses against references, both as they stand (no normalisation).

    Args:
        terms: words whose recall is counted.

    Raises:
        InvalidArgumentError: lists of different lengths, or a reference without words.
    """
    require(
        len(references) == len(hypotheses) and len(references) > 0,
        f"references and hypotheses must pair up, got {len(references)} and {len(hypotheses)}.",
    )
    errors, words, found, listed = [], [], 0, 0
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        require(bool(reference.split()), f"a reference holds no words: {reference!r}.")
        operations = _operations(reference, hypothesis)
        errors.append(sum(max(to - at, end - start) for kind, at, to, start, end in operations if kind != "equal"))
        own = reference.split()
        words.append(len(own))
        listed += sum(word in terms for word in own)
        found += sum(word in terms for kind, at, to, _, _ in operations if kind == "equal" for word in own[at:to])
    return WordErrors(tuple(errors), tuple(words), found, listed)


def marked_words(reference: str, hypothesis: str) -> str:
    """The hypothesis with its errors marked: [wrong], [-missing-], [+extra+]."""
    own, theirs = reference.split(), hypothesis.split()
    shown: list[str] = []
    for kind, at, to, start, end in _operations(reference, hypothesis):
        if kind == "equal":
            shown += theirs[start:end]
        elif kind == "delete":
            shown += [f"[-{word}-]" for word in own[at:to]]
        elif kind == "insert":
            shown += [f"[+{word}+]" for word in theirs[start:end]]
        else:
            shown += [f"[{word}]" for word in theirs[start:end]]
    return " ".join(shown)


def _operations(reference: str, hypothesis: str) -> list[tuple[str, int, int, int, int]]:
    """Alignment as (kind, reference start, end, hypothesis start, end)."""
    try:
        import jiwer
    except ImportError as error:
        raise ShallowFusionError(
            "word error rates need the package jiwer, which is not installed; pip install 'shallowfusion[eval]'."
        ) from error
    aligned: Any = jiwer.process_words(reference, hypothesis).alignments[0]
    return [
        (chunk.type, chunk.ref_start_idx, chunk.ref_end_idx, chunk.hyp_start_idx, chunk.hyp_end_idx)
        for chunk in aligned
    ]
