"""The learned gate of `bench.rules`: trained by `shallowfusion train-gate` on development recordings, once."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.rules_trials import Trial
from shallowfusion import FusionDecoder, fusion
from shallowfusion.fusion.learned_gate import LearnedGate

__all__ = ["learned_trial", "unguarded"]

Recordings = Sequence[tuple[Path, str]]


def learned_trial(work: Path, asr: str, lm: str, train: Recordings, dev: Recordings) -> Trial:
    """A gate trained on `train`, kept where it makes the fewest errors on `dev`; its figures lie beside it."""
    from shallowfusion.cli.main import main

    work.mkdir(parents=True, exist_ok=True)
    if not (work / "figures.json").exists():
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            first, second = _manifest(work / "train.jsonl", train), _manifest(work / "dev.jsonl", dev)
            code = main(
                ["train-gate", str(first), "--dev", str(second), "--asr", asr, "--lm", lm, "--out", str(work),
                 "--list-epochs", "3", "--normaliser", "basic", "--batch-size", "24", "--device", "cpu", "--json"]
            )  # fmt: skip
        if code:
            raise SystemExit(code)
        (work / "figures.json").write_text(told.getvalue(), encoding="utf-8")
    figures = json.loads((work / "figures.json").read_text(encoding="utf-8"))
    print(f"learned gate of {work}: dev errors {figures['dev_errors']}", flush=True)
    return Trial("learned gate", fusion.learned(work))


def unguarded(trial: Trial, decoder: FusionDecoder) -> Trial:
    """The trial with a gate that takes the decoder's models for those it was trained for, which it would refuse."""
    gate = trial.rule.gate
    assert isinstance(gate, LearnedGate)
    return replace(trial, rule=replace(trial.rule, gate=replace(gate, fingerprints=decoder.fingerprints)))


def _manifest(path: Path, recordings: Recordings) -> Path:
    rows = [json.dumps({"audio": str(audio), "text": text, "id": audio.stem}) for audio, text in recordings]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path
