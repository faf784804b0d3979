"""The CTC search on stored emissions of real networks against pyctcdecode, fast-ctc-decode and flashlight-text."""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.timing import ROOT, Measurement, measurements, take_turns
from shallowfusion.compat import pyctcdecode as front
from shallowfusion.ctc.results import CtcResult
from shallowfusion.ctc.search import CtcSearch
from shallowfusion.ctc.settings import CtcAlphabet, CtcOptions

__all__ = ["run"]

DATA = ROOT.parent / "shared" / "data" / "ctc"
BEAMS = (100, 25, 500)  # pyctcdecode's default first
SCORE_TOLERANCE = 1e-3
MARGIN = 50.0  # nats, torchaudio's default for flashlight-text
NOISE = 1.5  # standard deviation added to logits, so that beams have something to hold


@dataclass(frozen=True)
class Emissions:
    """Log-probs [frames, labels] of some utterances, float32, and what the columns mean."""

    name: str
    labels: list[str]
    utterances: list[np.ndarray]

    @property
    def blank(self) -> int:
        return self.labels.index("")

    @property
    def num_frames(self) -> int:
        return sum(map(len, self.utterances))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))).astype(np.float32)


def stored(quick: bool) -> list[Emissions]:
    """A LibriSpeech sentence four times, as it is and with noise of four seeds; stored lines, likewise."""
    rng = np.random.default_rng(0)
    libri = np.array(json.loads((DATA / "pyctcdecode" / "libri_logits.json").read_text(encoding="utf-8")))
    libri_labels = [" ", *"abcdefghijklmnopqrstuvwxyz", "'", ""]
    ocr_labels = json.loads((DATA / "ocr_en_mobile" / "labels.json").read_text(encoding="utf-8"))
    ocr_labels[95] = "\u00a0"  # a second space that never wins
    archive = np.load(DATA / "ocr_en_mobile" / "ocr_ctc_logprobs_f16.npz")
    lines = [archive[name].astype(np.float32) for name in list(archive)[: 6 if quick else 12]]

    def noisy(logits: np.ndarray) -> np.ndarray:
        return log_softmax(logits + rng.normal(size=logits.shape) * NOISE)

    return [
        Emissions("libri", libri_labels, [log_softmax(libri)] * 4),
        Emissions("libri noisy", libri_labels, [noisy(libri) for _ in range(4)]),
        Emissions("libri flat", libri_labels, [log_softmax(libri * 0.5)] * 4),
        Emissions("lines", ocr_labels, [log_softmax(line) for line in lines]),
        Emissions("lines noisy", ocr_labels, [noisy(line) for line in lines]),
    ]


def optional(name: str) -> Any:
    """A peer's module, None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def check_scores(own: Any, theirs: Any, utterances: list[np.ndarray], beam_size: int) -> None:
    """The best score of each utterance must be as good as theirs; in fact it is the same."""
    for logits in utterances:
        one = own.decode_beams(logits, beam_width=beam_size)[0]
        other = theirs.decode_beams(logits, beam_width=beam_size)[0]
        if one[-1] < other[-1] - SCORE_TOLERANCE:
            raise AssertionError(f"our best score {one[-1]} is below pyctcdecode's {other[-1]}.")


def flashlight(data: Emissions, beam_size: int) -> Callable[[], object] | None:
    """flashlight-text's search without lexicon and language model; log-add as ours."""
    library = optional("flashlight.lib.text.decoder")
    if library is None:
        return None
    options = library.LexiconFreeDecoderOptions(
        beam_size=beam_size, beam_size_token=len(data.labels), beam_threshold=MARGIN, lm_weight=0.0, sil_score=0.0,
        log_add=True, criterion_type=library.CriterionType.CTC,
    )  # fmt: skip
    decoder = library.LexiconFreeDecoder(options, library.ZeroLM(), -1, data.blank, [])
    emissions = [np.ascontiguousarray(own) for own in data.utterances]
    search = CtcSearch(
        CtcAlphabet(tuple(data.labels), data.blank), CtcOptions(beam_size=beam_size, beam_margin=MARGIN), threads=1
    )
    for own in emissions:
        best = decoder.decode(own.ctypes.data, *own.shape)[0]
        labels = [label for label, _ in itertools.groupby(best.tokens) if label not in (-1, data.blank)]
        ours = exact(search, own)[0].best
        if ours.label_ids.tolist() != labels and ours.total < best.score - SCORE_TOLERANCE:
            raise AssertionError(f"our best score {ours.total} is below theirs, {best.score}.")
    return lambda: [decoder.decode(own.ctypes.data, *own.shape) for own in emissions]


