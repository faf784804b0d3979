"""Every fusion rule on the same clips: `python -m bench.rules --data ../shared/data --work DIRECTORY [--task medical]`.

Parameters are chosen on development recordings with the right language model; the test recordings are decoded once,
with the right language model and, as a control, with one of the wrong domain.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bench.timing import ROOT, machine
from shallowfusion import DecodingOptions, FusionDecoder, fusion
from shallowfusion.audio.reading import read_audio
from shallowfusion.evaluation.mbr import minimum_bayes_risk
from shallowfusion.evaluation.normalisation import normaliser
from shallowfusion.evaluation.scoring import ReferenceSet, evaluate
from shallowfusion.evaluation.terms import TermList
from shallowfusion.evaluation.word_errors import word_errors
from shallowfusion.features.log_mel import log_mel
from shallowfusion.fusion import Rule
from shallowfusion.results import Transcription

__all__ = ["main"]

BATCH = 24
COLUMNS = (
    "task", "lm", "system", "rule", "asr_temperature", "utterances", "words", "errors", "wer", "low", "high",
    "p_corrected", "better", "worse", "term_recall", "truncated", "looping", "rtfx",
)  # fmt: skip


@dataclass(frozen=True)
class Set:
    """Encoded recordings with their references."""

    states: Tensor
    references: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Task:
    """What is decoded: the acoustic model with a fitting and an unfitting language model, and with both."""

    name: str
    right: FusionDecoder
    wrong: FusionDecoder
    both: FusionDecoder
    dev: Set
    test: Set
    terms: TermList | None


@dataclass(frozen=True)
class Trial:
    """One system with one choice of its parameters."""

    system: str
    rule: Rule
    asr_temperature: float = 1.0
    decoder: str = "one"  # or "both": two language models
    beam_size: int = 5
    rerank: Rule | None = None  # of a list decoded with `rule`
    risk_scale: float | None = None  # minimum Bayes risk instead of the best total


def trials() -> list[Trial]:
    """The grid of every system."""
    found = [Trial("static", fusion.static(w)) for w in (0.2, 0.4, 0.6, 0.8, 1.0)]
    found += [Trial("piecewise", fusion.piecewise(w, n)) for w in (0.6, 0.8, 1.0) for n in (2, 6)]
    found += [Trial("piecewise, catch-up", fusion.piecewise(w, 4, catch_up=True)) for w in (0.6, 0.8, 1.0)]
    found += [Trial("article", fusion.article(w, 2)) for w in (0.24, 0.6, 0.8)]
    found += [Trial("uadf, as published", fusion.uadf(), t) for t in (1.0, 2.0)]
    found += [Trial("uadf, ASR primary", fusion.uadf_asr_primary(), t) for t in (1.0, 2.0, 3.0)]
    found += [Trial("late fusion", fusion.late_fusion(w), t) for w in (0.25, 0.5, 1.0) for t in (1.0, 2.0)]
    for form in ("local", "advantage", "plain"):
        for weight in (0.8, 1.5, 3.0):
            for temperature in (1.0, 2.0):
                gates = {
                    "entropy gate": fusion.entropy_gate(weight, form=form),
                    "confidence gate": fusion.confidence_gate(weight, form=form),
                    "margin gate": fusion.margin_gate(weight, threshold=3.0, form=form),
                    "inverse-entropy gate": fusion.inverse_entropy_gate(weight, form=form),
                    "agreement gate": fusion.agreement_gate(weight, top_k=3, form=form),
                }
                found += [Trial(name, rule, temperature) for name, rule in gates.items()]
    pairs = [(w, i) for w in (0.6, 0.8, 1.0) for i in (0.1, 0.2, 0.3)]
    found += [Trial("internal LM", fusion.internal_lm(w, i)) for w, i in pairs]
    found += [Trial("evidence gate", fusion.evidence_gate(0.8, 0.2, s, m)) for s in (0.1, 0.3) for m in (0.7, 0.9, 1.1)]
    found += [Trial("two LMs", fusion.static([w, v]), decoder="both") for w in (0.6, 0.8) for v in (0.05, 0.1, 0.2)]
    alone = fusion.static(0.0)
    for weight in (0.2, 0.4, 0.6, 0.8):
        ranked = Trial("rescoring, 20-best of ASR alone", alone, beam_size=20, rerank=fusion.static(weight))
        found.append(ranked)
        found += [replace(ranked, system="rescoring and MBR", risk_scale=k) for k in (0.3, 1.0)]
    found += [Trial("static and MBR", fusion.static(0.8), beam_size=20, risk_scale=k) for k in (0.1, 0.3, 1.0)]
    return found


def run_trial(decoder: FusionDecoder, own: Set, trial: Trial) -> tuple[list[str], float]:
    """Transcripts and seconds."""
    start = time.perf_counter()
    n_best = trial.beam_size if trial.rerank or trial.risk_scale else 1
    options = DecodingOptions(
        beam_size=trial.beam_size, n_best=n_best, rule=trial.rule, asr_temperature=trial.asr_temperature
    )
    results: list[Transcription] = []
    for first in range(0, len(own.references), BATCH):
        results += decoder.decode(own.states[first : first + BATCH], options)
    if trial.rerank is not None:
        results = [result.rerank(trial.rerank) for result in results]
    texts = [result.text if trial.risk_scale is None else least_risk(result, trial.risk_scale) for result in results]
    return texts, time.perf_counter() - start


def least_risk(result: Transcription, scale: float) -> str:
    texts = [hypothesis.text for hypothesis in result.n_best]
    return texts[minimum_bayes_risk(texts, [h.total for h in result.n_best], scale).position]


def choose(task: Task) -> dict[str, Trial]:
    """For every system the trial with the fewest word errors on the development recordings."""
    best: dict[str, tuple[int, Trial]] = {}
    for trial in trials():
        texts, _ = run_trial(task.both if trial.decoder == "both" else task.right, task.dev, trial)
        errors = sum(word_errors(list(task.dev.references), texts).errors)
        print(f"dev {task.name} {errors:5d} {trial.system} {trial.rule} T={trial.asr_temperature}", flush=True)
        if trial.system not in best or errors < best[trial.system][0]:
            best[trial.system] = (errors, trial)
    return {system: trial for system, (_, trial) in best.items()}


def test(task: Task, chosen: dict[str, Trial]) -> list[dict[str, object]]:
    """The chosen trials on the test recordings with either language model."""
    rows = []
    own, normalise = task.test, normaliser("basic")
    references = ReferenceSet(
        tuple(str(i) for i in range(len(own.references))), own.references, normalise, None, task.terms
    )
    alone, alone_seconds = run_trial(task.right, own, Trial("ASR alone", fusion.static(0.0)))
    for lm, decoder in (("right", task.right), ("wrong", task.wrong)):
        texts, seconds = {"ASR alone": alone}, {"ASR alone": alone_seconds}
        for system, trial in chosen.items():
            if trial.decoder == "both" and lm == "wrong":
                continue
            which = task.both if trial.decoder == "both" else decoder
            texts[system], seconds[system] = run_trial(which, own, trial)
        for scores in evaluate(references, texts).systems:
            trial = chosen.get(scores.name, Trial("ASR alone", fusion.static(0.0)))
            row = {
                "task": task.name, "lm": lm, "system": scores.name, "rule": str(trial.rerank or trial.rule),
                "asr_temperature": trial.asr_temperature, "utterances": len(own.references),
                "words": sum(scores.words.words), "errors": sum(scores.words.errors), "wer": f"{scores.words.rate:.4f}",
                "low": f"{scores.interval[0]:.4f}", "high": f"{scores.interval[1]:.4f}",
                "p_corrected": "" if scores.tests is None else f"{scores.tests.p_corrected:.4f}",
                "better": "" if scores.comparison is None else scores.comparison.wins,
                "worse": "" if scores.comparison is None else scores.comparison.losses,
                "term_recall": "" if scores.terms is None else f"{scores.terms.recall:.4f}",
                "truncated": f"{scores.failures.truncation_rate:.4f}", "looping": f"{scores.failures.loop_rate:.4f}",
                "rtfx": f"{own.seconds / seconds[scores.name]:.1f}",
            }  # fmt: skip
            rows.append(row)
            print(row, flush=True)
    return rows


def encoded(decoder: FusionDecoder, recordings: Sequence[tuple[Path, str]]) -> Set:
    settings = decoder.acoustic.features
    states, seconds = [], 0.0
    for first in range(0, len(recordings), BATCH):
        samples = [read_audio(path, settings.sampling_rate) for path, _ in recordings[first : first + BATCH]]
        seconds += sum(len(own) for own in samples) / settings.sampling_rate
        states.append(decoder.acoustic.scorer.encode(log_mel(samples, settings)))
    return Set(torch.cat(states), tuple(text for _, text in recordings), seconds)


def medical_task(data: Path, work: Path) -> Task:
    """The demo models on 120 development and 320 test clips of unseen medical sentences, spoken by espeak-ng."""
    from shallowfusion.demo.shipped import decoders, read_manifest, terms
    from shallowfusion.demo.train import write_evaluation_clips

    write_evaluation_clips(data, work)
    loaded = decoders("cpu", "float32")
    clips = {part: [(clip.path, clip.text) for clip in read_manifest(work / part)] for part in ("private", "test")}
    right, wrong = loaded["medical"], loaded["general"]
    both = FusionDecoder(right.acoustic, [*right.language_models, *wrong.language_models])
    dev, test_set = encoded(right, clips["private"][:120]), encoded(right, clips["test"])
    listed = {term for term in terms() if any(f" {term} " in f" {text} " for text in test_set.references)}
    return Task("medical", right, wrong, both, dev, test_set, TermList.of(sorted(listed)))


def main(arguments: list[str] | None = None) -> int:
    """Choose, test and append to bench/results/rules.csv."""
    parser = argparse.ArgumentParser(description="Compare the fusion rules on the demo models.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where the synthesised clips go; needs espeak-ng")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    task = medical_task(chosen.data, chosen.work)
    rows = test(task, choose(task))
    path = ROOT / "bench" / "results" / "rules.csv"
    known = machine("cpu")
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*known, *COLUMNS])
        if is_new:
            writer.writeheader()
        writer.writerows({**known, **row} for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
