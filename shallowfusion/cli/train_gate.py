"""`shallowfusion train-gate`: a small network that weighs the language models in every row."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shallowfusion.cli.configuration import configured, load_decoder
from shallowfusion.cli.transcribe import add_model_options, progress
from shallowfusion.config import require
from shallowfusion.evaluation.normalisation import NORMALISERS
from shallowfusion.options import DecodingOptions

if TYPE_CHECKING:
    from shallowfusion.decoder import FusionDecoder
    from shallowfusion.fusion.learned_gate import GateNetwork
    from shallowfusion.training.gate_data import GateSet
    from shallowfusion.training.gate_training import GateOutcome, GateTraining
    from shallowfusion.training.teacher_forcing import Trace

__all__ = ["add_parser", "run"]

WORK = "work"  # encodings, traces and transcripts, by which a killed run goes on
CONSTANTS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # what the gate has to beat, tuned on the same development set


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "train-gate",
        help="train a gate that weighs the language models by what they say",
        description="Train a small network that gives every language model its weight in every row, from entropies, "
        "margins and agreement of the models, on references and on what was heard. The gate with the fewest word "
        "errors on a development set is kept, beginning with the best constant weight; use it as "
        "--rule \"learned('DIR')\". A killed run goes on where it stopped.",
    )
    parser.add_argument("train", type=Path, metavar="TRAIN", help="training set: a manifest as for evaluate")
    parser.add_argument("--dev", type=Path, required=True, metavar="DEV", help="development set, disjoint from TRAIN")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets gate.safetensors and gate.json")
    add_model_options(parser, is_required=False)
    group = parser.add_argument_group("training")
    group.add_argument("--largest-weight", type=float, default=None, metavar="W",
        help="of an open gate (default: twice the best constant weight)",
    )  # fmt: skip
    group.add_argument("--experts", action="store_true", help="several models compete for one strength")
    group.add_argument("--form", choices=("local", "advantage", "plain"), default="plain",
        help="plain starts from the best constant weight exactly (default: plain)",
    )  # fmt: skip
    group.add_argument("--epochs", type=int, default=60, metavar="N", help="default: 60")
    group.add_argument(
        "--weight-cost", type=float, default=0.01, metavar="C", help="on squared weights (default: 0.01)"
    )
    group.add_argument("--references-only", action="store_true", help="no prefixes that were heard, only references")
    group.add_argument("--list-epochs", type=int, default=0, metavar="N", help="finish on n-best lists (default: 0)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    group.add_argument("--beam-size", type=int, default=5, metavar="N", help="of decodings (default: 5)")
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="recordings together (default: 8)")
    group.add_argument("--language", default=None, help="language code of a multilingual model (default: detected)")
    group.add_argument("--normaliser", choices=NORMALISERS, default="english", help="default: english")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    require(arguments.asr is not None, "give a Whisper-type model with --asr.")
    require(bool(arguments.lm), "train-gate weighs language models; give one with --lm.")
    require(arguments.config is None, "train-gate makes a rule and reads none; leave --config out.")
    from shallowfusion.evaluation.manifest import check_disjoint, read_manifest
    from shallowfusion.evaluation.normalisation import normaliser
    from shallowfusion.training.gate_data import GateSet
    from shallowfusion.training.kept import Kept
    from shallowfusion.training.session import EncodedSet

    train, dev = ([r for r in read_manifest(p) if not r.is_silence] for p in (arguments.train, arguments.dev))
    require(bool(train and dev), "the training and the development set must hold recordings with references.")
    check_disjoint(dev, train)
    training = _training(arguments)
    options = DecodingOptions(
        beam_size=arguments.beam_size, batch_size=arguments.batch_size, language=arguments.language
    )
    normalise = normaliser(arguments.normaliser)
    decoder = load_decoder(arguments)
    options = configured(arguments, decoder, options)
    work = arguments.out / WORK
    encoded, kept = EncodedSet(decoder, work), Kept(work)
    encoded.make([*train, *dev], progress, options.batch_size)
    own, held_out = (GateSet(decoder, r, encoded, options, normalise, progress, kept) for r in (train, dev))
    _train(arguments, decoder, own, held_out, options, training)
    return 0


def _training(arguments: argparse.Namespace) -> GateTraining:
    from shallowfusion.training.gate_training import GateTraining

    return GateTraining(
        epochs=arguments.epochs,
        weight_cost=arguments.weight_cost,
        list_epochs=arguments.list_epochs,
        seed=arguments.seed,
        form=arguments.form,
    )


def _train(
    arguments: argparse.Namespace,
    decoder: FusionDecoder,
    train: GateSet,
    dev: GateSet,
    options: DecodingOptions,
    training: GateTraining,
) -> None:
    from shallowfusion.fusion.learned_gate import GateSettings, LearnedGate
    from shallowfusion.training.gate_data import with_gate
    from shallowfusion.training.gate_training import best_constant, train_gate
    from shallowfusion.training.teacher_forcing import joined_traces

    count = len(decoder.language_models)
    by_weight = _by_weight(dev, options, count)
    best = min(by_weight, key=lambda weight: (by_weight[weight], weight))
    first = best / count
    largest = 2 * first if arguments.largest_weight is None else arguments.largest_weight
    require(
        largest > first,
        f"--largest-weight must be above the best constant weight, {first:g} of each model, got {largest:g}.",
    )
    settings = GateSettings(count, largest, first, shares_strength=arguments.experts)
    traces = train.traces(not arguments.references_only)
    constant, _ = best_constant(joined_traces(traces), count)
    lists = train.lists(first, options.beam_size) if training.list_epochs else []

    def dev_errors(network: GateNetwork) -> int:
        return dev.errors(with_gate(options, network, decoder.fingerprints, arguments.form), "development set")

    outcome = train_gate(traces, settings, training, dev_errors, lists)
    gate = LearnedGate(settings, outcome.network, decoder.fingerprints, str(arguments.out), form=arguments.form)
    gate.save(arguments.out)
    figures = _figures(dev, options, outcome, dev.traces(False), constant) | {
        "constant": best,
        "dev_errors_by_constant": {str(weight): errors for weight, errors in by_weight.items()},
    }
    figures["dev_errors"]["constant"] = by_weight[best]
    if arguments.json:
        print(json.dumps(figures, indent=1))
        return
    print("\n".join(_lines(figures)))
    print(f"written to {arguments.out}; use --rule \"learned('{arguments.out}')\", or tune --try with it")


def _by_weight(dev: GateSet, options: DecodingOptions, count: int) -> dict[float, int]:
    """Development errors of constant weights, shared out evenly among the models."""
    from shallowfusion.fusion.catalogue import static

    return {
        weight: dev.errors(replace(options, rule=static((weight / count,) * count)), f"constant weight {weight:g}")
        for weight in CONSTANTS
    }


def _figures(
    dev: GateSet, options: DecodingOptions, outcome: GateOutcome, traces: Sequence[Trace], constant: float
) -> dict[str, Any]:
    """The gate beside the acoustic model alone and the best constant weights, all on the development set."""
    import torch

    from shallowfusion.training.gate_training import fused_log_probs
    from shallowfusion.training.teacher_forcing import joined_traces

    held_out = joined_traces(traces)
    network = outcome.network
    with torch.no_grad():
        weights = network.settings.largest_weight * network(held_out.features)
    losses = {
        name: -float(fused_log_probs(own, held_out).mean())
        for name, own in (("alone", 0 * weights), ("constant", torch.full_like(weights, constant)), ("gate", weights))
    }
    return {
        "loss": losses,
        "constant_of_least_loss": constant,
        "mean_weight": weights.mean(dim=0).tolist(),
        "dev_errors": {
            "alone": dev.errors(replace(options, lm_temperature=1.0, asr_temperature=1.0), "alone", fuses=False),
            "gate": min(errors for _, errors in outcome.dev_errors),
        },
        "dev_errors_by_epoch": [list(pair) for pair in outcome.dev_errors],
        "train_loss_by_epoch": list(outcome.losses),
    }


def _lines(figures: dict[str, Any]) -> list[str]:
    weights = ", ".join(f"{weight:.2f}" for weight in figures["mean_weight"])
    titles = {
        "alone": "acoustic model alone",
        "constant": f"best constant weight, {figures['constant']:g}",
        "gate": f"gate, mean weight {weights}",
    }
    lines = [f"{'development set':32} {'nats per token':>14} {'word errors':>11}"]
    lines += [f"{titles[k]:32} {figures['loss'][k]:14.4f} {figures['dev_errors'][k]:11d}" for k in titles]
    counted = ", ".join(f"{epoch}: {errors}" for epoch, errors in figures["dev_errors_by_epoch"])
    return [
        *lines,
        f"word errors by epoch {counted}; nats per token of the constant weight with the least training loss",
    ]
