"""What the table of line images needs: emissions, and language models of lines of the training texts.

The images hold lines of at most 68 characters, cut out of running text. So the training texts are wrapped into lines
alike. Some sentences stand in training and test files of MedQuAD; training lines with one of the images' texts are
left out, so that no model has seen a line it is asked about.
"""

from __future__ import annotations

import gzip
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shallowfusion.demo.corpus import GENERAL_SOURCES, MEDICAL_SOURCES
from shallowfusion.ngrams import units
from shallowfusion.ngrams.arpa import write_arpa
from shallowfusion.ngrams.estimate import EstimateSettings, estimate

__all__ = ["Line", "log_probs_of", "make_models", "read_images", "training_lines"]

SOURCES = {"medical": MEDICAL_SOURCES, "general": GENERAL_SOURCES, "both": MEDICAL_SOURCES + GENERAL_SOURCES}
HELD_OUT = ("med_pubmed_valid", "med_mtsdialog_valid", "med_acibench_valid")
LINE_WIDTH = 66
SPACE, SECOND_SPACE = 96, 95
WORD_ORDER, CHARACTER_ORDER = 3, 8
BPE_SIZE = 1500


@dataclass(frozen=True)
class Line:
    """One image: its text and domain, and whether weights may be chosen on it (every third image)."""

    name: str
    domain: str
    text: str
    greedy: str
    is_dev: bool


def read_images(data: Path) -> tuple[list[Line], tuple[str, ...]]:
    """All lines in file order, and the labels, the second space left out."""
    folder = data / "ctc" / "ocr_en_mobile"
    rows = [json.loads(row) for row in (folder / "ocr_ctc_refs.jsonl").read_text(encoding="utf-8").splitlines()]
    labels: list[str] = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    lines = [Line(row["utt"], row["domain"], row["ref"], row["greedy"], i % 3 == 0) for i, row in enumerate(rows)]
    return lines, tuple(label for i, label in enumerate(labels) if i != SECOND_SPACE)


def log_probs_of(data: Path, lines: Sequence[Line]) -> list[npt.NDArray[np.float32]]:
    """[frames, labels] of each line, nats; the mass of the second space is added to the first."""
    stored = np.load(data / "ctc" / "ocr_en_mobile" / "ocr_ctc_logprobs_f16.npz")
    found = []
    for line in lines:
        scores = stored[line.name].astype(np.float32)
        scores[:, SPACE] = np.logaddexp(scores[:, SPACE], scores[:, SECOND_SPACE])
        found.append(np.delete(scores, SECOND_SPACE, axis=1))
    return found


def training_lines(data: Path, sources: Sequence[str], images: Sequence[Line], letters: set[str]) -> list[str]:
    """Lines of the texts without letters that the images cannot hold; texts that hold an image's line are left out."""
    wanted = [line.text for line in images]
    found = []
    for source in sources:
        with gzip.open(data / "text" / f"{source}.txt.gz", "rt", encoding="utf-8") as stream:
            for row in stream:
                text = " ".join("".join(letter if letter in letters else " " for letter in row).split())
                if not any(own in text for own in wanted):
                    found += textwrap.wrap(text, LINE_WIDTH, break_on_hyphens=False)
    return found


def make_models(data: Path, work: Path, minutes: float) -> None:
    """Word 3-grams and character 8-grams of each domain and of both, a small GPT of both, where they are missing."""
    from bench.delayed_lm import train

    images, labels = read_images(data)
    letters = {*labels[1:], " "}
    for name, sources in SOURCES.items():
        paths = work / f"words_{name}.arpa", work / f"characters_{name}.arpa"
        neural = work / "lm_lines" if name == "both" else None
        if all(path.exists() for path in paths) and (neural is None or (neural / "config.json").exists()):
            continue
        lines = training_lines(data, sources, images, letters)
        if neural is not None and not (neural / "config.json").exists():
            neural.mkdir(parents=True, exist_ok=True)
            held_out = training_lines(data, HELD_OUT, images, letters)[:600]
            print(f"{name}: {train(lines, held_out, neural, minutes, BPE_SIZE):.4f} nats per character held out")
        known = [units.SPACE if label == " " else label for label in labels[1:]]
        for path, split, order, own in (
            (paths[0], units.words(), WORD_ORDER, None),
            (paths[1], units.characters(), CHARACTER_ORDER, known),
        ):
            if not path.exists():
                settings = EstimateSettings(order, () if own is None else (0, 0, 0, 0, 1))
                write_arpa(estimate(split.split(lines), settings, own).model, path)
        print(f"{name}: {len(lines)} lines", flush=True)
