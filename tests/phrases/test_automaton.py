from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion import fused_step
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.phrases.automaton import PhraseAutomaton
from shallowfusion.phrases.automaton_reference import ReferencePhraseAutomaton
from shallowfusion.phrases.patterns import Patterns, patterns
from shallowfusion.values import SparseBonus
from tests.shipped import decoder


def letters(text: str) -> list[list[int]]:
    return [[ord(letter) - ord("a") for letter in text]]


def bonuses(automaton, text: str) -> tuple[list[float], float]:
    """What each token of a text adds, refunds counted, and what the end takes back."""
    state, added = automaton.start_state, []
    for token in letters(text)[0]:
        row_offsets, token_ids, values = automaton.step([state])
        assert row_offsets.tolist() == [0, len(token_ids)]
        listed = dict(zip(token_ids.tolist(), values.tolist(), strict=True))
        added.append(float(automaton.refunds([state])[0]) + listed.get(token, 0.0))
        state = int(automaton.advance([state], [token])[0])
    return added, float(automaton.refunds([state])[0])


def test_a_failed_match_gives_everything_back(automaton_class: type) -> None:
    automaton = automaton_class(patterns({"abc": 1.0}, letters))
    assert bonuses(automaton, "abc") == ([1, 1, 1], 0)
    assert bonuses(automaton, "abx") == ([1, 1, -2], 0)
    assert bonuses(automaton, "xab") == ([0, 1, 1], -2)  # the end takes back what is not complete
    assert bonuses(automaton, "abab") == ([1, 1, -1, 1], -2)
    assert bonuses(automaton, "abcx") == ([1, 1, 1, 0], 0)  # a complete phrase keeps its bonus


def test_a_match_that_fails_goes_on_as_a_shorter_one(automaton_class: type) -> None:
    automaton = automaton_class(patterns({"abcd": 1.0, "bce": 2.0}, letters))
    assert bonuses(automaton, "abce") == ([1, 1, 1, 3], 0)


def test_phrases_inside_phrases_count_where_they_end(automaton_class: type) -> None:
    automaton = automaton_class(patterns({"abc": 1.0, "ab": 1.0, "bc": 1.0, "c": 0.5}, letters))
    added, end = bonuses(automaton, "abc")
    assert (sum(added), end) == (3 + 2 + 2 + 0.5, 0)
    assert added[:2] == [1, 1]  # nothing is lent to abc beyond what ab has earned
    added, end = bonuses(automaton, "abx")
    assert (added, end) == ([1, 1, 0], 0)


def test_spellings_of_one_phrase_count_once(automaton_class: type) -> None:
    def with_and_without_x(text: str) -> Sequence[Sequence[int]]:
        return [*letters("x" + text), *letters(text), *letters(text)]

    made = patterns({"ab": 1.0}, with_and_without_x)
    assert len(made) == 2
    automaton = automaton_class(made)
    assert sum(bonuses(automaton, "xab")[0]) == 3
    assert sum(bonuses(automaton, "ab")[0]) == 2


def test_held_is_the_part_of_the_refund_that_a_match_in_progress_was_lent(automaton_class: type) -> None:
    automaton = automaton_class(patterns({"abc": 1.0, "ab": 0.5}, letters))
    states = [automaton.start_state]
    for token in letters("abca")[0]:
        states.append(int(automaton.advance([states[-1]], [token])[0]))
    assert automaton.held(states).tolist() == [0, 1, 1, 0, 1]
    assert automaton.refunds(states).tolist() == [0, -1, -1, 0, -1]
    with pytest.raises(InvalidArgumentError, match="states"):
        automaton.held([99])


def test_weights_by_depth_and_negative_weights(automaton_class: type) -> None:
    deep = automaton_class(patterns({"abc": 1.5}, letters, depth_scaling=2.0, depth_bonus=True))
    np.testing.assert_allclose(bonuses(deep, "abc")[0], [1.5, 3.0 + math.log(3), 3.0 + math.log(4)], rtol=1e-6)
    disliked = automaton_class(patterns({"ab": -1.0}, letters))
    assert bonuses(disliked, "ab") == ([0, -2], 0)  # nothing before it is complete
    assert bonuses(disliked, "ac") == ([0, 0], 0)


