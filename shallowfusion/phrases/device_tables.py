"""Phrases in torch, where the scores of a batch are: what a label gains from a state and where it leads."""

from __future__ import annotations

import torch
from torch import Tensor

from shallowfusion.phrases.label_arcs import LabelArcs

__all__ = ["DevicePhraseTable"]

DENSE_BYTES = 2**27
DENSE_ENTRY = 12  # bytes


class DevicePhraseTable:
    """`LabelArcs` for tensors of states and labels.

    Up to `dense_bytes` every pair of state and label has a place of its own, and a look-up is two gathers; beyond, the
    arcs lie sorted and one search finds a pair. Nothing synchronises and the launches are always the same, so a look-up
    may be part of a CUDA graph.

    Price: a call takes 4 launches, or 14 and O(log(arcs)) for each pair. Memory: 12 bytes for each state and label, or
    24 for each arc, and 24 for each state.

    Args:
        arcs: the table on the host; it is copied.
        device: where the tensors are.
        dense_bytes: the largest table of all pairs.
    """

    def __init__(self, arcs: LabelArcs, device: str | torch.device = "cpu", dense_bytes: int = DENSE_BYTES) -> None:
        self.device = torch.device(device)
        self.start_state, self.num_states, self.num_labels = arcs.start_state, arcs.num_states, arcs.num_labels
        self.closing, self.held = self._tensor(arcs.closing), self._tensor(arcs.held)
        self._default_rows, self._keys = self._tensor(arcs.default_rows), self._tensor(arcs.keys)
        self._default_after, self._default_gains = self._tensor(arcs.default_after), self._tensor(arcs.default_gains)
        self._after, self._gains = self._tensor(arcs.after), self._tensor(arcs.gains)
        self._closes, self._is_silent = self._tensor(arcs.closes), self._tensor(arcs.is_silent)
        self.is_dense = arcs.num_states * arcs.num_labels * DENSE_ENTRY <= dense_bytes
        if self.is_dense:
            self._fill()
        elif len(arcs.keys) == 0:  # a search needs something to look at
            self._keys, self._after = self._keys.new_full((1,), -1), self._after.new_zeros(1)
            self._gains = self._gains.new_zeros(1)

    def _tensor(self, values: object) -> Tensor:
        return torch.as_tensor(values).to(self.device)

    def _fill(self) -> None:
        """All pairs, in place of the arcs."""
        after = self._default_after.int()[self._default_rows]
        gains = self._default_gains[self._default_rows]
        after.view(-1)[self._keys] = self._after.int()
        gains.view(-1)[self._keys] = self._gains
        own = torch.arange(self.num_states, dtype=torch.int32, device=self.device)
        after = torch.where(self._is_silent, own[:, None], after)
        gains = (gains + self.closing[:, None] * self._closes).masked_fill_(self._is_silent, 0.0)
        nothing = self._keys.new_zeros(0)
        self._keys = self._default_rows = nothing
        self._after, self._gains = after.view(-1), gains.view(-1)

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors."""
        tensors = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def look(self, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One label after each state.

        Args:
            states: int64, on the device; not checked, for that would synchronise.
            labels: int64, of the same shape.

        Returns:
            float64 gains for good, in nats, and int64 states after the labels.
        """
        keys = states * self.num_labels + labels
        if self.is_dense:
            return self._gains[keys], self._after[keys].long()
        place = torch.searchsorted(self._keys, keys).clamp_(max=len(self._keys) - 1)
        is_there = self._keys[place] == keys
        usual = self._default_rows[states] * self.num_labels + labels
        gains = torch.where(is_there, self._gains[place], self._default_gains.view(-1)[usual])
        after = torch.where(is_there, self._after[place], self._default_after.view(-1)[usual])
        is_silent = self._is_silent[labels]
        gains = (gains + self.closing[states] * self._closes[labels]).masked_fill(is_silent, 0.0)
        return gains, torch.where(is_silent, states, after)
