"""Word and character errors: counts, rates, intervals, marks."""

from __future__ import annotations

import jiwer
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.evaluation import WordErrors, character_errors, marked_words, word_errors
from shallowfusion.evaluation.word_errors import word_difference


def test_counts_by_hand() -> None:
    found = word_errors(["a b c d", "e f"], ["a x c", "e f g"])
    assert found.errors == (2, 1)
    assert (found.substitutions, found.deletions, found.insertions) == ((1, 0), (1, 0), (0, 1))
    assert found.words == (4, 2)
    assert found.rate == pytest.approx(0.5)
    assert found.mean_rate == pytest.approx((2 / 4 + 1 / 2) / 2)
    assert str(found) == "50.0 % (3 of 6 words)"


@pytest.mark.parametrize(
    ("reference", "hypothesis", "errors"),
    [
        ("a b c", "a b c", 0),
        ("a b c", "", 3),
        ("a b c", "a x c", 1),
        ("a b c", "b c d", 2),
        ("the left arm", "the the left arm", 1),
    ],
)
def test_errors_of_one_pair(reference: str, hypothesis: str, errors: int) -> None:
    assert word_errors([reference], [hypothesis]).errors == (errors,)


texts = st.lists(st.sampled_from(["ab", "b", "cab"]), min_size=1, max_size=6).map(" ".join)


@given(st.lists(st.tuples(texts, texts | st.just("")), min_size=1, max_size=5))
def test_rates_equal_those_of_jiwer(pairs: list[tuple[str, str]]) -> None:
    references, hypotheses = (list(side) for side in zip(*pairs, strict=True))
    assert word_errors(references, hypotheses).rate == pytest.approx(jiwer.wer(references, hypotheses))
    assert character_errors(references, hypotheses).rate == pytest.approx(jiwer.cer(references, hypotheses))


def test_characters_count_single_spaces() -> None:
    found = character_errors([" ab  c "], ["abd"])
    assert found.lengths == (4,)
    assert found.errors == (2,)
    assert str(found) == "50.0 % (2 of 4 characters)"


def test_both_sides_are_normalised_and_a_reference_may_vanish() -> None:
    found = word_errors(["Um", "A b"], ["a", "a B"], lambda text: text.lower().replace("um", ""))
    assert found.errors == (1, 0)
    assert found.lengths == (0, 2)
    assert found.rate == 0.5


def test_interval_holds_the_rate_and_is_a_point_for_equal_utterances() -> None:
    same = word_errors(["a b"] * 10, ["a x"] * 10)
    assert same.interval() == (0.5, 0.5)
    mixed = word_errors(["a b"] * 20, ["a x"] * 10 + ["a b"] * 10)
    low, high = mixed.interval()
    assert low < mixed.rate < high


def test_whole_groups_are_drawn() -> None:
    found = word_errors(["a b"] * 20, ["a x"] * 10 + ["a b"] * 10)
    assert found.interval(groups=["one"] * 20) == (0.25, 0.25)
    low, high = found.interval(groups=["bad"] * 10 + ["good"] * 10)
    assert (low, high) == (0.0, 0.5)


def test_marks() -> None:
    assert marked_words("a b c d", "a x c d e") == "a [x] c d [+e+]"
    assert marked_words("a b c", "a c") == "a [-b-] c"


def test_word_difference() -> None:
    assert word_difference("a b c", "a x y c d") == "a {b -> x y} c {-> d}"
    assert word_difference("a b", "b") == "{a ->} b"
    assert word_difference("a", "a") == "a"


@pytest.mark.parametrize(("references", "hypotheses"), [([], []), (["a"], []), (["", "a"], ["x", "a"])])
def test_lists_that_do_not_pair_and_empty_references_are_refused(references, hypotheses) -> None:
    with pytest.raises(InvalidArgumentError):
        word_errors(references, hypotheses)


def test_records_of_no_words_have_rate_zero() -> None:
    assert WordErrors((0,), (0,), (0,), (0,)).rate == 0.0
