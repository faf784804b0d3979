"""Every fusion rule on the same recordings: `python -m bench.rules --data ../shared/data --work DIRECTORY --task an4`.

Parameters are chosen on development recordings with the right language model; the test recordings are decoded once,
with the right language model and, as a control, with one of the wrong domain. Every decoding is kept in the work
directory as it comes, and a killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from bench.rules_gate import learned_trial, unguarded
from bench.rules_trials import ALONE, Trial, medical_trials, short_trials
from bench.timing import ROOT, machine
from shallowfusion import DecodingOptions, FusionDecoder, fusion
from shallowfusion.audio.reading import read_audio
from shallowfusion.evaluation.mbr import minimum_bayes_risk
from shallowfusion.evaluation.normalisation import normaliser
from shallowfusion.evaluation.scoring import ReferenceSet, evaluate
from shallowfusion.evaluation.terms import TermList
from shallowfusion.evaluation.word_errors import word_errors
from shallowfusion.features.log_mel import log_mel
from shallowfusion.results import Transcription
from shallowfusion.trusting import Evidence, trust_floor

__all__ = ["main"]

BATCH = 24
LISTS: dict[tuple[int, int, str], list[Transcription]] = {}
COLUMNS = (
    "task", "lm", "system", "rule", "asr_temperature", "utterances", "words", "errors", "wer", "low", "high",
    "p", "p_corrected", "better", "worse", "term_recall", "truncated", "looping", "rtfx",
)  # fmt: skip


@dataclass(frozen=True)
class Set:
    """Recordings with their references; the decoder encodes them when their states are first asked for."""

    decoder: FusionDecoder
    recordings: Sequence[tuple[Path, str]]

    @property
    def references(self) -> tuple[str, ...]:
        return tuple(text for _, text in self.recordings)

    @property
    def states(self) -> Tensor:
        return self._encoded[0]

    @property
    def seconds(self) -> float:
        return self._encoded[1]

    def first(self, count: int) -> Set:
        return Set(self.decoder, self.recordings[:count])

    @cached_property
    def _encoded(self) -> tuple[Tensor, float]:
        settings = self.decoder.acoustic.features
        states: list[Tensor] = []
        seconds = 0.0
        for first in range(0, len(self.recordings), BATCH):
            paths = [path for path, _ in self.recordings[first : first + BATCH]]
            samples = [read_audio(path, settings.sampling_rate) for path in paths]
            seconds += sum(len(own) for own in samples) / settings.sampling_rate
            states.append(self.decoder.acoustic.scorer.encode(log_mel(samples, settings)))
        return torch.cat(states), seconds


@dataclass(frozen=True)
class Task:
    """What is decoded.

    Args:
        learned: trains a gate for the right language model, which it knows by its fingerprint.
        decoders: the acoustic model with a fitting ("right") and an unfitting ("wrong") language model, and beside
            either with a second one ("right both", "wrong both") or a bigram of general text ("right source").
    """

    name: str
    decoders: Mapping[str, FusionDecoder]
    dev: Set
    test: Set
    terms: TermList | None
    trials: tuple[Trial, ...]
    learned: Callable[[], Trial]

    def decoder(self, lm: str, trial: Trial) -> FusionDecoder:
        return self.decoders[lm if trial.decoder == "one" else f"{lm} {trial.decoder}"]


class Progress:
    """JSON lines of what was decoded: development errors and test transcripts by trial."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._known = {entry["key"]: entry for entry in map(json.loads, lines)}

    def has(self, key: str) -> bool:
        return key in self._known

    def had(self, key: str, make: Callable[[], dict[str, object]]) -> dict[str, object]:
        """What is stored under a key; made and stored if nothing is."""
        if key not in self._known:
            self._known[key] = {"key": key, **make()}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self._known[key]) + "\n")
            shown = {name: value for name, value in self._known[key].items() if name != "texts"}
            print(json.dumps(shown), flush=True)
        return self._known[key]


