"""Systems against a baseline on one test set: every figure a report needs, in one record."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from shallowfusion.config import require
from shallowfusion.evaluation.failures import Comparison, FailureRates, compare, failure_rates, silence_insertions
from shallowfusion.evaluation.normalisation import Normaliser
from shallowfusion.evaluation.significance import (
    PairedBootstrap,
    SegmentTest,
    holm,
    mapsswe,
    paired_bootstrap,
    sign_flip_test,
)
from shallowfusion.evaluation.terms import TermErrors, TermList, term_errors
from shallowfusion.evaluation.word_errors import WordErrors, character_errors, word_errors

__all__ = ["Evaluation", "PairedTests", "SystemScores", "ReferenceSet", "evaluate"]


@dataclass(frozen=True)
class ReferenceSet:
    """References and how they are compared.

    Args:
        ids: of the utterances, in the order of `references`.
        normalise: applied to references, hypotheses and terms alike.
        groups: speaker of each utterance; whole speakers are resampled then.
        terms: listed terms, already normalised.
        require_terms: refuse a list with terms that no reference holds.
    """

    ids: tuple[str, ...]
    references: tuple[str, ...]
    normalise: Normaliser
    groups: tuple[Hashable, ...] | None = None
    terms: TermList | None = None
    require_terms: bool = False


@dataclass(frozen=True)
class PairedTests:
    """A system against the baseline: word errors after normalisation, utterance by utterance.

    Args:
        p_better: sign-flip test that the system makes fewer errors, one-sided; `p_value` two-sided.
        p_corrected: `p_value` after Holm's correction for all systems of the evaluation.
    """

    bootstrap: PairedBootstrap
    p_better: float
    p_value: float
    p_corrected: float
    segments: SegmentTest


@dataclass(frozen=True)
class SystemScores:
    """One system on the test set.

    Args:
        words, characters: errors after normalisation; `raw_words`, `raw_characters`: as written.
        interval: 95 % bootstrap interval of the word error rate.
        silence: share of silent recordings with words, and mean words there; None without such recordings.
        comparison, tests: against the baseline; None for the baseline itself.
    """

    name: str
    texts: tuple[str, ...]
    words: WordErrors
    raw_words: WordErrors
    characters: WordErrors
    raw_characters: WordErrors
    interval: tuple[float, float]
    failures: FailureRates
    terms: TermErrors | None
    silence: tuple[float, float] | None = None
    comparison: Comparison | None = None
    tests: PairedTests | None = None


@dataclass(frozen=True)
class Evaluation:
    """All systems on one test set; the first is the baseline of the others."""

    test_set: ReferenceSet
    systems: tuple[SystemScores, ...]

    @property
    def baseline(self) -> SystemScores:
        return self.systems[0]


def evaluate(
    test_set: ReferenceSet, systems: Mapping[str, Sequence[str]], silence: Mapping[str, Sequence[str]] | None = None
) -> Evaluation:
    """Score transcripts of one or more systems; the first is the baseline.

    Args:
        systems: transcripts by the system's name, in the order of the references.
        silence: transcripts of recordings without speech, by the system's name.

    Raises:
        InvalidArgumentError: no system, transcripts that do not pair, an empty reference, or terms as in `term_errors`.
    """
    require(bool(systems), "systems must hold at least one system, got none.")
    require(
        any(test_set.normalise(reference).split() for reference in test_set.references),
        f"the normaliser {test_set.normalise.name} leaves no word in any reference; use another.",
    )
    scored = [_scores(test_set, name, texts, (silence or {}).get(name)) for name, texts in systems.items()]
    baseline = scored[0]
    compared = [_compared(test_set, baseline, system) for system in scored[1:]]
    corrected = holm([system.tests.p_value for system in compared if system.tests is not None])
    final = [
        replace(system, tests=None if system.tests is None else replace(system.tests, p_corrected=p))
        for system, p in zip(compared, corrected, strict=True)
    ]
    return Evaluation(test_set, (baseline, *final))


def _scores(test_set: ReferenceSet, name: str, texts: Sequence[str], silent: Sequence[str] | None) -> SystemScores:
    normalise, references = test_set.normalise, test_set.references
    words = word_errors(references, texts, normalise)
    plain_references, plain_texts = [normalise(text) for text in references], [normalise(text) for text in texts]
    terms = None
    if test_set.terms is not None:
        terms = term_errors(plain_references, plain_texts, test_set.terms, test_set.require_terms)
    return SystemScores(
        name=name,
        texts=tuple(texts),
        words=words,
        raw_words=word_errors(references, texts),
        characters=character_errors(references, texts, normalise),
        raw_characters=character_errors(references, texts),
        interval=words.interval(test_set.groups),
        failures=failure_rates(plain_references, plain_texts),
        terms=terms,
        silence=None if not silent else silence_insertions([normalise(text) for text in silent]),
    )


def _compared(test_set: ReferenceSet, baseline: SystemScores, system: SystemScores) -> SystemScores:
    normalise = test_set.normalise
    before, after = baseline.words.errors, system.words.errors
    differences = [new - old for old, new in zip(before, after, strict=True)]
    p_value = sign_flip_test(differences)
    plain = [[normalise(text) for text in texts] for texts in (test_set.references, baseline.texts, system.texts)]
    tests = PairedTests(
        bootstrap=paired_bootstrap(before, after, system.words.lengths, test_set.groups),
        p_better=sign_flip_test(differences, "less"),
        p_value=p_value,
        p_corrected=p_value,
        segments=mapsswe(*plain),
    )
    comparison = compare(test_set.references, baseline.texts, system.texts, normalise)
    return replace(system, comparison=comparison, tests=tests)
