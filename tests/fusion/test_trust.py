"""The arithmetic of trust in a language model."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowfusion import fusion
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.fusion.trust import Trust, floor_of, likelihood


def test_evidence_by_hand() -> None:
    trust = Trust(-1.5)
    assert trust.follow(99.0, -12.0, 10) == 3.0  # -12 against -15
    assert trust.follow(0.0, -18.0, 10) == -3.0
    session = Trust(-1.5, memory=0.5)
    assert session.follow(4.0, -18.0, 10) == -1.0
    assert session.follow(8.0, -18.0, 10) == 1.0  # earlier utterances speak for the model
    assert session.follow(8.0, 0.0, 0) == 4.0  # nothing was said


@pytest.mark.parametrize("broken", [math.nan, -math.inf, math.inf])
def test_a_broken_model_is_not_trusted_and_is_no_burden_later(broken: float) -> None:
    session = Trust(-1.5, memory=0.9)
    assert session.follow(50.0, broken, 10) == 0.0
    assert session.follow(0.0, -12.0, 10) == 3.0


def test_several_models_count_by_their_weights() -> None:
    parts = {"asr": -9.0, "lm0": -10.0, "lm1": -20.0}
    assert likelihood(parts, ("lm0", "lm1"), (0.3, 0.1)) == pytest.approx(-12.5)
    assert likelihood(parts, ("lm0", "lm1"), (0.0, 0.4)) == -20.0
    assert likelihood(parts, ("lm0", "lm1"), (0.0, 0.0)) == -15.0
    assert likelihood(parts, ("lm0",), (0.7,)) == -10.0


@given(st.lists(st.tuples(st.floats(-200, -0.1), st.integers(1, 80)), min_size=1, max_size=40), st.floats(0, 0.99))
def test_no_more_than_the_share_lies_below_the_floor(pairs: list[tuple[float, int]], share: float) -> None:
    totals, counts = [total for total, _ in pairs], [count for _, count in pairs]
    floor = floor_of(totals, counts, share)
    assert sum(total / count < floor - 1e-12 for total, count in pairs) <= math.ceil(share * (len(pairs) - 1))
    assert floor >= min(total / count for total, count in pairs)


def test_floors_by_hand() -> None:
    assert floor_of([-10.0, -20.0, -30.0], [10, 10, 10], 0.5) == -2.0
    assert floor_of([-10.0, -20.0, -30.0], [10, 10, 10], 0.0) == -3.0
    assert floor_of([-10.0, -20.0, -30.0], [10, 10, 10], 0.25) == -2.5


def test_bad_numbers_are_refused() -> None:
    for floor in (0.0, 1.0, math.nan, -math.inf):
        with pytest.raises(InvalidArgumentError, match="floor must be"):
            Trust(floor)
    for memory in (-0.1, 1.0, math.nan):
        with pytest.raises(InvalidArgumentError, match="memory must be"):
            Trust(-1.0, memory)
    with pytest.raises(InvalidArgumentError, match="share must be"):
        floor_of([-1.0], [1], 1.0)
    with pytest.raises(InvalidArgumentError, match="one log-prob and one length each"):
        floor_of([], [])
    with pytest.raises(InvalidArgumentError, match="none to trust"):
        fusion.trusted(fusion.static(0.0), -1.0)


def test_the_rule_is_data_and_text() -> None:
    rule = fusion.trusted(fusion.internal_lm(0.8, 0.3), -1.5, memory=0.6)
    assert rule.trust == Trust(-1.5, 0.6)
    assert fusion.parse_rule("trusted(internal_lm(0.8, 0.3), -1.5, memory=0.6)") == rule
    assert "trust=Trust(floor=-1.5, memory=0.6)" in repr(rule)
    assert not rule.is_linear
