"""`shallowfusion train-ilm`: what stands for "no recording" when the internal language model is subtracted."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from shallowfusion.cli.transcribe import progress
from shallowfusion.errors import InvalidArgumentError

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "train-ilm",
        help="train the context of the internal language model",
        description="Fit an encoder output to transcripts of the kind the acoustic model was trained on, so that its "
        "decoder without a recording is as good a language model as it can be; use it with "
        "--rule \"internal_lm(0.8, 0.2, 'trained')\" --internal-context FILE.",
    )
    parser.add_argument("texts", type=Path, metavar="TEXTS", help="transcripts, one a line")
    parser.add_argument("--asr", required=True, help="Whisper-type model: hub id or local directory")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="gets the context, as safetensors")
    parser.add_argument("--frames", type=int, default=1, metavar="N", help="of the context (default: 1)")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="updates (default: 300)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        lines = arguments.texts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"texts cannot be read from {arguments.texts}: {error}.") from error
    from shallowfusion.scorers.loading import choose_device, choose_dtype, load_whisper
    from shallowfusion.training.internal_context import train_internal_context, write_internal_context

    device = choose_device(arguments.device)
    acoustic = load_whisper(arguments.asr, device, choose_dtype("float32", device))
    texts = [line.strip() for line in lines if line.strip()]
    bar = iter(progress(range(arguments.steps), "training"))
    found = train_internal_context(
        acoustic, texts, arguments.frames, arguments.steps, progress=lambda step, loss: next(bar, None)
    )
    write_internal_context(arguments.out, found)
    figures = {"out": str(arguments.out), "perplexity_zero_encoder": found.before, "perplexity_trained": found.after}
    if arguments.json:
        print(json.dumps(figures))
    else:
        print(f"perplexity of held-out transcripts {found.before:.2f} with zeros, {found.after:.2f} trained")
    return 0
