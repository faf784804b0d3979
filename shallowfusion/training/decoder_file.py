"""A tuned decoder in one JSON file: models, rule, options, temperatures, and what they were chosen on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from shallowfusion.config import require
from shallowfusion.decoder import FusionDecoder
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.fusion.parsing import parse_rule
from shallowfusion.options import DecodingOptions
from shallowfusion.scorers.fingerprints import tensor_fingerprint
from shallowfusion.search.bridging import BRIDGES, LmBridge
from shallowfusion.training.calibration import Calibration

__all__ = ["DecoderFile", "saved_options", "with_calibration"]

_KIND, _VERSION = "shallowfusion decoder", 1
# What belongs to a call, not to a decoder, or is said by the rule.
_LEFT_OUT = frozenset(
    {"rule", "lm_weight", "initial_steps", "n_best", "batch_size", "without_timestamps", "hotword_weight"}
)


@dataclass(frozen=True)
class DecoderFile:
    """What `transcribe --config` needs to decode as `tune` did.

    Args:
        asr, lm: hub ids, or directories as seen from the current one.
        rule: as `parse_rule` reads it.
        options: decoding options other than the rule; those not named keep their defaults.
        fingerprints: of the acoustic model and each language model.
        calibration: temperatures in force, None = 1 for all.
        chosen_on: what the choice rests on, for people.
        internal_context: file of train-ilm that internal_lm(variant="trained") stands on, and its fingerprint.
        lm_bridge: how language models on another tokenizer were joined, None = not at all.
    """

    asr: str
    lm: tuple[str, ...]
    rule: str
    options: Mapping[str, Any]
    fingerprints: tuple[str, ...]
    calibration: Calibration | None = None
    chosen_on: Mapping[str, Any] = field(default_factory=dict)
    internal_context: tuple[str, str] | None = None
    lm_bridge: LmBridge | None = None

    def __post_init__(self) -> None:
        require(self.lm_bridge in (None, *BRIDGES), f"lm_bridge must be 'bytes' or None, got {self.lm_bridge!r}.")

    def decoding_options(self) -> DecodingOptions:
        """The options of the file with its rule."""
        return DecodingOptions.of(**self.options, rule=parse_rule(self.rule))

    def check(self, decoder: FusionDecoder) -> None:
        """Raises InvalidArgumentError if other models are loaded than the file was made with, or otherwise joined."""
        require(
            decoder.fingerprints == self.fingerprints,
            f"the decoder file was made for models {', '.join(self.fingerprints)}, but "
            f"{', '.join(decoder.fingerprints)} are loaded; tune again with shallowfusion tune.",
        )
        require(
            decoder.lm_bridge == self.lm_bridge,
            f"the decoder file was made with lm_bridge={self.lm_bridge!r}, but the decoder has {decoder.lm_bridge!r}; "
            'give it that of the file, write "lm_bridge" into a file from before it was kept, or tune again.',
        )
        if self.internal_context is not None:
            path, wanted = self.internal_context
            loaded = decoder.internal_context
            got = "none" if loaded is None else tensor_fingerprint(loaded)
            require(
                got == wanted,
                f"the decoder file was made with the internal context {wanted} of {path}, but {got} is loaded; "
                "give it the file of that time, or tune again with shallowfusion tune.",
            )

    def save(self, path: Path) -> None:
        """Write the file; model directories are named from its own directory.

        Raises:
            InvalidArgumentError: it cannot be written.
        """
        record = {
            "kind": _KIND,
            "version": _VERSION,
            "asr": _from(self.asr, path),
            "lm": [_from(name, path) for name in self.lm],
            "rule": self.rule,
            "options": dict(self.options),
            "fingerprints": list(self.fingerprints),
            "calibration": None if self.calibration is None else self.calibration.as_data(),
            "chosen_on": dict(self.chosen_on),
            "lm_bridge": self.lm_bridge,
        }
        if self.internal_context is not None:
            name, digits = self.internal_context
            record["internal_context"] = {"file": _from(name, path), "fingerprint": digits}
        try:
            path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise InvalidArgumentError(f"{path} cannot be written ({error}); name another file.") from error

    @classmethod
    def load(cls, path: Path) -> DecoderFile:
        """Read what `save` wrote.

        Raises:
            InvalidArgumentError: no such file, or one that is no decoder file, or a rule or option that is unknown.
        """
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            require(
                isinstance(record, dict) and record.get("kind") == _KIND and record.get("version") == _VERSION,
                f"wanted kind {_KIND!r}, version {_VERSION}",
            )
            calibration, context = record["calibration"], record.get("internal_context")
            found = cls(
                asr=_towards(record["asr"], path),
                lm=tuple(_towards(name, path) for name in record["lm"]),
                rule=record["rule"],
                options=dict(record["options"]),
                fingerprints=tuple(record["fingerprints"]),
                calibration=None if calibration is None else Calibration.from_data(calibration),
                chosen_on=dict(record["chosen_on"]),
                internal_context=None if context is None else (_towards(context["file"], path), context["fingerprint"]),
                lm_bridge=record.get("lm_bridge"),
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidArgumentError(
                f"{path} is no decoder file ({type(error).__name__}: {error}); make one with shallowfusion tune."
            ) from error
        found.decoding_options()
        return found


def saved_options(options: DecodingOptions, calibrated: bool = False) -> dict[str, Any]:
    """The options that differ from the defaults, without the rule and what belongs to one call.

    Args:
        calibrated: leave out the temperatures, which a calibration holds.
    """
    options = replace(options, hotwords=options.weighted_hotwords() or None)
    plain = DecodingOptions()
    left_out = _LEFT_OUT | ({"asr_temperature", "lm_temperature"} if calibrated else frozenset())
    return {
        entry.name: _plain(getattr(options, entry.name))
        for entry in fields(options)
        if entry.name not in left_out and getattr(options, entry.name) != getattr(plain, entry.name)
    }


def with_calibration(
    decoder: FusionDecoder, options: DecodingOptions, calibration: Calibration | None
) -> DecodingOptions:
    """The options at the calibrated temperatures, if there are any.

    Raises:
        InvalidArgumentError: made for other models, or the options name temperatures of their own.
    """
    if calibration is None:
        return options
    require(
        options.asr_temperature == 1.0 and options.lm_temperature == 1.0,
        "give either a calibration or asr_temperature and lm_temperature, got both; the calibration holds them.",
    )
    calibration.check(decoder.fingerprints)
    asr, *lms = calibration.temperatures
    return replace(options, asr_temperature=asr, lm_temperature=tuple(lms) or 1.0)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _from(name: str, path: Path) -> str:
    """A local path as seen from the directory of the decoder file; a hub id as it is."""
    return os.path.relpath(name, path.parent) if Path(name).exists() else name


def _towards(name: Any, path: Path) -> str:
    require(isinstance(name, str) and bool(name), f"a model must be named by text, got {name!r}")
    near = path.parent / name
    return str(near) if near.exists() else name
