"""The picture of delayed fusion from its stored rows: `python -m bench.delayed_picture`, docs/delayed.svg."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.timing import ROOT

__all__ = ["main", "picture"]

Rows = Sequence[dict[str, str]]


def main() -> int:
    """Draw the newest row of every system, rule and beam."""
    with (ROOT / "bench" / "results" / "delayed.csv").open(newline="", encoding="utf-8") as file:
        newest = {(row["system"], row["rule"], row["beam_size"]): row for row in csv.DictReader(file)}
    picture(list(newest.values()), ROOT / "docs" / "delayed.svg")
    return 0


def picture(rows: Rows, path: Path) -> None:
    """Word error rate against time: the attention decoder with an LM as big as GPT-2 small, and the CTC search.

    The left half shows ratios of one run, which other work on the machine moves less than it moves seconds.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    heard = [row for row in rows if row["system"].startswith("CTC")]
    written = [row for row in rows if not row["system"].startswith("CTC")]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 6.4))
    _lines(left, written, "times_faster_gpt2_small", lambda ratio: 1 / ratio)
    left.set(
        title="attention decoder, LM as big as GPT-2 small", xlabel="time over that of fusion at every token, beam 5"
    )
    _lines(right, heard, "seconds_per_clip", lambda seconds: seconds)
    right.set(title="CTC search", xlabel="seconds per clip with the trained small LM")
    for axes in (left, right):
        axes.set(xscale="log", ylabel="word error rate, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def _lines(axes: object, rows: Rows, column: str, time: Callable[[float], float]) -> None:
    """One line per family and beam; intervals of one family are joined."""
    families: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row[column]:
            tail = ", free tail" if "tail='free'" in row["rule"] and row["system"] == "CTC, delayed" else ""
            key = (row["system"] + tail, row["beam_size"])
            families.setdefault(key, []).append((time(float(row[column])), 100 * float(row["wer"])))
    for (family, beam), points in families.items():
        style = {"5": "o-", "10": "s--", "20": "^:", "100": "D-."}[beam]
        axes.plot(*zip(*sorted(points), strict=True), style, markersize=4, label=f"{family}, beam {beam}")  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
