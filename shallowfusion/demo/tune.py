"""Choose LM weights and acoustic temperatures on development clips: `python -m shallowfusion.demo.tune`."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

from shallowfusion.demo.shipped import HERE, LANGUAGE_MODELS, decoders, read_manifest
from shallowfusion.evaluation.word_errors import WordErrors, word_errors
from shallowfusion.options import DecodingOptions

__all__ = ["main", "tune"]

WEIGHTS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
TEMPERATURES = (1.0, 1.5, 2.0)


def tune(clips_directory: Path) -> dict[str, object]:
    """Decode the clips with every pair of the grid; the fewest word errors win, ties go to the smaller numbers.

    An acoustic model trained on clean targets is surer of itself than it is right; a temperature above 1 lets the
    language model have a say where the two disagree. Alone, the acoustic model is decoded as it is.
    """
    clips = read_manifest(clips_directory)
    references, paths = [clip.text for clip in clips], [clip.path for clip in clips]
    found: dict[str, object] = {"clips": len(clips), "words": sum(len(text.split()) for text in references)}
    for name, decoder in decoders().items():
        pairs = itertools.product(WEIGHTS, TEMPERATURES) if name in LANGUAGE_MODELS else [(0.0, 1.0)]
        curve: dict[tuple[float, float], WordErrors] = {}
        for pair in pairs:
            results = decoder.transcribe(paths, DecodingOptions(lm_weight=pair[0], asr_temperature=pair[1]))
            curve[pair] = word_errors(references, [result.text for result in results])
            print(f"{name:8} {pair}  {100 * curve[pair].rate:5.1f} %", file=sys.stderr, flush=True)
        best = min(curve, key=lambda pair: (sum(curve[pair].errors), pair))
        found[name] = {
            "lm_weight": best[0],
            "asr_temperature": best[1],
            "errors": {f"{weight} {temperature}": sum(e.errors) for (weight, temperature), e in curve.items()},
        }
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Choose the demo's LM weights on development clips.")
    parser.add_argument("--clips", type=Path, default=HERE / "dev", help="directory with manifest.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "lm_weights.json")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)  # these models are too small to share
    chosen.out.write_text(json.dumps(tune(chosen.clips), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
