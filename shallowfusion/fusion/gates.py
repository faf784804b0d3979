"""Gates: which share of its weight a language model gets in a row, from what the models themselves say there.

A gate alone lets a hypothesis dodge the language model by passing through states in which it is switched off: its
total then lacks costs that its rivals paid. So every gate comes in a `form`:

    local      the fused row is renormalised (METHODS 1.9), so that no step has a net cost or gain
    advantage  asr + weight * (lm - max lm): a token costs what the model's favourite would have saved
    plain      asr + weight * lm: as in greedy search, where rows are never compared
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from shallowfusion.config import require
from shallowfusion.fusion.step import row_statistics
from shallowfusion.values import RowStatistics

__all__ = [
    "AgreementGate",
    "ConfidenceGate",
    "EntropyGate",
    "EvidenceGate",
    "Form",
    "Gate",
    "InverseEntropyGate",
    "MarginGate",
    "StepView",
]

Form = Literal["local", "advantage", "plain"]
FORMS: tuple[Form, ...] = ("local", "advantage", "plain")


@dataclass(frozen=True)
class StepView:
    """What a gate may look at in one step.

    Args:
        logits: per source [rows, vocab_s]; the acoustic source first.
        temperatures: one per source.
        step: generated tokens so far, the same for all rows.
        maps: per source the id of each acoustic token, or None; see `fused_step`.
        sums: float32 [rows, sources], each source's log-prob of the tokens so far; the best row of an utterance comes
            first. Only where the gate asks for it.
        beam_size: rows per utterance.
    """

    logits: Sequence[Tensor]
    temperatures: Sequence[float]
    step: int = 0
    maps: Sequence[Tensor | None] | None = None
    sums: Tensor | None = None
    beam_size: int = 1

    @cached_property
    def acoustic(self) -> RowStatistics:
        return row_statistics(self.logits[0], self.temperatures[0])

    @cached_property
    def language(self) -> tuple[RowStatistics, ...]:
        pairs = zip(self.logits[1:], self.temperatures[1:], strict=True)
        return tuple(row_statistics(source, temperature) for source, temperature in pairs)

    @property
    def num_models(self) -> int:
        return len(self.logits) - 1

    def for_each_model(self, share: Tensor) -> Tensor:
        """The same share [rows] for every language model, [rows, models]."""
        return share[:, None].expand(-1, self.num_models)


class Gate(Protocol):
    """Shares of the language models' weights. Price: one read of the logits it looks at.

    Args:
        needs_sums: whether it looks at `StepView.sums`.
    """

    needs_sums: ClassVar[bool]

    def shares(self, view: StepView) -> Tensor:
        """Share of each language model's weight in each row, [rows, models], from 0 to 1."""
        ...


@dataclass(frozen=True)
class EntropyGate:
    """H_asr / ln(vocab), or 2 * sigmoid(H_asr) - 1 where `squash` is "sigmoid": more weight where speech is unclear."""

    needs_sums: ClassVar[bool] = False

    squash: Literal["vocabulary", "sigmoid"] = "sigmoid"

    def __post_init__(self) -> None:
        require(
            self.squash in ("vocabulary", "sigmoid"), f"squash must be 'vocabulary' or 'sigmoid', got {self.squash!r}."
        )

    def shares(self, view: StepView) -> Tensor:
        entropy = view.acoustic.entropy
        if self.squash == "sigmoid":
            return view.for_each_model(2 * torch.sigmoid(entropy) - 1)
        return view.for_each_model(entropy / max(math.log(view.logits[0].shape[1]), 1e-9))


@dataclass(frozen=True)
class ConfidenceGate:
    """(1 - max P_asr) ** power."""

    needs_sums: ClassVar[bool] = False

    power: float = 1.0

    def __post_init__(self) -> None:
        _positive("power", self.power)

    def shares(self, view: StepView) -> Tensor:
        return view.for_each_model((-torch.expm1(view.acoustic.max_log_prob)).clamp(0, 1) ** self.power)


@dataclass(frozen=True)
class MarginGate:
    """sigmoid((threshold - margin) / width), margin = nats between the two best acoustic tokens."""

    needs_sums: ClassVar[bool] = False

    threshold: float = 2.0
    width: float = 1.0

    def __post_init__(self) -> None:
        require(math.isfinite(self.threshold), f"threshold must be finite, got {self.threshold!r}.")
        _positive("width", self.width)

    def shares(self, view: StepView) -> Tensor:
        return view.for_each_model(torch.sigmoid((self.threshold - view.acoustic.margin) / self.width))


@dataclass(frozen=True)
class InverseEntropyGate:
    """H_asr / (H_asr + H_lm): trust the language model only where it is itself sure."""

    needs_sums: ClassVar[bool] = False

    def shares(self, view: StepView) -> Tensor:
        own = view.acoustic.entropy
        found = [own / (own + language.entropy).clamp_min(1e-9) for language in view.language]
        return torch.stack(found, dim=1)


@dataclass(frozen=True)
class AgreementGate:
    """1 where the language model's favourite is among the acoustic model's best `top_k` tokens, else 0."""

    needs_sums: ClassVar[bool] = False

    top_k: int = 10

    def __post_init__(self) -> None:
        require(isinstance(self.top_k, int) and self.top_k >= 1, f"top_k must be at least 1, got {self.top_k!r}.")

    def shares(self, view: StepView) -> Tensor:
        acoustic = view.logits[0]
        maps = view.maps or [None] * len(view.logits)
        found = []
        for source, mapping in zip(view.logits[1:], maps[1:], strict=True):
            own = in_acoustic_ids(source, mapping, acoustic.shape[1])
            favourite = own.argmax(dim=1, keepdim=True)
            found.append((acoustic > acoustic.gather(1, favourite)).sum(dim=1) < self.top_k)
        return torch.stack(found, dim=1).float()


@dataclass(frozen=True)
class EvidenceGate:
    """sigmoid(scale * (log P_lm(y) - log P_ilm(y) - margin * tokens)), y = the best live hypothesis so far.

    A language model earns its weight by predicting what is being said better, by `margin` nats per token, than the
    decoder's own language model does; one of the wrong domain loses it. All rows of an utterance share it, so that
    their totals stay comparable. Source: ours; Bayesian interpolation with the internal LM as the rival.
    """

    needs_sums: ClassVar[bool] = True

    scale: float = 0.5
    margin: float = 0.0

    def __post_init__(self) -> None:
        _positive("scale", self.scale)
        require(math.isfinite(self.margin), f"margin must be finite, got {self.margin!r}.")

    def shares(self, view: StepView) -> Tensor:
        assert view.sums is not None
        best = view.sums[:: view.beam_size]
        advantage = best[:, 1:-1] - best[:, -1:]
        return torch.sigmoid(self.scale * (advantage - self.margin * view.step)).repeat_interleave(
            view.beam_size, dim=0
        )


def in_acoustic_ids(source: Tensor, mapping: Tensor | None, vocab: int) -> Tensor:
    """The logits of a source by acoustic id, [rows, <= vocab]; -inf where it has no counterpart."""
    if mapping is None:
        return source[:, :vocab]
    taken = source[:, mapping.clamp_min(0).long()]
    return taken.masked_fill(mapping[None] < 0, float("-inf"))


def _positive(name: str, value: float) -> None:
    require(
        isinstance(value, (int, float)) and math.isfinite(value) and value > 0,
        f"{name} must be finite and above 0, got {value!r}.",
    )
