"""Word errors: counts, intervals, terms, marks."""

from __future__ import annotations

import pytest

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.evaluation import marked_words, word_errors


def test_counts_by_hand() -> None:
    found = word_errors(["a b c d", "e f"], ["a x c", "e f g"])
    assert found.errors == (2, 1)
    assert found.words == (4, 2)
    assert found.rate == pytest.approx(0.5)


def test_empty_hypothesis_is_all_deletions() -> None:
    assert word_errors(["a b"], [""]).errors == (2,)


def test_recall_counts_listed_reference_words_aligned_as_correct() -> None:
    found = word_errors(["the renal cyst", "a cyst"], ["the kidney cyst", "assist"], {"renal", "cyst"})
    assert (found.terms_found, found.terms) == (1, 3)
    assert found.term_recall == pytest.approx(1 / 3)


def test_interval_holds_the_rate_and_is_a_point_for_equal_utterances() -> None:
    same = word_errors(["a b"] * 10, ["a x"] * 10)
    assert same.interval() == (0.5, 0.5)
    mixed = word_errors(["a b"] * 20, ["a x"] * 10 + ["a b"] * 10)
    low, high = mixed.interval()
    assert low < mixed.rate < high


def test_difference_interval_of_a_system_with_itself_is_zero() -> None:
    found = word_errors(["a b", "c d"], ["a x", "c d"])
    assert found.difference_interval(found) == (0.0, 0.0)


def test_marks() -> None:
    assert marked_words("a b c d", "a x c d e") == "a [x] c d [+e+]"
    assert marked_words("a b c", "a c") == "a [-b-] c"


@pytest.mark.parametrize(("references", "hypotheses"), [([], []), (["a"], []), (["", "a"], ["x", "a"])])
def test_lists_that_do_not_pair_and_empty_references_are_refused(references, hypotheses) -> None:
    with pytest.raises(InvalidArgumentError):
        word_errors(references, hypotheses)
