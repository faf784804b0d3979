"""Rows laid end to end: numbered, spread out and gathered again."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from shallowfusion.scorers.packed_rows import PackedRows, joined_numbers, row_numbers

CPU = torch.device("cpu")
TAKEN = np.array([[1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 1]], dtype=bool)


def test_rows_know_whose_they_are() -> None:
    rows = PackedRows.of(TAKEN, CPU)
    assert rows.owners.tolist() == [0, 2, 2, 2, 3, 3]
    assert rows.lanes.tolist() == [0, 0, 1, 2, 1, 2]
    assert rows.starts.tolist() == [0, 1, 1, 4, 6]
    assert (rows.num_utterances, rows.width) == (4, 3)


def test_spread_rows_have_zeros_between_them() -> None:
    rows, numbers = PackedRows.of(TAKEN, CPU), torch.arange(1.0, 7.0)
    spread = rows.spread(numbers[None, :, None])
    assert spread[:, :, 0].tolist() == [[1, 0, 0], [0, 0, 0], [2, 3, 4], [0, 5, 6]]


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**20 - 1))
def test_gathering_undoes_spreading(utterances: int, width: int, bits: int) -> None:
    taken = (bits >> np.arange(utterances * width) & 1).astype(bool).reshape(utterances, width)
    rows, given_rows = PackedRows.of(taken, CPU), torch.randn(1, int(taken.sum()), 2, 3)
    assert torch.equal(rows.gathered(rows.spread(given_rows)), given_rows)
    numbers = row_numbers(taken)
    assert numbers[taken].tolist() == list(range(int(taken.sum())))
    assert (numbers[~taken] == -1).all()


def test_rows_of_those_that_enter_follow_on_those_that_run() -> None:
    joined = joined_numbers(row_numbers(TAKEN), np.array([[0], [1]]), 6)
    assert joined.tolist() == [[0, -1, -1], [-1, -1, -1], [1, 2, 3], [-1, 4, 5], [6, -1, -1], [7, -1, -1]]
