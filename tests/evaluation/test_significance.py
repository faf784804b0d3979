"""Tests of significance against worked numbers, exact enumeration and each other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.evaluation.significance import (
    bootstrap_interval,
    holm,
    mapsswe,
    paired_bootstrap,
    segment_differences,
    segment_test,
    sign_flip_test,
)


def test_matched_pairs_on_the_worked_example() -> None:
    found = segment_test([1, 0, -1, 2, 0, 1, 0, 1, 0, 0, -1, 1])
    assert found.mean == pytest.approx(0.3333, abs=5e-5)
    assert found.variance == pytest.approx(0.7879, abs=5e-5)
    assert found.statistic == pytest.approx(1.3009, abs=5e-5)
    assert found.p_value == pytest.approx(0.193, abs=5e-4)
    assert not found.enough


def test_segments_are_parted_by_two_words_both_have_right() -> None:
    # a b | x: first wrong; d e right by both; f: second wrong and an insertion; g h right.
    assert segment_differences("a b c d e f g h", "a b x d e f g h", "a b c d e y z g h") == [1, -2]
    # One correct word between two errors does not part them.
    assert segment_differences("a b c d e", "x b y d e", "a b c d e") == [2]
    # Something inserted between two correct words keeps them from parting.
    assert segment_differences("a b c d", "x b i c y", "a b c d") == [3]
    assert segment_differences("a b", "a b", "a b") == []
    assert segment_differences("a", "", "x") == [0]


def test_identical_systems_show_no_difference() -> None:
    references, texts = ["a b c", "d e f", "g h"], ["a b x", "d e f", "h"]
    assert mapsswe(references, texts, texts).p_value == 1.0
    assert sign_flip_test([0, 0, 0]) == 1.0
    found = paired_bootstrap([1, 0, 1], [1, 0, 1], [3, 3, 2])
    assert (found.difference, found.low, found.high, found.probability_of_improvement) == (0.0, 0.0, 0.0, 0.0)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_sign_flips_approach_exact_enumeration(differences: list[int]) -> None:
    sums = [
        sum(sign * value for sign, value in zip(signs, differences, strict=True))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    measured = sum(differences)
    exact = {
        "two-sided": np.mean([abs(value) >= abs(measured) for value in sums]),
        "less": np.mean([value <= measured for value in sums]),
        "greater": np.mean([value >= measured for value in sums]),
    }
    for alternative, wanted in exact.items():
        found = sign_flip_test(differences, alternative)  # type: ignore[arg-type]
        assert found == pytest.approx(wanted, abs=0.025)  # five standard errors of 10,000 shuffles


def test_sign_flips_of_rates_count_equal_sums_as_equal() -> None:
    # All signs equal or all flipped: 2 of 1024; sums of tenths differ in their last bits.
    found = sign_flip_test([-0.1] * 10, shuffles=50_000)
    assert found == pytest.approx(2 / 1024, abs=0.001)


def test_one_sided_p_is_smaller_where_the_second_system_is_better() -> None:
    differences = [-1] * 12 + [1] * 4
    assert sign_flip_test(differences, "less") < sign_flip_test(differences) < sign_flip_test(differences, "greater")


def test_paired_bootstrap_sees_a_difference_that_single_intervals_hide() -> None:
    first = [3, 0, 5, 1, 4, 2, 6, 0, 3, 4] * 4
    second = [max(0, errors - 1) for errors in first]
    lengths = [10] * 40
    found = paired_bootstrap(first, second, lengths)
    assert found.difference == pytest.approx((sum(second) - sum(first)) / 400)
    assert found.high < 0
    assert found.probability_of_improvement == 1.0
    assert bootstrap_interval(second, lengths)[1] > bootstrap_interval(first, lengths)[0]


def test_groups_widen_the_interval_of_utterances_that_err_together() -> None:
    first = [0] * 50
    second = [1] * 25 + [-1] * 25
    lengths = [5] * 50
    single = paired_bootstrap(first, second, lengths)
    grouped = paired_bootstrap(first, second, lengths, groups=[i // 25 for i in range(50)])
    assert grouped.high - grouped.low > single.high - single.low


def test_holm_on_a_worked_example() -> None:
    # Sorted .01 .02 .03 .04 times 4 3 2 1, then the running maximum.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_never_lowers_and_never_exceeds_bonferroni(values: list[float]) -> None:
    corrected = holm(values)
    for value, found in zip(values, corrected, strict=True):
        assert value <= found <= min(1.0, max(value * len(values), *corrected))
    order = np.argsort(values, kind="stable")
    assert all(a <= b for a, b in itertools.pairwise([corrected[i] for i in order]))


@pytest.mark.parametrize(
    "call",
    [
        lambda: paired_bootstrap([1], [1, 2], [3]),
        lambda: paired_bootstrap([], [], []),
        lambda: paired_bootstrap([1], [1], [3], groups=[]),
        lambda: sign_flip_test([]),
        lambda: sign_flip_test([float("nan")]),
        lambda: sign_flip_test([1], "both"),  # type: ignore[arg-type]
        lambda: holm([1.5]),
    ],
)
def test_bad_input_is_refused(call) -> None:
    with pytest.raises(InvalidArgumentError):
        call()
