"""`shallowfusion evaluate`: a baseline against fused systems on recordings with transcripts, or stored hypotheses."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shallowfusion.cli.configuration import apply_configuration, configured, load_decoder
from shallowfusion.cli.ctc import add_ctc_model, add_ctc_options, check_ctc_model, given_ctc_options
from shallowfusion.cli.transcribe import (
    add_decoding_options,
    add_model_options,
    ctc_system,
    options_from,
    progress,
    refuse_ctc_options,
)
from shallowfusion.config import require
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.evaluation.normalisation import NORMALISERS
from shallowfusion.options import DecodingOptions

__all__ = ["add_parser", "run"]

BASELINE, FUSED = "baseline", "fused"
INTERRUPTED = 130  # as shells report it


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="word error rates of a baseline and fused systems, with tests of significance",
        description="Transcribe a test set with the acoustic model alone and fused, and report word and character "
        "error rates with intervals, paired tests, listed terms and failures; or score stored hypotheses. Exit code 2 "
        "on bad input, or if recordings failed; the others are evaluated all the same.",
    )
    parser.add_argument(
        "manifest", nargs="?", type=Path, metavar="MANIFEST",
        help='test set: JSON lines {"audio": path, "text": words} or lines audio<TAB>text',
    )  # fmt: skip
    parser.add_argument("--hypotheses", type=Path, metavar="FILE", help="score these, run no model: id and text a line")
    parser.add_argument("--references", type=Path, metavar="FILE", help="for --hypotheses: id and text a line")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="for --hypotheses: those of another system")
    add_model_options(parser, is_required=False)
    add_ctc_model(parser, "--ctc-weight, in the baseline too")
    _add_evaluation_options(parser)
    add_decoding_options(parser)
    add_ctc_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from shallowfusion.evaluation.report import as_data, changed_lines, table_lines
    from shallowfusion.evaluation.scoring import evaluate
    from shallowfusion.evaluation.terms import count_terms

    apply_configuration(arguments)
    _check(arguments)
    try:
        gathered = _read_texts(arguments) if arguments.hypotheses else _transcribe(arguments)
    except KeyboardInterrupt:
        kept = f"the same command goes on from {arguments.results}" if arguments.results else "nothing was stored"
        print(f"shallowfusion: interrupted; {kept}", file=sys.stderr)
        return INTERRUPTED
    test_set = gathered.test_set
    found = evaluate(test_set, gathered.texts, gathered.silence)
    counts = None
    if arguments.lm_text is not None and test_set.terms is not None:
        counts = count_terms(_text_lines(arguments.lm_text), test_set.terms, test_set.normalise)
    if arguments.json:
        data = as_data(found, counts) | {"chosen": gathered.chosen, "failed": gathered.failed}
        print(json.dumps(data, ensure_ascii=False, indent=1))
    else:
        lines = table_lines(found, counts)
        for system in found.systems[1:]:
            lines += changed_lines(found, system, arguments.show)
        print("\n".join([*([gathered.chosen] if gathered.chosen else []), *lines]))
    for id, reason in gathered.failed.items():
        print(f"shallowfusion: {reason if id in reason else f'{id}: {reason}'}", file=sys.stderr)
    if gathered.failed:
        total = len(gathered.failed) + len(test_set.ids)
        print(f"shallowfusion: {len(gathered.failed)} of {total} recordings failed, see above", file=sys.stderr)
    return 2 if gathered.failed else 0


@dataclasses.dataclass(frozen=True)
class _Gathered:
    """Transcripts by system, baseline first, and what has to be said about how they came about."""

    test_set: Any
    texts: Mapping[str, Sequence[str]]
    silence: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    failed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chosen: str = ""


def _add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--try-weights", type=_numbers, default=(), metavar="W,W,...",
        help="evaluate the LM with each of these weights; with --dev only with the best of them there",
    )  # fmt: skip
    group.add_argument("--dev", type=Path, metavar="MANIFEST", help="development set that --try-weights chooses on")
    group.add_argument("--results", type=Path, metavar="FILE", help="store hypotheses as they come; resumes from it")
    group.add_argument("--save-nbest", type=Path, metavar="FILE", help="n-best lists of the last system as JSON lines")
    group.add_argument("--normaliser", choices=NORMALISERS, default="english", help="default: english")
    group.add_argument("--spellings", type=Path, metavar="FILE", help="British spellings for the normaliser english")
    group.add_argument("--by-speaker", action="store_true", help="resample whole speakers (field speaker)")
    group.add_argument("--terms", type=Path, metavar="FILE", help="listed terms, one a line, fixed beforehand")
    group.add_argument("--allow-absent-terms", action="store_true", help="some terms may be in no reference")
    group.add_argument("--lm-text", type=Path, metavar="FILE", help="the LM's training text, for bands of terms")
    group.add_argument("--show", type=int, default=10, metavar="N", help="changed utterances shown (default: 10)")
    group.add_argument("--json", action="store_true", help="every figure and transcript as JSON")


def _check(arguments: argparse.Namespace) -> None:
    """Refuse combinations that would silently ignore something."""
    if arguments.hypotheses is not None or arguments.references is not None:
        require(
            arguments.hypotheses is not None and arguments.references is not None,
            "--hypotheses and --references go together, got one of them.",
        )
        extra = [
            name
            for name in ("manifest", "asr", "lm", "ctc", "calibration", "dev", "try_weights", "results", "save_nbest")
            if getattr(arguments, name)
        ]
        require(not extra, f"with --hypotheses no model runs, so {', '.join(extra)} cannot be given.")
        require(
            options_from(arguments) == DecodingOptions(),
            "with --hypotheses no model runs, so decoding options say nothing.",
        )
    else:
        require(
            arguments.manifest is not None and arguments.asr is not None,
            "give a MANIFEST and --asr, or --hypotheses and --references.",
        )
        require(arguments.baseline is None, "--baseline goes with --hypotheses; a manifest gets its baseline decoded.")
    require(arguments.dev is None or bool(arguments.try_weights), "--dev chooses among --try-weights; give both.")
    require(
        not arguments.try_weights or (len(arguments.lm) == 1 and not arguments.lm_weight),
        "--try-weights needs one --lm and no --lm-weight.",
    )
    require(
        bool(arguments.lm) or not (arguments.lm_weight or arguments.initial_steps),
        "--lm-weight and --initial-steps weigh the models of --lm; give one.",
    )
    require(arguments.show >= 0, f"--show must be at least 0, got {arguments.show}.")
    require(
        arguments.lm_text is None or arguments.terms is not None, "--lm-text bands the terms of --terms; give both."
    )


def _test_set(arguments: argparse.Namespace, ids: Sequence[str], references: Sequence[str], groups: Any = None) -> Any:
    from shallowfusion.evaluation.normalisation import normaliser
    from shallowfusion.evaluation.scoring import ReferenceSet
    from shallowfusion.evaluation.terms import TermList

    normalise = normaliser(arguments.normaliser, arguments.spellings)
    terms = None if arguments.terms is None else TermList.read(arguments.terms, normalise)
    if terms is not None and not arguments.allow_absent_terms:
        _check_terms(references, terms, normalise)
    return ReferenceSet(tuple(ids), tuple(references), normalise, groups, terms)


def _check_terms(references: Sequence[str], terms: Any, normalise: Any) -> None:
    """Before any decoding: a term that nobody says cannot be recalled."""
    from shallowfusion.evaluation.terms import count_terms

    absent = [name for name, count in count_terms(references, terms, normalise).items() if not count]
    require(
        not absent,
        f"{len(absent)} of {len(terms.terms)} terms are in no reference, first {', '.join(map(repr, absent[:5]))}; "
        "take them off the list or give --allow-absent-terms.",
    )


def _read_texts(arguments: argparse.Namespace) -> _Gathered:
    from shallowfusion.evaluation.manifest import paired_texts, read_transcripts

    references = read_transcripts(arguments.references, may_be_empty=False)
    require(not arguments.by_speaker, "--by-speaker needs a manifest with the field speaker.")
    texts = {}
    if arguments.baseline is not None:
        own = read_transcripts(arguments.baseline, may_be_empty=True)
        texts[BASELINE] = paired_texts(references, own, "baseline hypotheses")
    texts["hypotheses"] = paired_texts(references, read_transcripts(arguments.hypotheses, may_be_empty=True))
    return _Gathered(_test_set(arguments, list(references), list(references.values())), texts)


def _transcribe(arguments: argparse.Namespace) -> _Gathered:
    from shallowfusion.evaluation.manifest import check_disjoint, read_manifest

    recordings = read_manifest(arguments.manifest)
    spoken = [recording for recording in recordings if not recording.is_silence]
    require(bool(spoken), f"{arguments.manifest} holds silent recordings alone, wanted some with references.")
    require(
        not arguments.by_speaker or all(recording.speaker for recording in spoken),
        f"--by-speaker needs the field speaker in every line of {arguments.manifest}.",
    )
    dev = [] if arguments.dev is None else read_manifest(arguments.dev)
    check_disjoint(dev, recordings)
    options = {weight: _options(arguments, weight) for weight in arguments.try_weights or (None,)}
    require(
        arguments.save_nbest is None or all(own.n_best > 1 for own in options.values()),
        "--save-nbest needs lists of several hypotheses; give --n-best 2 or more.",
    )
    _test_set(arguments, [r.id for r in spoken], [r.text for r in spoken])  # bad terms end it before hours of decoding
    from shallowfusion.evaluation.stored import HypothesisStore

    with HypothesisStore(arguments.results) as store:
        systems = _Systems(arguments, store)
        chosen = ""
        if dev:
            options, chosen = _choose(arguments, systems, [r for r in dev if not r.is_silence], options)
        elif len(options) > 1:
            chosen = "weights were tried on the test set itself: read the corrected p, or choose one on --dev"
        heard = {BASELINE: systems.run(False, recordings, next(iter(options.values())), BASELINE)}
        if arguments.lm:
            for weight, own in options.items():
                name = FUSED if weight is None else f"{FUSED} {weight:g}"
                heard[name] = systems.run(True, recordings, own, name)
    return _gathered(arguments, recordings, heard, chosen)


def _gathered(
    arguments: argparse.Namespace, recordings: Sequence[Any], heard: Mapping[str, Any], chosen: str
) -> _Gathered:
    """What all systems could transcribe, in one order."""
    failed = {id: reason for found in heard.values() for id, reason in found.failed.items()}
    kept = [recording for recording in recordings if recording.id not in failed]
    spoken = [recording for recording in kept if not recording.is_silence]
    require(
        bool(spoken),
        f"none of the {len(recordings)} recordings could be transcribed, first: {next(iter(failed.values()), '')}",
    )
    groups = tuple(recording.speaker for recording in spoken) if arguments.by_speaker else None
    if arguments.save_nbest is not None:
        _save_nbest(arguments.save_nbest, spoken, list(heard.values())[-1])
    texts = {name: [found.lists[r.id].first.text for r in spoken] for name, found in heard.items()}
    silence = {name: [found.lists[r.id].first.text for r in kept if r.is_silence] for name, found in heard.items()}
    test_set = _test_set(arguments, [r.id for r in spoken], [r.text for r in spoken], groups)
    return _Gathered(test_set, texts, silence, failed, chosen)


class _Systems:
    """The loaded models, with and without their language models."""

    def __init__(self, arguments: argparse.Namespace, store: Any) -> None:
        from shallowfusion.ctc.models import is_ctc_model
        from shallowfusion.decoder import FusionDecoder

        self._arguments, self._store = arguments, store
        self._fused: Any
        self._alone: Any
        self._is_ctc = is_ctc_model(arguments.asr)
        check_ctc_model(arguments, self._is_ctc)
        if self._is_ctc:
            self._fused = ctc_system(arguments)
            self._alone = self._fused.alone()
        else:
            refuse_ctc_options(arguments)
            self._fused = load_decoder(arguments)
            self._alone = FusionDecoder(self._fused.acoustic, ctc=self._fused.ctc and self._fused.ctc.model)

    def run(self, is_fused: bool, recordings: Sequence[Any], options: DecodingOptions, title: str) -> Any:
        from shallowfusion.evaluation.stored import fingerprint_of, transcribe_set
        from shallowfusion.trusting import alone_options

        own, models = self._arguments, [self._arguments.asr]
        if own.ctc is not None:
            models.append(own.ctc)
        if is_fused:
            models += own.lm
            options = options if self._is_ctc else configured(own, self._fused, options)
        else:
            options = alone_options(options)
            if own.config is not None:  # what was tuned for the language model is no part of the model alone
                options = dataclasses.replace(options, length_bonus=0.0, end_threshold=1.5)
        known = {"device": own.device, "dtype": own.dtype}
        known |= {name: str(value) for name, value in given_ctc_options(own).items()}
        if is_fused and own.internal_context is not None:
            known["internal_context"] = str(own.internal_context)
        system = fingerprint_of(models, options, known)
        decoder = self._fused if is_fused else self._alone
        return transcribe_set(decoder, recordings, options, self._store, system, progress, title)


def _options(arguments: argparse.Namespace, weight: float | None) -> DecodingOptions:
    if weight is None:
        return options_from(arguments)
    return options_from(argparse.Namespace(**{**vars(arguments), "lm_weight": [weight]}))


def _choose(
    arguments: argparse.Namespace,
    systems: _Systems,
    dev: Sequence[Any],
    options: Mapping[float | None, DecodingOptions],
) -> tuple[dict[float | None, DecodingOptions], str]:
    """The weight with the fewest word errors on the development set; ties go to the smaller."""
    from shallowfusion.evaluation.normalisation import normaliser
    from shallowfusion.evaluation.word_errors import word_errors

    normalise = normaliser(arguments.normaliser, arguments.spellings)
    curve: dict[float, int] = {}
    for weight, own in options.items():
        heard = systems.run(True, dev, own, f"dev {weight:g}")
        require(
            not heard.failed,
            f"{len(heard.failed)} development recordings failed, first {next(iter(heard.failed.values()), '')}",
        )
        texts = [heard.lists[recording.id].first.text for recording in dev]
        curve[float(weight or 0.0)] = sum(word_errors([r.text for r in dev], texts, normalise).errors)
    best = min(curve, key=lambda weight: (curve[weight], weight))
    shown = ", ".join(f"{weight:g}: {errors}" for weight, errors in curve.items())
    return {best: _options(arguments, best)}, f"weight {best:g} chosen on the development set (errors {shown})"


def _save_nbest(path: Path, recordings: Sequence[Any], heard: Any) -> None:
    from shallowfusion.evaluation.nbest import with_references, write_nbest

    references = {recording.id: recording.text for recording in recordings}
    write_nbest(path, with_references([heard.lists[id] for id in references], references))


def _text_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{path} cannot be read as text ({error}).") from error


def _numbers(given: str) -> tuple[float, ...]:
    try:
        weights = tuple(float(number) for number in given.split(",") if number.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between, got {given!r}") from None
    if not weights or len(set(weights)) < len(weights):
        raise argparse.ArgumentTypeError(f"must be different numbers, got {given!r}")
    return weights
