"""Fusion rules as records: which weight each source has at each step. A new rule is a constructor, not a branch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from shallowfusion.config import require
from shallowfusion.fusion.delays import Delay
from shallowfusion.fusion.gates import FORMS, Form, Gate
from shallowfusion.fusion.mixtures import Mixture
from shallowfusion.fusion.trust import Trust
from shallowfusion.values import Normalize

__all__ = ["DEFAULT_END_POLICY", "END_POLICIES", "ILM_VARIANTS", "EndPolicy", "IlmVariant", "Rule"]

EndPolicy = Literal["end_factored", "neutral", "lm", "asr_only"]
END_POLICIES: tuple[EndPolicy, ...] = ("end_factored", "neutral", "lm", "asr_only")
DEFAULT_END_POLICY: EndPolicy = "neutral"  # measured: decision note 4
IlmVariant = Literal["zero_encoder", "zero_context", "mean_context", "silence", "trained", "source_lm"]
ILM_VARIANTS: tuple[IlmVariant, ...] = (
    "zero_encoder", "zero_context", "mean_context", "silence", "trained", "source_lm",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class Rule:
    """What the fused step weighs: increment[t, v] = asr[t, v] + sum_s lm_weights[s] * share(t) * lm_s[t, v].

    share(t) = 0 for t < initial_steps, then (t - initial_steps + 1) / ramp up to 1 (1 at once with ramp = 0).
    t counts generated text tokens from 0; forced prefix tokens do not count. A gate multiplies each row's weights by
    its own share; a mixture replaces the sum of log-probs by the log of a sum of probabilities.

    Args:
        name: the constructor that made it.
        lm_weights: one per language model, finite, >= 0.
        initial_steps: steps on acoustic scores alone; the language model reads along.
        ramp: steps over which the weight grows from its first share to all of it.
        catch_up: at t = initial_steps the language model's skipped log-probs are added, so that only the early
            pruning is acoustic.
        end_policy: this rule's own default, None = the decoder's.
        gate: shares by what the models say in each row; `form` keeps hypotheses comparable (see `gates`).
        mixture: sum of probabilities instead of log-probs.
        lm_mixture: prior weights of the language models where they count as one, the sum of their probabilities;
            lm_weights then holds one weight for all. `forgetting` lets them follow the text.
        class_factors: factors of the language models' weights for classes of tokens, by name (see `token_classes`).
        ilm_weight: of the acoustic model's internal language model, which is subtracted; `ilm_variant` says how it is
            had. "source_lm": the last language model that is loaded stands for it and has no weight in lm_weights.
        delay: the first language model is asked late, about hypotheses that survived; the second is its stand-in.
        trust: utterances in which the language models find the outcome too unlikely are decoded without them.
    """

    name: str
    lm_weights: tuple[float, ...]
    initial_steps: int = 0
    ramp: int = 0
    catch_up: bool = False
    end_policy: EndPolicy | None = None
    gate: Gate | None = None
    form: Form = "local"
    mixture: Mixture | None = None
    lm_mixture: tuple[float, ...] = ()
    forgetting: float | None = None
    class_factors: tuple[tuple[str, float], ...] = ()
    ilm_weight: float = 0.0
    ilm_variant: IlmVariant = "zero_context"
    delay: Delay | None = None
    trust: Trust | None = None

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
        require(self.form in FORMS, f"form must be one of {', '.join(FORMS)}, got {self.form!r}.")
        require(
            not (self.catch_up and (self.gate or self.mixture)),
            "catch_up adds skipped scores at their full weight, so it goes with neither a gate nor a mixture.",
        )
        require(
            not self.lm_mixture or len(self.lm_weights) == 1,
            f"a mixture of language models has one weight, got {self.lm_weights!r}.",
        )
        for name, factor in self.class_factors:
            require(
                math.isfinite(factor) and factor >= 0,
                f"the factor of the class {name!r} must be finite and >= 0, got {factor!r}.",
            )
        require(
            not (self.class_factors and (self.gate or self.mixture or self.ilm_weight or self.delay)),
            "factors by token class go with constant and piecewise weights only.",
        )
        timed = self.initial_steps or self.ramp or self.catch_up
        require(
            not (self.delay and (self.gate or self.mixture or self.lm_mixture or timed)),
            "a delayed rule has one constant weight, and one for a stand-in; fusion.delayed makes it.",
        )
        require(not (self.gate and self.mixture), "a rule has a gate or a mixture, got both.")
        require(
            isinstance(self.ilm_weight, (int, float)) and math.isfinite(self.ilm_weight) and self.ilm_weight >= 0,
            f"ilm_weight must be finite and >= 0, got {self.ilm_weight!r}; it is subtracted.",
        )
        require(
            self.ilm_variant in ILM_VARIANTS,
            f"ilm_variant must be one of {', '.join(ILM_VARIANTS)}, got {self.ilm_variant!r}.",
        )
        require(
            not (self.subtracts_last and (self.lm_mixture or self.delay)),
            "a rule that subtracts the last language model weighs the others one by one, without mixture or delay.",
        )
        require(
            not (self.ilm_weight and self.mixture), "an internal LM is subtracted from log-probs, not from a mixture."
        )

    @property
    def fuses(self) -> bool:
        """Whether any language model has a say."""
        return any(self.lm_weights) or self.ilm_weight > 0

    @property
    def subtracts_last(self) -> bool:
        """Whether the last language model is subtracted in the internal one's place."""
        return self.ilm_weight > 0 and self.ilm_variant == "source_lm"

    @property
    def is_linear(self) -> bool:
        """Whether totals can be had again from the parts of the tokens alone."""
        return self.gate is None and self.mixture is None and self.trust is None

    def normalize(self, policy: EndPolicy) -> Normalize:
        """What the fused step normalises under an end policy."""
        if policy == "end_factored":
            return "end_factored"
        return "local" if self.gate is not None and self.form == "local" else "none"

    def weights_at(self, step: int) -> tuple[float, ...]:
        """Weight of each language model at step t, counted from 0, before any gate."""
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
        if self.subtracts_last:
            require(
                count == len(self.lm_weights) + 1,
                f"the rule {self} weighs {len(self.lm_weights)} language model(s) and subtracts one more, the last, "
                f"but {count} are loaded; load both, the one of the acoustic model's own training text last.",
            )
            return self
        if self.lm_mixture:
            require(
                len(self.lm_mixture) == count,
                f"the rule {self} mixes {len(self.lm_mixture)} language models, but {count} are loaded.",
            )
            return self
        if len(self.lm_weights) == count or (count == 0 and not any(self.lm_weights)):
            return replace(self, lm_weights=self.lm_weights[:count])
        require(
            False,
            f"the rule {self} weighs {len(self.lm_weights)} language model(s), but {count} are loaded; "
            "load the decoder with lm=... or use weight 0.",
        )
        raise AssertionError

    def __repr__(self) -> str:
        """What differs from the defaults."""
        shown = [f"{self.lm_weights}"]
        for entry in fields(self)[2:]:
            value = getattr(self, entry.name)
            if value != entry.default:
                shown.append(f"{entry.name}={value!r}")
        return f"{self.name}({', '.join(shown)})"


def as_weights(weight: float | Sequence[float]) -> tuple[float, ...]:
    """One weight or several as a tuple.

    Raises:
        InvalidArgumentError: neither a number nor a sequence.
    """
    if isinstance(weight, (int, float)):
        return (weight,)
    require(
        isinstance(weight, Sequence) and not isinstance(weight, str),
        f"weight must be a number or a sequence of numbers, got {weight!r}.",
    )
    return tuple(weight)
