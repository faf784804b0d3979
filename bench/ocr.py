"""A real CTC network with real language models: line images, before and after, medical and general lines apart.

`python -m bench.ocr --data ../shared/data --work DIRECTORY [--minutes 10]` makes the language models missing in
DIRECTORY from training texts (`bench.ocr_data`), chooses weights on every third line by word errors, reads the other
lines once with what was chosen, and appends to bench/results/recognition.csv. Words are parted by spaces, and case and
punctuation count.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from bench.ocr_data import Line, log_probs_of, make_models, read_images
from bench.recognition import save
from shallowfusion import fusion
from shallowfusion.ctc.decoder import CTCDecoder
from shallowfusion.ctc.settings import CtcLanguage
from shallowfusion.evaluation.word_errors import WordErrors, character_errors, word_errors
from shallowfusion.fusion import Rule
from shallowfusion.ngrams.table import NgramTable
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.scorers.loading import load_causal_lm

__all__ = ["main"]

BEAM = 50
NEURAL_BEAM = 10
LM_WEIGHTS = (0.4, 0.8)
BONUSES = (2.0, 3.0, 4.0)
TEXTS = ("medical", "general", "both")


@dataclass(frozen=True)
class System:
    """One way to read the lines, with the choices that are tried on the development lines.

    Args:
        rules: of the delayed model; None = it is not asked.
        grid: option name -> values.
    """

    name: str
    decoder: CTCDecoder
    grid: Mapping[str, Sequence[float]] = field(default_factory=dict)
    rules: tuple[Rule | None, ...] = (None,)
    fixed: Mapping[str, object] = field(default_factory=dict)
    beam_size: int = BEAM


def systems(work: Path, data: Path, labels: tuple[str, ...]) -> Iterator[System]:
    """The network alone, n-grams of characters and words from each kind of text, terms, and a neural model late."""
    llm = load_causal_lm(str(work / "lm_lines"), torch.device("cpu"), torch.float32)
    alone = _decoder(labels, None, llm)
    yield System("CTC beam", alone, {"length_bonus": (0.0, 2.0, 3.0, 4.0, 5.0)})
    for text in reversed(TEXTS):
        words = _decoder(labels, CtcLanguage(NgramTable.from_arpa(work / f"words_{text}.arpa")), llm)
        grid = {"lm_weight": LM_WEIGHTS, "word_bonus": (2.0,), "length_bonus": (1.0, 2.0, 3.0)}
        yield System(f"words 3-gram of {text} text", words, grid)
        if text == "both":
            with gzip.open(data / "text" / "med_drug_names.txt.gz", "rt", encoding="utf-8") as stream:
                terms = tuple(line.strip() for line in stream if line.strip())
            grid = {
                "lm_weight": LM_WEIGHTS,
                "word_bonus": (2.0,),
                "length_bonus": (2.0, 3.0),
                "hotword_weight": (1.0, 3.0),
            }
            name = f"words 3-gram of both text, {len(terms)} drug names as hotwords"
            yield System(name, words, grid, fixed={"hotwords": terms, "hotword_form": "words"})
            late = (fusion.delayed(0.4, interval=16),)
            grid = {"length_bonus": (2.0, 3.0)}
            yield System("neural LM of both text, delayed", alone, grid, late, beam_size=NEURAL_BEAM)
        table = NgramTable.from_arpa(work / f"characters_{text}.arpa")
        characters = _decoder(labels, CtcLanguage(table, unit="labels"), llm)
        grid = {"lm_weight": LM_WEIGHTS, "length_bonus": BONUSES}
        yield System(f"characters 8-gram of {text} text", characters, grid)
        if text == "both":
            late = tuple(fusion.delayed(weight, interval=None) for weight in (0.1, 0.3))
            grid = {"lm_weight": (0.4,), "length_bonus": (2.0, 3.0)}
            name = "characters 8-gram of both text, neural LM at the end"
            yield System(name, characters, grid, late, beam_size=NEURAL_BEAM)


def _decoder(labels: tuple[str, ...], language: CtcLanguage | None, llm: CausalLMScorer) -> CTCDecoder:
    return CTCDecoder(labels, 0, len(labels) - 1, language, threads=1, llm=llm)


def read(system: System, scores: Sequence[np.ndarray], rule: Rule | None, options: Mapping[str, float]) -> list[str]:
    """The texts of some lines."""
    counts = np.array([len(own) for own in scores])
    padded = np.zeros((len(scores), counts.max(), scores[0].shape[1]), dtype=np.float32)
    for row, own in zip(padded, scores, strict=True):
        row[: len(own)] = own
    names = {**system.fixed, **options}
    found = system.decoder.decode(padded, counts, rule=rule, beam_size=system.beam_size, **names)
    return [result.text for result in found]


def chosen_on(
    system: System, lines: Sequence[Line], scores: Sequence[np.ndarray]
) -> tuple[Rule | None, dict[str, float], int]:
    """The fewest word errors; of equals the first."""
    best: tuple[Rule | None, dict[str, float], int] | None = None
    texts = [line.text for line in lines]
    for rule, *values in itertools.product(system.rules, *system.grid.values()):
        options = dict(zip(system.grid, values, strict=True))
        errors = sum(word_errors(texts, read(system, scores, rule, options)).errors)
        if best is None or errors < best[2]:
            best = rule, options, errors
    assert best is not None
    return best


def rows_of(name: str, beam_size: int, lines: Sequence[Line], texts: Sequence[str]) -> list[dict[str, object]]:
    """Words and characters, medical lines, general lines and all."""
    rows: list[dict[str, object]] = []
    for domain in ("medical", "general", "all"):
        pairs = [(line.text, text) for line, text in zip(lines, texts, strict=True) if domain in (line.domain, "all")]
        references, heard = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        for unit, found in (
            ("words", word_errors(references, heard)),
            ("characters", character_errors(references, heard)),
        ):
            rows.append(_row(f"OCR {domain} test, {unit}", name, beam_size, len(pairs), found))
    return rows


def _row(part: str, name: str, beam_size: int, count: int, found: WordErrors) -> dict[str, object]:
    low, high = found.interval()
    row: dict[str, object] = {
        "set": part, "model": name, "beam_size": beam_size, "utterances": count, "words": sum(found.words),
        "errors": sum(found.errors), "wer": f"{found.rate:.4f}", "low": f"{low:.4f}", "high": f"{high:.4f}",
    }  # fmt: skip
    print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return row


def main(arguments: list[str] | None = None) -> int:
    """Choose on every third line, read the others once, save."""
    parser = argparse.ArgumentParser(description="Word errors of line images with and without language models.")
    parser.add_argument("--data", type=Path, required=True, help="directory with ctc/ocr_en_mobile and text/")
    parser.add_argument("--work", type=Path, required=True, help="language models; what is missing is made")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training the neural model (default: 10)")
    parser.add_argument("--no-save", action="store_true", help="print only")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen.work.mkdir(parents=True, exist_ok=True)
    make_models(chosen.data, chosen.work, chosen.minutes)
    lines, labels = read_images(chosen.data)
    scores = log_probs_of(chosen.data, lines)
    dev, test = ([i for i, line in enumerate(lines) if line.is_dev == wanted] for wanted in (True, False))
    tested = [lines[i] for i in test]
    keep = print if chosen.no_save else save
    keep(rows_of("CTC greedy", 1, tested, [line.greedy for line in tested]))
    for system in systems(chosen.work, chosen.data, labels):
        start = time.perf_counter()
        rule, options, errors = chosen_on(system, [lines[i] for i in dev], [scores[i] for i in dev])
        shown = "; ".join([system.name, *(f"{name} {value:g}" for name, value in options.items())])
        shown += f"; {rule.lm_weights[0]:g} every {rule.delay.interval} frames" if rule and rule.delay else ""
        print(
            f"{shown}: {errors} errors on {len(dev)} development lines, {time.perf_counter() - start:.0f} s", flush=True
        )
        texts = read(system, [scores[i] for i in test], rule, options)
        keep(rows_of(shown, system.beam_size, tested, texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
