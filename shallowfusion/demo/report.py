"""The demo: shipped clips transcribed alone and with each language model, measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shallowfusion.demo.shipped import HERE, LANGUAGE_MODELS, Clip, decoders, lm_weights, read_manifest, terms
from shallowfusion.errors import ShallowFusionError
from shallowfusion.evaluation.terms import TermErrors, TermList, term_errors
from shallowfusion.evaluation.word_errors import WordErrors, marked_words, word_errors
from shallowfusion.options import DecodingOptions
from shallowfusion.results import Transcription

__all__ = ["DemoReport", "SystemReport", "clip_lines", "run_demo", "summary_lines"]

TITLES = {"asr": "ASR alone", "general": "+ general LM", "medical": "+ medical LM"}
STAGES = ("encoder", "asr", "lm", "fusion", "search")


@dataclass(frozen=True)
class SystemReport:
    """One system on all clips: its weight, transcripts, errors, listed terms and seconds by stage."""

    name: str
    lm_weight: float
    results: tuple[Transcription, ...]
    errors: WordErrors
    terms: TermErrors
    stages: dict[str, float]

    @property
    def rtfx(self) -> float:
        """Seconds of audio per second of work, from reading the file to the text."""
        return sum(result.duration for result in self.results) / sum(self.stages.values())


@dataclass(frozen=True)
class DemoReport:
    """All systems on the same clips."""

    clips: tuple[Clip, ...]
    systems: dict[str, SystemReport]

    def to_json(self) -> dict[str, Any]:
        """The figures as plain data."""
        found: dict[str, Any] = {f"wer_{name}": system.errors.rate for name, system in self.systems.items()}
        found |= {f"wer_{name}_interval": list(s.errors.interval()) for name, s in self.systems.items()}
        found |= {f"lm_weight_{name}": self.systems[name].lm_weight for name in LANGUAGE_MODELS}
        found |= {f"term_recall_{name}": system.terms.recall for name, system in self.systems.items()}
        found |= {f"rtfx_{name}": system.rtfx for name, system in self.systems.items()}
        found["utterances"] = len(self.clips)
        found["words"] = sum(self.systems["asr"].errors.words)
        found["rtfx"] = self.systems["medical"].rtfx
        found["clips"] = [
            {"audio": clip.path.name, "reference": clip.text}
            | {name: system.results[i].text for name, system in self.systems.items()}
            for i, clip in enumerate(self.clips)
        ]
        return found


def run_demo(
    device: str = "auto", dtype: str = "auto", beam_size: int = 5, progress: Callable[[str], None] = lambda _: None
) -> DemoReport:
    """Transcribe the shipped clips with every shipped system.

    Weights are those chosen on the development clips; one recording is decoded beforehand as a warm-up.

    Raises:
        ModelError: the package holds no models or clips.
    """
    clips = read_manifest(HERE / "clips")
    loaded = decoders(device, dtype)
    weights = lm_weights()
    systems = {}
    for name, decoder in loaded.items():
        progress(TITLES[name])
        weight = float(weights[name]["lm_weight"])
        options = DecodingOptions(beam_size=beam_size, lm_weight=weight)
        decoder.transcribe([clips[0].path], options)
        results = decoder.transcribe([clip.path for clip in clips], options)
        systems[name] = _system(name, weight, clips, results)
    return DemoReport(tuple(clips), systems)


def _system(name: str, weight: float, clips: Sequence[Clip], results: Sequence[Transcription]) -> SystemReport:
    failed = [result for result in results if result.error is not None]
    if failed:
        raise ShallowFusionError(f"{len(failed)} demo clips failed, first {failed[0].source}: {failed[0].error}")
    said, heard = [clip.text for clip in clips], [result.text for result in results]
    errors, found = word_errors(said, heard), term_errors(said, heard, TermList.of(terms()))
    stages: dict[str, float] = {}
    for timing in {id(r.timing): r.timing for r in results if r.timing is not None}.values():
        for stage, seconds in timing.stages.items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    return SystemReport(name, weight, tuple(results), errors, found, stages)


def clip_lines(report: DemoReport, number: int) -> list[str]:
    """One clip: what was said, what each system heard with its errors marked, and each model's score of it."""
    clip = report.clips[number]
    lines = [f"{clip.path.name} ({clip.seconds:.1f} s)", f"  {'said':13}{clip.text}"]
    for name, system in report.systems.items():
        best = system.results[number].best
        scores = " ".join(f"{source} {value:.1f}" for source, value in best.parts.items())
        flags = f"  flags: {', '.join(best.flags)}" if best.flags else ""
        lines.append(f"  {TITLES[name]:13}{marked_words(clip.text, best.text)}")
        lines.append(f"  {'':13}total {best.total:.1f} = {scores} nats{flags}")
    return lines


def summary_lines(report: DemoReport) -> list[str]:
    """Word error rates with intervals, term recall and speed of each system, and where the time went."""
    words, count = sum(report.systems["asr"].errors.words), len(report.clips)
    lines = [
        f"{count} clips, {words} words; weights were chosen on development clips",
        f"{'system':15}{'weight':>7}{'WER':>8}  {'95 % interval':17}{'errors':>7}{'term recall':>14}{'RTFx':>7}",
    ]
    for system in report.systems.values():
        low, high = system.errors.interval()
        recall = f"{system.terms.recalled}/{system.terms.spoken}"
        lines.append(
            f"{TITLES[system.name]:15}{system.lm_weight:7.2f}{100 * system.errors.rate:7.1f}%  "
            f"{100 * low:5.1f}% .. {100 * high:5.1f}%{sum(system.errors.errors):8d}{recall:>14}{system.rtfx:7.1f}"
        )
    medical = report.systems["medical"]
    total = sum(medical.stages.values())
    shares = ", ".join(f"{stage} {100 * medical.stages.get(stage, 0.0) / total:.0f} %" for stage in STAGES)
    lines.append(f"time with the medical LM: {total:.1f} s: {shares}")
    return lines
