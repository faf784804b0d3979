"""Word errors."""

from __future__ import annotations

import pytest

from shallowfusion.demo.evaluation import WordErrors, count_word_errors, word_error_rate


@pytest.mark.parametrize(
    ("reference", "hypothesis", "errors"),
    [
        ("a b c", "a b c", 0),
        ("a b c", "", 3),
        ("", "a b", 2),
        ("a b c", "a x c", 1),
        ("a b c", "b c d", 2),
        ("the left arm", "the the left arm", 1),
    ],
)
def test_word_errors(reference: str, hypothesis: str, errors: int) -> None:
    assert count_word_errors(reference, hypothesis) == errors


def test_rate_is_over_all_words_together() -> None:
    found = word_error_rate(["a b c", "d"], ["a b c", "e f"])
    assert found == WordErrors(errors=2, words=4)
    assert str(found) == "50.0 % (2 of 4 words)"
