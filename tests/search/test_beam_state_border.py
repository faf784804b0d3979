"""What the border of a beam state refuses and what it understands; threads and speed of the native one."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from shallowfusion.config import BeamSettings
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.search.beam_state import BeamState, BeamStep

END = 0


def advance(state: Any, candidates: list[tuple[float, int, int]], utterance: int = 0) -> BeamStep:
    """One step of one utterance with candidates (total, parent, token)."""
    totals, parents, tokens = zip(*candidates, strict=True)
    return state.advance([utterance], [totals], [parents], [tokens], np.zeros((1, len(candidates), 1)))


def test_released_or_unknown_utterances_are_refused(state_class: type) -> None:
    state = state_class(BeamSettings(2, (END,), 9), 2, 1)
    state.release(0)
    for bad in (0, 2, -1, 2**63, 2**90, 0.5, "1", None):
        for call in (
            state.release,
            state.force_finish,
            state.is_done,
            state.num_live,
            state.num_finished,
            lambda utterance: state.results(utterance, 1),
            lambda utterance: advance(state, [(-1, 0, 4)], utterance),
        ):
            with pytest.raises(InvalidArgumentError):
                call(bad)


def test_results_need_a_done_utterance_and_a_positive_count(state_class: type) -> None:
    state = state_class(BeamSettings(2, (END,), 9), 1, 1)
    with pytest.raises(InvalidArgumentError, match="force_finish"):
        state.results(0, 1)
    state.force_finish(0)
    for bad in (0, -1, 1.5, 2**80, "2"):
        with pytest.raises(InvalidArgumentError, match="n_best"):
            state.results(0, bad)
    with pytest.raises(InvalidArgumentError, match="is done"):
        advance(state, [(-1, 0, 4)])


GOOD = {
    "utterances": [0, 1],
    "totals": np.zeros((2, 3), np.float32),
    "parents": np.zeros((2, 3), np.int64),
    "tokens": np.ones((2, 3), np.int64),
    "parts": np.zeros((2, 3, 2), np.float32),
}
BAD = [
    ("utterances", [0, 0]),
    ("utterances", [0, 2]),
    ("utterances", [0, -1]),
    ("utterances", [0]),
    ("utterances", [[0, 1]]),
    ("utterances", [0.0, 1.0]),
    ("utterances", ["a", "b"]),
    ("utterances", np.array([0, 2**64 - 1], np.uint64)),
    ("utterances", None),
    ("totals", np.zeros((2, 4))),
    ("totals", np.zeros(6)),
    ("totals", np.zeros((2, 3), np.complex64)),
    ("totals", np.zeros((2, 3), bool)),
    ("totals", [[0, 0, 0], [0, 0]]),
    ("totals", [[-2.0, -1.0, -3.0]] * 2),
    ("totals", "zeros"),
    ("totals", object()),
    ("parents", np.zeros((2, 2), np.int64)),
    ("parents", np.zeros((2, 3))),
    ("parents", np.full((2, 3), 1)),
    ("parents", np.full((2, 3), -2)),
    ("parents", np.full((2, 3), 2**40)),
    ("tokens", np.full((2, 3), -1)),
    ("tokens", np.zeros((3, 2), np.int64)),
    ("tokens", np.zeros((2, 3), "datetime64[s]")),
    ("parts", np.zeros((2, 3, 1))),
    ("parts", np.zeros((2, 3))),
    ("parts", None),
    ("flagged", [0, 1]),
    ("flagged", [True]),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_arrays_are_refused_and_change_nothing(state_class: type, name: str, value: Any) -> None:
    state = state_class(BeamSettings(2, (END,), 9), 2, 2)
    with pytest.raises(InvalidArgumentError):
        state.advance(**{**GOOD, name: value})
    assert state.num_nodes == 0
    assert [state.num_live(utterance) for utterance in (0, 1)] == [1, 1]
    step = state.advance(**GOOD)
    assert step.totals.shape == (2, 2)


@pytest.mark.parametrize(
    "sizes", [(-1, 1), (1, -1), (2**62, 1), (1, 2**62), (2**80, 1), (1.5, 1), (1, None), ("2", 1), (10**6 + 1, 0)]
)
def test_bad_sizes_are_refused(state_class: type, sizes: tuple[Any, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        state_class(BeamSettings(2, (END,), 9), *sizes)


def test_bad_settings_are_refused(state_class: type) -> None:
    for beam in (None, {"beam_size": 2}, BeamSettings(2, (-1,), 9), BeamSettings(2, (2**70,), 9)):
        with pytest.raises(InvalidArgumentError):
            state_class(beam, 1, 1)


def test_strided_and_narrow_arrays_are_understood(state_class: type) -> None:
    state = state_class(BeamSettings(2, (), 9), 4, 1)
    step = state.advance(
        np.array([3, 9, 1, 9], np.int16)[::2],
        np.array([[-1, -1], [-2, -2]], np.float64).T[:, ::1],
        np.zeros((2, 2), np.uint8),
        np.array([[7, 8], [5, 6]], np.int32, order="F"),
        np.zeros((2, 2, 1), np.float16),
    )
    assert step.tokens.tolist() == [[7, 8], [5, 6]]
    assert (step.tokens.dtype, step.parents.dtype, step.totals.dtype, step.done.dtype) == ("i8", "i8", "f4", "?")


def test_no_active_utterance_and_no_parts_are_allowed(state_class: type) -> None:
    state = state_class(BeamSettings(2, (END,), 9), 2, 0)
    step = state.advance([], np.zeros((0, 4)), np.zeros((0, 4), int), np.zeros((0, 4), int), np.zeros((0, 4, 0)))
    assert step.tokens.shape == (0, 2)
    step = state.advance([1], [[-1.0]], [[0]], [[5]], np.zeros((1, 1, 0)))
    assert step.tokens.tolist() == [[5, 0]]
    state.force_finish(1)
    assert state.results(1, 1)[0].parts.shape == (1, 0)


def test_threads_may_share_a_native_state() -> None:
    state = BeamState(BeamSettings(4, (END,), 10**6), 8, 1)

    def search(utterance: int) -> None:
        for length in range(300):
            advance(state, [(-length - rank / 8, 0, 5 + rank) for rank in range(8)], utterance)
            assert state.num_live(utterance) == 4
        state.force_finish(utterance)
        assert len(state.results(utterance, 4)[0].token_ids) == 300
        state.release(utterance)

    threads = [threading.Thread(target=search, args=(utterance,)) for utterance in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state.num_nodes == 0


def test_native_advance_takes_tens_of_microseconds() -> None:
    """64 utterances of 10 beams, two sources; the bound is generous for a busy machine."""
    beam = BeamSettings(10, (END,), 448)
    state = BeamState(beam, 64, 2)
    generator = np.random.default_rng(0)
    seconds = []
    for length in range(100):
        totals = -np.sort(generator.random((64, 20)), axis=1).astype(np.float32) - length
        parents = generator.integers(0, 10 if length else 1, (64, 20))
        tokens = generator.integers(1, 50_000, (64, 20))
        parts = generator.random((64, 20, 2)).astype(np.float32)
        start = time.perf_counter()
        state.advance(np.arange(64), totals, parents, tokens, parts)
        seconds.append(time.perf_counter() - start)
    assert np.median(seconds) < 5e-4
