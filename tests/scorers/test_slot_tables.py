"""Slot tables against bits set one by one, and against the bookkeeping of real searches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shallowfusion.scorers.slot_tables import slot_table
from shallowfusion.scorers.slots import BeamSlots
from tests.kernels.attention_cases import table_of


@pytest.mark.parametrize("queries", [1, 5, 31, 32, 33, 70])
def test_tables_are_what_bits_one_by_one_make(queries: int) -> None:
    generator = torch.Generator().manual_seed(queries)
    visible = torch.rand((3, queries, 45), generator=generator) < 0.05
    visible[1] = False
    table = slot_table(visible, torch.tensor([4, 0, 2]))
    assert table.shape[2] % 16 == 0
    assert table[:, 0, 0].tolist() == [4, 0, 2]
    for own, seen in zip(table, visible, strict=True):
        live = seen.any(dim=0).nonzero()[:, 0]
        assert own[0, 1] == len(live)  # slots that nobody sees are not walked
        assert torch.equal(own[1, : len(live)].long(), live)
        expected = table_of(seen[None][:, :, live], live[None], torch.tensor([0]))
        assert torch.equal(own[2:, : len(live)], expected[0, 2:, : len(live)])


def test_a_plan_of_beams_as_a_table() -> None:
    """Forks and steps of real bookkeeping: the bits of each row are the slots of its sequence."""
    slots = BeamSlots(2, 200, torch.device("cpu"))
    slots.prefill([3, 2])
    rng = np.random.default_rng(0)
    slots.fork(np.zeros((2, 4), dtype=np.int64))
    for _ in range(10):
        plan = slots.append(np.ones((2, 4), dtype=bool))
        table = slot_table(plan.visible[:, 0])
        for i, (pool, rows) in enumerate(zip(slots._pools, slots._rows, strict=True)):
            count = int(table[i, 0, 1])
            assert count == pool.num_used
            for k, row in enumerate(rows):
                seen = table[i, 1, :count][(table[i, 2, :count] >> k & 1).bool()]
                assert sorted(seen.tolist()) == sorted(pool.slots(int(row)).tolist())
        slots.fork(rng.integers(0, 4, (2, 4)))
