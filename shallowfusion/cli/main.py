"""The command `shallowfusion`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from shallowfusion import __version__
from shallowfusion.cli import build_ngram, calibrate, demo, evaluate, explain, train_gate, train_ilm, transcribe, tune
from shallowfusion.errors import ShallowFusionError

__all__ = ["main"]

BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; bad input ends with one sentence on standard error and exit code 2."""
    parser = argparse.ArgumentParser(prog="shallowfusion", description="Transcribe with language models in the beam.")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--verbose", action="store_true", help="log what happens on the way")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    transcribe.add_parser(commands)
    evaluate.add_parser(commands)
    tune.add_parser(commands)
    explain.add_parser(commands)
    calibrate.add_parser(commands)
    train_gate.add_parser(commands)
    train_ilm.add_parser(commands)
    demo.add_parser(commands)
    build_ngram.add_parser(commands)
    chosen = parser.parse_args(arguments)
    if not chosen.verbose:
        # Known to transformers before it is imported; its own bars would mix with our output.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.INFO if chosen.verbose else logging.CRITICAL, format="%(name)s: %(message)s")
    try:
        code: int = chosen.run(chosen)
        return code
    except ShallowFusionError as error:
        print(f"shallowfusion: {error}", file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:  # the reader of our output left, for instance `| head`
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
