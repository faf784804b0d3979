"""The mirror of a device-driven search: it agrees with the beam state, and it notices whatever goes wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion.config import BeamSettings
from shallowfusion.errors import DivergenceError, InvalidArgumentError
from shallowfusion.kernels.beam_advance_arrays import RING_ENTRIES, BeamArrays
from shallowfusion.kernels.beam_advance_reference import beam_advance_reference
from shallowfusion.search.beam_mirror import BeamMirror
from shallowfusion.search.beam_mirror_reference import ReferenceBeamMirror
from shallowfusion.search.beam_state import BeamState, BeamStep
from tests.kernels.advance_cases import END, VOCAB, lanes_of, start, stream, tables_of
from tests.search.test_beam_state_properties import assert_equal_results

CPU = torch.device("cpu")


@pytest.fixture(params=[BeamMirror, ReferenceBeamMirror], ids=["native", "reference"])
def mirror_class(request: pytest.FixtureRequest) -> type:
    return request.param


class Recorded:
    """A device-driven search on random candidates; its ring entries and a beam state that saw the same."""

    def __init__(self, chosen: BeamSettings, utterances: int, seed: int, padding: int = 1) -> None:
        generator = np.random.default_rng(seed)
        tables = tables_of(chosen, utterances=utterances + padding)
        self.settings, self.utterances = chosen, utterances
        rows = utterances + padding
        self.arrays = BeamArrays.make(tables, VOCAB, chosen.num_candidates, 2)
        start(self.arrays, tables, range(utterances))
        self.state = BeamState(chosen, utterances, 2)
        self.entries: list[Any] = []
        self.flagged = np.zeros(utterances, dtype=bool)
        step: BeamStep | None = None
        while not bool(self.arrays.done.all()):
            active = (self.arrays.done.numpy() == 0).nonzero()[0]
            candidates = stream(generator, step, chosen, rows, coarse=bool(seed % 2))
            lanes = lanes_of(candidates, chosen.beam_size)
            offered = (candidates.totals.numpy(), lanes, candidates.token_ids.numpy(), candidates.parts.numpy())
            self.state.advance(active, *(array[active] for array in offered))
            self.flagged[active] |= candidates.flags.numpy().reshape(rows, -1).any(axis=1)[active]
            beam_advance_reference(tables, self.arrays, candidates)
            self.entries.append(self.arrays.ring[len(self.entries) % RING_ENTRIES].numpy().copy())
            totals = self.arrays.totals.numpy().reshape(rows, -1).copy()
            step = BeamStep(self.arrays.tokens.numpy(), self.arrays.parents.numpy(), totals, self.arrays.done.numpy())

    def mirror(self, mirror_class: type) -> Any:
        return mirror_class(self.settings, self.utterances, self.settings.num_candidates, 2)


@pytest.mark.parametrize("rule", ["hf", "whisper", "espnet"])
@settings(max_examples=60)
@given(
    st.integers(1, 10), st.integers(1, 80), st.sampled_from([0.0, 1.0, -1.5]), st.sampled_from([1.0, 2.5]),
    st.integers(0, 2**16),
)  # fmt: skip
def test_a_replay_gives_what_the_beam_state_gives(
    rule: str, beam_size: int, longest: int, penalty: float, patience: float, seed: int
) -> None:
    chosen = BeamSettings(beam_size, (END,), longest, rule, penalty, "never", patience)
    recorded = Recorded(chosen, 2, seed)
    for mirror_class in (BeamMirror, ReferenceBeamMirror):
        mirror = recorded.mirror(mirror_class)
        for entry in recorded.entries:
            mirror.replay(entry)
        assert mirror.num_steps == len(recorded.entries)
        for utterance in range(2):
            assert mirror.is_done(utterance)
            assert mirror.saw_nan(utterance) == recorded.flagged[utterance]
            assert mirror.hash(utterance) == int(recorded.arrays.hashes[utterance]) % 2**64
            assert_equal_results(mirror.results(utterance, 100), recorded.state.results(utterance, 100))


def recorded_search() -> Recorded:
    found = Recorded(BeamSettings(3, (END,), 12, "whisper", patience=4.0), 2, seed=5)
    assert len(found.entries) >= 4
    return found


def changes() -> list[tuple[str, Any]]:
    """What a device could do wrong in its third step; all must be noticed."""

    def swap_tokens(entry: Any) -> None:
        first = 8 + 2 * 6
        entry[0, first : first + 2] = entry[0, first + 1] + 1, entry[0, first]

    def shift_total(entry: Any) -> None:
        entry[0, 8] ^= 1

    def stop(entry: Any) -> None:
        entry[0, 1] ^= 2

    def idle(entry: Any) -> None:
        entry[0, 1] = 2

    def other_hash(entry: Any) -> None:
        entry[0, 3] ^= 1 << 30

    def flag(entry: Any) -> None:
        entry[0, 1] ^= 4

    def other_step(entry: Any) -> None:
        entry[1, 0] += 1

    def wake_padding(entry: Any) -> None:
        entry[2, 1] |= 1

    return [(change.__name__, change) for change in (
        swap_tokens, shift_total, stop, idle, other_hash, flag, other_step, wake_padding,
    )]  # fmt: skip


@pytest.mark.parametrize("change", [change for _, change in changes()], ids=[name for name, _ in changes()])
def test_any_divergence_is_an_error(mirror_class: type, change: Any) -> None:
    recorded = recorded_search()
    mirror = recorded.mirror(mirror_class)
    for entry in recorded.entries[:2]:
        mirror.replay(entry)
    wrong = recorded.entries[2].copy()
    change(wrong)
    with pytest.raises(DivergenceError, match=r"step 2: .*driver='host'"):
        mirror.replay(wrong)


def test_a_lost_and_a_repeated_step_are_noticed(mirror_class: type) -> None:
    recorded = recorded_search()
    mirror = recorded.mirror(mirror_class)
    mirror.replay(recorded.entries[0])
    for wrong in (recorded.entries[0], recorded.entries[2]):
        with pytest.raises(DivergenceError, match="in its place"):
            mirror.replay(wrong)
    mirror.replay(recorded.entries[1])


def test_a_search_cut_short_no_longer_listens_to_the_device(mirror_class: type) -> None:
    recorded = recorded_search()
    mirror = recorded.mirror(mirror_class)
    mirror.replay(recorded.entries[0])
    mirror.force_finish(0)
    forced = mirror.results(0, 5)
    assert forced
    assert all(len(hypothesis.token_ids) <= 1 for hypothesis in forced)
    for entry in recorded.entries[1:]:
        mirror.replay(entry)
    assert_equal_results(mirror.results(0, 5), forced)
    assert_equal_results(mirror.results(1, 5), recorded.state.results(1, 5))


def test_bad_arguments_are_refused(mirror_class: type) -> None:
    recorded = recorded_search()
    mirror = recorded.mirror(mirror_class)
    entry = recorded.entries[0]
    for wrong in (entry[:, :-1], entry[:1], entry.astype(np.int64), entry[0], [1, 2]):
        with pytest.raises(InvalidArgumentError, match="ring entry"):
            mirror.replay(wrong)
    for method in (mirror.saw_nan, mirror.hash, mirror.is_done, mirror.force_finish):
        with pytest.raises(InvalidArgumentError, match="utterance"):
            method(2)
    with pytest.raises(InvalidArgumentError, match="not done"):
        mirror.results(0, 1)
    with pytest.raises(InvalidArgumentError, match="recombine"):
        mirror_class(BeamSettings(3, (END,), 12, recombination="max"), 2, 6, 2)
    with pytest.raises(InvalidArgumentError, match="num_candidates"):
        mirror_class(BeamSettings(3, (END,), 12), 2, 0, 2)


@settings(max_examples=200)
@given(st.binary(min_size=0, max_size=3 * 38 * 4), st.booleans())
def test_garbage_raises_our_errors_and_nothing_else(words: bytes, plausible: bool) -> None:
    entry = np.zeros((3, 38), dtype=np.int32)
    flat = np.frombuffer(words[: len(words) // 4 * 4], dtype=np.int32)
    entry.reshape(-1)[: len(flat)] = flat
    if plausible:
        entry[:, 0], entry[:2, 1], entry[2, 1] = 0, 1, 2
    chosen = BeamSettings(3, (END,), 12, "whisper")
    for mirror_class in (BeamMirror, ReferenceBeamMirror):
        mirror = mirror_class(chosen, 2, 6, 2)
        with pytest.raises((DivergenceError, InvalidArgumentError)):
            mirror.replay(entry)
