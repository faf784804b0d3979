from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion.phrases.automaton import PhraseAutomaton
from shallowfusion.phrases.device_tables import DevicePhraseTable
from shallowfusion.phrases.label_arcs import label_arcs
from tests.phrases.labels import LABELS, PHRASES, all_pairs, automaton_of, num_states
from tests.phrases.test_whole_words import PHRASES as WHOLE_WORDS
from tests.phrases.test_whole_words import PIECES, made

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def looked(table: DevicePhraseTable) -> tuple[np.ndarray, np.ndarray]:
    """[states, labels] gains and states after."""
    states, labels = torch.arange(table.num_states), torch.arange(table.num_labels)
    pairs = torch.cartesian_prod(states, labels).to(table.device)
    gains, after = table.look(pairs[:, 0], pairs[:, 1])
    assert (gains.dtype, after.dtype) == (torch.float64, torch.int64)
    shape = (table.num_states, table.num_labels)
    return gains.cpu().numpy().reshape(shape), after.cpu().numpy().reshape(shape)


@settings(max_examples=60, deadline=None)
@given(PHRASES, st.booleans())
def test_dense_and_sorted_tables_say_what_the_automaton_says(phrases: dict[str, float], inside_words: bool) -> None:
    automaton = automaton_of(phrases, inside_words)
    wanted_gains, wanted_after = all_pairs(automaton)
    arcs = label_arcs(automaton, LABELS)
    for dense_bytes in (0, num_states(automaton) * len(LABELS) * 12):
        table = DevicePhraseTable(arcs, dense_bytes=dense_bytes)
        assert table.is_dense == (dense_bytes > 0)
        gains, after = looked(table)
        assert after.tolist() == wanted_after.tolist()
        np.testing.assert_allclose(gains, wanted_gains, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(WHOLE_WORDS)
def test_tokens_of_a_decoder_get_the_bonus_of_its_search(phrases: dict[str, float]) -> None:
    """Gains and loans of a table over tokens are what the fused step is given."""
    automaton = made(PhraseAutomaton, phrases)
    table = DevicePhraseTable(label_arcs(automaton, [[token] for token in range(len(PIECES))]), dense_bytes=0)
    gains, after = looked(table)
    held = table.held.numpy()
    rows = range(table.num_states)
    offsets, tokens, values = automaton.step(rows)
    bonus = np.repeat(automaton.refunds(rows)[:, None].astype(np.float64), len(PIECES), axis=1)
    bonus[np.repeat(rows, np.diff(offsets)), tokens] += values
    np.testing.assert_allclose(gains + held[after] - held[:, None], bonus, atol=1e-5)
    # The end of a text ends its word.
    np.testing.assert_allclose(table.closing.numpy() - held, automaton.refunds(rows), atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dense_bytes", [0, 2**27])
def test_tables_on_a_device(device: str, dense_bytes: int) -> None:
    phrases = {"ab ab": 2.0, "ba": -1.0, "c": 4.0, "a c": 1.5}
    automaton = automaton_of(phrases, inside_words=False)
    table = DevicePhraseTable(label_arcs(automaton, LABELS), device, dense_bytes)
    gains, after = looked(table)
    wanted_gains, wanted_after = all_pairs(automaton)
    assert after.tolist() == wanted_after.tolist()
    np.testing.assert_allclose(gains, wanted_gains, atol=1e-12)
    np.testing.assert_array_equal(table.held.cpu(), automaton.held(range(table.num_states)))
    np.testing.assert_array_equal(table.closing.cpu(), automaton.closing(range(table.num_states)))
    assert table.start_state == automaton.start_state
    assert (table.num_bytes > table.num_states * table.num_labels * 12) == table.is_dense
