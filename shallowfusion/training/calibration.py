"""Temperatures at which models are as sure as they are right (METHODS 3.3)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shallowfusion.config import require
from shallowfusion.decoder import FusionDecoder
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.fusion.catalogue import static
from shallowfusion.fusion.gates import StepView
from shallowfusion.options import DecodingOptions
from shallowfusion.training.teacher_forcing import forced_steps

__all__ = ["Calibration", "ModelCalibration", "calibrate", "calibrate_logits", "expected_calibration_error"]

_KIND, _VERSION = "shallowfusion calibration", 1
LOWEST, HIGHEST = 0.05, 20.0
ITERATIONS = 60
BINS = 15
_ROWS = 1024  # of float64 at a time


@dataclass(frozen=True)
class ModelCalibration:
    """What one model says of right tokens before and after calibration.

    Args:
        name: "asr", "lm", "lm0", ...
        fingerprint: of the model.
        temperature: at which the mean largest probability equals the accuracy.
        nll_temperature: with the least negative log-likelihood, the alternative.
        num_tokens: tokens measured.
        accuracy: share of tokens that are the model's favourite; no temperature changes it.
        confidence, ece, nll: mean largest probability, expected calibration error over 15 bins, and mean negative
            log-likelihood in nats: at temperature 1, at `temperature`, at `nll_temperature`.
    """

    name: str
    fingerprint: str
    temperature: float
    nll_temperature: float
    num_tokens: int
    accuracy: float
    confidence: tuple[float, float, float]
    ece: tuple[float, float, float]
    nll: tuple[float, float, float]

    @property
    def is_at_bound(self) -> bool:
        """Whether no temperature in the range makes the model as sure as it is right."""
        return self.temperature in (LOWEST, HIGHEST)


@dataclass(frozen=True)
class Calibration:
    """Temperatures of an acoustic model and its language models.

    Args:
        criterion: "confidence" or "nll": which of a model's two temperatures is in force.
        measured_on: what the numbers rest on, for people.
    """

    models: tuple[ModelCalibration, ...]
    criterion: str = "confidence"
    measured_on: str = ""

    @property
    def temperatures(self) -> tuple[float, ...]:
        if self.criterion == "nll":
            return tuple(model.nll_temperature for model in self.models)
        return tuple(model.temperature for model in self.models)

    def check(self, fingerprints: Sequence[str]) -> None:
        """Raises InvalidArgumentError for other models than were calibrated."""
        own = tuple(model.fingerprint for model in self.models)
        require(
            own == tuple(fingerprints),
            f"the calibration was made for models {', '.join(own)}, but {', '.join(fingerprints)} are loaded; "
            "temperatures of other models do not fit, calibrate these with shallowfusion calibrate.",
        )

    def as_data(self) -> dict[str, Any]:
        """The record as plain data."""
        return {
            "kind": _KIND,
            "version": _VERSION,
            "criterion": self.criterion,
            "measured_on": self.measured_on,
            "models": [asdict(model) for model in self.models],
        }

    @classmethod
    def from_data(cls, data: Any) -> Calibration:
        """Raises InvalidArgumentError for data that is no calibration."""
        try:
            require(
                isinstance(data, dict) and data.get("kind") == _KIND and data.get("version") == _VERSION,
                f"wanted kind {_KIND!r}, version {_VERSION}",
            )
            models = []
            for row in data["models"]:
                triples = {name: tuple(float(value) for value in row[name]) for name in ("confidence", "ece", "nll")}
                models.append(ModelCalibration(**{**row, **triples}))
            require(data["criterion"] in ("confidence", "nll"), f"unknown criterion {data['criterion']!r}")
            for model in models:
                for value in (model.temperature, model.nll_temperature):
                    require(math.isfinite(value) and value > 0, f"{value!r} is no temperature")
            require(bool(models), "no models")
            return cls(tuple(models), data["criterion"], str(data["measured_on"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidArgumentError(f"this is no calibration ({type(error).__name__}: {error}).") from error

    def save(self, path: Path) -> None:
        """Raises InvalidArgumentError if the file cannot be written."""
        try:
            path.write_text(json.dumps(self.as_data(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InvalidArgumentError(f"{path} cannot be written ({error}); name another file.") from error

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Raises InvalidArgumentError: no such file, or one that is no calibration."""
        try:
            return cls.from_data(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            raise InvalidArgumentError(
                f"{path} is no calibration ({error}); make one with shallowfusion calibrate."
            ) from error


@torch.inference_mode()
def calibrate(
    decoder: FusionDecoder,
    batches: Iterable[tuple[Tensor, Sequence[tuple[int, ...]]]],
    options: DecodingOptions,
    most_tokens: int = 4000,
) -> tuple[ModelCalibration, ...]:
    """Calibrate the acoustic model and every language model on recordings with references, teacher-forced.

    The acoustic model's end of an utterance counts as one of its tokens; a language model's does not, since its end
    is that of a document.

    Price: one forced pass, and the logits of up to 2 * `most_tokens` tokens of every model in memory (50,000 ids,
    float32: 0.2 MB a token). With more tokens every second, fourth, ... one is measured.

    Args:
        batches: encoder output [utterances, frames, size] and the reference's ids of each utterance.
        options: language, prompt and the like; its rule and temperatures do not matter.

    Raises:
        InvalidArgumentError: no recordings.
    """
    end = decoder.acoustic.tokens.end
    names = decoder.source_names
    kept = [_KeptRows(most_tokens) for _ in names]
    rule = static((1.0,) * len(decoder.language_models)) if decoder.language_models else None
    plain = replace(options, rule=rule, lm_weight=None, initial_steps=0, asr_temperature=1.0, lm_temperature=1.0)
    for encoded, references in batches:
        sources = decoder.sources(encoded, plain)
        for view, reached in forced_steps(sources, references):
            gold = torch.tensor([[*own, end][min(view.step, len(own))] for own in references])
            for s in range(len(names)):
                own_ids = _targets_of(view, s, gold, end)
                rows = [i for i in reached if own_ids[i] >= 0]
                kept[s].add(view.logits[s][rows], own_ids[rows])
    return tuple(
        calibrate_logits(name, own, *rows.all())
        for name, own, rows in zip(names, decoder.fingerprints, kept, strict=True)
    )


def _targets_of(view: StepView, source: int, gold: Tensor, end: int) -> Tensor:
    """The right tokens as ids of a source; -1 where it has none, or where a language model would have to end."""
    if source == 0:
        return gold
    mapping = None if view.maps is None else view.maps[source]
    own = torch.where(gold < view.logits[source].shape[1], gold, -1) if mapping is None else mapping.cpu()[gold].long()
    return torch.where(gold == end, -1, own)


class _KeptRows:
    """Logits and right tokens, evenly thinned so that at most twice `most` rows are held."""

    def __init__(self, most: int) -> None:
        self._most, self._stride, self._seen, self._held = max(1, most), 1, 0, 0
        self._logits: list[Tensor] = []
        self._targets: list[Tensor] = []

    def add(self, logits: Tensor, targets: Tensor) -> None:
        chosen = [i for i in range(len(targets)) if (self._seen + i) % self._stride == 0]
        self._seen += len(targets)
        if not chosen:
            return
        self._logits.append(logits[chosen].cpu())
        self._targets.append(targets[chosen])
        self._held += len(chosen)
        if self._held > 2 * self._most:
            held, own = self.all()
            self._logits, self._targets = [held[::2].clone()], [own[::2]]
            self._stride, self._held = 2 * self._stride, len(own[::2])

    def all(self) -> tuple[Tensor, Tensor]:
        require(bool(self._targets), "no tokens to calibrate on; give recordings with references.")
        return torch.cat(self._logits), torch.cat(self._targets)


def calibrate_logits(name: str, fingerprint: str, logits: Tensor, targets: Tensor) -> ModelCalibration:
    """Calibrate one model from its logits and the right tokens.

    Both criteria are monotone in the temperature (the gradient of the likelihood in 1 / temperature), so each is found
    by bisection of its logarithm, 60 times.

    Args:
        logits: [tokens, vocab], the model's own vocabulary; targets: int64 [tokens].

    Raises:
        InvalidArgumentError: no tokens, or logits that are NaN.
    """
    require(len(logits) == len(targets) > 0, f"{name}: no tokens to calibrate on; give recordings with references.")
    accuracy = float((logits.argmax(dim=1) == targets).double().mean())
    require(bool(torch.isfinite(logits.amax(dim=1)).all()), f"{name}: the logits hold NaN or only -inf.")
    temperature = _bisected(lambda t: float(_confidences(logits, t).mean()) - accuracy)
    nll_temperature = _bisected(lambda t: -_likelihood_slope(logits, targets, t))
    three = (1.0, temperature, nll_temperature)
    confidences = [_confidences(logits, t) for t in three]
    right = logits.argmax(dim=1) == targets
    return ModelCalibration(
        name, fingerprint, temperature, nll_temperature, len(targets), accuracy,
        _triple([float(own.mean()) for own in confidences]),
        _triple([expected_calibration_error(own, right) for own in confidences]),
        _triple([_negative_log_likelihood(logits, targets, t) for t in three]),
    )  # fmt: skip


def expected_calibration_error(confidences: Tensor, right: Tensor, bins: int = BINS) -> float:
    """Sum over equally wide bins of share of tokens * |accuracy - mean confidence|."""
    place = (confidences.double() * bins).long().clamp_max(bins - 1)
    count = torch.bincount(place, minlength=bins).double()
    sure = torch.bincount(place, weights=confidences.double(), minlength=bins)
    correct = torch.bincount(place, weights=right.double(), minlength=bins)
    return float((sure - correct).abs().sum() / count.sum())


def _bisected(surplus: Callable[[float], float]) -> float:
    """Where a function that falls with the temperature crosses 0; the end of the range it would leave."""
    if surplus(LOWEST) <= 0:
        return LOWEST
    if surplus(HIGHEST) >= 0:
        return HIGHEST
    low, high = math.log(LOWEST), math.log(HIGHEST)
    for _ in range(ITERATIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if surplus(math.exp(middle)) > 0 else (low, middle)
    return math.exp((low + high) / 2)


def _confidences(logits: Tensor, temperature: float) -> Tensor:
    """Largest probability of each row, float64 [tokens]."""
    found = []
    for rows in torch.split(logits, _ROWS):
        scaled = rows.double() / temperature
        found.append((scaled.amax(dim=1) - scaled.logsumexp(dim=1)).exp())
    return torch.cat(found)


def _likelihood_slope(logits: Tensor, targets: Tensor, temperature: float) -> float:
    """Derivative of the mean log-likelihood by 1 / temperature: gold logit minus expected logit."""
    total = 0.0
    for rows, own in zip(torch.split(logits, _ROWS), torch.split(targets, _ROWS), strict=True):
        values = rows.double()
        shares = torch.softmax(values / temperature, dim=1)
        expected = torch.where(shares > 0, shares * values, torch.zeros_like(values)).sum(dim=1)
        total += float((values.gather(1, own[:, None])[:, 0] - expected).sum())
    return total / len(targets)


def _negative_log_likelihood(logits: Tensor, targets: Tensor, temperature: float) -> float:
    total = 0.0
    for rows, own in zip(torch.split(logits, _ROWS), torch.split(targets, _ROWS), strict=True):
        total -= float(torch.log_softmax(rows.double() / temperature, dim=1).gather(1, own[:, None]).sum())
    return total / len(targets)


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    first, second, third = values
    return first, second, third
