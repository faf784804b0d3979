"""Measure: `python -m bench.run --device cpu [--case fused_step] [--quick]`, or `python bench/run.py ...`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

if not __package__:  # run as a file: the packages lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.registry import CASES, Case
from bench.report import table
from bench.timing import ROOT, save

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen cases and append their rows to bench/results/<device>.csv; a red test prints no speed."""
    parser = argparse.ArgumentParser(description="Measure speed and memory against other implementations.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="default: all")
    parser.add_argument("--quick", action="store_true", help="small shapes, few repeats; nothing is saved")
    parser.add_argument("--no-save", action="store_true", help="print only")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("bench: no CUDA device here; use --device cpu", file=sys.stderr)
        return 2
    failed = 0
    for case in CASES:
        if (chosen.case and case.name not in chosen.case) or chosen.device not in case.devices:
            continue
        if not chosen.quick and not tests_pass(case, chosen.device):
            print(f"bench: the tests of {case.name} are red, so no speed is printed", file=sys.stderr)
            failed = 1
            continue
        for rows in case.run(chosen.device, chosen.quick):
            print(table(rows), flush=True)
            if not (chosen.quick or chosen.no_save):
                save(rows, chosen.device, ROOT / "bench" / "results" / f"{chosen.device}.csv")
    return failed


def tests_pass(case: Case, device: str) -> bool:
    """Whether all tests of a case pass, on CUDA those marked `gpu`; to find none to run is not to pass."""
    marks = ["-m", "gpu"] if device == "cuda" else []
    files = [path for path in case.tests if Path(ROOT / path).exists()]
    if not files:
        return False
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *marks, *files], cwd=ROOT)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
