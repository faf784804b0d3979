"""Settings of the search: small frozen records, checked when made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from shallowfusion.errors import InvalidArgumentError

__all__ = ["DRIVERS", "BeamSettings", "Driver", "require"]

StopRule = Literal["hf", "whisper", "espnet"]
EarlyStopping = Literal["heuristic", "first", "never"]
Recombination = Literal["none", "max", "logsumexp"]
Driver = Literal["host", "device"]
DRIVERS: tuple[Driver, ...] = ("host", "device")


def require(condition: bool, message: str) -> None:
    """Raise `InvalidArgumentError` with `message` unless `condition` holds."""
    if not condition:
        raise InvalidArgumentError(message)


@dataclass(frozen=True)
class BeamSettings:
    """How one batch of beam searches keeps, finishes and ranks hypotheses.

    Args:
        beam_size: live hypotheses per utterance.
        end_ids: tokens that finish a hypothesis.
        max_new_tokens: a hypothesis of this many tokens, the end token counted, is finished by force.
        stop_rule: whose rule stops and ranks: `hf` (transformers), `whisper` (openai-whisper), `espnet`.
        length_penalty: `hf`, `espnet`: key = total / length ** length_penalty, the end token counted in length.
            `whisper`: None: key = total / length; a number: key = total / ((5 + length) / 6) ** length_penalty,
            the end token not counted (GNMT, 1609.08144).
        early_stopping: `hf` only: transformers' False (`heuristic`), True (`first`) and "never".
        patience: `whisper` only: stop at round(beam_size * patience) finished hypotheses.
        recombination: what happens to live hypotheses with equal tokens: nothing, the better one stays (`max`),
            or the better one stays with the log of the summed probabilities (`logsumexp`).
    """

    beam_size: int
    end_ids: tuple[int, ...]
    max_new_tokens: int
    stop_rule: StopRule = "hf"
    length_penalty: float | None = 1.0
    early_stopping: EarlyStopping = "heuristic"
    patience: float = 1.0
    recombination: Recombination = "none"

    def __post_init__(self) -> None:
        require(
            isinstance(self.beam_size, int) and 1 <= self.beam_size <= 1024,
            f"beam_size must be an integer from 1 to 1024, got {self.beam_size!r}; 5 is a common choice.",
        )
        require(
            self.max_new_tokens >= 1,
            f"max_new_tokens must be at least 1, got {self.max_new_tokens!r}.",
        )
        require(
            self.stop_rule in ("hf", "whisper", "espnet"),
            f"stop_rule must be 'hf', 'whisper' or 'espnet', got {self.stop_rule!r}.",
        )
        require(
            self.early_stopping in ("heuristic", "first", "never"),
            f"early_stopping must be 'heuristic', 'first' or 'never', got {self.early_stopping!r}.",
        )
        require(
            self.recombination in ("none", "max", "logsumexp"),
            f"recombination must be 'none', 'max' or 'logsumexp', got {self.recombination!r}.",
        )
        require(
            math.isfinite(self.patience) and self.patience > 0,
            f"patience must be finite and above 0, got {self.patience!r}.",
        )
        penalty = self.length_penalty
        require(
            math.isfinite(penalty) if penalty is not None else self.stop_rule == "whisper",
            f"length_penalty must be a finite number, got {penalty!r}; None is for stop_rule='whisper' only.",
        )

    @property
    def num_candidates(self) -> int:
        """Candidates per utterance a step must offer so that `beam_size` of them do not end (HF's rule)."""
        return max(2, 1 + len(self.end_ids)) * self.beam_size
