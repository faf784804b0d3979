"""CTC models on the command line: the options that are theirs alone, and their decoder as the commands call it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shallowfusion.config import require
from shallowfusion.ngrams.arpa import is_arpa
from shallowfusion.options import DecodingOptions
from shallowfusion.results import Transcription

if TYPE_CHECKING:
    from shallowfusion.ctc.decoder import CTCDecoder

__all__ = ["CtcSystem", "add_ctc_model", "add_ctc_options", "check_ctc_model", "given_ctc_options"]

_OWN = ("word_bonus", "beam_margin", "blank_skip", "backend")


def add_ctc_model(parser: argparse.ArgumentParser, ways: str) -> None:
    """The CTC model beside a Whisper-type one.

    Args:
        ways: the options that give it a say.
    """
    parser.add_argument(
        "--ctc", default=None, metavar="MODEL",
        help="CTC model (wav2vec2, Parakeet, ...: hub id or local directory) that hears the recordings beside a "
        f"Whisper-type --asr, for {ways}",
    )  # fmt: skip


def check_ctc_model(arguments: argparse.Namespace, is_ctc: bool) -> None:
    """Refuse a CTC model beside another, or one that nobody asks."""
    require(
        arguments.ctc is None or not is_ctc,
        f"{arguments.asr} is a CTC model itself, and --ctc goes beside a Whisper-type --asr; leave it out.",
    )
    rescores = getattr(arguments, "ctc_rescore", None) is not None
    require(
        arguments.ctc is None or bool(arguments.ctc_weight) or rescores,
        "--ctc is heard with --ctc-weight or --ctc-rescore alone; give one, for instance --ctc-weight 0.3.",
    )


def add_ctc_options(parser: argparse.ArgumentParser) -> None:
    """Options of CTC models alone; see `CtcOptions`."""
    group = parser.add_argument_group("options of CTC models")
    numbers = {
        "word_bonus": ("NATS", "per closed word (default: 0)"),
        "beam_margin": ("NATS", "prefixes that lie more below the best are dropped (default: off)"),
        "blank_skip": ("P", "frames whose blank is at least that likely count as blank alone (default: off)"),
    }
    for name, (metavar, text) in numbers.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=float, default=None, metavar=metavar, help=text)
    group.add_argument(
        "--backend", choices=("auto", "native", "device"), default=None,
        help="search on the CPU (native), where the scores are (device), or there if it can be (default: auto)",
    )  # fmt: skip


def given_ctc_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of CTC models that were given, by name."""
    return {name: getattr(arguments, name) for name in _OWN if getattr(arguments, name, None) is not None}


class CtcSystem:
    """The CTC decoder that the options of a command name, with the `transcribe` of a `FusionDecoder`.

    Of --lm, NAME.arpa of words goes into the search; a language model on any tokenizer is asked late, as --rule says.

    Args:
        arguments: of `add_model_options`, `add_decoding_options` and `add_ctc_options`.

    Raises:
        InvalidArgumentError: more models or weights than a CTC search takes, or a model without its rule.
        ModelError: a model cannot be loaded.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        inside = [name for name in arguments.lm if is_arpa(name)]
        late = [name for name in arguments.lm if not is_arpa(name)]
        weights = arguments.lm_weight
        require(
            len(inside) <= 1 and len(late) <= 1,
            "a CTC model takes one --lm NAME.arpa of words and one language model on any tokenizer, got "
            f"{len(inside)} and {len(late)}.",
        )
        require(
            len(weights) <= len(inside),
            f"--lm-weight weighs the --lm NAME.arpa of a CTC model, got {len(weights)} and {len(inside)}; the weight "
            'of another language model stands in its rule: --rule "delayed(0.5, interval=16)".',
        )
        require(
            bool(late) == (arguments.rule is not None),
            f"a language model that is no NAME.arpa is asked late by a CTC model, got --lm {' '.join(late) or 'none'} "
            f'and --rule {arguments.rule or "none"}; give both, for instance --rule "delayed(0.5, interval=16)".',
        )
        from shallowfusion.ctc.decoder import CTCDecoder

        self._own = given_ctc_options(arguments)
        if arguments.beam_size is not None:
            self._own["beam_size"] = arguments.beam_size
        self._decoder = CTCDecoder.from_pretrained(
            arguments.asr,
            inside[0] if inside else None,
            arguments.device,
            arguments.dtype,
            llm=late[0] if late else None,
        )

    def alone(self) -> CtcSystem:
        """The same acoustic model and search without language models."""
        other = object.__new__(CtcSystem)
        other._own, other._decoder = self._own, _without_models(self._decoder)
        return other

    def transcribe(self, recordings: Sequence[Any], options: DecodingOptions) -> list[Transcription]:
        """One result per recording, under those of the options that a CTC search has."""
        decoder, chosen = self._decoder, {**self._own, "length_bonus": options.length_bonus}
        if options.hotwords:
            chosen |= {"hotwords": options.hotwords, "hotwords_inside_words": options.hotwords_inside_words}
        if options.lm_weight is not None:
            chosen["lm_weight"] = options.lm_weight
        rule = None if decoder.llm is None else options.rule
        return decoder.transcribe(list(recordings), None, options.n_best, options.batch_size, rule, **chosen)


def _without_models(decoder: CTCDecoder) -> CTCDecoder:
    from shallowfusion.ctc.decoder import CTCDecoder

    model = decoder.model
    assert model is not None
    alone = CTCDecoder(
        model.labels, model.blank, model.delimiter, word_start=model.word_start, frame_seconds=model.frame_seconds
    )
    alone.model = model
    return alone
