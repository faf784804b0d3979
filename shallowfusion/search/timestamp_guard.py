"""The rules of timestamps of a model, and what a host-driven search remembers for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shallowfusion.config import require
from shallowfusion.scorers.loading import AcousticModel
from shallowfusion.search.timestamps import TIMESTAMP_SECONDS, TimestampRows, TimestampRules, allowed_words

__all__ = ["TimestampGuard", "timestamp_rules"]

Array = npt.NDArray[Any]
IMPOSSIBLE = float("-inf")


def timestamp_rules(acoustic: AcousticModel, max_initial_timestamp: float | None = 1.0) -> TimestampRules:
    """The rules for a model's timestamps.

    Args:
        max_initial_timestamp: seconds, None = any.

    Raises:
        InvalidArgumentError: the model has no timestamp tokens.
    """
    tokens = acoustic.tokens
    require(
        tokens.no_timestamps is not None and tokens.num_timestamps > 0,
        f"without_timestamps=False needs timestamp tokens, which {acoustic.name} does not have; leave it out.",
    )
    assert tokens.no_timestamps is not None
    latest = None if max_initial_timestamp is None else round(max_initial_timestamp / TIMESTAMP_SECONDS)
    return TimestampRules(tokens.no_timestamps + 1, tokens.num_timestamps, tokens.end, latest)


class TimestampGuard:
    """Remembers what the rules must know of the live rows, at first one per utterance.

    Price: one pass over the acoustic logits per step.
    """

    def __init__(self, rules: TimestampRules, num_utterances: int) -> None:
        self.rules = rules
        self.rows = TimestampRows.fresh(num_utterances)
        self._lanes = 1
        self._biases: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def allowed(
        self,
        logits: Tensor,
        temperature: float,
        forbidden: tuple[int, ...] = (),
        entries: tuple[Array, Array] | None = None,
    ) -> Tensor:
        """What each row may say, as `fused_step` takes it.

        Args:
            logits: acoustic, [rows, vocab].
            forbidden: tokens that no row may say.
            entries: rows and tokens, int64 [entries] each, of which no row may say its own.
        """
        device = logits.device
        bias = self._bias(forbidden, logits.shape[1], device)
        if entries is not None and len(entries[0]):
            bias = bias.expand(logits.shape).clone()
            bias[tuple(torch.from_numpy(own).to(device) for own in entries)] = IMPOSSIBLE
        rows = TimestampRows(self.rows.kinds.to(device), self.rows.latest.to(device))
        return allowed_words(self.rules, rows, logits, bias, temperature)

    def follow(self, parents: Array, tokens: Array) -> None:
        """Row k of utterance u now continues its old row parents[u, k] with tokens[u, k]."""
        rows = parents + np.arange(len(parents))[:, None] * self._lanes
        self._lanes = parents.shape[1]
        numbers = (torch.from_numpy(np.ascontiguousarray(own, dtype=np.int64)).view(-1) for own in (rows, tokens))
        self.rows = self.rows.followed(self.rules, *numbers)

    def keep(self, order: Sequence[int]) -> None:
        """Place i of the new batch holds what was at place order[i]."""
        places = torch.tensor(list(order), dtype=torch.int64)
        kept = (own.view(-1, self._lanes)[places].view(-1) for own in (self.rows.kinds, self.rows.latest))
        self.rows = TimestampRows(*kept)

    def _bias(self, forbidden: tuple[int, ...], vocab: int, device: torch.device) -> Tensor:
        key = (forbidden, device)
        if key not in self._biases:
            bias = torch.zeros(vocab)
            bias[list(forbidden)] = IMPOSSIBLE
            self._biases[key] = bias.to(device)
        return self._biases[key]
