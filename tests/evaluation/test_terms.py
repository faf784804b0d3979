"""Listed terms: recall, precision, errors in and outside them, bands."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.evaluation import word_errors
from shallowfusion.evaluation.terms import TermList, count_terms, term_bands, term_errors

TERMS = TermList.of(["renal cyst", "cyst", "left renal vein", "edema"])


def test_recall_precision_and_rates_by_hand() -> None:
    references = ["a renal cyst and edema", "no cyst"]
    hypotheses = ["a renal mist and edema edema", "no cyst"]
    found = term_errors(references, hypotheses, TERMS)
    assert (found.spoken, found.recalled) == (3, 2)  # renal cyst is lost; edema and the second cyst are found
    assert (found.written, found.correct) == (3, 2)  # one edema was never said
    assert found.recall == pytest.approx(2 / 3)
    assert found.precision == pytest.approx(2 / 3)
    assert found.f1 == pytest.approx(2 / 3)
    assert found.inside.lengths == (3, 1)
    assert found.inside.errors == (2, 0)  # cyst replaced, edema inserted
    assert found.outside.errors == (0, 0)
    assert found.outside.lengths == (2, 1)
    assert found.term_error_rate == pytest.approx(1 / 4)
    assert found.by_term == {"cyst": (1, 1), "edema": (1, 1), "renal cyst": (1, 0)}
    assert found.absent == ("left renal vein",)


def test_the_longest_term_counts_and_none_overlap() -> None:
    assert TERMS.occurrences(["the", "left", "renal", "vein", "renal", "cyst", "cyst"]) == [
        (1, ("left", "renal", "vein")),
        (4, ("renal", "cyst")),
        (6, ("cyst",)),
    ]


def test_a_term_torn_apart_is_not_recalled() -> None:
    found = term_errors(["renal cyst"], ["renal small cyst"], TermList.of(["renal cyst"]))
    assert (found.recalled, found.written) == (0, 0)
    assert found.precision is None
    assert found.outside.insertions == (1,)


def test_a_term_made_by_leaving_out_a_word_is_not_correct() -> None:
    found = term_errors(["renal small cyst renal cyst"], ["renal cyst renal cyst"], TermList.of(["renal cyst"]))
    assert (found.spoken, found.recalled, found.written, found.correct) == (1, 1, 2, 1)


words = st.lists(st.sampled_from(["renal", "cyst", "a", "b"]), min_size=1, max_size=7).map(" ".join)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_inside_and_outside_sum_to_all_errors(pairs: list[tuple[str, str]]) -> None:
    references, hypotheses = (list(side) for side in zip(*pairs, strict=True))
    if not any("cyst" in reference for reference in references):
        return
    found = term_errors(references, hypotheses, TermList.of(["cyst", "renal cyst"]))
    whole = word_errors(references, hypotheses)
    for name in ("substitutions", "deletions", "insertions", "lengths"):
        sides = zip(getattr(found.inside, name), getattr(found.outside, name), strict=True)
        assert tuple(map(sum, sides)) == getattr(whole, name)
    assert found.recalled <= found.spoken
    assert found.correct <= found.written


def test_bands_by_occurrences_in_a_training_text() -> None:
    found = term_errors(["cyst edema renal cyst", "edema"], ["cyst edema cyst", "x"], TERMS)
    counts = count_terms(["Edema"] * 11 + ["a renal cyst cyst"], TERMS, str.lower)
    assert counts == {"cyst": 1, "edema": 11, "left renal vein": 0, "renal cyst": 1}
    assert term_bands(found, counts) == {"0": (0, 0), "1-10": (2, 1), ">10": (2, 1)}


def test_a_file_holds_one_term_a_line(tmp_path: Path) -> None:
    path = tmp_path / "terms.txt"
    path.write_text("# medical\nRenal Cyst\n\ncyst\ncyst\n")
    found = TermList.read(path, str.lower)
    assert found.terms == (("cyst",), ("renal", "cyst"))
    assert found.fingerprint == TermList.of(["renal cyst", "cyst"]).fingerprint
    assert found.fingerprint != TERMS.fingerprint


def test_absent_terms_are_refused_on_demand_and_an_unrelated_list_always(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="in no reference, first 'left renal vein'"):
        term_errors(["renal cyst cyst edema"], ["x"], TERMS, require_present=True)
    with pytest.raises(InvalidArgumentError, match="none of the 4 terms"):
        term_errors(["nothing"], ["x"], TERMS)
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        TermList.read(tmp_path / "nowhere.txt")
    (tmp_path / "empty.txt").write_text("\n# only this\n")
    with pytest.raises(InvalidArgumentError, match="holds no terms"):
        TermList.read(tmp_path / "empty.txt")
    with pytest.raises(InvalidArgumentError):
        term_errors(["a"], [], TERMS)
