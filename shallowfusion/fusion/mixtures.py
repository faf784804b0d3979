"""Fusion of probabilities instead of log-probabilities: the published UADF and its relatives (2402.05457)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shallowfusion.config import require
from shallowfusion.fusion.gates import StepView

__all__ = ["Mixture"]


@dataclass(frozen=True)
class Mixture:
    """P = (P_primary + w * P_other) / (1 + w), w = sigmoid(U) - shift with U the entropy of the primary, or a constant.

    The division makes it a distribution, without which unsure steps would earn a beam search a bonus; within a row it
    changes no order, so greedy search is the published one.

    Args:
        primary: whose entropy decides and who is only overruled where it is unsure.
        constant: w itself, for static late fusion; None = by entropy.
        shift: subtracted from sigmoid(U); 0.5 makes w run from 0 to 0.5.
    """

    primary: Literal["lm", "asr"]
    constant: float | None = None
    shift: float = 0.5

    def __post_init__(self) -> None:
        require(self.primary in ("lm", "asr"), f"primary must be 'lm' or 'asr', got {self.primary!r}.")
        require(
            self.constant is None or (math.isfinite(self.constant) and self.constant >= 0),
            f"the weight of a mixture must be finite and >= 0, got {self.constant!r}.",
        )
        require(0 <= self.shift <= 0.5, f"shift must be from 0 to 0.5, got {self.shift!r}.")

    def weights(self, view: StepView) -> Tensor:
        """Weights of the acoustic and the language model in each row, [rows, 2], summing to 1."""
        if self.constant is not None:
            other = torch.full((view.logits[0].shape[0],), self.constant, device=view.logits[0].device)
        else:
            statistics = view.acoustic if self.primary == "asr" else view.language[0]
            other = torch.sigmoid(statistics.entropy) - self.shift
        primary = 1 / (1 + other)
        pair = (primary, other * primary) if self.primary == "asr" else (other * primary, primary)
        return torch.stack(pair, dim=1)
