"""A whole evaluation by hand: figures, table and data agree."""

from __future__ import annotations

import json

import pytest

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.evaluation.normalisation import normaliser
from shallowfusion.evaluation.report import as_data, changed_lines, table_lines
from shallowfusion.evaluation.scoring import ReferenceSet, evaluate
from shallowfusion.evaluation.terms import TermList

REFERENCES = ("the renal cyst", "no pain at all", "left arm", "a b c d e f")
BASELINE = ("the Renal sister", "no pain at all", "left arm", "a b c")
FUSED = ("the renal cyst", "no pane at all", "Left arm", "a b c d e f")
SET = ReferenceSet(
    ("u1", "u2", "u3", "u4"), REFERENCES, normaliser("basic"), terms=TermList.of(["renal cyst", "cyst", "heart"])
)


def test_figures_by_hand() -> None:
    found = evaluate(SET, {"baseline": BASELINE, "fused": FUSED}, {"fused": ["", "you"]})
    baseline, fused = found.systems
    assert sum(baseline.words.errors) == 1 + 3
    assert sum(fused.words.errors) == 1
    assert sum(baseline.raw_words.errors) == 5
    assert baseline.failures.truncated == (3,)
    assert fused.failures.truncated == ()
    assert baseline.terms is not None
    assert fused.terms is not None
    assert (baseline.terms.recall, fused.terms.recall) == (0.0, 1.0)
    assert fused.terms.absent == ("cyst", "heart")  # the one cyst there belongs to the longer term
    assert fused.silence == (0.5, 0.5)
    assert baseline.silence is None
    assert fused.comparison is not None
    assert (fused.comparison.wins, fused.comparison.losses, fused.comparison.ties) == (2, 1, 1)
    assert fused.tests is not None
    assert fused.tests.bootstrap.difference == pytest.approx((1 - 4) / 15)
    # Differences -1, +1, 0, -3: of eight equally likely signs, sums as low as -3 are -5, -3 and -3.
    assert fused.tests.p_better == pytest.approx(3 / 8, abs=0.03)
    assert fused.tests.p_value == pytest.approx(6 / 8, abs=0.03)
    assert fused.tests.p_corrected == fused.tests.p_value
    assert baseline.tests is None


def test_several_systems_are_corrected_together() -> None:
    found = evaluate(SET, {"baseline": BASELINE, "one": FUSED, "two": FUSED, "same": BASELINE})
    one, two, same = (system.tests for system in found.systems[1:])
    assert one is not None
    assert two is not None
    assert same is not None
    assert one.p_corrected == pytest.approx(min(1.0, 3 * one.p_value))
    assert same.p_value == same.p_corrected == 1.0
    assert same.segments.p_value == 1.0
    assert same.bootstrap.low <= 0.0 <= same.bootstrap.high


def test_the_table_and_the_data_say_the_same() -> None:
    found = evaluate(SET, {"baseline": BASELINE, "fused": FUSED}, {"fused": ["", "you"]})
    counts = {"renal cyst": 3, "cyst": 20, "heart": 0}
    table = "\n".join([*table_lines(found, counts), *changed_lines(found, found.systems[1], most=5)])
    data = json.loads(json.dumps(as_data(found, counts), allow_nan=False))
    baseline, fused = data["systems"]
    assert baseline["wer"]["errors"] == 4
    assert fused["comparison"]["wins"] == 2
    assert [change["id"] for change in fused["comparison"]["changed"]] == ["u2", "u3", "u1", "u4"]
    assert fused["terms"]["bands"] == {"0": [0, 0], "1-10": [1, 1], ">10": [0, 0]}
    assert data["term_list"]["absent"] == ["cyst", "heart"]
    assert fused["errors"] == {"u1": 0, "u2": 1, "u3": 0, "u4": 0}
    for words in (
        "4 utterances, 15 words, 15 after normalisation; normaliser basic",
        "2 wins, 1 losses, 1 ties",
        "-20.00 points (-75.0 % relative)",
        "u2: 0 -> 1 errors: no {pain -> pane} at all",
        "u3: 0 -> 0 errors (style only): {left -> Left} arm",
        "u4: 3 -> 0 errors: a b c {-> d e f}",
        "recall 100.0 % (1/1)",
        "1-10: 1/1",
        "words in 50.0 % of silent recordings",
        "wanted 50",
    ):
        assert words in table
    shares = [line for line in table.splitlines() if line.startswith("baseline") and "truncated" in line]
    assert "truncated 25.0 %" in shares[0]


def test_segments_that_all_differ_alike_have_no_infinity_in_json() -> None:
    own = ReferenceSet(("u1", "u2"), ("a", "b"), normaliser("none"))
    found = evaluate(own, {"baseline": ["x", "x"], "fused": ["a", "b"]})
    data = json.loads(json.dumps(as_data(found), allow_nan=False))
    assert data["systems"][1]["tests"]["segments"]["statistic"] is None


def test_speakers_are_resampled_whole() -> None:
    own = ReferenceSet(("u1", "u2", "u3", "u4"), REFERENCES, normaliser("basic"), groups=("s", "s", "s", "s"))
    found = evaluate(own, {"baseline": BASELINE, "fused": FUSED})
    assert found.baseline.interval == (found.baseline.words.rate,) * 2
    assert "bootstrap over speakers" in table_lines(found)[0]


def test_bad_input_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="at least one system"):
        evaluate(SET, {})
    with pytest.raises(InvalidArgumentError, match="must pair up"):
        evaluate(SET, {"baseline": BASELINE[:2]})
