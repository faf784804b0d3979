"""Failures of fusion: truncation, loops, silence, style, wins and losses."""

from __future__ import annotations

import pytest

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.evaluation.failures import compare, failure_rates, is_looping, is_truncated, silence_insertions
from shallowfusion.evaluation.normalisation import normaliser


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("a b c d e", "a b", True),
        ("a b c d e", "a b c", False),
        ("a b c d e", "b c d e", False),
        ("a b c d e", "a x e", False),
        ("a a a a", "a", True),
        ("a b c", "", True),
    ],
)
def test_truncated_is_three_deletions_at_the_end(reference: str, hypothesis: str, expected: bool) -> None:
    assert is_truncated(reference, hypothesis) is expected


@pytest.mark.parametrize(
    ("hypothesis", "reference", "expected"),
    [
        ("the the the the arm", "the arm", True),
        ("one one one one", "one one one one", False),
        ("one one one one one", "one one one one", True),
        ("left arm left arm left arm left arm", "left arm", True),
        ("the left arm is in pain", "the left arm is in pain", False),
        ("", "a", False),
        ("a long sentence without end " * 3, "", False),
        ("and so the story goes on and on without an end in sight for anybody here " * 3, "and so", True),
    ],
)
def test_loops_are_repeats_the_reference_does_not_have(hypothesis: str, reference: str, expected: bool) -> None:
    assert is_looping(hypothesis, reference) is expected


def test_rates_over_a_set() -> None:
    found = failure_rates(["a b c d", "a b", "c d"], ["a", "b b b b b", "c d"])
    assert found.truncated == (0,)
    assert found.looping == (1,)
    assert found.truncation_rate == found.loop_rate == pytest.approx(1 / 3)
    assert found.tail_deletions == pytest.approx(1.0)
    assert found.length_ratio == pytest.approx(8 / 8)
    assert found.insertions_per_100_words == pytest.approx(100 * 3 / 8)


def test_words_out_of_silence() -> None:
    assert silence_insertions(["", "thank you", " ", "you"]) == (0.5, 0.75)
    with pytest.raises(InvalidArgumentError):
        silence_insertions([])


def test_comparison_by_hand() -> None:
    references = ["Give 5 mg now.", "the left arm", "no pain", "a b c"]
    baseline = ["give five milligrams now", "the left arm", "no plain", "a b c"]
    fused = ["Give 5 mg now", "the loft harm", "no pain", "a b c"]
    found = compare(references, baseline, fused, normaliser("article"))
    assert (found.wins, found.losses, found.ties) == (1, 1, 2)
    assert [change.position for change in found.changed] == [1, 0, 2]
    worst, style, win = found.changed
    assert (worst.baseline_errors, worst.errors) == (0, 2)
    assert worst.difference == "the {left arm -> loft harm}"
    assert worst.marked == "the [loft] [harm]"
    assert style.is_style_only
    assert style.difference == "{give five milligrams -> Give 5 mg} now"
    assert not win.is_style_only
    assert found.change_rate == 0.75
    assert found.style_drift_rate == 0.25
    # Raw, the baseline errs in 4 + 0 + 1 of 12 words, the system in 1 + 2 + 0; after normalisation in 1 and 2.
    assert found.baseline_style_gap == pytest.approx(5 / 12 - 1 / 12)
    assert found.style_gap == pytest.approx(3 / 12 - 2 / 12)


def test_equal_systems_change_nothing() -> None:
    found = compare(["a b"], ["a x"], ["a  x "], normaliser("none"))
    assert found.changed == ()
    assert (found.wins, found.losses, found.ties) == (0, 0, 1)
    assert found.change_rate == found.style_drift_rate == 0.0


def test_lists_that_do_not_pair_are_refused() -> None:
    with pytest.raises(InvalidArgumentError):
        failure_rates(["a"], [])
    with pytest.raises(InvalidArgumentError):
        compare(["a"], ["a"], [], str)
