"""CTC, attention and both: `python -m bench.ctc_attention --data ../shared/data [--work DIRECTORY]`.

Weights are chosen on development recordings; the test recordings are decoded once with what was chosen.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.recognition import save
from bench.rules import BATCH, Set, encoded
from shallowfusion import DecodingOptions, FusionDecoder, fusion
from shallowfusion.attention_rescoring import AttentionRescorer, RescoringOptions
from shallowfusion.ctc.joint import CtcFrames
from shallowfusion.ctc.models import CtcModel
from shallowfusion.ctc.settings import CtcOptions
from shallowfusion.demo.recordings import an4_recordings
from shallowfusion.demo.shipped import HERE, model_directory, read_manifest
from shallowfusion.evaluation import word_errors
from shallowfusion.results import Transcription

__all__ = ["main"]

CTC_WEIGHTS = (0.1, 0.2, 0.3, 0.5)
RESCORING_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)
LM_WEIGHTS = (0.4, 0.6, 0.8, 1.0)
LIST = 50
BEAM = 5


@dataclass(frozen=True)
class Task:
    """One acoustic model with and without a language model, and its recordings."""

    name: str
    model: str
    decoder: FusionDecoder
    dev: Set
    test: Set


@dataclass(frozen=True)
class System:
    """A way of decoding with the weights that are tried on the development recordings."""

    name: str
    ctc_weights: tuple[float, ...]
    lm_weights: tuple[float, ...]
    run: Callable[[FusionDecoder, Set, float, float], list[str]]
    beam_size: int = BEAM


def greedy(decoder: FusionDecoder, own: Set, ctc_weight: float, lm_weight: float) -> list[str]:
    """The likeliest label of every frame, repeats merged, blanks dropped."""
    head = decoder.acoustic.ctc_head
    assert head is not None
    texts = []
    for state in own.states:
        best = head.log_probs(state).argmax(dim=1).tolist()
        texts.append("".join(head.labels[label] for label, _ in itertools.groupby(best) if label != head.blank).strip())
    return texts


def joint(decoder: FusionDecoder, own: Set, ctc_weight: float, lm_weight: float) -> list[str]:
    """One search over attention, CTC and the language model."""
    rule = fusion.static([lm_weight] * len(decoder.language_models))
    texts: list[str] = []
    for first in range(0, len(own.references), BATCH):
        states = own.states[first : first + BATCH]
        texts += [r.text for r in decoder.decode(states, beam_size=BEAM, rule=rule, ctc_weight=ctc_weight)]
    return texts


def spelled(decoder: FusionDecoder, own: Set, ctc_weight: float, lm_weight: float) -> list[str]:
    """As `joint`, but the head is a CTC model of its own, in capitals, with "|" between words."""
    head = decoder.acoustic.ctc_head
    assert head is not None
    labels = tuple("|" if label == " " else label.upper() for label in head.labels)
    mark, rate = labels.index("|"), decoder.acoustic.features.sampling_rate
    model = CtcModel("head", None, None, labels, head.blank, mark, None, (), rate, head.frame_seconds)
    beside = FusionDecoder(decoder.acoustic, decoder.language_models, ctc=model)
    options = DecodingOptions(
        beam_size=BEAM, rule=fusion.static([lm_weight] * len(decoder.language_models)), ctc_weight=ctc_weight
    )
    texts: list[str] = []
    for first in range(0, len(own.references), BATCH):
        states = own.states[first : first + BATCH]
        texts += [r.text for r in beside.decode(states, options, ctc_frames=CtcFrames(head.log_probs(states)))]
    return texts


class Rescoring:
    """The lists of the CTC search with all parts, made once per set, then ranked under any weights."""

    def __init__(self) -> None:
        self.lists: dict[tuple[int, int], list[Transcription]] = {}

    def __call__(self, decoder: FusionDecoder, own: Set, ctc_weight: float, lm_weight: float) -> list[str]:
        key = (id(own), len(decoder.language_models))
        if key not in self.lists:
            rescorer = AttentionRescorer(decoder, CtcOptions(beam_size=LIST), threads=1)
            options = RescoringOptions(1.0, n_best=LIST, list_size=LIST)
            self.lists[key] = [
                result
                for first in range(0, len(own.references), BATCH)
                for result in rescorer.decode(own.states[first : first + BATCH], None, options)
            ]
        rule = fusion.static([lm_weight] * len(decoder.language_models))
        return [result.rerank(rule, 0.0, ctc_weight=ctc_weight).text for result in self.lists[key]]


def systems(has_lm: bool) -> list[System]:
    lists = Rescoring()
    weights = LM_WEIGHTS if has_lm else (0.0,)
    found = [
        System("attention", (0.0,), weights, joint),
        System("CTC beam", (1.0,), weights, lists, LIST),
        System("joint CTC-attention", CTC_WEIGHTS, weights, joint),
        System("joint, the head spelled as another model", CTC_WEIGHTS, weights, spelled),
        System("attention rescoring of the CTC beam", RESCORING_WEIGHTS, weights, lists, LIST),
    ]
    return found if has_lm else [System("CTC greedy", (1.0,), (0.0,), greedy, 1), *found]


def rows_of(task: Task) -> list[dict[str, object]]:
    """Choose the weights of every system on dev, then one row on dev and one on test."""
    rows: list[dict[str, object]] = []
    for system in systems(bool(task.decoder.language_models)):
        tried = []
        for ctc_weight, lm_weight in itertools.product(system.ctc_weights, system.lm_weights):
            texts = system.run(task.decoder, task.dev, ctc_weight, lm_weight)
            found = word_errors(list(task.dev.references), texts)
            tried.append((sum(found.errors), ctc_weight, lm_weight, texts))
            print(f"{task.name} dev {system.name} ctc={ctc_weight} lm={lm_weight}: {sum(found.errors)}", flush=True)
        _, ctc_weight, lm_weight, dev_texts = min(tried, key=lambda trial: trial[:3])
        test_texts = system.run(task.decoder, task.test, ctc_weight, lm_weight)
        chosen = [f"ctc_weight {ctc_weight}"] if len(system.ctc_weights) > 1 else []
        chosen += [f"lm medical {lm_weight}"] if task.decoder.language_models else []
        for part, own, texts in (("dev", task.dev, dev_texts), ("test", task.test, test_texts)):
            found = word_errors(list(own.references), texts)
            low, high = found.interval()
            row: dict[str, object] = {
                "set": f"{task.name} {part}",
                "model": "; ".join([task.model, system.name, *chosen]),
                "beam_size": system.beam_size,
                "utterances": len(own.references),
                "words": sum(found.words),
                "errors": sum(found.errors),
                "wer": f"{found.rate:.4f}",
                "low": f"{low:.4f}",
                "high": f"{high:.4f}",
            }
            rows.append(row)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return rows


def demo_sets(decoder: FusionDecoder, data: Path, work: Path | None) -> tuple[str, Set, Set]:
    """The shipped clips or, with `work`, 120 and 320 synthesised ones of the same kind."""
    if work is None:
        name, parts = "demo clips", (HERE / "dev", HERE / "clips")
    else:
        name, parts = "espeak medical", (work / "private", work / "test")
        if not (work / "test" / "manifest.jsonl").is_file():
            from shallowfusion.demo.train import write_evaluation_clips

            write_evaluation_clips(data, work)
    dev, test = ([(clip.path, clip.text) for clip in read_manifest(part)] for part in parts)
    return name, encoded(decoder, dev[:120]), encoded(decoder, test)


def tasks(data: Path, work: Path | None) -> list[Task]:
    found = []
    for model in ("asr", "asr_an4"):
        decoder = FusionDecoder.from_pretrained(model_directory(model), device="cpu")
        dev, test = (
            encoded(decoder, [(path, text.lower()) for path, text in an4_recordings(data, part)])
            for part in ("dev", "test")
        )
        found.append(Task("AN4", model, decoder, dev, test))
    alone = FusionDecoder.from_pretrained(model_directory("asr"), device="cpu")
    fused = FusionDecoder.from_pretrained(model_directory("asr"), model_directory("lm_medical"), device="cpu")
    name, dev, test = demo_sets(alone, data, work)
    return [*found, *(Task(name, "asr", decoder, dev, test) for decoder in (alone, fused))]


def main(arguments: list[str] | None = None) -> int:
    """Choose, test and append to bench/results/recognition.csv."""
    parser = argparse.ArgumentParser(description="Compare CTC, attention and both on the demo models.")
    parser.add_argument("--data", type=Path, required=True, help="directory with audio/manifest.jsonl")
    parser.add_argument("--work", type=Path, help="where synthesised clips lie or go (espeak-ng); else shipped ones")
    parser.add_argument("--no-save", action="store_true", help="print only")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for task in tasks(chosen.data, chosen.work):
        rows = rows_of(task)
        if not chosen.no_save:
            save(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
