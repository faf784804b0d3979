"""Alphabets of byte labels and phrases over them, for tables of all states."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from shallowfusion.phrases.automaton import PhraseAutomaton
from shallowfusion.phrases.patterns import patterns, spread, whole_words

BYTES = tuple(bytes([byte]) for byte in range(256))
LABELS = tuple(
    text.encode() for text in ("", "a", "b", "ab", "a", "ba b", "abab", "'", "-a", " ", "z", "éa", "b'a-b", "c c")
)
PHRASES = st.dictionaries(
    st.text("ab c'é", min_size=1, max_size=7).map(str.strip).filter(bool),
    st.floats(-3, 6).map(lambda weight: round(weight, 2)),
    max_size=6,
)


def automaton_of(phrases: dict[str, float], inside_words: bool, kind: type = PhraseAutomaton) -> Any:
    found = spread(patterns(phrases, lambda text: [list(text.encode())]))
    return kind(found if inside_words else whole_words(found, BYTES))


def walked(automaton: Any, state: int, label: bytes) -> tuple[float, int]:
    """What the symbols of a label gain, that of the word before included, one at a time."""
    total = 0.0
    for symbol in label:
        if automaton.ends_words([symbol])[0]:
            total += float(automaton.closing([state])[0])
        gain, after = automaton.say([state], [symbol])
        total, state = total + float(gain[0]), int(after[0])
    return total, state


def num_states(automaton: Any) -> int:
    return len(automaton.turns()[0])


def all_pairs(automaton: Any) -> tuple[np.ndarray, np.ndarray]:
    """[states, labels] gains and states."""
    found = [[walked(automaton, state, label) for label in LABELS] for state in range(num_states(automaton))]
    return np.array([[pair[0] for pair in row] for row in found]), np.array(
        [[pair[1] for pair in row] for row in found]
    )