def run_trial(decoder: FusionDecoder, own: Set, trial: Trial) -> tuple[list[str], float]:
    """Transcripts, and seconds of processor time, which other work on the machine does not lengthen."""
    states = own.states  # encoded before the clock starts
    start = time.process_time()
    is_list = trial.rerank is not None or trial.risk_scale is not None
    options = DecodingOptions(
        beam_size=trial.beam_size,
        n_best=trial.beam_size if is_list else 1,
        rule=trial.rule,
        asr_temperature=trial.asr_temperature,
    )
    known = LISTS.get((id(decoder), id(states), repr(options)))
    results = list(known or decoded(decoder, own, options))
    if is_list:  # ranked in several ways
        LISTS[id(decoder), id(states), repr(options)] = results
    if trial.rerank is not None:
        results = [result.rerank(trial.rerank) for result in results]
    texts = [result.text if trial.risk_scale is None else least_risk(result, trial.risk_scale) for result in results]
    return texts, time.process_time() - start


def decoded(decoder: FusionDecoder, own: Set, options: DecodingOptions) -> list[Transcription]:
    """Results of all recordings, which are one session in their order."""
    found: list[Transcription] = []
    evidence = Evidence()
    for first in range(0, len(own.references), BATCH):
        found += decoder.decode(own.states[first : first + BATCH], options, evidence=evidence)
    return found


def least_risk(result: Transcription, scale: float) -> str:
    texts = [hypothesis.text for hypothesis in result.n_best]
    return texts[minimum_bayes_risk(texts, [h.total for h in result.n_best], scale).position]


def choose(task: Task, progress: Progress, systems: Collection[str] = ()) -> dict[str, Trial]:
    """For every system the trial with the fewest word errors on the development recordings, the first among equals.

    Args:
        systems: empty = all; the trusted ones rest on "internal LM".
    """
    best: dict[str, tuple[int, Trial]] = {}
    trusts = not systems or any(name.startswith("trusted") for name in systems)
    wanted = set(systems) | ({"internal LM"} if trusts else set())
    for trial in task.trials:
        if systems and trial.system not in wanted:
            continue

        def errors(trial: Trial = trial) -> dict[str, object]:
            texts, _ = run_trial(task.decoder("right", trial), task.dev, trial)
            return {"errors": sum(word_errors(list(task.dev.references), texts).errors)}

        found = int(str(progress.had(f"dev {trial.key}", errors)["errors"]))
        if trial.system not in best or found < best[trial.system][0]:
            best[trial.system] = (found, trial)
    chosen = {system: trial for system, (_, trial) in best.items()}
    return chosen | (with_trust(task, progress, chosen["internal LM"]) if trusts else {})


def with_trust(task: Task, progress: Progress, base: Trial) -> dict[str, Trial]:
    """A rule that may give the language model up; its floor needs no references and no wrong language model."""
    options = DecodingOptions(rule=base.rule, beam_size=base.beam_size)

    def floor() -> dict[str, object]:
        return {"floor": round(trust_floor(decoded(task.decoder("right", base), task.dev, options), 0.1), 3)}

    found = float(str(progress.had(f"floor {base.key}", floor)["floor"]))
    return {
        "trusted internal LM": Trial("trusted internal LM", fusion.trusted(base.rule, found)),
        "trusted internal LM, memory 0.6": Trial(
            "trusted internal LM, memory 0.6", fusion.trusted(base.rule, found, 0.6)
        ),
    }


def test(task: Task, lm: str, trials: Iterable[Trial], progress: Progress, is_timed: bool) -> list[dict[str, object]]:
    """Rows of the table for one language model; without `is_timed` the speed is left blank where it is not known."""
    own, normalise = task.test, normaliser("basic")
    ids = tuple(str(i) for i in range(len(own.references)))
    texts: dict[str, Sequence[str]] = {}
    chosen = {trial.system: trial for trial in (ALONE, *trials)}
    for system, trial in chosen.items():
        which = "right" if trial is ALONE else lm

        def texts_of(trial: Trial = trial, which: str = which) -> dict[str, object]:
            return {"texts": run_trial(task.decoder(which, trial), own, trial)[0]}

        texts[system] = list(progress.had(f"test {which} {trial.key}", texts_of)["texts"])  # type: ignore[call-overload]
    rows = []
    for scores in evaluate(ReferenceSet(ids, own.references, normalise, None, task.terms), texts).systems:
        trial = chosen[scores.name]

        def timed(trial: Trial = trial) -> dict[str, object]:
            few = own.first(min(BATCH, len(own.references)))
            LISTS.clear()
            return {"rtfx": round(few.seconds / run_trial(task.decoder(lm, trial), few, trial)[1], 1)}

        rows.append({
            "task": task.name, "lm": lm, "system": scores.name, "rule": str(trial.rerank or trial.rule),
            "asr_temperature": trial.asr_temperature, "utterances": len(own.references),
            "words": sum(scores.words.words), "errors": sum(scores.words.errors), "wer": f"{scores.words.rate:.4f}",
            "low": f"{scores.interval[0]:.4f}", "high": f"{scores.interval[1]:.4f}",
            "p": "" if scores.tests is None else f"{scores.tests.p_value:.4f}",
            "p_corrected": "" if scores.tests is None else f"{scores.tests.p_corrected:.4f}",
            "better": "" if scores.comparison is None else scores.comparison.wins,
            "worse": "" if scores.comparison is None else scores.comparison.losses,
            "term_recall": "" if scores.terms is None else f"{scores.terms.recall:.4f}",
            "truncated": f"{scores.failures.truncation_rate:.4f}", "looping": f"{scores.failures.loop_rate:.4f}",
            "rtfx": progress.had(f"time {trial.key}", timed)["rtfx"]
            if is_timed or progress.has(f"time {trial.key}")
            else "",
        })  # fmt: skip
    return rows


