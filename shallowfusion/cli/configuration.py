"""`--config` and `--calibration`: what tune and calibrate wrote, for every command that decodes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shallowfusion.config import require
from shallowfusion.options import DecodingOptions

if TYPE_CHECKING:
    from shallowfusion.decoder import FusionDecoder

__all__ = ["add_configuration", "apply_configuration", "configured", "load_decoder"]

_IN_THE_FILE = (
    "asr",
    "lm",
    "rule",
    "lm_weight",
    "initial_steps",
    "ramp",
    "catch_up",
    "calibration",
    "internal_context",
)


def add_configuration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE",
        help="decoder file of shallowfusion tune: models, rule and options; other decoding options override it",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="temperatures of shallowfusion calibrate, for the fused system"
    )


def apply_configuration(arguments: argparse.Namespace) -> None:
    """Fill in what the decoder file says and the command line does not.

    Raises:
        InvalidArgumentError: no such file, or models and rule are named beside it.
    """
    if getattr(arguments, "config", None) is None:
        return
    from shallowfusion.training.decoder_file import DecoderFile

    given = [f"--{name.replace('_', '-')}" for name in _IN_THE_FILE if getattr(arguments, name, None)]
    require(not given, f"--config names models, rule and temperatures, so {', '.join(given)} cannot be given with it.")
    found = DecoderFile.load(arguments.config)
    arguments.asr, arguments.lm, arguments.rule = found.asr, list(found.lm), found.rule
    arguments.lm_bridge = getattr(arguments, "lm_bridge", None) or found.lm_bridge
    arguments.internal_context = None if found.internal_context is None else found.internal_context[0]
    for name, value in found.options.items():
        if name == "suppress_blank":
            arguments.keep_blank = arguments.keep_blank or not value
        elif name == "hotwords":
            arguments.hotword = arguments.hotword or [f"{text}={weight}" for text, weight in value.items()]
        else:
            require(
                hasattr(arguments, name),
                f"{arguments.config} sets {name}, which the command line has no option for; take it out.",
            )
            if getattr(arguments, name) is None:
                setattr(arguments, name, _as_argument(value))


def load_decoder(arguments: argparse.Namespace) -> FusionDecoder:
    """The models that the options of `add_model_options` name."""
    from shallowfusion.decoder import FusionDecoder

    return FusionDecoder.from_pretrained(
        arguments.asr,
        arguments.lm,
        arguments.device,
        arguments.dtype,
        arguments.internal_context,
        getattr(arguments, "lm_bridge", None),
        getattr(arguments, "ngram_lookups", None) or "auto",
        ctc=getattr(arguments, "ctc", None),
        attention=getattr(arguments, "attention", None) or "auto",
    )


def configured(arguments: argparse.Namespace, decoder: FusionDecoder, options: DecodingOptions) -> DecodingOptions:
    """The options at the temperatures of --calibration or --config.

    Raises:
        InvalidArgumentError: either file was made for other models than are loaded.
    """
    if getattr(arguments, "config", None) is None and getattr(arguments, "calibration", None) is None:
        return options
    from shallowfusion.training.calibration import Calibration
    from shallowfusion.training.decoder_file import DecoderFile, with_calibration

    if arguments.config is None:
        return with_calibration(decoder, options, Calibration.load(arguments.calibration))
    found = DecoderFile.load(arguments.config)
    found.check(decoder)
    return with_calibration(decoder, options, found.calibration)


def _as_argument(value: Any) -> Any:
    if value is None:
        return "none"
    return ",".join(map(str, value)) if isinstance(value, list) else value
