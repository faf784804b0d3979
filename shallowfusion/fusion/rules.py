"""Fusion rules as records: which weight each source has at each step. A new rule is a constructor, not a branch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shallowfusion.config import require

__all__ = ["END_POLICIES", "EndPolicy", "Rule", "article", "piecewise", "static"]

EndPolicy = Literal["end_factored", "neutral", "lm", "asr_only"]
END_POLICIES: tuple[EndPolicy, ...] = ("end_factored", "neutral", "lm", "asr_only")


@dataclass(frozen=True)
class Rule:
    """What the fused step weighs: increment[t, v] = asr[t, v] + sum_s lm_weights[s] * share(t) * lm_s[t, v].

    share(t) = 0 for t < initial_steps, then (t - initial_steps + 1) / ramp up to 1 (1 at once with ramp = 0).
    t counts generated text tokens from 0; forced prefix tokens do not count.

    Args:
        name: the constructor that made it.
        lm_weights: one per language model, finite, >= 0.
        initial_steps: steps on acoustic scores alone; the language model reads along.
        ramp: steps over which the weight grows from its first share to all of it.
        catch_up: at t = initial_steps the language model's skipped log-probs are added, so that only the early
            pruning is acoustic.
        end_policy: this rule's own default, None = the decoder's (`end_factored`).
    """

    name: str
    lm_weights: tuple[float, ...]
    initial_steps: int = 0
    ramp: int = 0
    catch_up: bool = False
    end_policy: EndPolicy | None = None

    def __post_init__(self) -> None:
        for weight in self.lm_weights:
            require(
                isinstance(weight, (int, float)) and math.isfinite(weight) and weight >= 0,
                f"lm_weight must be finite and >= 0, got {weight!r}; to subtract an LM use ilm_weight.",
            )
        for name in ("initial_steps", "ramp"):
            value = getattr(self, name)
            require(
                isinstance(value, int) and value >= 0,
                f"{name} must be an integer >= 0, got {value!r}; 0 switches it off.",
            )
        require(
            self.end_policy is None or self.end_policy in END_POLICIES,
            f"end_policy must be one of {', '.join(END_POLICIES)}, got {self.end_policy!r}.",
        )

    @property
    def fuses(self) -> bool:
        """Whether any language model has a say."""
        return any(self.lm_weights)

    def weights_at(self, step: int) -> tuple[float, ...]:
        """Weight of each language model at step t, counted from 0."""
        share = self.share_at(step)
        return tuple(weight * share for weight in self.lm_weights)

    def share_at(self, step: int) -> float:
        if step < self.initial_steps:
            return 0.0
        return 1.0 if self.ramp == 0 else min(1.0, (step - self.initial_steps + 1) / self.ramp)

    def for_models(self, count: int) -> Rule:
        """This rule with one weight per loaded language model.

        Raises:
            InvalidArgumentError: the rule weighs another number of models than are loaded.
        """
        if len(self.lm_weights) == count or (count == 0 and not self.fuses):
            return Rule(**{**self.__dict__, "lm_weights": self.lm_weights[:count]})
        require(
            False,
            f"the rule {self} weighs {len(self.lm_weights)} language model(s), but {count} are loaded; "
            "load the decoder with lm=... or use weight 0.",
        )
        raise AssertionError

    def __str__(self) -> str:
        return repr(self)


def static(weight: float | Sequence[float]) -> Rule:
    """Shallow fusion with a constant weight: asr + weight * lm (METHODS 1.2; 1503.03535, 1712.01996)."""
    return Rule("static", _as_weights(weight))


def piecewise(weight: float | Sequence[float], initial_steps: int, ramp: int = 0, catch_up: bool = False) -> Rule:
    """Acoustic scores alone for the first `initial_steps` tokens, then `static` (METHODS 1.4).

    Hypotheses that finish before `initial_steps` carry no LM cost: keep a length penalty above 0 or set
    min_new_tokens = initial_steps.
    """
    return Rule("piecewise", _as_weights(weight), initial_steps, ramp, catch_up)


def article(weight: float = 0.24, initial_steps: int = 2) -> Rule:
    """The published Whisper + GPT-2 recipe: piecewise, the end token without any LM term (METHODS 1.3, 1.4).

    That end policy favours stopping early the more, the larger the weight and the wider the beam (METHODS 1.5).
    """
    return Rule("article", _as_weights(weight), initial_steps, end_policy="asr_only")


def _as_weights(weight: float | Sequence[float]) -> tuple[float, ...]:
    if isinstance(weight, (int, float)):
        return (weight,)
    require(
        isinstance(weight, Sequence) and not isinstance(weight, str),
        f"weight must be a number or a sequence of numbers, got {weight!r}.",
    )
    return tuple(weight)
