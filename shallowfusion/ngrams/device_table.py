"""Look-up of n-gram log-probs in torch, where the scores of a batch are: the arrays of the C++ table, on any device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shallowfusion.config import require
from shallowfusion.ngrams.table import NgramTable, NgramTableProtocol

__all__ = ["DeviceNgramTable"]


class DeviceNgramTable:
    """log P(word | state) for tensors of states and words: what the `NgramTable` answers, to the bit.

    Every n-gram is a node; its children lie side by side, so the pair (context, last word) grows with the number of
    the node, and one search in the sorted pairs finds a child. Nothing synchronises with the host, and the number of
    launches depends on the order alone, so the look-up may be part of a CUDA graph.

    Price: a call takes 8 launches for each order, each row O(order * log(n-grams)). Memory: 32 bytes per n-gram.

    Args:
        table: the C++ table, whose arrays are copied.
        device: where the tensors are.

    Raises:
        InvalidArgumentError: another kind of table.
    """

    def __init__(self, table: NgramTableProtocol, device: str | torch.device = "cpu") -> None:
        require(
            isinstance(table, NgramTable),
            f"a device table needs an NgramTable, got {type(table).__name__}; make NgramTable(model).",
        )
        assert isinstance(table, NgramTable)
        words, first_children, suffixes, states, log_probs, back_offs = table.native.arrays()
        num_nodes = len(words)
        contexts = np.repeat(np.arange(num_nodes, dtype=np.int64), np.diff(first_children.astype(np.int64)))
        self.device = torch.device(device)
        self.order, self.num_words = int(table.native.order), int(table.native.num_words)
        self.end_word = table.model.end_word
        self._pairs = self._tensor(contexts * self.num_words + words[1:].astype(np.int64))  # of nodes 1, 2, ...
        self._suffixes, self._states = self._tensor(suffixes, np.int64), self._tensor(states, np.int64)
        self._log_probs, self._back_offs = self._tensor(log_probs), self._tensor(back_offs)

    def _tensor(self, values: np.ndarray, dtype: type | None = None) -> Tensor:
        return torch.from_numpy(values if dtype is None else values.astype(dtype)).to(self.device)

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors."""
        tensors = (self._pairs, self._suffixes, self._states, self._log_probs, self._back_offs)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def score(self, states: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Score one word after each state.

        Args:
            states: int64 [rows], on the device; not checked, for that would synchronise.
            words: int64 [rows].

        Returns:
            float32 [rows] log-probs, nats, and int64 [rows] the states after the words.
        """
        node, back_off = states, torch.zeros(states.shape, dtype=torch.float32, device=states.device)
        found = torch.full_like(states, -1)
        for _ in range(self.order):
            wanted = node * self.num_words + words
            place = torch.searchsorted(self._pairs, wanted).clamp_(max=len(self._pairs) - 1)
            is_open = found < 0
            found = torch.where(is_open & (self._pairs[place] == wanted), place + 1, found)
            is_open = found < 0
            back_off = torch.where(is_open, back_off + self._back_offs[node], back_off)
            node = torch.where(is_open, self._suffixes[node], node)
        return back_off + self._log_probs[found], self._states[found]

    def end(self, states: Tensor) -> Tensor:
        """float32 [rows], log-prob of </s> after each state."""
        return self.score(states, torch.full_like(states, self.end_word))[0]