def encoded(decoder: FusionDecoder, recordings: Sequence[tuple[Path, str]]) -> Set:
    """Recordings that are encoded now."""
    own = Set(decoder, recordings)
    assert len(own.states) == len(recordings)
    return own


def medical_task(data: Path, work: Path) -> Task:
    """The demo models on 120 development and 320 test clips of unseen medical sentences, spoken by espeak-ng.

    The wrong language model has read two novels; where a rule takes a second one, it is that one again. The
    acoustic model has heard the text of the novels too, so that this one is also the source that the density ratio
    takes out, and a bigram of the same text that of LODR.
    """
    from shallowfusion.demo.shipped import decoders, model_directory, read_manifest, terms
    from shallowfusion.demo.train import write_evaluation_clips

    write_evaluation_clips(data, work)
    loaded = decoders("cpu", "float32")
    clips = {part: [(clip.path, clip.text) for clip in read_manifest(work / part)] for part in ("private", "test")}
    right, wrong = loaded["medical"], loaded["general"]
    dev, test_set = Set(right, clips["private"][:120]), Set(right, clips["test"])
    listed = {term for term in terms() if any(f" {term} " in f" {text} " for text in test_set.references)}
    named = {"right": right, "wrong": wrong} | _with_second(right, wrong, wrong, "both")
    named |= _with_second(right, wrong, source_decoder(right, data, work), "source")
    models = (str(model_directory("asr")), str(model_directory("lm_medical")))
    gate = partial(learned_trial, work / "gate_medical", *models, clips["private"][:120], clips["private"][120:160])
    return Task("medical", named, dev, test_set, TermList.of(sorted(listed)), tuple(medical_trials()), gate)


def an4_task(data: Path, work: Path) -> Task:
    """Real speech: AN4's development and test speakers, an n-gram model of its training transcripts' characters.

    The second language model is the one of two novels; the wrong one is the medical one.
    """
    from shallowfusion.demo.recordings import an4_recordings
    from shallowfusion.demo.shipped import model_directory

    asr = str(model_directory("asr_an4"))
    general, medical = (str(model_directory(f"lm_{name}")) for name in ("general", "medical"))
    right = FusionDecoder.from_pretrained(asr, [str(an4_lm(data, work))], device="cpu")
    wrong = FusionDecoder(right.acoustic, FusionDecoder.from_pretrained(asr, [medical], device="cpu").language_models)
    second = FusionDecoder(right.acoustic, FusionDecoder.from_pretrained(asr, [general], device="cpu").language_models)
    parts = {part: [(path, text.lower()) for path, text in an4_recordings(data, part)] for part in ("dev", "test")}
    named = {"right": right, "wrong": wrong} | _with_second(right, wrong, second, "both")
    halves = parts["dev"][0::2], parts["dev"][1::2]
    gate = partial(learned_trial, work / "gate_an4", asr, str(an4_lm(data, work)), *halves)
    sets = (Set(right, parts["dev"]), Set(right, parts["test"]))
    return Task("an4", named, *sets, None, tuple(short_trials()), gate)


def _with_second(
    right: FusionDecoder, wrong: FusionDecoder, second: FusionDecoder, role: str
) -> dict[str, FusionDecoder]:
    return {
        f"{name} {role}": FusionDecoder(right.acoustic, [*own.language_models, *second.language_models])
        for name, own in (("right", right), ("wrong", wrong))
    }


