"""`shallowfusion transcribe`: recordings to text, JSON lines or subtitles of scores."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shallowfusion.cli.configuration import add_configuration, apply_configuration, configured, load_decoder
from shallowfusion.cli.ctc import CtcSystem, add_ctc_model, add_ctc_options, check_ctc_model, given_ctc_options
from shallowfusion.config import DRIVERS, require
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.fusion import Rule, parse_rule, piecewise, static
from shallowfusion.fusion.coverage import COVERAGE_KINDS
from shallowfusion.options import DecodingOptions
from shallowfusion.results import Transcription

__all__ = [
    "add_decoding_options", "add_model_options", "add_parser", "ctc_system", "options_from", "progress",
    "refuse_ctc_options", "run",
]  # fmt: skip

Transcriber = Callable[[list[str]], list[Transcription]]

NUMBER = {"int": int, "float": float}
BRIDGES, LOOKUPS, ATTENTION = ("bytes",), ("auto", "rows", "candidates"), ("auto", "sdpa", "triton")
DEFAULT_RESCORING_WEIGHT, DEFAULT_LIST_SIZE = 0.24, 20
RESCORED_SEARCH_OPTIONS = ("beam_size", "n_best", "batch_size", "lm_weight", "length_bonus")
CTC_OPTIONS = (*RESCORED_SEARCH_OPTIONS, "rule", "hotword", "hotword_weight", "hotwords_inside_words")
RESCORING_OPTIONS = (*RESCORED_SEARCH_OPTIONS, "rule", "length_penalty", "attention")
NUMBER_OR_NONE = ("length_penalty", "end_threshold", "max_initial_timestamp", "min_attention_centre")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "transcribe",
        help="transcribe recordings",
        description="Transcribe recordings with a Whisper-type model (up to 30 s) or a CTC model, fused with language "
        "models. Exit code 2 if any recording fails; the others are transcribed all the same.",
    )
    parser.add_argument("recordings", nargs="+", metavar="RECORDING", help="wav, flac, mp3 or ogg, any rate")
    add_model_options(parser, is_required=False)
    add_ctc_model(parser, "--ctc-weight or --ctc-rescore")
    parser.add_argument(
        "--ctc-rescore", type=float, default=None, metavar="SHARE",
        help="search with the CTC head, or --ctc, alone (and --lm NAME.arpa of words), then rank the list by SHARE * "
        "CTC + (1 - SHARE) * attention + other --lm, on any tokenizer",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object per recording, with n-best and scores")
    add_decoding_options(parser)
    add_ctc_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    apply_configuration(arguments)
    require(arguments.asr is not None, "give a Whisper-type model with --asr, or a decoder file with --config.")
    options = options_from(arguments)
    from shallowfusion.ctc.models import is_ctc_model

    transcribe = _maker(arguments, is_ctc_model(arguments.asr))(arguments, options)
    failed = 0
    batches = range(0, len(arguments.recordings), options.batch_size)
    for start in progress(batches, f"{len(arguments.recordings)} recordings"):
        for result in transcribe(arguments.recordings[start : start + options.batch_size]):
            failed += result.error is not None
            _show(result, arguments.json, len(arguments.recordings) > 1)
    if failed:
        print(f"shallowfusion: {failed} of {len(arguments.recordings)} recordings failed, see above", file=sys.stderr)
    return 2 if failed else 0


def _maker(arguments: argparse.Namespace, is_ctc: bool) -> Callable[..., Transcriber]:
    check_ctc_model(arguments, is_ctc)
    if arguments.ctc_rescore is not None:
        require(not is_ctc, f"{arguments.asr} has no attention decoder, which --ctc-rescore ranks with; leave it out.")
        refuse_ctc_options(arguments)
        return _rescoring_transcriber
    if not is_ctc:
        refuse_ctc_options(arguments)
    return _ctc_transcriber if is_ctc else _transcriber


def _transcriber(arguments: argparse.Namespace, options: DecodingOptions) -> Transcriber:
    decoder = load_decoder(arguments)
    chosen = configured(arguments, decoder, options)
    return lambda recordings: decoder.transcribe(recordings, chosen)


def _ctc_transcriber(arguments: argparse.Namespace, options: DecodingOptions) -> Transcriber:
    system = ctc_system(arguments)
    return lambda recordings: system.transcribe(recordings, options)


def ctc_system(arguments: argparse.Namespace) -> CtcSystem:
    """The decoder of a CTC model, which knows few of the options; the others are errors, not ignored."""
    unused = _unused(arguments, CTC_OPTIONS)
    require(not unused, f"{arguments.asr} is a CTC model, for which {', '.join(unused)} mean nothing; leave them out.")
    return CtcSystem(arguments)


def refuse_ctc_options(arguments: argparse.Namespace) -> None:
    """For models that are no CTC models, and ways of decoding that know none of their options."""
    own = given_ctc_options(arguments)
    require(not own, f"{', '.join(own)} are for the search of CTC models, which does not run here; leave them out.")


def _rescoring_transcriber(arguments: argparse.Namespace, options: DecodingOptions) -> Transcriber:
    """A CTC search with the n-gram model of words, then attention decoder and other language models on its list."""
    unused = _unused(arguments, RESCORING_OPTIONS)
    require(not unused, f"with --ctc-rescore {', '.join(unused)} mean nothing; leave them out.")
    from shallowfusion.attention_rescoring import AttentionRescorer, RescoringOptions
    from shallowfusion.ctc.settings import CtcOptions
    from shallowfusion.decoder import FusionDecoder
    from shallowfusion.ngrams.arpa import is_arpa

    weights = arguments.lm_weight or [DEFAULT_RESCORING_WEIGHT] * len(arguments.lm)
    require(
        len(weights) == len(arguments.lm),
        f"give one --lm-weight per --lm, got {len(weights)} and {len(arguments.lm)}.",
    )
    pairs = list(zip(arguments.lm, weights, strict=True))
    inside = [pair for pair in pairs if is_arpa(pair[0])]
    ranking = [pair for pair in pairs if not is_arpa(pair[0])]
    require(len(inside) <= 1, f"the CTC search takes one --lm NAME.arpa of words, got {len(inside)}.")
    decoder = FusionDecoder.from_pretrained(
        arguments.asr, [name for name, _ in ranking], arguments.device, arguments.dtype, ctc=arguments.ctc,
        attention=arguments.attention or "auto",
    )  # fmt: skip
    size = arguments.beam_size or max(DEFAULT_LIST_SIZE, options.n_best)
    search = CtcOptions(beam_size=size, lm_weight=inside[0][1] if inside else 0.0)
    rescorer = AttentionRescorer(decoder, search, inside[0][0] if inside else None)
    chosen = RescoringOptions(
        ctc_weight=arguments.ctc_rescore,
        rule=options.rule if arguments.rule else static([weight for _, weight in ranking]),
        length_bonus=options.length_bonus,
        length_penalty=0.0 if arguments.length_penalty is None else options.length_penalty or 0.0,
        n_best=options.n_best,
        list_size=size,
        batch_size=options.batch_size,
    )
    return lambda recordings: rescorer.transcribe(recordings, chosen)


def _unused(arguments: argparse.Namespace, known: tuple[str, ...]) -> list[str]:
    """Given options that a way of decoding does not know."""
    parser = argparse.ArgumentParser(add_help=False)
    add_decoding_options(parser)
    given = [name for name, value in vars(parser.parse_args([])).items() if getattr(arguments, name) != value]
    others = ("config", "calibration", "internal_context", "lm_bridge", "ngram_lookups", "attention")
    given += [name for name in others if getattr(arguments, name, None)]
    return [name for name in given if name not in known]


def options_from(arguments: argparse.Namespace) -> DecodingOptions:
    """Decoding options as given on the command line."""
    names = {
        name: getattr(arguments, name)
        for name in (*_numbers(), *_words(), "early_stopping", "hotwords_inside_words")
        if getattr(arguments, name) is not None
    }
    rule = _rule(arguments)
    if rule is not None:
        names["rule"] = rule
    elif len(arguments.lm_weight) == 1:
        names["lm_weight"] = arguments.lm_weight[0]
        names["initial_steps"] = arguments.initial_steps
    for name in NUMBER_OR_NONE:
        value = getattr(arguments, name)
        if value is not None:
            names[name] = None if value == "none" else value
    if arguments.lm_temperature is not None:
        given = _temperatures(str(arguments.lm_temperature))  # from a decoder file it is no text
        names["lm_temperature"] = given if len(given) > 1 else given[0]
    if arguments.suppress_tokens is not None:
        names["suppress_tokens"] = _suppressed(arguments.suppress_tokens)
    names["suppress_blank"] = not arguments.keep_blank
    names["without_timestamps"] = not arguments.timestamps
    if arguments.hotword:
        names["hotwords"] = _hotwords(arguments.hotword, names.get("hotword_weight", DecodingOptions.hotword_weight))
    return DecodingOptions.of(**names)


def _rule(arguments: argparse.Namespace) -> Rule | None:
    """A rule only where the plain option names cannot say it."""
    weights = arguments.lm_weight
    if arguments.rule is not None:
        require(
            not (weights or arguments.initial_steps or arguments.ramp or arguments.catch_up),
            "give either --rule or --lm-weight, --initial-steps, --ramp and --catch-up, got both; the rule holds them.",
        )
        return parse_rule(arguments.rule)
    if not (arguments.ramp or arguments.catch_up or len(weights) > 1):
        return None
    if not (arguments.initial_steps or arguments.ramp or arguments.catch_up):
        return static(weights)
    return piecewise(weights or 0.24, arguments.initial_steps, arguments.ramp, arguments.catch_up)


def _hotwords(given: list[str], weight_of_others: float) -> dict[str, float]:
    """Phrases with weights, from the command line and the files it names."""
    found: dict[str, float] = {}
    for entry in given:
        lines = [entry]
        if entry.startswith("@"):
            try:
                lines = list(filter(str.strip, Path(entry[1:]).read_text(encoding="utf-8").splitlines()))
            except (OSError, UnicodeDecodeError) as error:
                raise InvalidArgumentError(f"hotwords cannot be read from {entry[1:]}: {error}.") from error
        for line in lines:
            text, _, weight = line.partition("=")
            try:
                found[text.strip()] = float(weight) if weight.strip() else weight_of_others
            except ValueError:
                raise InvalidArgumentError(f"a hotword is TEXT or TEXT=NATS, got {line!r}.") from None
    return found


def _numbers() -> dict[str, tuple[type, str]]:
    return {
        "beam_size": (int, "live hypotheses per recording (default: 5)"),
        "n_best": (int, "hypotheses returned (default: 1)"),
        "ctc_weight": (float, "share of the model's CTC head or of --ctc, 0 to below 1 (default: 0)"),
        "length_bonus": (float, "nats per token (default: 0)"),
        "patience": (float, "stop rule whisper: waits for beam_size * patience hypotheses (default: 1)"),
        "min_new_tokens": (int, "no end before this many tokens (default: 0)"),
        "max_new_tokens": (int, "no more tokens than this (default: what the model's window leaves)"),
        "no_repeat_ngram_size": (int, "no group of this many tokens is said twice (default: 0, off)"),
        "hotword_weight": (float, "nats for each --hotword that names none (default: 4)"),
        "coverage_weight": (float, "weight of the recording's coverage in the ranking of the n-best (default: 0)"),
        "asr_temperature": (float, "default: 1"),
        "batch_size": (int, "recordings decoded together (default: 8)"),
    }


def _numbers_or_none() -> dict[str, str]:
    return {
        "length_penalty": "number, or none (default: 1)",
        "end_threshold": "number, or none (default: 1.5)",
        "max_initial_timestamp": "seconds, the latest first timestamp, or none for any (default: 1)",
        "min_attention_centre": "ends that look at less of the recording than this come last (default: none)",
    }


def _words() -> dict[str, tuple[tuple[str, ...] | None, str]]:
    return {
        "end_policy": (
            ("neutral", "end_factored", "lm", "asr_only"),
            "what language models say of the end token (default: neutral)",
        ),
        "stop_rule": (("hf", "whisper", "espnet"), "default: hf"),
        "coverage": (COVERAGE_KINDS, "what --coverage-weight counts of the recording (default: threshold)"),
        "task": (("transcribe", "translate"), "default: transcribe"),
        "language": (None, "language code of a multilingual model (default: detected)"),
        "initial_prompt": (None, "text the acoustic model sees as previous text"),
        "lm_prompt": (None, "text of the domain that language models on its tokenizer read first; not scored"),
        "driver": (DRIVERS, "who decides each step, the device as one CUDA graph where it can (default: host)"),
    }


def add_model_options(parser: argparse.ArgumentParser, is_required: bool = True) -> None:
    """Options that say which models run, and where."""
    parser.add_argument("--asr", required=is_required, help="Whisper-type or CTC model: hub id or local directory")
    parser.add_argument(
        "--lm",
        action="append",
        default=[],
        help='language model on the same tokenizer (on any with --lm-bridge, or --rule "delayed(0.5)"), or NAME.arpa '
        "of its pieces or of words (for a CTC model: one of words, and one on any tokenizer with a delayed rule); "
        "repeatable",
    )
    parser.add_argument(
        "--lm-bridge", choices=BRIDGES, default=None, help="how language models on another tokenizer are joined"
    )
    parser.add_argument(
        "--ngram-lookups", choices=LOOKUPS, default=None,
        help="n-gram models of pieces score every token (rows) or what survives the step (candidates); default: auto",
    )  # fmt: skip
    parser.add_argument(
        "--attention", choices=ATTENTION, default=None,
        help="torch's, kernels that read each key of an utterance once for all its beams (triton, on CUDA), or what "
        "suits the device (default: auto)",
    )  # fmt: skip
    add_configuration(parser)
    parser.add_argument(
        "--internal-context", default=None, metavar="FILE", help="of train-ilm, for internal_lm(..., variant='trained')"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, float16, bfloat16, int8 (default: auto)")


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    """The options `options_from` reads."""
    group = parser.add_argument_group("decoding options")
    group.add_argument(
        "--rule", default=None, metavar="RULE",
        help="fusion rule, for instance \"internal_lm(0.8, 0.2)\", in place of --lm-weight and what goes with it",
    )  # fmt: skip
    group.add_argument(
        "--lm-weight", type=float, action="append", default=[], metavar="W", help="one per --lm (default: 0.24)"
    )
    group.add_argument("--initial-steps", type=int, default=0, metavar="N", help="tokens before the LM has a say")
    group.add_argument("--ramp", type=int, default=0, metavar="N", help="tokens over which its weight grows")
    group.add_argument("--catch-up", action="store_true", help="add the LM scores skipped at the start")
    for name, (number, text) in _numbers().items():
        names = [f"--{name.replace('_', '-')}", *(["--num-beams"] if name == "beam_size" else [])]
        group.add_argument(*names, type=number, default=None, metavar="N", dest=name, help=text)
    for name, (choices, text) in _words().items():
        group.add_argument(f"--{name.replace('_', '-')}", default=None, choices=choices, help=text)
    group.add_argument("--lm-temperature", default=None, metavar="T[,T]", help="one, or one per --lm (default: 1)")
    for name, text in _numbers_or_none().items():
        group.add_argument(f"--{name.replace('_', '-')}", type=_number_or_none, default=None, metavar="N", help=text)
    group.add_argument("--early-stopping", default=None, type=_early_stopping, metavar="X", help="false, true or never")
    group.add_argument(
        "--hotword",
        action="append",
        default=None,
        metavar="TEXT[=NATS]",
        help="word or phrase to favour by that many nats (default: 4); repeatable, or @FILE with one a line",
    )
    group.add_argument(
        "--hotwords-inside-words", action="store_const", const=True, default=None,
        help="favour them inside longer words too (default: whole words only)",
    )  # fmt: skip
    group.add_argument(
        "--suppress-tokens", default=None, metavar="IDS", help="-1 = the model's list, ids: 1,2,3, or none"
    )
    group.add_argument("--timestamps", action="store_true", help="segments with the seconds they begin and end at")
    group.add_argument("--keep-blank", action="store_true", help="allow blank or end as the first token")


def _number_or_none(word: str) -> float | str:
    if word == "none":
        return word
    try:
        return float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or none, got {word!r}") from None


def _temperatures(given: str) -> list[float]:
    try:
        return [float(number) for number in given.split(",")]
    except ValueError:
        raise InvalidArgumentError(f"--lm-temperature must be numbers such as 1 or 1,0.9, got {given!r}.") from None


def _suppressed(given: str) -> str | list[int]:
    if given == "-1":
        return given
    try:
        return [] if given == "none" else [int(token) for token in given.split(",") if token.strip()]
    except ValueError:
        raise InvalidArgumentError(f"--suppress-tokens must be -1, none or ids such as 1,2,3, got {given!r}.") from None


def _early_stopping(word: str) -> bool | str:
    known: dict[str, bool | str] = {"false": False, "true": True, "never": "never"}
    if word.lower() not in known:
        raise argparse.ArgumentTypeError(f"must be false, true or never, got {word!r}")
    return known[word.lower()]


def _show(result: Transcription, as_json: bool, with_name: bool) -> None:
    if as_json:
        print(json.dumps(result.to_json(), ensure_ascii=False), flush=True)
    elif result.error is not None:
        print(f"shallowfusion: {result.error}", file=sys.stderr)
    elif result.best.spans is not None:
        _show_segments(result, with_name)
    else:
        alarm = f"  [{', '.join(result.flags)}]" if result.flags else ""
        print(f"{result.source}: {result.text}{alarm}" if with_name else f"{result.text}{alarm}", flush=True)


def _show_segments(result: Transcription, with_name: bool) -> None:
    """One line each, and one for the alarms."""
    name = f"{result.source}: " if with_name else ""
    for segment in result.segments:
        print(f"{name}[{segment.start:.2f} -> {segment.end:.2f}] {segment.text.strip()}", flush=True)
    if result.flags:
        print(f"{name}[{', '.join(result.flags)}]", flush=True)


def progress(batches: Any, title: str) -> Any:
    """The batches, with a bar on standard error if that is a terminal and there are several."""
    if len(batches) < 2 or not sys.stderr.isatty():
        return batches
    from tqdm import tqdm

    return tqdm(batches, unit="batch", desc=title)
