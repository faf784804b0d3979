"""Word error rates on AN4's real recordings: `python -m bench.recognition --data ../shared/data`."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from bench.timing import ROOT, machine
from shallowfusion import DecodingOptions, FusionDecoder
from shallowfusion.demo.recordings import an4_recordings
from shallowfusion.demo.shipped import model_directory
from shallowfusion.evaluation import word_errors

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Decode AN4 dev and test with the shipped acoustic models alone; append rows to bench/results/recognition.csv."""
    parser = argparse.ArgumentParser(description="Word error rates of the shipped acoustic models on AN4.")
    parser.add_argument("--data", type=Path, required=True, help="directory with audio/manifest.jsonl")
    parser.add_argument("--no-save", action="store_true", help="print only")
    chosen = parser.parse_args(arguments)
    rows = []
    for name in ("asr", "asr_an4"):
        decoder = FusionDecoder.from_pretrained(model_directory(name))
        for part in ("dev", "test"):
            pairs = [(path, text.lower()) for path, text in an4_recordings(chosen.data, part)]
            for beam_size in (1, 5):
                results = decoder.transcribe([path for path, _ in pairs], DecodingOptions(beam_size=beam_size))
                found = word_errors([text for _, text in pairs], [result.text for result in results])
                low, high = found.interval()
                row = {
                    "set": f"AN4 {part}",
                    "model": name,
                    "beam_size": beam_size,
                    "utterances": len(pairs),
                    "words": sum(found.words),
                    "errors": sum(found.errors),
                    "wer": f"{found.rate:.4f}",
                    "low": f"{low:.4f}",
                    "high": f"{high:.4f}",
                }
                rows.append(row)
                print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if not chosen.no_save:
        save(rows)
    return 0


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
