"""`shallowfusion build-ngram`: text to an n-gram model in an ARPA file."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from shallowfusion.config import require
from shallowfusion.ngrams import units
from shallowfusion.ngrams.arpa import is_arpa, write_arpa
from shallowfusion.ngrams.estimate import Estimate, EstimateSettings, estimate
from shallowfusion.ngrams.perplexity import Perplexity, perplexity
from shallowfusion.ngrams.table import NgramTable

__all__ = ["add_parser", "run"]

UNIT_NAMES = "words, characters, or tokens MODEL (the pieces of a model's tokenizer)"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "build-ngram",
        help="estimate an n-gram language model from text",
        description="Estimate an n-gram model with interpolated modified Kneser-Ney smoothing and write an ARPA file. "
        "A model of an acoustic model's tokens can be given to transcribe as --lm.",
    )
    parser.add_argument("text", nargs="+", help="UTF-8 text, plain or gzipped, a sentence a line")
    parser.add_argument("--out", required=True, metavar="FILE", help="NAME.arpa or NAME.arpa.gz")
    parser.add_argument("--order", type=int, default=3, metavar="N", help="words of the longest n-grams (default: 3)")
    parser.add_argument("--units", nargs="+", default=["words"], metavar="UNIT", help=f"{UNIT_NAMES} (default: words)")
    parser.add_argument(
        "--prune", type=int, nargs="+", default=[], metavar="N",
        help="per order, leave out n-grams seen at most N times; the last holds for higher orders (default: 0)",
    )  # fmt: skip
    parser.add_argument("--vocab", type=int, default=None, metavar="N", help="keep the N most frequent words")
    parser.add_argument("--lower", action="store_true", help="lower-case the text")
    parser.add_argument(
        "--leading-space", action=argparse.BooleanOptionalAction, default=None,
        help="start each line with a space, as transcripts of Whisper do (default: for tokens)",
    )  # fmt: skip
    parser.add_argument("--held-out", nargs="+", default=[], metavar="TEXT", help="text to tell the perplexity of")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of sentences")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    require(is_arpa(arguments.out), f"--out must end in .arpa or .arpa.gz, got {arguments.out}.")
    settings = EstimateSettings(arguments.order, tuple(arguments.prune), arguments.vocab)
    chosen = _units(arguments.units, arguments.leading_space)
    lines = _with_progress(units.read_lines(arguments.text, arguments.lower), "lines read")
    found = estimate(chosen.split(lines), settings, chosen.vocabulary, _report)
    _report(f"writing {arguments.out}")
    write_arpa(found.model, arguments.out)
    held_out = None
    if arguments.held_out:
        text = units.read_lines(arguments.held_out, arguments.lower)
        held_out = perplexity(NgramTable(found.model), chosen.split(text))
    summary = _summary(found, held_out) | {"out": arguments.out, "units": chosen.name}
    summary["seconds"] = round(time.perf_counter() - started, 2)
    if arguments.json:
        print(json.dumps(summary, ensure_ascii=False))
    else:
        _show(summary)
    return 0


def _units(named: Sequence[str], leading_space: bool | None) -> units.Units:
    match list(named):
        case ["words"]:
            require(leading_space is None, "--leading-space is for characters and tokens, got it with words.")
            return units.words()
        case ["characters"]:
            return units.characters(bool(leading_space))
        case ["tokens", name]:
            return units.tokens(name, leading_space is not False)
    require(False, f"--units must be {UNIT_NAMES}, got {' '.join(named)!r}.")
    raise AssertionError


def _summary(found: Estimate, held_out: Perplexity | None) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "order": found.model.order,
        "ngrams": [len(ngrams) for ngrams in found.model.orders],
        "sentences": found.num_sentences,
        "words": found.num_words,
        "unknown_words": found.num_unknown,
        "discounts": [list(discounts) for discounts in found.discounts],
        "notes": list(found.notes),
    }
    if held_out is not None:
        summary["held_out"] = {
            "perplexity": held_out.value,
            "perplexity_of_known": held_out.of_known,
            "words": held_out.num_words,
            "unknown_words": held_out.num_unknown,
        }
    return summary


def _show(summary: dict[str, Any]) -> None:
    counts = ", ".join(f"{count} {order}-grams" for order, count in enumerate(summary["ngrams"], start=1))
    print(f"{summary['out']}: {counts} from {summary['words']} {summary['units']} in {summary['sentences']} sentences")
    for note in summary["notes"]:
        print(note)
    if "held_out" in summary:
        told = summary["held_out"]
        print(
            f"held-out perplexity {told['perplexity']:.2f} ({told['words']} words, {told['unknown_words']} unknown; "
            f"without those {told['perplexity_of_known']:.2f})"
        )


def _report(message: str) -> None:
    if sys.stderr.isatty():
        print(message, file=sys.stderr, flush=True)


def _with_progress(lines: Iterator[str], unit: str) -> Iterable[str]:
    if not sys.stderr.isatty():
        return lines
    from tqdm import tqdm

    bar: Iterable[str] = tqdm(lines, unit=" " + unit, unit_scale=True)
    return bar
