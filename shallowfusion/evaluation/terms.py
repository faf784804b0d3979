"""How well the words that matter are recognised: recall and precision of listed terms, errors in and outside them.

The list is fixed before decoding and never made from hypotheses (METHODS 10.2).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from shallowfusion.config import require
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.evaluation.alignment import Edit, align
from shallowfusion.evaluation.word_errors import WordErrors

__all__ = ["BANDS", "TermErrors", "TermList", "count_terms", "term_bands", "term_errors"]

Term = tuple[str, ...]

BANDS = ("0", "1-10", ">10")
_FEW = 10


@dataclass(frozen=True)
class TermList:
    """Terms of one or more words, sorted and each once.

    Args:
        terms: words of each term, normalised as the transcripts are.
    """

    terms: tuple[Term, ...]

    @classmethod
    def of(cls, texts: Iterable[str], normalise: Callable[[str], str] | None = None) -> TermList:
        """Terms as texts; empty ones are dropped, equal ones count once.

        Raises:
            InvalidArgumentError: nothing is left.
        """
        words = (tuple((text if normalise is None else normalise(text)).split()) for text in texts)
        terms = tuple(sorted({term for term in words if term}))
        require(bool(terms), "a term list must hold at least one word, got none.")
        return cls(terms)

    @classmethod
    def read(cls, path: Path, normalise: Callable[[str], str] | None = None) -> TermList:
        """One term a line; empty lines and lines that start with # are passed over.

        Raises:
            InvalidArgumentError: the file cannot be read or holds no term.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgumentError(
                f"{path} cannot be read as a term list ({error}); wanted one term a line."
            ) from error
        own = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
        require(bool(own), f"{path} holds no terms, wanted one a line.")
        return cls.of(own, normalise)

    @property
    def fingerprint(self) -> str:
        """Twelve digits of SHA-256: a report that states it proves which list it used."""
        text = "\n".join(" ".join(term) for term in self.terms)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def _by_first_word(self) -> dict[str, list[Term]]:
        """Terms that begin with a word, the longest first."""
        found: dict[str, list[Term]] = {}
        for term in sorted(self.terms, key=len, reverse=True):
            found.setdefault(term[0], []).append(term)
        return found

    def occurrences(self, words: Sequence[str]) -> list[tuple[int, Term]]:
        """Where terms stand, left to right, the longest at each place, none overlapping."""
        found: list[tuple[int, Term]] = []
        place = 0
        while place < len(words):
            candidates = self._by_first_word.get(words[place], ())
            term = next((term for term in candidates if tuple(words[place : place + len(term)]) == term), None)
            if term is None:
                place += 1
            else:
                found.append((place, term))
                place += len(term)
        return found


@dataclass(frozen=True)
class TermErrors:
    """Recognition of listed terms.

    Args:
        spoken: occurrences in the references; `recalled`: those whose words all are right, with nothing between.
        written: occurrences in the hypotheses; `correct`: those whose words were all said there, with nothing between.
        inside: word errors of reference words within occurrences, and of inserted words within written ones (B-WER).
        outside: all other word errors (U-WER); both together are the errors of all words.
        by_term: per term of the references how often it was spoken and recalled.
        absent: terms of the list that no reference holds.
    """

    spoken: int
    recalled: int
    written: int
    correct: int
    inside: WordErrors
    outside: WordErrors
    by_term: Mapping[str, tuple[int, int]]
    absent: tuple[str, ...]

    @property
    def recall(self) -> float:
        return self.recalled / self.spoken

    @property
    def precision(self) -> float | None:
        """Share of written terms that were said; None if none was written."""
        return self.correct / self.written if self.written else None

    @property
    def f1(self) -> float:
        return 2 * self.recalled / (self.spoken + self.written) if self.spoken + self.written else 0.0

    @property
    def term_error_rate(self) -> float:
        """Substituted and deleted words within spoken terms over their words (salient-term error rate, 2306.08133)."""
        missed = sum(self.inside.substitutions) + sum(self.inside.deletions)
        return missed / sum(self.inside.lengths)


