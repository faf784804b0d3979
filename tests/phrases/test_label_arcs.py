from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shallowfusion.phrases.label_arcs as module
from shallowfusion.phrases.automaton import PhraseAutomaton
from shallowfusion.phrases.automaton_reference import ReferencePhraseAutomaton
from shallowfusion.phrases.label_arcs import LabelArcs, label_arcs
from tests.phrases.labels import LABELS, PHRASES, all_pairs, automaton_of, num_states


def filled(arcs: LabelArcs) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of state and label, as the record says to read it."""
    gains, after = arcs.default_gains[arcs.default_rows], arcs.default_after[arcs.default_rows]
    gains.reshape(-1)[arcs.keys], after.reshape(-1)[arcs.keys] = arcs.gains, arcs.after
    gains += arcs.closing[:, None] * arcs.closes
    after[:, arcs.is_silent] = np.arange(arcs.num_states)[:, None]
    gains[:, arcs.is_silent] = 0.0
    return gains, after


@settings(max_examples=100, deadline=None)
@given(PHRASES, st.booleans(), st.sampled_from([PhraseAutomaton, ReferencePhraseAutomaton]))
def test_every_state_and_label_as_walked_symbol_by_symbol(
    phrases: dict[str, float], inside_words: bool, kind: type
) -> None:
    automaton = automaton_of(phrases, inside_words, kind)
    arcs = label_arcs(automaton, LABELS)
    assert (np.diff(arcs.keys) > 0).all()
    gains, after = filled(arcs)
    wanted_gains, wanted_after = all_pairs(automaton)
    assert after.tolist() == wanted_after.tolist()
    np.testing.assert_allclose(gains, wanted_gains, atol=1e-12)
    assert arcs.held.tolist() == automaton.held(range(arcs.num_states)).tolist()
    assert (arcs.num_states, arcs.num_labels) == (num_states(automaton), len(LABELS))


def test_few_arcs_tell_states_apart() -> None:
    """Of 1,000 words a state has a child or two."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijkl"), 6)) for _ in range(1000)]
    letters = [bytes([letter]) for letter in b"abcdefghijkl"]
    arcs = label_arcs(automaton_of(dict.fromkeys(words, 1.0), inside_words=False), letters)
    assert arcs.num_states > 3000
    assert len(arcs.keys) < arcs.num_states
    both = [f"{one} {other}" for one, other in itertools.pairwise(words)]
    arcs = label_arcs(automaton_of(dict.fromkeys(both, 1.0), inside_words=False), [*letters, b" "])
    assert len(arcs.keys) < 3 * arcs.num_states  # what goes on as a phrase of the second word counts too


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    automaton = automaton_of({"ab a": 2.0, "bab": 1.0, "b'a": 3.0}, inside_words=True)
    whole = label_arcs(automaton, LABELS)
    monkeypatch.setattr(module, "SLICE", 2)
    for one, other in zip(vars(whole).values(), vars(label_arcs(automaton, LABELS)).values(), strict=True):
        assert np.array_equal(one, other)


def test_no_phrases_and_no_labels() -> None:
    automaton = automaton_of({}, inside_words=False)
    arcs = label_arcs(automaton, LABELS)
    assert len(arcs.keys) == 0
    assert filled(arcs)[1].tolist() == [[0] * len(LABELS)]
    assert label_arcs(automaton_of({"ab": 1.0}, inside_words=False), []).num_labels == 0
