"""Train the demo's models from public texts and espeak-ng's voices.

    python -m shallowfusion.demo.train --data DIRECTORY [--out DIRECTORY] [--stage STAGE] [--steps N]

The stages build on each other: `speech` speaks the training sentences, `clips` the test and development
clips, `lm` trains the two language models, `asr` the acoustic model, `an4` adapts it to real recordings,
`cards` measures everything and writes the model cards. Each stage goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from shallowfusion.demo.acoustic_model import load_acoustic_model, new_acoustic_model, save_acoustic_model
from shallowfusion.demo.acoustic_training import AcousticSettings, train_acoustic
from shallowfusion.demo.cards import write_cards
from shallowfusion.demo.corpus import (
    ACOUSTIC_SOURCES,
    EVALUATION_SOURCES,
    GENERAL_SOURCES,
    MEDICAL_SOURCES,
    Sentence,
    choose_unseen,
    held_out_sentences,
    read_sentences,
)
from shallowfusion.demo.lm_training import LmSettings, new_lm, save_lm, train_lm
from shallowfusion.demo.recordings import read_an4, write_clips
from shallowfusion.demo.synthesis import Utterance, load_cache, write_cache
from shallowfusion.demo.training_loop import Budget
from shallowfusion.errors import AudioError, InvalidArgumentError, ShallowFusionError

__all__ = ["STAGES", "Plan", "main", "run_stages"]

STAGES = ("speech", "clips", "lm", "asr", "an4", "cards")

_NUM_CLIPS = 20
_NUM_DEV_CLIPS = 24
_NUM_PRIVATE_CLIPS = 200
_NUM_EVALUATION_CLIPS = 320
_CLIP_SEED = 2026
_VOICE_PASSES = 2
_AN4_REPEATS = 2
_AN4_SPEEDS = (0.9, 1.0, 1.1)


@dataclass(frozen=True)
class Plan:
    """What is trained, from where to where, and for how long.

    Args:
        data: directory with `text/` and `audio/`.
        out: directory that gets `models/`, `clips/` and `dev/`.
        work: directory for spoken features and checkpoints.
        acoustic_steps: updates of the acoustic model.
        medical_steps: updates of the medical language model.
        general_steps: updates of the general language model; it overfits its small text when trained longer.
        an4_steps: updates on AN4's recordings.
        minutes: wall-clock limit of each single training, or None.
        seed: of sentence order, voices, noise and initial weights; the clips have their own.
        num_workers: processes that speak.
        quick: three sentences and tiny models, to try the whole way in under a minute.
    """

    data: Path
    out: Path
    work: Path
    acoustic_steps: int = 5000
    medical_steps: int = 2800
    general_steps: int = 850
    an4_steps: int = 1800
    minutes: float | None = None
    seed: int = 17
    num_workers: int = 2
    quick: bool = False

    @property
    def models(self) -> Path:
        """Where the model directories go."""
        return self.out / "models"


def run_stages(plan: Plan, stages: tuple[str, ...] = STAGES) -> None:
    """Run stages in order.

    Raises:
        InvalidArgumentError: a stage is unknown, or the data directory lacks its texts.
        AudioError: espeak-ng is missing.
    """
    actions: dict[str, Callable[[Plan], None]] = {
        "speech": _speak,
        "clips": _make_clips,
        "lm": _train_lms,
        "asr": _train_asr,
        "an4": _train_an4,
        "cards": _write_cards,
    }
    for stage in stages:
        if stage not in actions:
            raise InvalidArgumentError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}.")
    if not (plan.data / "text").is_dir():
        raise InvalidArgumentError(f"--data must name a directory that holds text/, got {plan.data}.")
    if {"speech", "clips", "an4"} & set(stages) and shutil.which("espeak-ng") is None:
        raise AudioError("espeak-ng is not on the path; install the package espeak-ng (apt-get install espeak-ng).")
    plan.work.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        print(f"stage {stage}", flush=True)
        torch.manual_seed(plan.seed)
        actions[stage](plan)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and train; returns the exit status."""
    defaults = {name: field.default for name, field in Plan.__dataclass_fields__.items()}
    parser = argparse.ArgumentParser(prog="python -m shallowfusion.demo.train", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="directory with text/ and audio/")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: this package")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "shallowfusion-demo")
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--steps", type=int, help="updates of every training, in place of each one's own default")
    parser.add_argument("--minutes", type=float, help="wall-clock limit of every training")
    parser.add_argument("--seed", type=int, default=defaults["seed"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="three sentences and tiny models")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(max(1, chosen.threads))
    names = ("acoustic_steps", "medical_steps", "general_steps", "an4_steps")
    steps = {} if chosen.steps is None else dict.fromkeys(names, chosen.steps)
    try:
        plan = Plan(
            data=chosen.data,
            out=chosen.out,
            work=chosen.work,
            minutes=chosen.minutes,
            seed=chosen.seed,
            quick=chosen.quick,
            num_workers=max(1, chosen.threads),
            **steps,
        )
        run_stages(plan, STAGES if chosen.stage == "all" else (chosen.stage,))
    except ShallowFusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _speak(plan: Plan) -> None:
    sentences = read_sentences(plan.data, ACOUSTIC_SOURCES, speakable=True, min_words=2, max_words=24)
    for voice_pass in range(1 if plan.quick else _VOICE_PASSES):
        order = list(sentences)
        random.Random(f"{plan.seed}-{voice_pass}").shuffle(order)
        chosen = order[:3] if plan.quick else order
        write_cache(plan.work / f"speech-{voice_pass}", chosen, plan.seed + voice_pass, plan.num_workers)


def _make_clips(plan: Plan) -> None:
    counts = (1, 1, 1) if plan.quick else (_NUM_CLIPS, _NUM_DEV_CLIPS, _NUM_PRIVATE_CLIPS)
    chosen = choose_unseen(plan.data, sum(counts), _CLIP_SEED)
    start = 0
    for directory, count in zip((plan.out / "clips", plan.out / "dev", plan.work / "private"), counts, strict=True):
        write_clips(directory, chosen[start : start + count], _CLIP_SEED)
        start += count


def write_evaluation_clips(data: Path, work: Path) -> None:
    """Speak 200 development and 320 test sentences, neither trained on nor shipped, into work/private and work/test.

    Directories that exist are left as they are.
    """
    shipped = _NUM_CLIPS + _NUM_DEV_CLIPS
    counts = {"private": _NUM_PRIVATE_CLIPS, "test": _NUM_EVALUATION_CLIPS}
    chosen = choose_unseen(data, shipped + sum(counts.values()), _CLIP_SEED)[shipped:]
    for name, count in counts.items():
        if not (work / name).exists():
            write_clips(work / name, chosen[:count], _CLIP_SEED)
        chosen = chosen[count:]


def _train_lms(plan: Plan) -> None:
    jobs = (
        ("lm_medical", MEDICAL_SOURCES, EVALUATION_SOURCES, 0.0, plan.medical_steps),
        ("lm_general", GENERAL_SOURCES, ("gen_gutenberg_test",), 0.1, plan.general_steps),
    )
    for name, sources, held_out_sources, dropout, steps in jobs:
        texts = [sentence.text for sentence in read_sentences(plan.data, sources, speakable=False)]
        held_out = held_out_sentences(plan.data, held_out_sources, sources)
        model = new_lm(width=40, layers=1) if plan.quick else new_lm(dropout=dropout)
        if plan.quick:
            texts, held_out = texts[:3], held_out[:3]
        budget = Budget(steps, 3e-3, plan.minutes, decay_start=0.2)
        trained = train_lm(model, texts, budget, LmSettings(), plan.work / f"{name}.pt", plan.seed, held_out)
        save_lm(trained, plan.models / name)


def _spoken(plan: Plan) -> list[Utterance]:
    utterances = []
    for directory in sorted(plan.work.glob("speech-*")):
        utterances += load_cache(directory)
    if not utterances:
        raise AudioError(f"{plan.work} holds no speech; run --stage speech first.")
    return utterances


def _train_asr(plan: Plan) -> None:
    model = new_acoustic_model(32, 1, 1) if plan.quick else new_acoustic_model()
    budget = Budget(plan.acoustic_steps, 2e-3, plan.minutes, warmup_steps=400, decay_start=0.45)
    trained = train_acoustic(model, _spoken(plan), budget, AcousticSettings(), plan.work / "asr.pt", plan.seed)
    save_acoustic_model(trained, plan.models / "asr")


def _train_an4(plan: Plan) -> None:
    """Go on from the espeak-ng model with AN4, its words shuffled and spoken by espeak-ng, and a little of before."""
    real = read_an4(plan.data, "train", (1.0,) if plan.quick else _AN4_SPEEDS)
    generator = random.Random(plan.seed)
    words = [word for utterance in real for word in utterance.text.split()]
    lines = [" ".join(generator.choices(words, k=generator.randint(2, 7))) for _ in range(3 if plan.quick else 1500)]
    write_cache(plan.work / "an4-words", [Sentence(line, "an4") for line in lines], plan.seed, plan.num_workers)
    before = _spoken(plan)
    mixture = real[:3] if plan.quick else real * _AN4_REPEATS
    mixture = mixture + load_cache(plan.work / "an4-words") + generator.sample(before, min(len(before), 500))
    model = load_acoustic_model(plan.models / "asr")
    budget = Budget(plan.an4_steps, 8e-4, plan.minutes, warmup_steps=100)
    trained = train_acoustic(model, mixture, budget, AcousticSettings(), plan.work / "asr_an4.pt", plan.seed)
    save_acoustic_model(trained, plan.models / "asr_an4")


def _write_cards(plan: Plan) -> None:
    write_cards(plan.data, plan.out, plan.work)


if __name__ == "__main__":
    sys.exit(main())