def source_decoder(right: FusionDecoder, data: Path, work: Path) -> FusionDecoder:
    """The acoustic model with a bigram of its tokens of the general text."""
    from shallowfusion.demo.corpus import GENERAL_SOURCES, read_sentences
    from shallowfusion.demo.shipped import model_directory
    from shallowfusion.ngrams.arpa import write_arpa
    from shallowfusion.ngrams.estimate import EstimateSettings, estimate
    from shallowfusion.ngrams.units import tokens

    path, asr = work / "general_bigram.arpa", str(model_directory("asr"))
    if not path.exists():
        units = tokens(asr)
        texts = [sentence.text for sentence in read_sentences(data, GENERAL_SOURCES, speakable=False)]
        write_arpa(estimate(units.split(texts), EstimateSettings(2), units.vocabulary).model, path)
    loaded = FusionDecoder.from_pretrained(asr, [str(path)], device="cpu")
    return FusionDecoder(right.acoustic, loaded.language_models)


def an4_lm(data: Path, work: Path, orders: Sequence[int] = (4, 6, 8, 10, 12)) -> Path:
    """An ARPA file of character n-grams of the training transcripts, of the order that predicts those of dev best."""
    from shallowfusion.demo.corpus import normalise
    from shallowfusion.demo.recordings import an4_recordings
    from shallowfusion.demo.shipped import model_directory
    from shallowfusion.ngrams.arpa import write_arpa
    from shallowfusion.ngrams.estimate import EstimateSettings, estimate
    from shallowfusion.ngrams.perplexity import perplexity
    from shallowfusion.ngrams.table import NgramTable
    from shallowfusion.ngrams.units import tokens

    path = work / "an4.arpa"
    if path.exists():
        return path
    units = tokens(str(model_directory("asr_an4")))
    texts = {part: [normalise(text) or "" for _, text in an4_recordings(data, part)] for part in ("train", "dev")}
    found = {}
    for order in orders:
        model = estimate(units.split(texts["train"]), EstimateSettings(order), units.vocabulary).model
        found[order] = (perplexity(NgramTable(model), units.split(texts["dev"])).value, model)
        print(f"order {order}: perplexity {found[order][0]:.3f} per character of dev", flush=True)
    work.mkdir(parents=True, exist_ok=True)
    write_arpa(found[min(found, key=lambda order: found[order][0])][1], path)
    return path


def task_parser(description: str) -> argparse.ArgumentParser:
    """What every comparison of the rules asks for; `task_of` reads it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="clips, which need espeak-ng, and what was decoded")
    parser.add_argument("--task", choices=("medical", "an4"), default="medical")
    return parser


def task_of(chosen: argparse.Namespace) -> Task:
    """The task asked for, to be decoded on one thread."""
    torch.set_num_threads(1)
    return {"medical": medical_task, "an4": an4_task}[chosen.task](chosen.data, chosen.work)


def main(arguments: list[str] | None = None) -> int:
    """Choose, test and append to bench/results/rules.csv."""
    parser = task_parser("Compare the fusion rules on the demo models.")
    parser.add_argument("--lm", choices=("right", "wrong"), nargs="+", default=["right", "wrong"])
    parser.add_argument("--no-time", action="store_true", help="no decoding for speed, which other work would spoil")
    parser.add_argument("--systems", nargs="+", metavar="NAME", help="test these alone")
    chosen = parser.parse_args(arguments)
    task = task_of(chosen)
    progress = Progress(chosen.work / f"rules_{task.name}.jsonl")
    trials = choose(task, progress, chosen.systems or ())
    learned = [task.learned()] if "learned gate" in (chosen.systems or ["learned gate"]) else []
    for lm in chosen.lm:
        gates = learned if lm == "right" else [unguarded(own, task.decoders[lm]) for own in learned]
        wanted = [own for own in (*trials.values(), *gates) if own.system in (chosen.systems or [own.system])]
        rows = test(task, lm, wanted, progress, not chosen.no_time)
        save([row | {"rule": str(row["rule"]).replace(str(chosen.work), "DIRECTORY")} for row in rows])
    return 0


def save(rows: Sequence[Mapping[str, object]]) -> None:
    path = ROOT / "bench" / "results" / "rules.csv"
    known = machine("cpu")
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*known, *COLUMNS])
        if is_new:
            writer.writeheader()
        for row in rows:
            print(row, flush=True)
            writer.writerow({**known, **row})


if __name__ == "__main__":
    sys.exit(main())
