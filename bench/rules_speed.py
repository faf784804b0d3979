"""The speed of the systems of `bench.rules`: `python -m bench.rules_speed --data ../shared/data --work DIRECTORY`.

All systems take turns on the same first test recordings, and processor time of one thread is counted, which other work
on the machine lengthens less than the clock. Encoding is left out. Parameters are those that `bench.rules` chose in the
same directory; systems for which it has not chosen yet are left out. Every turn is kept as it ends.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from bench.rules import LISTS, Progress, Set, Task, choose, run_trial, task_of, task_parser
from bench.rules_trials import ALONE, Trial
from bench.timing import ROOT, machine

__all__ = ["main"]

COLUMNS = ("task", "system", "recordings", "audio_seconds", "turns", "processor_seconds", "rtfx")


def timed_trials(task: Task, progress: Progress, work: Path) -> list[Trial]:
    """What was chosen, and the gate that was trained, if it was."""
    unknown = {trial.system for trial in task.trials if not progress.has(f"dev {trial.key}")}
    systems = {trial.system for trial in task.trials} - unknown
    trusted = {"trusted internal LM"} if "internal LM" in systems else set()
    trials = [ALONE, *choose(task, progress, systems | trusted).values()]
    return [*trials, task.learned()] if (work / f"gate_{task.name}" / "figures.json").exists() else trials


def take_turns(task: Task, own: Set, trials: Sequence[Trial], turns: int, kept: Progress) -> dict[str, list[float]]:
    """Seconds of processor time of each system, a turn after the other."""
    seconds: dict[str, list[float]] = {trial.system: [] for trial in trials}
    run_trial(task.decoder("right", ALONE), own.first(2), ALONE)  # warm-up
    for turn in range(turns):
        for trial in trials:

            def timed(trial: Trial = trial) -> dict[str, object]:
                LISTS.clear()
                return {"seconds": run_trial(task.decoder("right", trial), own, trial)[1]}

            key = f"turn {turn} of {len(own.references)}: {trial.key}"
            seconds[trial.system].append(float(str(kept.had(key, timed)["seconds"])))
    return seconds


def main(arguments: list[str] | None = None) -> int:
    """Time and append to bench/results/rules_speed.csv."""
    parser = task_parser("Time the fusion rules on the demo models, in the work directory of bench.rules.")
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--turns", type=int, default=3)
    chosen = parser.parse_args(arguments)
    task = task_of(chosen)
    trials = timed_trials(task, Progress(chosen.work / f"rules_{task.name}.jsonl"), chosen.work)
    own = task.test.first(chosen.clips)
    seconds = take_turns(task, own, trials, chosen.turns, Progress(chosen.work / f"speed_{task.name}.jsonl"))
    save(task.name, own, seconds)
    return 0


def save(task: str, own: Set, seconds: Mapping[str, Sequence[float]]) -> None:
    path = ROOT / "bench" / "results" / "rules_speed.csv"
    known = machine("cpu")
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*known, *COLUMNS])
        if is_new:
            writer.writeheader()
        for system, turns in seconds.items():
            middle = median(turns)
            row = {
                "task": task, "system": system, "recordings": len(own.references),
                "audio_seconds": f"{own.seconds:.1f}", "turns": len(turns), "processor_seconds": f"{middle:.2f}",
                "rtfx": f"{own.seconds / middle:.1f}",
            }  # fmt: skip
            print(row, flush=True)
            writer.writerow({**known, **row})


if __name__ == "__main__":
    sys.exit(main())
