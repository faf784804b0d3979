"""How fusion goes wrong: cut transcripts, loops, words out of silence, mere changes of style (METHODS 10.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shallowfusion.config import require
from shallowfusion.evaluation.alignment import align
from shallowfusion.evaluation.word_errors import marked_words, word_difference, word_errors
from shallowfusion.results import compression_ratio

__all__ = [
    "ChangedUtterance",
    "Comparison",
    "FailureRates",
    "compare",
    "failure_rates",
    "is_looping",
    "is_truncated",
    "silence_insertions",
]

TAIL_DELETIONS = 3
LOOP_COMPRESSION_RATIO = 2.4  # openai-whisper's threshold
LOOP_REPEATS = 4
_LONGEST_REPEATED = 8


@dataclass(frozen=True)
class FailureRates:
    """Shares of utterances, each from 0 to 1.

    Args:
        truncated, looping: positions of the utterances concerned.
        tail_deletions: mean run of deletions at the end of an utterance.
        length_ratio: words of all hypotheses over words of all references.
        insertions_per_100_words: inserted words per hundred of the reference.
    """

    num_utterances: int
    truncated: tuple[int, ...]
    looping: tuple[int, ...]
    tail_deletions: float
    length_ratio: float
    insertions_per_100_words: float

    @property
    def truncation_rate(self) -> float:
        return len(self.truncated) / self.num_utterances

    @property
    def loop_rate(self) -> float:
        return len(self.looping) / self.num_utterances


@dataclass(frozen=True)
class ChangedUtterance:
    """An utterance on which two systems differ.

    Args:
        position: in the test set.
        baseline_errors, errors: word errors after normalisation.
        difference: how the baseline's words became the system's: {before -> after}.
        marked: the system's words with their errors marked: [wrong], [-missing-], [+extra+].
        is_style_only: the two are the same after normalisation.
    """

    position: int
    reference: str
    baseline: str
    text: str
    baseline_errors: int
    errors: int
    difference: str
    marked: str
    is_style_only: bool


@dataclass(frozen=True)
class Comparison:
    """A system against a baseline on the same utterances.

    Args:
        wins, losses, ties: utterances with fewer, more and equally many errors than the baseline.
        changed: every utterance whose text differs, those that lost most first.
        style_gap, baseline_style_gap: word error rate as written minus after normalisation.
    """

    num_utterances: int
    wins: int
    losses: int
    ties: int
    changed: tuple[ChangedUtterance, ...]
    style_gap: float
    baseline_style_gap: float

    @property
    def change_rate(self) -> float:
        return len(self.changed) / self.num_utterances

    @property
    def style_drift_rate(self) -> float:
        """Share of utterances changed in case, punctuation or the writing of numbers alone."""
        return sum(change.is_style_only for change in self.changed) / self.num_utterances


def failure_rates(references: Sequence[str], hypotheses: Sequence[str]) -> FailureRates:
    """Truncations and loops of transcripts, both sides normalised by the caller.

    Raises:
        InvalidArgumentError: lists that do not pair or are empty.
    """
    require(
        len(references) == len(hypotheses) > 0,
        f"references and hypotheses must pair up, got {len(references)} and {len(hypotheses)}.",
    )
    tails, insertions = [], 0
    looping = []
    for i, (reference, hypothesis) in enumerate(zip(references, hypotheses, strict=True)):
        steps = align(reference.split(), hypothesis.split())
        tails.append(_tail([step.kind for step in steps]))
        insertions += sum(step.kind == "insert" for step in steps)
        if is_looping(hypothesis, reference):
            looping.append(i)
    words = max(1, sum(len(reference.split()) for reference in references))
    return FailureRates(
        num_utterances=len(references),
        truncated=tuple(i for i, tail in enumerate(tails) if tail >= TAIL_DELETIONS),
        looping=tuple(looping),
        tail_deletions=sum(tails) / len(tails),
        length_ratio=sum(len(hypothesis.split()) for hypothesis in hypotheses) / words,
        insertions_per_100_words=100.0 * insertions / words,
    )


def is_truncated(reference: str, hypothesis: str) -> bool:
    """Whether the alignment ends with three deletions or more."""
    return _tail([step.kind for step in align(reference.split(), hypothesis.split())]) >= TAIL_DELETIONS


def is_looping(hypothesis: str, reference: str = "") -> bool:
    """Whether a text repeats itself as its reference does not.

    Either it compresses better than openai-whisper allows (ratio above 2.4) and the reference does not, or one to
    eight words stand four times or more in a row, and more often than anything does in the reference.
    """
    if compression_ratio(hypothesis) > LOOP_COMPRESSION_RATIO >= compression_ratio(reference):
        return True
    repeats = _repeats(hypothesis.split())
    return repeats >= LOOP_REPEATS and repeats > _repeats(reference.split())


def silence_insertions(hypotheses: Sequence[str]) -> tuple[float, float]:
    """Transcripts of recordings without speech: share that holds words, and mean number of words.

    Raises:
        InvalidArgumentError: no transcripts.
    """
    require(len(hypotheses) > 0, "hypotheses of silent recordings must hold at least one transcript, got none.")
    counts = [len(hypothesis.split()) for hypothesis in hypotheses]
    return sum(count > 0 for count in counts) / len(counts), sum(counts) / len(counts)


def compare(
    references: Sequence[str],
    baseline: Sequence[str],
    hypotheses: Sequence[str],
    normalise: Callable[[str], str],
) -> Comparison:
    """Wins, losses and every change of a system against a baseline; errors are those after normalisation.

    Raises:
        InvalidArgumentError: lists that do not pair, or a reference without words.
    """
    before = word_errors(references, baseline, normalise)
    after = word_errors(references, hypotheses, normalise)
    changed = []
    for i, (reference, old, new) in enumerate(zip(references, baseline, hypotheses, strict=True)):
        if " ".join(old.split()) == " ".join(new.split()):
            continue
        plain_old, plain_new = normalise(old), normalise(new)
        is_style_only = plain_old == plain_new
        change = ChangedUtterance(
            position=i,
            reference=reference,
            baseline=old,
            text=new,
            baseline_errors=before.errors[i],
            errors=after.errors[i],
            difference=word_difference(old, new) if is_style_only else word_difference(plain_old, plain_new),
            marked=marked_words(normalise(reference), plain_new),
            is_style_only=is_style_only,
        )
        changed.append(change)
    gains = [one - other for one, other in zip(before.errors, after.errors, strict=True)]
    return Comparison(
        num_utterances=len(references),
        wins=sum(gain > 0 for gain in gains),
        losses=sum(gain < 0 for gain in gains),
        ties=sum(gain == 0 for gain in gains),
        changed=tuple(sorted(changed, key=lambda change: change.baseline_errors - change.errors)),
        style_gap=word_errors(references, hypotheses).rate - after.rate,
        baseline_style_gap=word_errors(references, baseline).rate - before.rate,
    )


def _tail(kinds: Sequence[str]) -> int:
    """Deletions at the end of an alignment."""
    count = 0
    for kind in reversed(kinds):
        if kind != "delete":
            break
        count += 1
    return count


def _repeats(words: Sequence[str]) -> int:
    """The most times one to eight words stand in a row; price: words x 8."""
    most = min(1, len(words))
    for size in range(1, min(_LONGEST_REPEATED, len(words) // 2) + 1):
        run = 0
        for place in range(size, len(words)):
            run = run + 1 if words[place] == words[place - size] else 0
            most = max(most, 1 + run // size)
    return most
