"""A gate that was trained: a small network turns what the models say in a row into the LM's weight (METHODS 11.3)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from shallowfusion.config import require
from shallowfusion.errors import InvalidArgumentError, ModelError
from shallowfusion.fusion.gates import FORMS, Form, StepView, in_acoustic_ids
from shallowfusion.values import RowStatistics

__all__ = ["GateNetwork", "GateSettings", "LearnedGate", "feature_names", "gate_features"]

WEIGHTS, SETTINGS = "gate.safetensors", "gate.json"
_KIND, _VERSION = "shallowfusion gate", 1
_FARTHEST = 20.0  # nats; beyond, a margin or a difference says nothing more
_ACOUSTIC = ("entropy_asr", "max_log_prob_asr", "margin_asr", "step")
_LANGUAGE = ("entropy_lm", "max_log_prob_lm", "margin_lm", "agreement", "log_prob_of_asr_best", "log_ratio")


def feature_names(num_models: int) -> tuple[str, ...]:
    """The columns of `gate_features` for a number of language models."""
    return (*_ACOUSTIC, *(f"{name}{k}" for k in range(num_models) for name in _LANGUAGE))


def gate_features(view: StepView) -> Tensor:
    """What the gate looks at, float32 [rows, features]: row statistics, and what each LM says of the acoustic best.

    Entropies, log-probs and margins are in nats, at most 20 away from 0; `step` is log(1 + t). `agreement` is 1 where
    both favour the same token; `log_ratio` is how much more the LM likes the acoustic best than the acoustic model.

    Price: one read of every source's logits for statistics, one for the best tokens.
    """
    own = view.acoustic
    best = view.logits[0].argmax(dim=1, keepdim=True)
    columns = [*_columns(own), torch.full_like(own.entropy, float(view.step)).log1p()]
    maps = view.maps or [None] * len(view.logits)
    for k, statistics in enumerate(view.language):
        mapped = in_acoustic_ids(view.logits[1 + k], maps[1 + k], view.logits[0].shape[1])
        known = best < mapped.shape[1]
        place = best.clamp_max(mapped.shape[1] - 1)
        log_prob = mapped.gather(1, place).float() / view.temperatures[1 + k] - statistics.log_sum_exp[:, None]
        log_prob = torch.where(known, log_prob, torch.full_like(log_prob, -_FARTHEST))[:, 0]
        agrees = (mapped.argmax(dim=1, keepdim=True) == best)[:, 0].float()
        columns += [*_columns(statistics), agrees, log_prob, log_prob - own.max_log_prob]
    return torch.stack([column.float() for column in columns], dim=1).nan_to_num(nan=0.0).clamp(-_FARTHEST, _FARTHEST)


def _columns(statistics: RowStatistics) -> tuple[Tensor, Tensor, Tensor]:
    return statistics.entropy, statistics.max_log_prob, statistics.margin


@dataclass(frozen=True)
class GateSettings:
    """Shape of a gate.

    Args:
        num_models: language models; one output each.
        largest_weight: the weight of a gate that is wide open (lambda_max).
        first_weight: what an untrained gate gives everywhere.
        hidden_size: of both layers.
        shares_strength: mixture of experts: a softmax over the models times one total strength, so that several
            models compete; False = every model has its own sigmoid.
    """

    num_models: int = 1
    largest_weight: float = 1.0
    first_weight: float = 0.1
    hidden_size: int = 64
    shares_strength: bool = False

    def __post_init__(self) -> None:
        require(
            isinstance(self.num_models, int) and self.num_models >= 1,
            f"a gate needs at least one language model, got num_models={self.num_models!r}.",
        )
        require(
            0 < self.first_weight < self.largest_weight,
            f"first_weight must be above 0 and below largest_weight={self.largest_weight!r}, "
            f"got {self.first_weight!r}.",
        )
        require(
            isinstance(self.hidden_size, int) and self.hidden_size >= 1,
            f"hidden_size must be an integer of at least 1, got {self.hidden_size!r}.",
        )


class GateNetwork(torch.nn.Module):
    """Standardised features -> LayerNorm -> two layers -> the weight of each language model as share of the largest."""

    mean: Tensor
    scale: Tensor

    def __init__(self, settings: GateSettings) -> None:
        super().__init__()
        size, hidden = len(feature_names(settings.num_models)), settings.hidden_size
        outputs = settings.num_models + int(settings.shares_strength)
        self.settings = settings
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.layers = torch.nn.Sequential(
            torch.nn.LayerNorm(size),
            torch.nn.Linear(size, hidden),
            torch.nn.GELU(),
            torch.nn.Linear(hidden, hidden),
            torch.nn.GELU(),
            torch.nn.Linear(hidden, outputs),
        )
        last = self.layers[-1]
        assert isinstance(last, torch.nn.Linear)
        share = settings.first_weight / settings.largest_weight
        with torch.no_grad():
            last.weight.zero_()
            last.bias.zero_()
            if settings.shares_strength:  # an untrained softmax gives every model an equal part
                share = min(share * settings.num_models, 0.99)
                last.bias[-1] = torch.logit(torch.tensor(share))
            else:
                last.bias.fill_(float(torch.logit(torch.tensor(share))))

    def standardise(self, features: Tensor) -> None:
        """Take mean and spread of each feature from [rows, features]."""
        self.mean.copy_(features.mean(dim=0))
        self.scale.copy_(features.std(dim=0, correction=0).clamp_min(1e-3))

    def forward(self, features: Tensor) -> Tensor:
        """Shares [rows, models], each from 0 to 1."""
        found: Tensor = self.layers((features - self.mean) / self.scale)
        if not self.settings.shares_strength:
            return torch.sigmoid(found)
        return torch.softmax(found[:, :-1], dim=1) * torch.sigmoid(found[:, -1:])


@dataclass(frozen=True)
class LearnedGate:
    """A trained gate and the models it was trained for; satisfies `Gate`.

    Price: `gate_features`, and two layers of 64 per row.

    Args:
        fingerprints: of the acoustic model and the language models it was trained for.
        origin, digest: where it was loaded from and which weights these are, for `repr`.
        form: the one it was trained in (see `gates`).
    """

    needs_sums: ClassVar[bool] = False

    settings: GateSettings
    network: GateNetwork = field(repr=False, compare=False)
    fingerprints: tuple[str, ...] = ()
    origin: str = ""
    digest: str = ""
    form: Form = "local"

    @torch.inference_mode()
    def shares(self, view: StepView) -> Tensor:
        require(
            view.num_models == self.settings.num_models,
            f"the gate {self.origin} weighs {self.settings.num_models} language model(s), got {view.num_models}.",
        )
        features = gate_features(view)
        network = self.network.to(features.device)
        return network(features)  # type: ignore[no-any-return]

    def check_models(self, fingerprints: Sequence[str]) -> None:
        """Raises InvalidArgumentError for other models than the gate was trained for."""
        require(
            tuple(fingerprints) == self.fingerprints,
            f"the gate {self.origin} was trained for models {', '.join(self.fingerprints)}, but "
            f"{', '.join(fingerprints)} are loaded; train one for these with shallowfusion train-gate.",
        )

    def save(self, directory: Path) -> None:
        """Write `gate.safetensors` and `gate.json`.

        Raises:
            InvalidArgumentError: the directory cannot be written.
        """
        from safetensors.torch import save_file

        record = {"kind": _KIND, "version": _VERSION, "settings": vars(self.settings)}
        record |= {
            "form": self.form,
            "features": feature_names(self.settings.num_models),
            "fingerprints": self.fingerprints,
        }
        try:
            directory.mkdir(parents=True, exist_ok=True)
            save_file({name: t.contiguous() for name, t in self.network.state_dict().items()}, directory / WEIGHTS)
            (directory / SETTINGS).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InvalidArgumentError(f"{directory} cannot hold a gate ({error}); name a directory.") from error

    @classmethod
    def load(cls, directory: str | Path) -> LearnedGate:
        """Read what `save` wrote.

        Raises:
            ModelError: the directory holds no gate, or one made with other features.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        place = Path(directory)
        try:
            record: dict[str, Any] = json.loads((place / SETTINGS).read_text(encoding="utf-8"))
            require(record["kind"] == _KIND and record["version"] == _VERSION, f"{SETTINGS} is of another kind.")
            settings = GateSettings(**record["settings"])
            expected = feature_names(settings.num_models)
            require(tuple(record["features"]) == expected, "it looks at other features than this release.")
            network = GateNetwork(settings)
            network.load_state_dict(load_file(place / WEIGHTS))
            fingerprints = tuple(str(own) for own in record["fingerprints"])
            form: Form = record.get("form", "local")
            require(form in FORMS, f"its form is {form!r}, wanted one of {', '.join(FORMS)}.")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f"{place} cannot be loaded as a learned gate ({type(error).__name__}: {reason}); make one with "
                "shallowfusion train-gate."
            ) from error
        digest = hashlib.sha256((place / WEIGHTS).read_bytes()).hexdigest()[:16]
        return cls(settings, network.eval(), fingerprints, str(directory), digest, form)