def term_errors(
    references: Sequence[str], hypotheses: Sequence[str], terms: TermList, require_present: bool = False
) -> TermErrors:
    """Align every pair and count what befell the listed terms; texts and list are normalised by the caller.

    Args:
        require_present: refuse a list with a term that no reference holds, instead of listing it in `absent`.

    Raises:
        InvalidArgumentError: lists that do not pair, no term in any reference, or, on demand, an absent term.
    """
    require(
        len(references) == len(hypotheses) > 0,
        f"references and hypotheses must pair up, got {len(references)} and {len(hypotheses)}.",
    )
    count = _Counts()
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        count.add(reference.split(), hypothesis.split(), terms)
    absent = tuple(name for name in (" ".join(term) for term in terms.terms) if name not in count.spoken)
    require(
        bool(count.spoken),
        f"none of the {len(terms.terms)} terms is in the references; check the list and its normalisation.",
    )
    require(
        not (require_present and absent),
        f"{len(absent)} of {len(terms.terms)} terms are in no reference, first {', '.join(map(repr, absent[:5]))}; "
        "take them off the list or do not require their presence.",
    )
    return TermErrors(
        spoken=sum(count.spoken.values()),
        recalled=sum(count.recalled.values()),
        written=count.written,
        correct=count.correct,
        inside=count.errors(inside=True),
        outside=count.errors(inside=False),
        by_term={name: (number, count.recalled[name]) for name, number in sorted(count.spoken.items())},
        absent=absent,
    )


def count_terms(lines: Iterable[str], terms: TermList, normalise: Callable[[str], str] | None = None) -> dict[str, int]:
    """How often each term occurs in a text, for instance what the language model was trained on."""
    counts: Counter[str] = Counter({" ".join(term): 0 for term in terms.terms})
    for line in lines:
        words = (line if normalise is None else normalise(line)).split()
        counts.update(" ".join(term) for _, term in terms.occurrences(words))
    return dict(counts)


def term_bands(found: TermErrors, counts: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Occurrences spoken and recalled of terms seen 0, 1 to 10 and more than 10 times in a training text."""
    bands = dict.fromkeys(BANDS, (0, 0))
    for name, (spoken, recalled) in found.by_term.items():
        seen = counts.get(name, 0)
        band = BANDS[0] if seen == 0 else BANDS[1] if seen <= _FEW else BANDS[2]
        bands[band] = (bands[band][0] + spoken, bands[band][1] + recalled)
    return bands


class _Counts:
    """Sums over utterances; errors per utterance, within terms and outside."""

    def __init__(self) -> None:
        self.spoken: Counter[str] = Counter()
        self.recalled: Counter[str] = Counter()
        self.written = 0
        self.correct = 0
        self._errors: list[list[Counter[str]]] = [[], []]  # outside, inside

    def add(self, reference: Sequence[str], hypothesis: Sequence[str], terms: TermList) -> None:
        steps = align(reference, hypothesis)
        said, heard = terms.occurrences(reference), terms.occurrences(hypothesis)
        partner = {step.reference: step.hypothesis for step in steps if step.kind == "equal"}
        counterpart = {there: here for here, there in partner.items()}
        for start, term in said:
            self.spoken[" ".join(term)] += 1
            self.recalled[" ".join(term)] += _is_run([partner.get(start + i) for i in range(len(term))])
        for start, term in heard:
            self.written += 1
            self.correct += _is_run([counterpart.get(start + i) for i in range(len(term))])
        self._add_errors(steps, _places(said), _places(heard), len(reference))

    def _add_errors(self, steps: Sequence[Edit], said: set[int], heard: set[int], length: int) -> None:
        own = [Counter[str](lengths=length - len(said)), Counter[str](lengths=len(said))]
        for step in steps:
            is_inside = step.hypothesis in heard if step.kind == "insert" else step.reference in said
            own[is_inside][step.kind] += 1
        for side, errors in zip(self._errors, own, strict=True):
            side.append(errors)

    def errors(self, inside: bool) -> WordErrors:
        columns = {
            kind: tuple(own[kind] for own in self._errors[inside])
            for kind in ("substitute", "delete", "insert", "lengths")
        }
        return WordErrors(columns["substitute"], columns["delete"], columns["insert"], columns["lengths"])


def _places(occurrences: Sequence[tuple[int, Term]]) -> set[int]:
    return {start + i for start, term in occurrences for i in range(len(term))}


def _is_run(places: Sequence[int | None]) -> bool:
    """Whether all places are known and follow each other."""
    first = places[0]
    return first is not None and list(places) == list(range(first, first + len(places)))
