"""The exact curve against brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.evaluation import word_errors
from shallowfusion.evaluation.line_search import best_first, line_search, search_weights, upper_envelope
from shallowfusion.evaluation.nbest import ListedHypothesis, NBestList, read_nbest

SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"

# Halves and quarters are exact in binary, so brute force and the envelope tie in the same places.
numbers = st.integers(-12, 12).map(lambda i: i / 4)
texts = ["", "a", "a b", "b a c", "c c a b"]
hypotheses = st.builds(
    lambda text, asr, lm: ListedHypothesis(text, asr, {"asr": asr, "lm": lm}, 1 + len(text.split())),
    st.sampled_from(texts),
    numbers,
    numbers,
)
lists = st.lists(
    st.builds(
        lambda own, reference: NBestList("u", tuple(own), reference),
        st.lists(hypotheses, min_size=1, max_size=5, unique_by=lambda h: h.text),
        st.sampled_from(texts[1:]),
    ),
    min_size=1,
    max_size=4,
)


def errors_at(found: list[NBestList], weights: dict[str, float]) -> int:
    chosen = [best_first(entry, weights)[0].text for entry in found]
    return sum(word_errors([str(entry.reference) for entry in found], chosen).errors)


@given(lists, st.sampled_from(["lm", "num_words", "num_tokens"]))
def test_the_curve_equals_brute_force_between_its_bends(found: list[NBestList], along: str) -> None:
    curve = line_search(found, along, {"asr": 1.0}, -3.0, 3.0)
    assert curve.starts[0] == -3.0
    assert list(curve.starts) == sorted(set(curve.starts))
    bends = np.array(curve.starts)
    for weight in np.arange(-3.0, 3.0, 1 / 7):
        if np.abs(bends - weight).min() > 1e-9 and not _ties(found, along, weight):
            assert curve.errors_at(weight) == errors_at(found, {"asr": 1.0, along: float(weight)})
    best = curve.best
    assert best.errors == min(curve.errors)
    assert curve.num_words == sum(len(str(entry.reference).split()) for entry in found)


def _ties(found: list[NBestList], along: str, weight: float) -> bool:
    """Whether two hypotheses with other slopes have the same score here: the choice is free."""
    for entry in found:
        scores = sorted((h.parts["asr"] + weight * _slope(h, along), i) for i, h in enumerate(entry.hypotheses))
        if len(scores) > 1 and scores[-1][0] - scores[-2][0] < 1e-9:
            return True
    return False


def _slope(hypothesis: ListedHypothesis, along: str) -> float:
    if along == "lm":
        return hypothesis.parts["lm"]
    return float(hypothesis.num_words if along == "num_words" else hypothesis.num_tokens or 0)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8))
def test_the_envelope_holds_the_highest_line_everywhere(lines: list[tuple[float, float]]) -> None:
    intercepts, slopes = zip(*lines, strict=True)
    starts, chosen = upper_envelope(intercepts, slopes, -2.0, 2.0)
    assert starts[0] == -2.0
    for k, start in enumerate(starts):
        end = starts[k + 1] if k + 1 < len(starts) else 2.0
        assert start < end
        for weight in (start, (start + end) / 2, end):
            highest = max(a + weight * b for a, b in lines)
            assert intercepts[chosen[k]] + weight * slopes[chosen[k]] == pytest.approx(highest, abs=1e-9)


def made(*rows: tuple[str, float, float], reference: str = "a b") -> NBestList:
    return NBestList("u", tuple(ListedHypothesis(t, asr, {"asr": asr, "lm": lm}) for t, asr, lm in rows), reference)


def test_the_weight_of_the_worked_example_flips_at_a_sixth() -> None:
    # METHODS 1.2: melanoma -1.8 / -0.3, diploma -1.0 / -5.0, aroma -3.5 / -3.8; the winner changes at 0.8 / 4.7.
    rows = [("diploma", -1.0, -5.0), ("melanoma", -1.8, -0.3), ("aroma", -3.5, -3.8)]
    curve = line_search([made(*rows, reference="melanoma")], "lm", {"asr": 1.0}, 0.0, 1.0)
    assert curve.starts == pytest.approx((0.0, 0.8 / 4.7))
    assert curve.errors == (1, 0)
    assert (curve.best.low, curve.best.high) == (pytest.approx(0.8 / 4.7), 1.0)
    assert curve.best.middle == pytest.approx((0.8 / 4.7 + 1) / 2)


def test_among_equally_good_intervals_the_widest_is_best() -> None:
    first = made(("a b", 0.0, 0.0), ("x", -1.0, 2.0), reference="a b")  # right below 0.5
    second = made(("x y", 0.0, 0.0), ("a b", -1.5, 2.0), reference="a b")  # right above 0.75
    curve = line_search([first, second], "lm", {"asr": 1.0}, 0.0, 3.0)
    assert curve.starts == (0.0, 0.5, 0.75)
    assert curve.errors == (2, 4, 2)
    assert (curve.best.low, curve.best.high) == (0.75, 3.0)
    with pytest.raises(InvalidArgumentError):
        curve.errors_at(3.5)


@given(lists)
def test_searching_several_weights_never_ends_worse_than_it_began(found: list[NBestList]) -> None:
    start = {"asr": 1.0, "lm": 0.5, "num_words": 0.0}
    weights, errors = search_weights(found, start, {"lm": (0.0, 2.0), "num_words": (-1.0, 1.0)})
    assert errors <= errors_at(found, start)
    assert errors == errors_at(found, weights)
    assert weights["asr"] == 1.0


def test_on_published_lists_a_grid_finds_nothing_better() -> None:
    path = SHARED_DATA / "nbest" / "pocketsphinx_an4.jsonl.gz"
    if not path.exists():
        pytest.skip("the public n-best lists are not beside this checkout")
    found = read_nbest(path)
    curve = line_search(found, "num_words", {"total": 1.0}, -0.5, 0.51)
    grid = np.linspace(-0.5, 0.5, 41) + 1e-7
    assert [curve.errors_at(w) for w in grid] == [errors_at(found, {"total": 1.0, "num_words": float(w)}) for w in grid]
    assert curve.best.errors < errors_at(found, {"total": 1.0})


@pytest.mark.parametrize(
    "call",
    [
        lambda: line_search([], "lm"),
        lambda: line_search([made(("a", 0, 0))], "lm", low=1.0, high=1.0),
        lambda: line_search([made(("a", 0, 0))], "nothing"),
        lambda: line_search([made(("a", 0, 0))], "num_tokens"),
        lambda: line_search([NBestList("u", (ListedHypothesis("a", 0.0, {}),))], "total"),
    ],
)
def test_bad_input_is_refused(call) -> None:
    with pytest.raises(InvalidArgumentError):
        call()
