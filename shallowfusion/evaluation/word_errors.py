"""Word and character error rates with counts and an interval (METHODS 10.1)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

from shallowfusion.config import require
from shallowfusion.evaluation.alignment import align, edit_counts
from shallowfusion.evaluation.significance import bootstrap_interval

__all__ = ["WordErrors", "character_errors", "marked_words", "word_difference", "word_errors"]


@dataclass(frozen=True)
class WordErrors:
    """Errors of one system on a test set, utterance by utterance.

    Args:
        substitutions, deletions, insertions: of each utterance, as `align` counts them.
        lengths: reference words (or characters) of each utterance.
        unit: "word" or "character".
    """

    substitutions: tuple[int, ...]
    deletions: tuple[int, ...]
    insertions: tuple[int, ...]
    lengths: tuple[int, ...]
    unit: str = "word"

    @cached_property
    def errors(self) -> tuple[int, ...]:
        """All errors of each utterance."""
        return tuple(map(sum, zip(self.substitutions, self.deletions, self.insertions, strict=True)))

    @property
    def words(self) -> tuple[int, ...]:
        """Reference words of each utterance; of character errors its characters."""
        return self.lengths

    @property
    def rate(self) -> float:
        """All errors over all reference words; 1.0 is as many errors as words."""
        return sum(self.errors) / max(1, sum(self.lengths))

    @property
    def mean_rate(self) -> float:
        """Mean of the utterances' own rates ("macro"), a reference without words counted as one word."""
        rates = [errors / max(1, length) for errors, length in zip(self.errors, self.lengths, strict=True)]
        return sum(rates) / max(1, len(rates))

    def interval(self, groups: Sequence[Hashable] | None = None, seed: int = 0) -> tuple[float, float]:
        """95 % bootstrap interval of the rate over utterances, or over whole groups (speakers) of them."""
        return bootstrap_interval(self.errors, self.lengths, groups, seed)

    def __str__(self) -> str:
        return f"{100.0 * self.rate:.1f} % ({sum(self.errors)} of {sum(self.lengths)} {self.unit}s)"


def word_errors(
    references: Sequence[str], hypotheses: Sequence[str], normalise: Callable[[str], str] | None = None
) -> WordErrors:
    """Count word errors of hypotheses against references.

    Args:
        normalise: applied to both sides; None takes them as they stand. A reference may be empty after it, not before.

    Raises:
        InvalidArgumentError: lists of different lengths, or a reference without words.
    """
    return _errors(references, hypotheses, normalise, str.split, "word")


def character_errors(
    references: Sequence[str], hypotheses: Sequence[str], normalise: Callable[[str], str] | None = None
) -> WordErrors:
    """As `word_errors`, with characters; runs of white space are one space and none is at the ends."""
    return _errors(references, hypotheses, normalise, lambda text: list(" ".join(text.split())), "character")


def marked_words(reference: str, hypothesis: str) -> str:
    """The hypothesis with its errors marked: [wrong], [-missing-], [+extra+]."""
    own, theirs = reference.split(), hypothesis.split()
    shown: list[str] = []
    for step in align(own, theirs):
        if step.kind == "equal":
            shown.append(theirs[step.hypothesis])
        elif step.kind == "delete":
            shown.append(f"[-{own[step.reference]}-]")
        elif step.kind == "insert":
            shown.append(f"[+{theirs[step.hypothesis]}+]")
        else:
            shown.append(f"[{theirs[step.hypothesis]}]")
    return " ".join(shown)


def word_difference(before: str, after: str) -> str:
    """How one text became another: words that stayed as they are, changes as {before -> after}."""
    own, theirs = before.split(), after.split()
    shown: list[str] = []
    dropped: list[str] = []
    added: list[str] = []
    for step in (*align(own, theirs), None):
        if step is None or step.kind == "equal":
            if dropped or added:
                shown.append("{" + " ".join([*dropped, "->", *added]) + "}")
                dropped, added = [], []
            if step is not None:
                shown.append(own[step.reference])
            continue
        if step.kind != "insert":
            dropped.append(own[step.reference])
        if step.kind != "delete":
            added.append(theirs[step.hypothesis])
    return " ".join(shown)


def _errors(
    references: Sequence[str],
    hypotheses: Sequence[str],
    normalise: Callable[[str], str] | None,
    split: Callable[[str], list[str]],
    unit: str,
) -> WordErrors:
    require(
        len(references) == len(hypotheses) and len(references) > 0,
        f"references and hypotheses must pair up, got {len(references)} and {len(hypotheses)}.",
    )
    counts, lengths = [], []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        require(bool(reference.split()), f"a reference holds no words: {reference!r}; leave out utterances of silence.")
        own, theirs = (reference, hypothesis) if normalise is None else (normalise(reference), normalise(hypothesis))
        counts.append(edit_counts(split(own), split(theirs)))
        lengths.append(len(split(own)))
    return WordErrors(
        tuple(count.substitutions for count in counts),
        tuple(count.deletions for count in counts),
        tuple(count.insertions for count in counts),
        tuple(lengths),
        unit,
    )
