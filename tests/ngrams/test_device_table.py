"""The table in torch against the C++ one, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.ngrams.device_table import DeviceNgramTable
from shallowfusion.ngrams.model import NgramModel
from shallowfusion.ngrams.table import NgramTable
from shallowfusion.ngrams.table_reference import ReferenceNgramTable
from tests.ngrams.conftest import ARPA_FILES, shared_model
from tests.ngrams.test_table import models


def assert_equal_walks(model: NgramModel, seed: int, rows: int, steps: int, device: str = "cpu") -> None:
    """Random words from the start and from nothing: equal log-probs, states and ends."""
    native = NgramTable(model)
    table = DeviceNgramTable(native, device)
    rng = np.random.default_rng(seed)
    states = np.where(np.arange(rows) % 2, native.start_state, native.null_state)
    for _ in range(steps):
        words = rng.integers(0, len(model.words), rows)
        found, after = table.score(torch.from_numpy(states).to(device), torch.from_numpy(words).to(device))
        ends = table.end(after)
        wanted, states = native.score(states, words)
        assert found.cpu().numpy().tobytes() == wanted.tobytes()
        assert after.tolist() == states.tolist()
        assert ends.cpu().numpy().tobytes() == native.end(states).tobytes()


@settings(max_examples=60, deadline=None)
@given(models())
def test_random_models_are_scored_to_the_bit(model: NgramModel) -> None:
    assert_equal_walks(model, 0, 40, 6)


@pytest.mark.parametrize("name", ARPA_FILES)
def test_real_models_are_scored_to_the_bit(name: str) -> None:
    assert_equal_walks(shared_model(name), 1, 500, 8)


def test_known_sentences_are_followed_through_their_longest_ngrams() -> None:
    model = shared_model("ctc/parlance/test.arpa")
    table = DeviceNgramTable(NgramTable(model))
    state = torch.tensor([NgramTable(model).start_state])
    log10 = []
    for word in ("looking", "on", "a", "little"):
        found, state = table.score(state, torch.tensor([model.id_of(word)]))
        log10.append(float(found) / np.log(10.0))
    np.testing.assert_allclose(log10, [-0.484652, -0.348837, -0.0155266, -0.00306122], rtol=1e-4)


def test_memory_is_stated_and_other_tables_are_refused() -> None:
    model = shared_model("ctc/parlance/test.arpa")
    num_nodes = 1 + sum(len(ngrams) for ngrams in model.orders)
    assert DeviceNgramTable(NgramTable(model)).num_bytes >= 32 * num_nodes - 8
    with pytest.raises(InvalidArgumentError, match="NgramTable"):
        DeviceNgramTable(ReferenceNgramTable(model))


@pytest.mark.gpu
def test_a_gpu_scores_to_the_bit() -> None:
    assert_equal_walks(shared_model("ctc/parlance/test.arpa"), 2, 500, 8, "cuda")
