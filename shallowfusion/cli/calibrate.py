"""`shallowfusion calibrate`: the temperature of each model at which it is as sure as it is right."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shallowfusion.cli.configuration import load_decoder
from shallowfusion.cli.transcribe import add_model_options, progress
from shallowfusion.config import require
from shallowfusion.options import DecodingOptions

if TYPE_CHECKING:
    from torch import Tensor

    from shallowfusion.decoder import FusionDecoder
    from shallowfusion.evaluation.manifest import Recording
    from shallowfusion.training.session import EncodedSet

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="measure the temperatures at which models are as sure as they are right",
        description="Read the references of a development set through every model, teacher-forced, and find the "
        "temperature at which its mean largest probability equals its token accuracy. The file is for --calibration; "
        "uadf and gates by entropy or confidence want it. A killed run does not encode again.",
    )
    parser.add_argument("dev", type=Path, metavar="DEV", help="development set: a manifest as for evaluate")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="gets the temperatures as JSON")
    add_model_options(parser, is_required=False)
    parser.add_argument(
        "--criterion", choices=("confidence", "nll"), default="confidence",
        help="confidence = accuracy, or least negative log-likelihood (default: confidence)",
    )  # fmt: skip
    parser.add_argument("--language", default=None, help="language code of a multilingual model (default: detected)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="recordings together (default: 8)")
    parser.add_argument("--json", action="store_true", help="print the file's content instead of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    require(arguments.asr is not None, "give a Whisper-type model with --asr.")
    given = [f"--{name}" for name in ("config", "calibration") if getattr(arguments, name) is not None]
    require(not given, f"calibrate measures the models as they are; leave {' and '.join(given)} out.")
    require(arguments.batch_size >= 1, f"--batch-size must be at least 1, got {arguments.batch_size}.")
    from shallowfusion.evaluation.manifest import read_manifest
    from shallowfusion.training.calibration import Calibration, calibrate
    from shallowfusion.training.session import EncodedSet

    dev = [recording for recording in read_manifest(arguments.dev) if not recording.is_silence]
    require(bool(dev), f"{arguments.dev} holds silent recordings alone, wanted some with references.")
    decoder = load_decoder(arguments)
    options = DecodingOptions(language=arguments.language, batch_size=arguments.batch_size)
    require(
        arguments.out.absolute().parent.is_dir(),
        f"{arguments.out} cannot be written, its directory does not exist; name another file.",
    )
    work = arguments.out.with_name(arguments.out.name + ".encoded")  # by which a killed run goes on
    encoded = EncodedSet(decoder, work)
    encoded.make(dev, progress, arguments.batch_size)
    models = calibrate(decoder, _batches(decoder, dev, encoded, arguments.batch_size), options)
    found = Calibration(models, arguments.criterion, f"{len(dev)} utterances of {arguments.dev.name}")
    found.save(arguments.out)
    shutil.rmtree(work)
    if arguments.json:
        print(json.dumps(found.as_data(), indent=1))
    else:
        print("\n".join(_lines(found)))
        print(f"written to {arguments.out}; give it to transcribe, evaluate or tune as --calibration")
    return 0


def _batches(
    decoder: FusionDecoder, dev: Sequence[Recording], encoded: EncodedSet, size: int
) -> Iterator[tuple[Tensor, list[tuple[int, ...]]]]:
    from shallowfusion.training.teacher_forcing import text_ids

    for batch in progress([dev[start : start + size] for start in range(0, len(dev), size)], "reading references"):
        ids = [text_ids(decoder, recording.text) for recording in batch]
        yield encoded.read(batch), ids


def _lines(found: Any) -> list[str]:
    lines = [
        f"{'':6} {'tokens':>6} {'accuracy':>8}  {'temperature':>11}  {'confidence':>16}  {'ECE':>16}  "
        f"{'NLL, nats':>16}  {'T of least NLL':>14}"
    ]
    for model in found.models:
        pairs = [f"{one:.3f} -> {two:.3f}" for one, two, _ in (model.confidence, model.ece, model.nll)]
        bound = "  (no temperature in range fits)" if model.is_at_bound else ""
        lines.append(
            f"{model.name:6} {model.num_tokens:6d} {100 * model.accuracy:6.1f} %  {model.temperature:11.3f}  "
            f"{pairs[0]:>16}  {pairs[1]:>16}  {pairs[2]:>16}  {model.nll_temperature:14.3f}{bound}"
        )
    return lines