PHRASES = st.dictionaries(
    st.text("abc", min_size=1, max_size=5), st.floats(-2, 4).map(lambda weight: round(weight, 2)), max_size=6
)


def of_complete_phrases(text: str, phrases: dict[str, float]) -> float:
    """Sum over places and the phrases that end there."""
    return sum(
        weight * len(phrase)
        for stop in range(1, len(text) + 1)
        for phrase, weight in phrases.items()
        if text[:stop].endswith(phrase)
    )


@settings(max_examples=200, deadline=None)
@given(PHRASES, st.text("abcd", max_size=15))
def test_the_bonus_of_a_text_is_that_of_its_complete_phrases(phrases: dict[str, float], text: str) -> None:
    for automaton_class in (PhraseAutomaton, ReferencePhraseAutomaton):
        added, end = bonuses(automaton_class(patterns(phrases, letters)), text)
        assert sum(added) + end == pytest.approx(of_complete_phrases(text, phrases), abs=1e-4)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=4), st.floats(-2, 4), max_size=5),
    st.lists(st.lists(st.integers(-1, 4), min_size=3, max_size=3), max_size=10),
    st.booleans(),
)
def test_native_equals_reference(phrases: dict[str, float], columns: list[list[int]], with_spellings: bool) -> None:
    def segment(text: str) -> list[list[int]]:
        return [*letters(text), *letters("a" + text)] if with_spellings else letters(text)

    made = patterns(phrases, segment, depth_bonus=True)
    pair = [PhraseAutomaton(made), ReferencePhraseAutomaton(made)]
    states = [[0, 0, 0] for _ in pair]
    for tokens in columns:
        for shared_first in (False, True):
            (offsets, ids, values), other = (a.step(s, shared_first) for a, s in zip(pair, states, strict=True))
            assert offsets.tolist() == other[0].tolist()
            assert ids.tolist() == other[1].tolist()
            np.testing.assert_allclose(values, other[2], atol=1e-5)
            assert (offsets.dtype, ids.dtype, values.dtype) == (np.int32, np.int32, np.float32)
        refunds = [a.refunds(s) for a, s in zip(pair, states, strict=True)]
        np.testing.assert_allclose(refunds[0], refunds[1], atol=1e-5)
        states = [a.advance(s, tokens).tolist() for a, s in zip(pair, states, strict=True)]


@settings(max_examples=100, deadline=None)
@given(PHRASES, st.text("abcd", max_size=8))
def test_shared_first_tokens_and_the_rest_make_the_whole(phrases: dict[str, float], text: str) -> None:
    def dense(offsets, ids, values) -> np.ndarray:
        row = np.zeros(5)
        row[ids] = values
        return row

    automaton = PhraseAutomaton(patterns(phrases, letters))
    state = [automaton.start_state]
    shared = dense(*automaton.step(state))
    for token in letters(text)[0]:
        state = automaton.advance(state, [token]).tolist()
        both = shared + dense(*automaton.step(state, shared_first=True))
        np.testing.assert_allclose(both, dense(*automaton.step(state)), atol=1e-5)


def test_the_fused_step_takes_its_entries() -> None:
    automaton = PhraseAutomaton(patterns({"ab": 2.0, "cb": 1.0}, letters))
    states = automaton.advance([0, 0, 0], [0, 2, 3])
    bonus = SparseBonus(*(torch.from_numpy(part) for part in automaton.step(states)))
    totals = torch.from_numpy(automaton.refunds(states)) + torch.tensor([2.0, 1.0, 0.0])
    found = fused_step(
        [torch.zeros(3, 5)], torch.ones(3, 1), totals, beam_size=3, top_k=2, end_id=4, bonus=bonus, backend="reference"
    )
    assert found.token_ids.tolist() == [[1, 0]]
    assert found.parent_rows.tolist() == [[0, 0]]
    np.testing.assert_allclose(found.totals + math.log(5), [[4.0, 2.0]], rtol=1e-5)


