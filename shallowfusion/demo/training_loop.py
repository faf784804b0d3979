"""What both trainings share: the budget, the learning rate, averaged weights and resumable checkpoints."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shallowfusion.errors import InvalidArgumentError

__all__ = ["Budget", "TrainingState"]


@dataclass(frozen=True)
class Budget:
    """When a training ends and how its learning rate runs.

    The rate climbs linearly over `warmup_steps`, stays until `decay_start`, then falls along a cosine to zero.

    Args:
        steps: updates at most.
        minutes: wall-clock at most, or None; whichever of the two is nearer its end sets the rate.
        peak_rate: highest learning rate.
        warmup_steps: updates of the climb.
        decay_start: share of the budget, 0..1, at which the fall begins.

    Raises:
        InvalidArgumentError: a value lies outside its range.
    """

    steps: int
    peak_rate: float
    minutes: float | None = None
    warmup_steps: int = 300
    decay_start: float = 0.3

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InvalidArgumentError(f"steps must be at least 1, got {self.steps}.")
        if self.minutes is not None and not self.minutes > 0:
            raise InvalidArgumentError(f"minutes must be positive, got {self.minutes}; leave it out for no limit.")
        if not 0.0 <= self.decay_start < 1.0:
            raise InvalidArgumentError(f"decay_start must lie in 0..1, 1 excluded, got {self.decay_start}.")

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget that is spent; 1 or more means the end."""
        share = step / self.steps
        return share if self.minutes is None else max(share, seconds / (60.0 * self.minutes))

    def rate(self, step: int, seconds: float) -> float:
        """Learning rate of an update."""
        climb = min(1.0, (step + 1) / max(1, min(self.warmup_steps, self.steps // 4)))
        fall = (self.progress(step, seconds) - self.decay_start) / (1.0 - self.decay_start)
        return self.peak_rate * climb * 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, fall))))


@dataclass
class TrainingState:
    """A model under training, its optimizers, and a running average of its weights.

    The matrices inside the transformer's layers are updated by Muon, everything else by AdamW.

    Args:
        model: trained in place.
        budget: length and learning rate.
        average_decay: share of the average kept at each update once past the beginning.
        weight_decay: of matrices; vectors (biases, norms) are left alone.
    """

    model: nn.Module
    budget: Budget
    average_decay: float = 0.998
    weight_decay: float = 0.02
    step: int = 0
    seconds: float = 0.0
    average: nn.Module = field(init=False)
    optimizers: list[torch.optim.Optimizer] = field(init=False)

    def __post_init__(self) -> None:
        hidden: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                inside = ".layers." in name or ".h." in name
                (hidden if inside and parameter.dim() == 2 else others).append(parameter)
        rate = self.budget.peak_rate
        self.optimizers = [
            torch.optim.Muon(hidden, lr=rate, weight_decay=self.weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]
        self.average = copy.deepcopy(self.model).eval()
        self._resumed = time.monotonic()

    @property
    def finished(self) -> bool:
        """Whether the budget is spent."""
        return self.budget.progress(self.step, self.elapsed_seconds) >= 1.0

    def update(self) -> None:
        """Clip the gradients at norm 1, make one update, and move the average."""
        rate = self.budget.rate(self.step, self.elapsed_seconds)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        keep = min(self.average_decay, (1.0 + self.step) / (10.0 + self.step))
        with torch.no_grad():
            for averaged, current in zip(self.average.parameters(), self.model.parameters(), strict=True):
                averaged.lerp_(current, 1.0 - keep)

    def save(self, path: Path) -> None:
        """Write a checkpoint from which `restore` goes on."""
        content = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.elapsed_seconds,
        }
        unfinished = path.with_suffix(".part")
        torch.save(content, unfinished)
        unfinished.replace(path)

    def restore(self, path: Path) -> bool:
        """Read a checkpoint if there is one; returns whether there was."""
        if not path.exists():
            return False
        content: dict[str, Any] = torch.load(path, weights_only=True)
        self.model.load_state_dict(content["model"])
        self.average.load_state_dict(content["average"])
        for optimizer, stored in zip(self.optimizers, content.get("optimizers", []), strict=False):
            optimizer.load_state_dict(stored)
        self.step = int(content["step"])
        self.seconds = float(content["seconds"])
        self._resumed = time.monotonic()
        return True

    @property
    def elapsed_seconds(self) -> float:
        """Wall-clock spent on this training, earlier runs included."""
        return self.seconds + time.monotonic() - self._resumed
