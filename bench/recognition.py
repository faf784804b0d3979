"""Word error rates on AN4's real recordings: `python -m bench.recognition --data ../shared/data`.

With `--dtypes` what rounded weights cost: AN4 with its own model, and the shipped medical clips with the medical
language model, in float32, bfloat16 and int8.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.timing import ROOT, machine
from shallowfusion import DecodingOptions, FusionDecoder
from shallowfusion.demo.recordings import an4_recordings
from shallowfusion.demo.shipped import HERE, lm_weights, model_directory, read_manifest
from shallowfusion.evaluation import word_errors

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Decode AN4 dev and test with the shipped acoustic models alone; append rows to bench/results/recognition.csv."""
    parser = argparse.ArgumentParser(description="Word error rates of the shipped acoustic models on AN4.")
    parser.add_argument("--data", type=Path, required=True, help="directory with audio/manifest.jsonl")
    parser.add_argument("--dtypes", action="store_true", help="compare dtypes of the weights instead")
    parser.add_argument("--no-save", action="store_true", help="print only")
    chosen = parser.parse_args(arguments)
    rows = []
    for row in of_dtypes(chosen.data) if chosen.dtypes else of_models(chosen.data):
        rows.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if not chosen.no_save:
        save(rows)
    return 0


def of_models(data: Path) -> Iterator[dict[str, object]]:
    for name in ("asr", "asr_an4"):
        decoder = FusionDecoder.from_pretrained(model_directory(name))
        for part in ("dev", "test"):
            for beam_size in (1, 5):
                yield row_of(decoder, f"AN4 {part}", an4(data, part), name, DecodingOptions(beam_size=beam_size))


def of_dtypes(data: Path) -> Iterator[dict[str, object]]:
    clips = [(clip.path, clip.text) for folder in ("dev", "clips") for clip in read_manifest(HERE / folder)]
    fused = DecodingOptions(beam_size=5, lm_weight=lm_weights()["medical"]["lm_weight"])
    for dtype in ("float32", "bfloat16", "int8"):
        decoder = FusionDecoder.from_pretrained(
            model_directory("asr"), lm=model_directory("lm_medical"), device="cpu", dtype=dtype
        )
        yield row_of(decoder, "medical clips, dev and demo", clips, f"asr + lm_medical, {dtype}", fused)
        alone = FusionDecoder.from_pretrained(model_directory("asr_an4"), device="cpu", dtype=dtype)
        for part in ("dev", "test"):
            yield row_of(alone, f"AN4 {part}", an4(data, part), f"asr_an4, {dtype}", DecodingOptions(beam_size=5))


def an4(data: Path, part: str) -> list[tuple[Path, str]]:
    return [(path, text.lower()) for path, text in an4_recordings(data, part)]


def row_of(
    decoder: FusionDecoder, name: str, pairs: list[tuple[Path, str]], model: str, options: DecodingOptions
) -> dict[str, object]:
    results = decoder.transcribe([path for path, _ in pairs], options)
    found = word_errors([text for _, text in pairs], [result.text for result in results])
    low, high = found.interval()
    return {
        "set": name,
        "model": model,
        "beam_size": options.beam_size,
        "utterances": len(pairs),
        "words": sum(found.words),
        "errors": sum(found.errors),
        "wer": f"{found.rate:.4f}",
        "low": f"{low:.4f}",
        "high": f"{high:.4f}",
    }


def save(rows: list[dict[str, object]]) -> None:
    path = ROOT / "bench" / "results" / "recognition.csv"
    known = machine("cpu")
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*known, *rows[0]])
        if is_new:
            writer.writeheader()
        writer.writerows({**known, **row} for row in rows)


if __name__ == "__main__":
    sys.exit(main())
