"""Slot tables against bits set one by one, and against the bookkeeping of real searches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shallowfusion.scorers.slot_tables import advance_table, slot_table
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


def entries(table: torch.Tensor) -> list[dict[int, int]]:
    """The bits of each slot, per utterance."""
    return [dict(zip(*own[1:3, : int(own[0, 1])].tolist(), strict=True)) for own in table]


@pytest.mark.parametrize("beam_size", [1, 5, 32])
def test_a_table_advanced_step_by_step_is_that_of_the_plan(beam_size: int) -> None:
    """Random forks, rows that do not advance, branches that die and whose slots are used again."""
    rng = np.random.default_rng(beam_size)
    slots = BeamSlots(2, 1200, torch.device("cpu"))
    slots.prefill([3, 7])
    table = torch.zeros((2, 3, 1200), dtype=torch.int32)
    for i, length in enumerate((3, 7)):  # one row, which sees the prompt
        table[i, 0, :2] = torch.tensor([i, length])
        table[i, 1, :length] = torch.arange(length)
        table[i, 2, :length] = 1
    rows = 1
    for _ in range(25):
        parents = rng.integers(0, rows, (2, beam_size))
        advancing = rng.random((2, beam_size)) < 0.9
        slots.fork(parents)
        plan = slots.append(advancing)
        written = torch.where(torch.from_numpy(advancing), plan.slots, -1)
        table = advance_table(table, torch.from_numpy(parents), written)
        seen = plan.visible[:, 0].clone()
        seen[~torch.from_numpy(advancing)] = False  # those look at a slot of nobody's
        wanted = slot_table(seen)
        mask = sum(1 << k for k in range(beam_size)) if beam_size < 32 else -1
        moving = [sum(1 << k for k in range(beam_size) if own[k]) for own in advancing]
        for found, expected, bits in zip(entries(table), entries(wanted), moving, strict=True):
            of_those = {slot: word & mask & bits for slot, word in found.items()}
            assert {k: v for k, v in of_those.items() if v} == {k: v & 0xFFFFFFFF for k, v in expected.items()}
        rows = beam_size
    for i, pool in enumerate(slots._pools):
        assert int(table[i, 0, 1]) == pool.num_used
