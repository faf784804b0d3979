"""Results as text: `python -m bench.report [bench/results/cpu.csv]` shows the newest rows of each case."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Sequence

from bench.timing import ROOT, Measurement

__all__ = ["main", "table"]


def table(rows: Sequence[Measurement]) -> str:
    """One line per provider and shape; `x` is how many times slower than the one compared against."""
    lines = []
    for row in rows:
        parts = [f"{row.case:11}{row.shape:66} {row.dtype:9}{row.provider:28}"]
        if not math.isnan(row.median_ms):
            parts.append(f"{row.median_ms:10.3f} ms [{row.p20_ms:.3f}, {row.p80_ms:.3f}] {row.ratio:6.2f} x")
        if not math.isnan(row.gigabytes_per_second):
            parts.append(f"{row.gigabytes_per_second:7.1f} GB/s")
        if not math.isnan(row.peak_memory_mb):
            parts.append(f"{row.peak_memory_mb:8.0f} MB")
        if row.note:
            parts.append(f" {row.note}")
        lines.append(" ".join(parts))
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    path = arguments[0] if arguments else ROOT / "bench" / "results" / "cpu.csv"
    with open(path, newline="", encoding="utf-8") as file:
        stored = list(csv.DictReader(file))
    newest: dict[tuple[str, ...], dict[str, str]] = {}
    for row in stored:
        newest[(row["case"], row["shape"], row["dtype"], row["provider"])] = row
    numbers = ("median_ms", "p20_ms", "p80_ms", "ratio", "gigabytes_per_second", "peak_memory_mb")
    kept = Measurement.__dataclass_fields__
    for row in newest.values():
        own = {k: float(v) if k in numbers else v for k, v in row.items() if k in kept}
        print(f"{row['date']} {row['commit']:8}", table([Measurement(**own)]))  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1:])
