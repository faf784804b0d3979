"""Rows of utterances of several beam sizes, laid end to end in one pass so that none is computed in vain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["PackedRows", "joined_numbers", "row_numbers"]


@dataclass(frozen=True)
class PackedRows:
    """Which rows of a pass [1, rows] are queries of which utterance; all layers but attention need not know.

    Price: `spread` and `gathered` copy what they are given; attention that reads `starts` copies nothing.

    Args:
        owners: int64 [rows], the utterance of each row, ascending.
        lanes: int64 [rows], its number among the queries of the utterance, ascending within one.
        starts: int64 [utterances + 1] on the CPU, the first row of each utterance, and behind them the number of rows.
        width: the most queries that an utterance may have.
    """

    owners: Tensor
    lanes: Tensor
    starts: Tensor
    width: int

    @classmethod
    def of(cls, taken: npt.NDArray[np.bool_], device: torch.device) -> PackedRows:
        """The rows that are taken of [utterances, queries]."""
        owners, lanes = np.nonzero(taken)
        starts = np.concatenate([[0], taken.sum(axis=1).cumsum()]).astype(np.int64)
        places = [torch.from_numpy(np.ascontiguousarray(own)).to(device) for own in (owners, lanes)]
        return cls(places[0], places[1], torch.from_numpy(starts), taken.shape[1])

    @property
    def num_utterances(self) -> int:
        return len(self.starts) - 1

    def spread(self, rows: Tensor) -> Tensor:
        """[1, rows, ...] as [utterances, width, ...], zeros where there is no row."""
        spread = rows.new_zeros((self.num_utterances, self.width, *rows.shape[2:]))
        spread[self.owners, self.lanes] = rows[0]
        return spread

    def gathered(self, spread: Tensor) -> Tensor:
        """[utterances, width, ...] as [1, rows, ...]."""
        return spread[self.owners, self.lanes][None]


def row_numbers(taken: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Of [utterances, queries] those that are taken numbered from 0, int64; -1 for the others."""
    return np.where(taken, taken.cumsum().reshape(taken.shape) - 1, -1)


def joined_numbers(
    running: npt.NDArray[np.int64], fresh: npt.NDArray[np.int64], num_rows: int
) -> npt.NDArray[np.int64]:
    """Numbers of `num_rows` rows [utterances, rows], and those of utterances with one row [utterances, 1] behind."""
    beyond = np.pad(num_rows + fresh, ((0, 0), (0, running.shape[1] - 1)), constant_values=-1)
    return np.concatenate([running, beyond])
