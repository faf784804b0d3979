"""Which rules `tune` tries by decoding, and how their numbers are drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from shallowfusion.config import require

__all__ = ["DEFAULT_FAMILIES", "FAMILIES", "Draw", "drawn_rule"]

LARGEST_WEIGHT = 1.6


class Draw(Protocol):
    """Where numbers come from: an Optuna trial, or a fake in tests."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int) -> int: ...

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


def drawn_rule(family: str, draw: Draw, num_models: int, has_context: bool = False) -> str:
    """The text of a rule of a family with drawn numbers.

    Args:
        has_context: a trained internal context is loaded, so that internal_lm may draw the variant "trained".

    Raises:
        InvalidArgumentError: no such family.
    """
    require(family in FAMILIES, f"unknown family {family!r}; known are {', '.join(FAMILIES)}.")
    if family == "internal_lm":
        return _internal(family, draw, num_models, has_context)
    return FAMILIES[family](family, draw, num_models)


def _number(draw: Draw, name: str, low: float, high: float, log: bool = False) -> str:
    return f"{draw.suggest_float(name, low, high, log=log):.3g}"


def _weight(draw: Draw, family: str, num_models: int) -> str:
    weights = [_number(draw, f"{family}_weight{k}", 0.05, LARGEST_WEIGHT) for k in range(num_models)]
    return weights[0] if num_models == 1 else f"({', '.join(weights)})"


def _plain(family: str, draw: Draw, num_models: int) -> str:
    return f"{family}({_weight(draw, family, num_models)})"


def _piecewise(family: str, draw: Draw, num_models: int) -> str:
    start = draw.suggest_int("piecewise_initial_steps", 1, 8)
    catch_up = draw.suggest_categorical("piecewise_catch_up", [False, True])
    return f"piecewise({_weight(draw, family, num_models)}, {start}, catch_up={catch_up})"


def _internal(family: str, draw: Draw, num_models: int, has_context: bool = False) -> str:
    ilm = _number(draw, "internal_lm_ilm_weight", 0.01, 0.5)
    variants = ["zero_context", "mean_context", "silence", *(["trained"] if has_context else [])]
    variant = draw.suggest_categorical("internal_lm_variant", variants)
    return f"internal_lm({_weight(draw, family, num_models)}, {ilm}, variant={variant!r})"


def _confidence(family: str, draw: Draw, num_models: int) -> str:
    power = _number(draw, "confidence_gate_power", 0.1, 2.0, log=True)
    return f"confidence_gate({_weight(draw, family, num_models)}, power={power}{_form(family, draw)})"


def _margin(family: str, draw: Draw, num_models: int) -> str:
    threshold = _number(draw, "margin_gate_threshold", 0.5, 8.0)
    width = _number(draw, "margin_gate_width", 0.2, 4.0, log=True)
    weight = _weight(draw, family, num_models)
    return f"margin_gate({weight}, threshold={threshold}, width={width}{_form(family, draw)})"


def _entropy(family: str, draw: Draw, num_models: int) -> str:
    return f"{family}({_weight(draw, family, num_models)}{_form(family, draw)})"


def _evidence(family: str, draw: Draw, num_models: int) -> str:
    ilm = _number(draw, "evidence_gate_ilm_weight", 0.01, 0.5)
    scale = _number(draw, "evidence_gate_scale", 0.1, 2.0, log=True)
    margin = _number(draw, "evidence_gate_margin", -0.5, 1.5)
    return f"evidence_gate({_weight(draw, family, num_models)}, {ilm}, scale={scale}, margin={margin})"


def _form(family: str, draw: Draw) -> str:
    return f", form={draw.suggest_categorical(f'{family}_form', ['local', 'advantage', 'plain'])!r}"


FAMILIES: dict[str, Callable[[str, Draw, int], str]] = {
    "static": _plain,
    "piecewise": _piecewise,
    "internal_lm": _internal,
    "confidence_gate": _confidence,
    "margin_gate": _margin,
    "entropy_gate": _entropy,
    "inverse_entropy_gate": _entropy,
    "evidence_gate": _evidence,
}
DEFAULT_FAMILIES = ("static", "piecewise", "internal_lm", "confidence_gate", "margin_gate", "evidence_gate")
