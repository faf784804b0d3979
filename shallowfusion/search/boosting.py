"""Phrases that rows are favoured to say: bonuses inside the fused step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shallowfusion.phrases.automaton import PhraseAutomatonProtocol
from shallowfusion.values import SparseBonus

__all__ = ["PhraseBonus", "PhraseBooster"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class PhraseBonus:
    """What the phrases add in one step.

    Args:
        refunds: float32 [rows], added to totals: what rows held for a match that may fail now.
        sparse: per row the tokens that continue a match.
    """

    refunds: Tensor
    sparse: SparseBonus


class PhraseBooster:
    """Follows every row through the automaton.

    Price: O(matches in progress) per row and step; the first tokens of all phrases are one bias shared by all rows.

    Args:
        automaton: of the phrases, over acoustic token ids.
        vocab_size: width of `first`.
        num_utterances: one row each at first.
    """

    def __init__(self, automaton: PhraseAutomatonProtocol, vocab_size: int, num_utterances: int) -> None:
        self._automaton = automaton
        self._states: Array = np.full((num_utterances, 1), automaton.start_state, dtype=np.int64)
        _, tokens, values = automaton.step([automaton.shared_state])
        self.first = torch.zeros(vocab_size)  # [vocab], of the first token of each phrase
        self.first[torch.from_numpy(tokens).long()] = torch.from_numpy(values)

    def bonus(self, device: torch.device) -> PhraseBonus:
        """Bonuses of the next token of every row, beside `first`."""
        states = self._states.reshape(-1)
        arrays = (self._automaton.refunds(states), *self._automaton.step(states, shared_first=True))
        tensors = [torch.from_numpy(array) for array in arrays]
        if device.type != "cpu":
            tensors = [tensor.to(device) for tensor in tensors]
        return PhraseBonus(tensors[0], SparseBonus(*tensors[1:]))

    def follow(self, parents: Array, tokens: Array) -> None:
        """Row k of utterance u now continues its old row parents[u, k] with tokens[u, k]."""
        states = self._states[np.arange(len(parents))[:, None], parents]
        self._states = self._automaton.advance(states.reshape(-1), tokens.reshape(-1)).reshape(states.shape)

    def keep(self, order: Sequence[int]) -> None:
        """Place i of the new batch holds what was at place order[i]."""
        self._states = self._states[list(order)]
