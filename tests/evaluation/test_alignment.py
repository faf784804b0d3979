"""Alignment against a slow table and against jiwer."""

from __future__ import annotations

import jiwer
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowfusion.evaluation.alignment import align, edit_counts, pairwise_edits

words = st.lists(st.sampled_from("abcd"), max_size=9)


def slow_cost(reference: list[str], hypothesis: list[str]) -> tuple[int, int]:
    """(errors, -correct) of the best alignment by the textbook recursion over all three steps."""
    table = {(0, 0): (0, 0)}
    for i in range(len(reference) + 1):
        for j in range(len(hypothesis) + 1):
            ways = []
            if i:
                ways.append((table[i - 1, j][0] + 1, table[i - 1, j][1]))
            if j:
                ways.append((table[i, j - 1][0] + 1, table[i, j - 1][1]))
            if i and j:
                same = reference[i - 1] == hypothesis[j - 1]
                ways.append((table[i - 1, j - 1][0] + (not same), table[i - 1, j - 1][1] - same))
            if ways:
                table[i, j] = min(ways)
    return table[len(reference), len(hypothesis)]


@given(words, words)
def test_fewest_errors_and_among_them_most_correct_words(reference: list[str], hypothesis: list[str]) -> None:
    counts = edit_counts(reference, hypothesis)
    assert (counts.errors, -counts.correct) == slow_cost(reference, hypothesis)
    assert counts.correct + counts.substitutions + counts.deletions == len(reference)
    assert counts.correct + counts.substitutions + counts.insertions == len(hypothesis)


@given(words, words)
def test_the_alignment_visits_every_word_once_and_has_the_counts(reference: list[str], hypothesis: list[str]) -> None:
    steps = align(reference, hypothesis)
    assert [s.reference for s in steps if s.kind != "insert"] == list(range(len(reference)))
    assert [s.hypothesis for s in steps if s.kind != "delete"] == list(range(len(hypothesis)))
    for step in steps:
        if step.kind in ("equal", "substitute"):
            assert (reference[step.reference] == hypothesis[step.hypothesis]) == (step.kind == "equal")
    kinds = [step.kind for step in steps]
    counts = edit_counts(reference, hypothesis)
    assert kinds.count("equal") == counts.correct
    assert kinds.count("substitute") == counts.substitutions
    assert kinds.count("delete") == counts.deletions
    assert kinds.count("insert") == counts.insertions


@given(st.lists(words.filter(bool), min_size=1, max_size=4), st.data())
def test_errors_equal_those_of_jiwer(references: list[list[str]], data: st.DataObject) -> None:
    hypotheses = [data.draw(words) for _ in references]
    theirs = jiwer.process_words([" ".join(r) for r in references], [" ".join(h) for h in hypotheses])
    ours = [edit_counts(r, h) for r, h in zip(references, hypotheses, strict=True)]
    assert sum(c.errors for c in ours) == theirs.substitutions + theirs.deletions + theirs.insertions
    assert sum(c.correct for c in ours) >= theirs.hits


@given(st.lists(words, min_size=1, max_size=6))
def test_pairwise_edits_equal_edits_of_each_pair(sequences: list[list[str]]) -> None:
    expected = [[edit_counts(one, other).errors for other in sequences] for one in sequences]
    assert pairwise_edits(sequences).tolist() == expected


def test_gaps_come_as_late_as_possible() -> None:
    assert [step.kind for step in align(["go"] * 3, ["go"])] == ["equal", "delete", "delete"]
    assert [step.kind for step in align(["the", "arm"], ["the", "the", "arm"])] == ["equal", "insert", "equal"]


def test_long_texts_are_counted_without_a_table() -> None:
    generator = np.random.default_rng(0)
    reference = [str(i) for i in generator.integers(0, 50, 3000)]
    hypothesis = [word for word in reference if word != "7"]
    assert edit_counts(reference, hypothesis).errors == reference.count("7")


@pytest.mark.parametrize(("reference", "hypothesis", "errors"), [([], [], 0), (["a"], [], 1), ([], ["a", "b"], 2)])
def test_empty_sides(reference: list[str], hypothesis: list[str], errors: int) -> None:
    assert edit_counts(reference, hypothesis).errors == errors
    assert len(align(reference, hypothesis)) == errors
