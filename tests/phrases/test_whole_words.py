"""Phrases that count only as whole words."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion.phrases.automaton import PhraseAutomaton
from shallowfusion.phrases.automaton_reference import ReferencePhraseAutomaton
from shallowfusion.phrases.patterns import patterns, spread, whole_words

PIECES = (
    b"art",
    b" art",
    b"he",
    b" he",
    b"a",
    b"r",
    b"t",
    b" ",
    b"-",
    b"s",
    b"'",
    b"he art",
    b" -",
    "\u4eac".encode(),
    None,
)
IDS = {piece: token for token, piece in enumerate(PIECES) if piece is not None}


def segmentations(text: bytes) -> list[list[int]]:
    """All ways to spell a text in pieces."""
    if not text:
        return [[]]
    found = []
    for piece, token in IDS.items():
        if text.startswith(piece):
            found += [[token, *rest] for rest in segmentations(text[len(piece) :])]
    return found


def segment(text: str) -> list[list[int]]:
    return [*segmentations(b" " + text.encode()), *segmentations(text.encode())]


def made(automaton_class: type, phrases: dict[str, float]):
    return automaton_class(whole_words(spread(patterns(phrases, segment)), PIECES))


def bonus(automaton, tokens: list[int], shared_first: bool = False) -> float:
    """What a search adds to a hypothesis of these tokens, its end counted."""
    first = dict(zip(*(part.tolist() for part in automaton.step([automaton.shared_state])[1:]), strict=True))
    state, total = [automaton.start_state], 0.0
    for token in tokens:
        _, ids, values = automaton.step(state, shared_first)
        listed = dict(zip(ids.tolist(), values.tolist(), strict=True))
        total += float(automaton.refunds(state)[0]) + listed.get(token, 0.0)
        total += first.get(token, 0.0) if shared_first else 0.0
        state = automaton.advance(state, [token]).tolist()
    return total + float(automaton.refunds(state)[0])


def ids(*pieces: bytes) -> list[int]:
    return [IDS[piece] for piece in pieces]


@pytest.mark.parametrize("shared_first", [False, True])
def test_a_word_inside_a_word_earns_nothing(automaton_class: type, shared_first: bool) -> None:
    automaton = made(automaton_class, {"art": 3.0})
    for said in ([b" he", b"art"], [b" art", b"s"], [b"he", b"a", b"r", b"t"], [b" ", b"a", b"r", b"t", b"he"]):
        assert bonus(automaton, ids(*said), shared_first) == pytest.approx(0, abs=1e-5), said
    for said in ([b" art"], [b"art"], [b" ", b"art", b"-"], [b" -", b"art", b" he"], [b"art", b"'", b"s"], [b"he art"]):
        wanted = 0 if said == [b"he art"] else 3  # inside a token nothing is looked for
        assert bonus(automaton, ids(*said), shared_first) == pytest.approx(wanted, abs=1e-5), said
    assert bonus(automaton, ids(b" art", b" art", b" he", b"art"), shared_first) == pytest.approx(6, abs=1e-5)
    assert bonus(automaton, [IDS[b" art"], PIECES.index(None)], shared_first) == pytest.approx(3, abs=1e-5)


def test_the_reward_comes_while_the_word_is_said_and_goes_when_it_goes_on(automaton_class: type) -> None:
    automaton = made(automaton_class, {"art": 3.0})
    state = automaton.advance([automaton.start_state], ids(b" art")).tolist()
    first = automaton.step([automaton.start_state])
    assert dict(zip(first[1].tolist(), first[2].tolist(), strict=True))[IDS[b" art"]] == pytest.approx(3)
    assert automaton.refunds(state).tolist() == [0]  # as if the word ended
    _, tokens, values = automaton.step(state, shared_first=True)
    assert dict(zip(tokens.tolist(), values.tolist(), strict=True))[IDS[b"s"]] == pytest.approx(-3)


def test_phrases_of_several_words_and_scripts_without_spaces(automaton_class: type) -> None:
    automaton = made(automaton_class, {"he art": 4.0, "art": 1.0, "\u4eac": 2.0})
    assert bonus(automaton, ids(b" he", b" art")) == pytest.approx(5, abs=1e-5)
    assert bonus(automaton, ids(b"he art")) == pytest.approx(4, abs=1e-5)
    assert bonus(automaton, ids(b" he", b" art", b"s")) == pytest.approx(0, abs=1e-5)
    assert bonus(automaton, ids(b"a", "\u4eac".encode(), b"r")) == pytest.approx(2, abs=1e-5)


PHRASES = st.dictionaries(
    st.sampled_from(["art", "he", "he art", "hear", "t", "star", "s art", "a-t", "\u4eac"]),
    st.floats(-2, 4).map(lambda weight: round(weight, 2)),
    max_size=5,
)
TOKENS = st.lists(st.integers(0, len(PIECES) - 1), max_size=8)


def whole_occurrences(tokens: list[int], phrases: dict[str, float]) -> float:
    """Weights of the phrases said, whose beginning and end are token borders and, but for the last, word boundaries."""
    pieces = [PIECES[token] for token in tokens]
    stops = list(itertools.accumulate((len(piece or b"|") for piece in pieces), initial=0))
    text = b"".join(piece or b"|" for piece in pieces)

    def is_letter(place: int) -> bool:
        return 0 <= place < len(text) and (text[place] >= 128 or chr(text[place]).isalnum())

    total = 0.0
    for phrase, weight in phrases.items():
        own, free = phrase.encode(), phrase == "\u4eac"
        for stop in set(stops):
            starts = [s for s in set(stops) if text[s:stop].lstrip(b" ") == own and text[s:stop].count(b"|") == 0]
            starts = [s for s in starts if len(text[s:stop]) - len(own) <= 1]
            begin = stop - len(own)
            is_whole = free or not (
                (is_letter(begin - 1) and is_letter(begin)) or (is_letter(stop - 1) and is_letter(stop))
            )
            total += weight * (bool(starts) and is_whole)
    return total


@settings(max_examples=300, deadline=None)
@given(PHRASES, TOKENS)
def test_the_bonus_of_a_text_is_that_of_its_whole_words(phrases: dict[str, float], tokens: list[int]) -> None:
    wanted = whole_occurrences(tokens, phrases)
    for automaton_class in (PhraseAutomaton, ReferencePhraseAutomaton):
        automaton = made(automaton_class, phrases)
        for shared_first in (False, True):
            assert bonus(automaton, tokens, shared_first) == pytest.approx(wanted, abs=1e-4)


@settings(max_examples=150, deadline=None)
@given(PHRASES, TOKENS)
def test_native_equals_reference(phrases: dict[str, float], tokens: list[int]) -> None:
    pair = [made(PhraseAutomaton, phrases), made(ReferencePhraseAutomaton, phrases)]
    states = [[each.start_state] for each in pair]
    for token in [*tokens, -1]:
        for shared_first in (False, True):
            ours, other = (a.step(s, shared_first) for a, s in zip(pair, states, strict=True))
            assert ours[0].tolist() == other[0].tolist()
            assert ours[1].tolist() == other[1].tolist()
            np.testing.assert_allclose(ours[2], other[2], atol=1e-5)
        np.testing.assert_allclose(*(a.refunds(s) for a, s in zip(pair, states, strict=True)), atol=1e-5)
        np.testing.assert_allclose(*(a.closing(s) for a, s in zip(pair, states, strict=True)), atol=1e-5)
        (gains, after), other = (a.say(s, [token]) for a, s in zip(pair, states, strict=True))
        np.testing.assert_allclose(gains, other[0], atol=1e-5)
        states = [a.advance(s, [token]).tolist() for a, s in zip(pair, states, strict=True)]
        assert [after.tolist(), other[1].tolist()] == states


@settings(max_examples=150, deadline=None)
@given(PHRASES, TOKENS)
def test_what_is_said_and_lent_is_the_bonus(phrases: dict[str, float], tokens: list[int]) -> None:
    for automaton_class in (PhraseAutomaton, ReferencePhraseAutomaton):
        automaton = made(automaton_class, phrases)
        state, total = [automaton.start_state], 0.0
        for token in tokens:
            total += float(automaton.closing(state)[0]) * bool(automaton.ends_words([token])[0])
            gain, after = automaton.say(state, [token])
            total, state = total + float(gain[0]), after.tolist()
        total += float(automaton.closing(state)[0])
        assert total == pytest.approx(bonus(automaton, tokens), abs=1e-4)
        assert not automaton.ends_words([-1])[0]
        assert [part.tolist() for part in automaton.say(state, [-1])] == [[0.0], state]


@settings(max_examples=100, deadline=None)
@given(PHRASES, TOKENS)
def test_turns_are_the_tokens_that_tell_a_state_from_its_fallback(phrases: dict[str, float], tokens: list[int]) -> None:
    pair = [made(PhraseAutomaton, phrases), made(ReferencePhraseAutomaton, phrases)]
    found = [automaton.turns() for automaton in pair]
    states = [automaton.start_state for automaton in pair]
    everything = range(len(PIECES) + 2)
    for token in [*tokens, -1]:
        listed = []
        for automaton, (fallbacks, offsets, turns), state in zip(pair, found, states, strict=True):
            own = turns[offsets[state] : offsets[state + 1]].tolist()
            fallback = int(fallbacks[state])
            assert fallback in (automaton.start_state, automaton.shared_state)
            for other in everything:
                after = [int(automaton.advance([at], [other])[0]) for at in (state, fallback)]
                assert (after[0] != after[1]) <= (other in own)
            listed.append(own)
        assert listed[0] == listed[1]
        states = [int(a.advance([s], [token])[0]) for a, s in zip(pair, states, strict=True)]
