"""Choosing a weight: exact errors of stored lists for every weight, against decoding a grid of weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.timing import Measurement, measurements, take_turns

__all__ = ["run"]

GRID = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)


def run(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """The shipped models on the shipped development clips, encoded beforehand for both sides."""
    from shallowfusion import DecodingOptions, FusionDecoder, fusion
    from shallowfusion.demo.shipped import HERE, model_directory
    from shallowfusion.evaluation.manifest import read_manifest
    from shallowfusion.evaluation.normalisation import normaliser
    from shallowfusion.evaluation.stored import HypothesisStore
    from shallowfusion.training.offline import OfflineSearch, pooled
    from shallowfusion.training.session import EncodedSet, TunedSet

    torch.set_num_threads(1)
    decoder = FusionDecoder.from_pretrained(model_directory("asr"), model_directory("lm_medical"), device=device)
    recordings = tuple(read_manifest(HERE / "dev" / "manifest.jsonl")[: 2 if quick else 24])
    size = 2 if quick else 10
    with tempfile.TemporaryDirectory() as directory:
        encoded = EncodedSet(decoder, Path(directory))
        encoded.make(recordings, lambda batches, _: batches, 8)

        def decoded(weight: float) -> tuple[dict, int]:  # type: ignore[type-arg]
            with HypothesisStore(None) as store:
                dev = TunedSet(decoder, recordings, encoded, store, normaliser("basic"), lambda batches, _: batches)
                options = DecodingOptions(beam_size=size, n_best=size, rule=fusion.static(weight))
                lists = dev.decode(options, "")
                return lists, sum(dev.errors(lists).errors)

        weights = GRID[-2:] if quick else GRID
        runs = [decoded(weight)[0] for weight in weights]
        lists = pooled(runs, DecodingOptions())
        search = OfflineSearch(lists, ["lm"], normaliser("basic"))
        # What is timed agrees where it can: the chosen weight, decoded, makes about the errors that were expected.
        best = search.curve("lm").best
        assert abs(decoded(best.middle)[1] - best.errors) <= 5, "the offline choice does not hold when decoded"
        providers = {
            "exact, every weight from 0 to 2": lambda: search.curve("lm"),
            f"decoding {len(weights)} weights": lambda: [decoded(weight) for weight in weights],
        }
        shape = f"{len(recordings)} clips, lists of {size} pooled from {len(weights)} weights"
        seconds = take_turns(providers, 1 if quick else 3, 1, device)
        yield measurements("tuning", shape, "float32", seconds, "exact, every weight from 0 to 2")
