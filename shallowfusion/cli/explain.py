"""`shallowfusion explain`: what each model said of each token, and where the language model decided."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from shallowfusion.cli.configuration import apply_configuration, configured, load_decoder
from shallowfusion.cli.transcribe import add_decoding_options, add_model_options, options_from
from shallowfusion.config import require

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "explain",
        help="show what each model said of each token of a transcript",
        description="Transcribe a recording fused and with the acoustic model alone, and show token by token what each "
        "model said, with which weight, what it would have liked, and where the language model changed the outcome.",
    )
    parser.add_argument("recording", metavar="RECORDING", help="wav, flac, mp3 or ogg, up to 30 s")
    add_model_options(parser, is_required=False)
    parser.add_argument("--reference", metavar="TEXT", help="what is said, to mark errors")
    parser.add_argument("--alternatives", type=int, default=3, metavar="N", help="best tokens per model (default: 3)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    add_decoding_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    apply_configuration(arguments)
    require(
        arguments.asr is not None and bool(arguments.lm),
        "give --asr and --lm, or a decoder file with --config; without a language model there is nothing to explain.",
    )
    require(arguments.alternatives >= 1, f"--alternatives must be at least 1, got {arguments.alternatives}.")
    options = options_from(arguments)
    from shallowfusion.evaluation.pages import write_page
    from shallowfusion.training.explanation import explain
    from shallowfusion.training.explanation_page import explanation_data, explanation_lines, explanation_page

    decoder = load_decoder(arguments)
    options = configured(arguments, decoder, options)
    found = explain(decoder, arguments.recording, options, arguments.alternatives)
    if arguments.html is not None:
        write_page(arguments.html, explanation_page(found, Path(arguments.recording).name, arguments.reference))
    if arguments.json:
        print(json.dumps(explanation_data(found, arguments.reference), ensure_ascii=False))
    else:
        print("\n".join(explanation_lines(found, arguments.reference)))
        if arguments.html is not None:
            print(f"page: {arguments.html}")
    return 0
