"""`shallowfusion demo`: shipped recordings, alone and fused, with word error rates."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="transcribe the shipped clips alone and fused",
        description="Transcribe 20 shipped recordings of medical sentences with the shipped Whisper-type model alone, "
        "with a general and with a medical language model in the beam. Errors are marked [wrong], [-missing-], "
        "[+extra+]. Needs no network and no GPU.",
    )
    parser.add_argument("--json", action="store_true", help="figures and transcripts as JSON")
    parser.add_argument("--beam-size", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, float16, bfloat16, int8 (default: auto)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from shallowfusion.demo.report import clip_lines, run_demo, summary_lines

    def progress(title: str) -> None:
        if sys.stderr.isatty():
            print(f"{title} ...", file=sys.stderr)

    import torch

    torch.set_num_threads(1)  # these models are too small to share
    report = run_demo(arguments.device, arguments.dtype, arguments.beam_size, progress)
    if arguments.json:
        print(json.dumps(report.to_json(), indent=1))
        return 0
    for number in range(len(report.clips)):
        print("\n".join(clip_lines(report, number)), end="\n\n")
    print("\n".join(summary_lines(report)))
    return 0