def test_phrases_of_a_real_tokenizer() -> None:
    tokenizer = decoder(with_lm=False).acoustic.tokenizer

    def segment(text: str) -> list[list[int]]:
        return [tokenizer.encode(" " + text, add_special_tokens=False)]

    automaton = PhraseAutomaton(patterns({"melanoma": 0.5, "mole": 0.25}, segment))
    state, total = [0], 0.0
    for token in tokenizer.encode(" a mole or melanoma", add_special_tokens=False):
        _, ids, values = automaton.step(state)
        total += float(automaton.refunds(state)[0]) + dict(zip(ids.tolist(), values.tolist(), strict=True)).get(
            token, 0
        )
        state = automaton.advance(state, [token]).tolist()
    assert total == pytest.approx(0.5 * 9 + 0.25 * 5)


def test_no_phrases_no_bonus(automaton_class: type) -> None:
    automaton = automaton_class(patterns({}, letters))
    assert [part.tolist() for part in automaton.step([0, 0])] == [[0, 0, 0], [], []]
    assert automaton.advance([0, 0], [5, -1]).tolist() == [0, 0]
    assert [part.tolist() for part in automaton.step([])] == [[0], [], []]


def test_bad_arguments_are_refused(automaton_class: type) -> None:
    automaton = automaton_class(patterns({"ab": 1.0}, letters))
    for states in ([-1], [3], [[0]], ["a"], [0.5]):
        for method in (automaton.step, automaton.refunds):
            with pytest.raises(InvalidArgumentError, match="states"):
                method(states)
    with pytest.raises(InvalidArgumentError, match="tokens"):
        automaton.advance([0], [1, 2])
    assert automaton.advance([0, 1], [2**40, 2**40]).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offsets": np.array([0, 0, 3])}, "no tokens"),
        ({"tokens": np.array([0, -1, 2], dtype=np.int32)}, "at least 0"),
        ({"credits": np.array([0.0, np.nan, 1.0])}, "not finite"),
    ],
)
def test_bad_patterns_are_refused(automaton_class: type, changes: dict, message: str) -> None:
    parts = {
        "tokens": np.array([0, 1, 2], dtype=np.int32), "credits": np.ones(3), "offsets": np.array([0, 2, 3]),
        "phrases": np.array([0, 1]), **changes,
    }  # fmt: skip
    with pytest.raises(InvalidArgumentError, match=message):
        automaton_class(Patterns(**parts))


@pytest.mark.parametrize("offsets", [[0, 2], [0, 2, 4], [1, 2, 3], [0, 3, 2], [0, 4, 3]])
def test_offsets_that_do_not_fit_are_refused(offsets: list[int]) -> None:
    made = Patterns(np.zeros(3, dtype=np.int32), np.ones(3), np.array(offsets), np.array([0, 1]))
    with pytest.raises(InvalidArgumentError, match="offsets"):
        PhraseAutomaton(made)


@pytest.mark.parametrize(
    ("phrases", "names", "message"),
    [
        ({"": 1.0}, {}, "empty"),
        ({"ab": math.inf}, {}, "finite"),
        ({"ab": 1.0}, {"segment": lambda text: []}, "no tokens spell"),
        ({"ab": 1.0}, {"segment": lambda text: [[]]}, "no tokens spell"),
        ({"ab": 1.0}, {"segment": lambda text: [[-1]]}, "tokens of 'ab'"),
        ({"ab": 1.0}, {"depth_scaling": -1.0}, "depth_scaling"),
    ],
)
def test_bad_phrases_are_refused(phrases: dict, names: dict, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        patterns(phrases, **{"segment": letters, **names})
