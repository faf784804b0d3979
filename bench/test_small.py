"""Small pieces under pytest-benchmark: `python -m pytest bench --benchmark-only -o addopts=`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.fused_step import make_inputs, ours
from shallowfusion import row_statistics
from shallowfusion.config import BeamSettings
from shallowfusion.features.log_mel import FeatureSettings, log_mel
from shallowfusion.scorers.page_pool import PagePool
from shallowfusion.search.beam_state import BeamState


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("utterances", [1, 8])
def test_fused_step(benchmark, utterances: int) -> None:
    rows = 5 * utterances
    acoustic, language, totals = make_inputs(rows, torch.float32, "cpu")
    weights = torch.tensor([1.0, 0.3]).expand(rows, 2).contiguous()
    benchmark(ours, acoustic, language, totals, weights, 5)


def test_row_statistics(benchmark) -> None:
    acoustic, _, _ = make_inputs(40, torch.float32, "cpu")
    benchmark(row_statistics, acoustic)


@pytest.mark.parametrize(("utterances", "beam_size"), [(1, 5), (64, 10)])
def test_beam_state_advance(benchmark, utterances: int, beam_size: int) -> None:
    settings = BeamSettings(beam_size=beam_size, end_ids=(0,), max_new_tokens=100_000)
    rng = np.random.default_rng(0)
    active = np.arange(utterances)
    width = settings.num_candidates
    tokens = np.tile(np.arange(1, width + 1), (utterances, 1))
    parts = np.zeros((utterances, width, 2), dtype=np.float32)
    parents = rng.integers(0, beam_size, (utterances, width))

    def fresh() -> tuple[tuple[object, ...], dict[str, object]]:
        state = BeamState(settings, utterances, 2)
        totals = -np.sort(rng.random((utterances, width), dtype=np.float32), axis=1)
        state.advance(active, totals, np.zeros_like(parents), tokens, parts)
        return (state, totals - 1), {}

    benchmark.pedantic(
        lambda state, totals: state.advance(active, totals, parents, tokens, parts), setup=fresh, rounds=200
    )


def test_page_pool_step(benchmark) -> None:
    pool = PagePool(10_000, page_size=1)
    rows = [np.array([pool.create() for _ in range(5)])]
    parents = np.array([0, 0, 1, 2, 4])

    def step() -> None:
        rows[0] = pool.reorder(rows[0], parents)
        pool.append_each(rows[0])
        if pool.num_used > 500:
            for row in rows[0]:
                pool.release(int(row))
            rows[0] = np.array([pool.create() for _ in range(5)])

    benchmark(step)


def test_log_mel_of_ten_seconds(benchmark) -> None:
    samples = [torch.rand(160_000) - 0.5]
    benchmark(log_mel, samples, FeatureSettings())