def fast_ctc(data: Emissions, beam_size: int) -> Callable[[], object] | None:
    """fast-ctc-decode's search; it wants the blank first and prunes by probability."""
    library = optional("fast_ctc_decode")
    if library is None or beam_size > BEAMS[0]:  # minutes
        return None
    order = [data.blank, *(number for number in range(len(data.labels)) if number != data.blank)]
    letters = "".join(chr(0x4E00 + number) for number in range(len(order)))  # it wants one character each
    probs = [np.ascontiguousarray(np.exp(own[:, order])) for own in data.utterances]
    return lambda: [library.beam_search(own, letters, beam_size, 0.0) for own in probs]


def plain_rows(data: Emissions, beam_size: int, repeats: int) -> list[Measurement]:
    """Without language model: the front against pyctcdecode with its pruning, the search against the others."""
    own = front.build_ctcdecoder(data.labels)
    providers: dict[str, Callable[[], object]] = {
        "shallowfusion decode_beams": lambda: [own.decode_beams(x, beam_width=beam_size) for x in data.utterances],
    }
    peer = optional("pyctcdecode")
    if peer is not None:
        theirs = peer.build_ctcdecoder(data.labels)
        check_scores(own, theirs, data.utterances, beam_size)
        providers["pyctcdecode decode_beams"] = lambda: [
            theirs.decode_beams(x, beam_width=beam_size) for x in data.utterances
        ]
    rows = compared(data, beam_size, "no LM, pruned as pyctcdecode", providers, repeats)
    search = CtcSearch(
        CtcAlphabet(tuple(data.labels), data.blank), CtcOptions(beam_size=beam_size, beam_margin=MARGIN), threads=1
    )
    providers = {"shallowfusion CtcSearch": lambda: [exact(search, x) for x in data.utterances]}
    for name, made in (
        ("flashlight-text", flashlight(data, beam_size)),
        ("fast-ctc-decode", fast_ctc(data, beam_size)),
    ):
        if made is not None:
            providers[name] = made
    return rows + compared(data, beam_size, "no LM, all labels", providers, repeats)


def exact(search: CtcSearch, log_probs: np.ndarray) -> list[CtcResult]:
    state = search.begin(1)
    search.step(state, log_probs[None])
    return search.end(state)


def language_rows(data: Emissions, beam_size: int, repeats: int, arpa: Path) -> list[Measurement]:
    """With a word 3-gram of 200,003 words, alpha and beta as pyctcdecode has them."""
    peer = optional("pyctcdecode")
    text = arpa.read_text(encoding="utf-8").split("\\2-grams:")[0]
    words = [line.split("\t")[1] for line in text.splitlines() if "\t" in line]
    own = front.build_ctcdecoder(data.labels, arpa, words)
    providers: dict[str, Callable[[], object]] = {
        "shallowfusion decode_beams": lambda: [own.decode_beams(x, beam_width=beam_size) for x in data.utterances],
    }
    if peer is not None and optional("kenlm") is not None:
        theirs = peer.build_ctcdecoder(data.labels, str(arpa), words)
        check_scores(own, theirs, data.utterances, beam_size)
        providers["pyctcdecode decode_beams"] = lambda: [
            theirs.decode_beams(x, beam_width=beam_size) for x in data.utterances
        ]
    return compared(data, beam_size, "3-gram, pruned as pyctcdecode", providers, repeats)


def compared(
    data: Emissions, beam_size: int, kind: str, providers: dict[str, Callable[[], object]], repeats: int
) -> list[Measurement]:
    seconds = take_turns(providers, repeats, warm_up=1, clock=time.process_time)
    shape = (
        f"{data.name} utterances={len(data.utterances)} frames={data.num_frames} labels={len(data.labels)} "
        f"beam={beam_size} {kind} threads=1"
    )
    return measurements("ctc", shape, "float32", seconds, next(iter(providers)))


def run(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """Every stored set and beam, on one thread, decoder only; equal-or-better scores are asserted first."""
    if not DATA.exists():
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("pyctcdecode", "shallowfusion.compat.pyctcdecode"):
        logging.getLogger(name).setLevel(logging.ERROR)
    repeats = 3 if quick else 5
    with tempfile.TemporaryDirectory() as folder:
        arpa = Path(folder) / "lm.arpa"
        arpa.write_bytes(gzip.decompress((DATA / "flashlight" / "lm.arpa.gz").read_bytes()))
        for data in stored(quick):
            for beam_size in BEAMS[:1] if quick else BEAMS:
                yield plain_rows(data, beam_size, repeats)
                if data.name.startswith("libri"):
                    yield language_rows(data, beam_size, repeats, arpa)
    torch.set_num_threads(threads)
