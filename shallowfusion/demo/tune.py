"""Choose LM weights on development clips: `python -m shallowfusion.demo.tune`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from shallowfusion.demo.shipped import HERE, LANGUAGE_MODELS, decoders, read_manifest
from shallowfusion.evaluation.word_errors import word_errors
from shallowfusion.options import DecodingOptions

__all__ = ["main", "tune"]

WEIGHTS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)


def tune(clips_directory: Path) -> dict[str, object]:
    """Decode the clips with every weight; the fewest word errors win, ties go to the smaller weight."""
    clips = read_manifest(clips_directory)
    references, paths = [clip.text for clip in clips], [clip.path for clip in clips]
    found: dict[str, object] = {"clips": len(clips), "words": sum(len(text.split()) for text in references)}
    for name, decoder in decoders().items():
        errors: dict[float, int] = {}
        for weight in WEIGHTS if name in LANGUAGE_MODELS else (0.0,):
            results = decoder.transcribe(paths, DecodingOptions(lm_weight=weight))
            counted = word_errors(references, [result.text for result in results])
            errors[weight] = sum(counted.errors)
            print(f"{name:8} {weight}  {100 * counted.rate:5.1f} %", file=sys.stderr, flush=True)
        best = min(errors, key=lambda weight: (errors[weight], weight))
        found[name] = {"lm_weight": best, "errors": {str(weight): count for weight, count in errors.items()}}
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
