"""Minimum Bayes risk against its definition."""

from __future__ import annotations

import math

import jiwer
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.evaluation.mbr import minimum_bayes_risk

texts = st.lists(st.sampled_from(["a", "a b", "b", "b c a", "c a"]), min_size=1, max_size=6)


@given(texts, st.data(), st.sampled_from([0.0, 0.3, 1.0]))
def test_the_choice_has_the_fewest_expected_errors(own: list[str], data: st.DataObject, scale: float) -> None:
    totals = [data.draw(st.floats(-20, 0)) for _ in own]
    found = minimum_bayes_risk(own, totals, scale)
    sums = sum(math.exp(scale * total) for total in totals)
    for j, text in enumerate(own):
        edits = [jiwer.wer(one, text) * len(one.split()) for one in own]
        risk = sum(math.exp(scale * total) / sums * e for total, e in zip(totals, edits, strict=True))
        assert found.risks[j] == pytest.approx(risk, abs=1e-9)
    assert found.risks[found.position] == pytest.approx(min(found.risks), abs=1e-9)
    assert sum(found.posteriors) == pytest.approx(1.0)


def test_the_centre_beats_the_likeliest() -> None:
    # Each of three outer texts is two errors from the others and one from the centre.
    own = ["x b c", "a y c", "a b z", "a b c"]
    totals = [math.log(p) for p in (0.34, 0.3, 0.26, 0.1)]
    assert minimum_bayes_risk(own, totals).position == 3
    assert minimum_bayes_risk(own, totals, scale=100.0).position == 0  # sharp: the likeliest


def test_ties_go_to_the_higher_total_and_impossible_ones_weigh_nothing() -> None:
    assert minimum_bayes_risk(["a", "b"], [-1.0, -1.0 + 1e-15], 0.0).position == 1
    found = minimum_bayes_risk(["a", "b b b"], [-1.0, -math.inf])
    assert found.position == 0
    assert found.posteriors == (1.0, 0.0)


def test_characters() -> None:
    assert minimum_bayes_risk(["abc", "ab"], [0.0, 0.0], unit="character").risks == (0.5, 0.5)


@pytest.mark.parametrize(
    ("own", "totals", "scale"),
    [
        ([], [], 1),
        (["a"], [], 1),
        (["a"], [math.nan], 1),
        (["a"], [math.inf], 1),
        (["a"], [-math.inf], 1),
        (["a"], [0], -1),
    ],
)
def test_bad_input_is_refused(own, totals, scale) -> None:
    with pytest.raises(InvalidArgumentError):
        minimum_bayes_risk(own, totals, scale)
