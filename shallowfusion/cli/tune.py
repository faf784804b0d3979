"""`shallowfusion tune`: the fusion rule and its numbers chosen on a development set, reported on a test set."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shallowfusion.cli.configuration import configured, load_decoder
from shallowfusion.cli.transcribe import add_decoding_options, add_model_options, options_from, progress
from shallowfusion.config import require
from shallowfusion.evaluation.normalisation import NORMALISERS

if TYPE_CHECKING:
    from shallowfusion.evaluation.scoring import Evaluation
    from shallowfusion.training.session import TunedSet
    from shallowfusion.training.tuning import Tried, Tuning

__all__ = ["add_parser", "run"]

DECODER, REPORT, DATA = "decoder.json", "report.html", "tuning.json"
INTERRUPTED = 130  # as shells report it
FEWEST = 50  # development recordings, for a floor of trust


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="choose a fusion rule and its weights on a development set",
        description="Encode each recording once, decode n-best lists at a few weights, search weights and length bonus "
        "exactly on the lists, draw other rules, confirm all by decoding, and write a decoder file for --config and a "
        "report. With --test the choice is tested there, once. A killed run goes on where it stopped.",
    )
    parser.add_argument("dev", type=Path, metavar="DEV", help="development set: a manifest as for evaluate")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"gets {DECODER}, {REPORT}, {DATA}")
    parser.add_argument("--test", type=Path, metavar="MANIFEST", help="test set, which shares no recording with DEV")
    add_model_options(parser, is_required=False)
    group = parser.add_argument_group("tuning")
    group.add_argument("--grid", default="0.1,0.2,0.4,0.6,0.8,1", metavar="W,W,...", help="weights decoded first")
    group.add_argument("--families", default=None, metavar="NAME,...", help="rules whose numbers are drawn")
    group.add_argument("--trials", type=int, default=16, metavar="N", help="drawn rules (default: 16)")
    group.add_argument("--try", dest="rules", action="append", default=[], metavar="RULE", help="a rule more to try")
    group.add_argument("--no-internal-lm", action="store_true", help="leave internal_lm out of the offline search")
    group.add_argument(
        "--trust", type=float, default=None, metavar="SHARE",
        help="guard the choice by fusion.trusted: the LM is left out where it finds the outcome less likely than all "
        "but SHARE of DEV, so that one of the wrong domain does no harm; 0.1 is sensible (default: off)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    group.add_argument("--normaliser", choices=NORMALISERS, default="english", help="default: english")
    group.add_argument("--spellings", type=Path, metavar="FILE", help="British spellings for the normaliser english")
    group.add_argument("--json", action="store_true", help="every figure as JSON")
    add_decoding_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print(f"shallowfusion: interrupted; the same command goes on from {arguments.out}", file=sys.stderr)
        return INTERRUPTED


def _check(arguments: argparse.Namespace) -> None:
    require(arguments.asr is not None, "give a Whisper-type model with --asr.")
    require(bool(arguments.lm), "tune weighs language models; give one with --lm.")
    require(arguments.config is None, "tune makes decoder files and reads none; leave --config out.")
    given = [name for name in ("rule", "lm_weight", "initial_steps", "ramp", "catch_up") if getattr(arguments, name)]
    require(not given, f"tune chooses the rule, so {', '.join(given)} cannot be given; name rules to try with --try.")


def _run(arguments: argparse.Namespace) -> int:
    from shallowfusion.evaluation.manifest import check_disjoint, read_manifest
    from shallowfusion.evaluation.normalisation import normaliser
    from shallowfusion.evaluation.stored import HypothesisStore
    from shallowfusion.training.session import EncodedSet, TunedSet
    from shallowfusion.training.tuning import tune

    settings = _settings(arguments)
    dev = [recording for recording in read_manifest(arguments.dev) if not recording.is_silence]
    if arguments.trust is not None and len(dev) < FEWEST:
        print(
            f"shallowfusion: --trust takes its floor from {len(dev)} recordings; with fewer than {FEWEST} it is chance",
            file=sys.stderr,
        )
    require(bool(dev), f"{arguments.dev} holds silent recordings alone, wanted some with references.")
    test = [] if arguments.test is None else [r for r in read_manifest(arguments.test) if not r.is_silence]
    check_disjoint(dev, test)
    if arguments.beam_size is None:
        arguments.beam_size = 10
    options = options_from(arguments)
    normalise = normaliser(arguments.normaliser, arguments.spellings)
    decoder = load_decoder(arguments)
    options = configured(arguments, decoder, options)
    encoded = EncodedSet(decoder, arguments.out / "encoded")
    encoded.make([*dev, *test], progress, options.batch_size)
    with HypothesisStore(arguments.out / "hypotheses.jsonl") as store:
        own = TunedSet(decoder, tuple(dev), encoded, store, normalise, progress)
        found = tune(own, options, settings)
        systems = _systems(found)
        on_dev = _evaluated(own, found, systems)
        on_test = None
        if test:
            on_test = _evaluated(TunedSet(decoder, tuple(test), encoded, store, normalise, progress), found, systems)
    _write(arguments, own, found, on_dev, on_test)
    return 0


def _context(arguments: argparse.Namespace, dev: TunedSet) -> tuple[str, str] | None:
    """The internal context that was given, which the chosen rule may need."""
    from shallowfusion.scorers.fingerprints import tensor_fingerprint

    loaded = dev.decoder.internal_context
    return None if loaded is None else (str(arguments.internal_context), tensor_fingerprint(loaded))


def _settings(arguments: argparse.Namespace) -> Any:
    from shallowfusion.training.families import DEFAULT_FAMILIES
    from shallowfusion.training.tuning import TuningSettings

    try:
        grid = tuple(float(number) for number in arguments.grid.split(",") if number.strip())
    except ValueError:
        grid = ()
    require(bool(grid), f"--grid must be numbers with commas between, got {arguments.grid!r}.")
    families = DEFAULT_FAMILIES
    if arguments.families is not None:
        families = tuple(name.strip() for name in arguments.families.split(",") if name.strip())
    return TuningSettings(
        grid, families, arguments.trials, arguments.seed, tuple(arguments.rules), not arguments.no_internal_lm,
        arguments.trust,
    )  # fmt: skip


def _systems(found: Tuning) -> dict[str, Tried]:
    """The best constant weight, if it was not chosen itself, and the choice."""
    best = found.best_static
    systems = {} if best.rule == found.chosen.rule else {f"best constant: {_shown(best)}": best}
    return systems | {f"chosen: {_shown(found.chosen)}": found.chosen}


def _shown(own: Tried) -> str:
    """The rule with what else was tuned and differs from the defaults."""
    bonus, threshold = own.options.length_bonus, own.options.end_threshold
    shown = f"{own.rule}, length_bonus={bonus:g}" if bonus else own.rule
    return shown if threshold == 1.5 else f"{shown}, end_threshold={threshold}"


def _evaluated(own: TunedSet, found: Tuning, systems: dict[str, Tried]) -> Evaluation:
    from shallowfusion.evaluation.scoring import ReferenceSet, evaluate

    texts = {"acoustic model alone": own.texts(own.decode(found.baseline.options, "acoustic model alone", fuses=False))}
    texts |= {name: own.texts(own.decode(tried.options, tried.rule)) for name, tried in systems.items()}
    ids = tuple(recording.id for recording in own.recordings)
    return evaluate(ReferenceSet(ids, tuple(own.references), own.normalise), texts)  # type: ignore[arg-type]


def _write(
    arguments: argparse.Namespace, dev: TunedSet, found: Tuning, on_dev: Evaluation, on_test: Evaluation | None
) -> None:
    from shallowfusion.evaluation.pages import write_page
    from shallowfusion.evaluation.report import table_lines
    from shallowfusion.training.calibration import Calibration
    from shallowfusion.training.decoder_file import DecoderFile, saved_options
    from shallowfusion.training.tuning_page import tuning_data, tuning_page

    calibration = None if arguments.calibration is None else Calibration.load(arguments.calibration)
    chosen = found.chosen
    about = {
        "utterances": len(dev.recordings),
        "errors": chosen.num_errors,
        "baseline_errors": found.baseline.num_errors,
    }
    if on_test is not None:
        about["test_errors"] = sum(on_test.systems[-1].words.errors)
        about["test_baseline_errors"] = sum(on_test.baseline.words.errors)
    file = DecoderFile(
        arguments.asr, tuple(arguments.lm), chosen.rule, saved_options(chosen.options, calibration is not None),
        dev.decoder.fingerprints, calibration, about, _context(arguments, dev), dev.decoder.lm_bridge,
    )  # fmt: skip
    file.save(arguments.out / DECODER)
    data = tuning_data(found, dev, on_test)
    (arguments.out / DATA).write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    write_page(arguments.out / REPORT, tuning_page(found, dev, on_dev, on_test))
    if arguments.json:
        print(json.dumps(data, ensure_ascii=False, indent=1))
        return
    print(f"{len(found.tried)} rules decoded on {len(dev.recordings)} development utterances, fewest errors first")
    print(f"{found.baseline.num_errors:5d}  acoustic model alone")
    for own in sorted(found.tried, key=lambda tried: tried.num_errors)[:10]:
        print(f"{own.num_errors:5d}  {_shown(own)}")
    if on_test is None:
        print("no test set was given (--test): figures of the development set flatter the choice made on it")
    else:
        print("\n".join(["", "test set", *table_lines(on_test)]))
    print(f"\nshallowfusion transcribe --config {arguments.out / DECODER} RECORDING; report: {arguments.out / REPORT}")
