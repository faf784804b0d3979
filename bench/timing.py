"""Fair timing: competitors take turns, medians are compared, the machine is written down."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

__all__ = ["Measurement", "machine", "save", "take_turns"]

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Measurement:
    """One row of the results: what was timed, on what, and how it compares.

    `ratio` is this provider's median over that of `against`, in the same run: above 1 this one is slower.
    """

    case: str
    shape: str
    dtype: str
    provider: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    against: str = ""
    ratio: float = float("nan")
    gigabytes_per_second: float = float("nan")
    peak_memory_mb: float = float("nan")
    note: str = ""


def take_turns(
    providers: Mapping[str, Callable[[], object]],
    repeats: int,
    warm_up: int = 2,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each provider; they run in turn, so that a busy moment of the machine hits all alike.

    Args:
        clock: time.process_time counts what other processes do not take.
    """
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for turn in range(warm_up + repeats):
        for name, run in providers.items():
            _synchronise(device)
            start = clock()
            run()
            _synchronise(device)
            if turn >= warm_up:
                seconds[name].append(clock() - start)
    return seconds


def measurements(
    case: str, shape: str, dtype: str, seconds: Mapping[str, Sequence[float]], against: str, **more: object
) -> list[Measurement]:
    """Rows of one comparison; each ratio is the median over turns of own time / `against`'s time in that turn."""
    rows = []
    for name, own in seconds.items():
        low, middle, high = np.percentile(np.array(own) * 1e3, [20, 50, 80])
        ratio = float(np.median(np.array(own) / np.array(seconds[against])))
        extra = {key: value[name] for key, value in more.items() if isinstance(value, Mapping) and name in value}
        rows.append(Measurement(case, shape, dtype, name, middle, low, high, against, ratio, **extra))  # type: ignore[arg-type]
    return rows


def machine(device: str) -> dict[str, str]:
    """What a figure depends on besides the code."""
    import transformers
    import triton

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "device": name,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def save(rows: Sequence[Measurement], device: str, path: Path) -> None:
    """Append rows with the machine they were measured on."""
    columns = [*machine(device), *(entry.name for entry in fields(Measurement))]
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        if is_new:
            writer.writeheader()
        for row in rows:
            numbers = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow({**machine(device), **numbers})


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x{len(names)}" if names else platform.processor()


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
