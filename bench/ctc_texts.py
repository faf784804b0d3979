"""What phrases, hotwords and word n-grams cost the device CTC search, against itself without and the CPU search."""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.ctc import DATA
from bench.ctc_batch import BLANK, LABELS, MARGIN, SPACE, TOKEN_MIN, utterances, word_error_rate
from bench.phrases import WEIGHT, lm_phrases
from bench.timing import Measurement, measurements, take_turns
from shallowfusion.ctc.device_search import DeviceCtcSearch
from shallowfusion.ctc.search import CtcSearch
from shallowfusion.ctc.settings import CtcAlphabet, CtcLanguage, CtcOptions
from shallowfusion.ngrams.table import NgramTable

__all__ = ["run"]

ALPHABET = CtcAlphabet(LABELS, BLANK, SPACE)
PHRASES = 20_000


def word_language() -> CtcLanguage:
    """The word 3-gram of flashlight-text's tests, in small letters as the labels have them."""
    with tempfile.TemporaryDirectory() as folder:
        arpa = Path(folder) / "lm.arpa"
        arpa.write_bytes(gzip.decompress((DATA / "flashlight" / "lm.arpa.gz").read_bytes()).lower())
        return CtcLanguage(NgramTable.from_arpa(arpa))


def kinds(quick: bool) -> dict[str, tuple[dict[str, Any], CtcLanguage | None]]:
    """What a search is asked for: options and language model."""
    phrases = list(lm_phrases(PHRASES))
    found: dict[str, tuple[dict[str, Any], CtcLanguage | None]] = {
        "labels alone": ({}, None),
        "10 phrases": ({"hotwords": dict.fromkeys(phrases[:10], WEIGHT)}, None),
        f"{PHRASES:,} phrases": ({"hotwords": dict.fromkeys(phrases, WEIGHT)}, None),
        "10 hotwords as words": ({"hotwords": phrases[:10], "hotword_form": "words"}, None),
    }
    if not quick:
        language = word_language()
        found["word 3-gram"] = ({}, language)
        found[f"word 3-gram, {PHRASES:,} phrases"] = (found[f"{PHRASES:,} phrases"][0], language)
    return found


def decoded(search: CtcSearch | DeviceCtcSearch, log_probs: torch.Tensor) -> list[str]:
    state = search.begin(len(log_probs))
    search.step(state, log_probs)
    return [result.best.text for result in search.end(state)]


def rows(device: str, beam: int, count: int, frames: int, quick: bool) -> list[Measurement]:
    """Every kind on the device and on the CPU, in turns; the texts must be the same."""
    batch = torch.from_numpy(np.stack(utterances(count)))[:, :frames].contiguous()
    there = batch.to(device)
    plain = CtcOptions(beam, beam_margin=MARGIN, token_min_log_prob=TOKEN_MIN, blank_skip=0.95)
    providers: dict[str, Callable[[], object]] = {}
    notes: dict[str, str] = {}
    for kind, (chosen, language) in kinds(quick).items():
        options = replace(plain, **chosen)
        native = CtcSearch(ALPHABET, options, language)
        search = DeviceCtcSearch(ALPHABET, options, language, device, phrases=native.phrases)
        texts, wanted = decoded(search, there), decoded(native, batch)
        if texts != wanted:
            raise AssertionError(f"the device search says {texts}, the CPU search {wanted}.")
        note = f"WER {100 * word_error_rate(texts):.3f} %" if frames == len(utterances(1)[0]) else "texts equal"
        notes[f"DeviceCtcSearch, {kind}"] = notes[f"CtcSearch on the CPU, {kind}"] = note
        providers[f"DeviceCtcSearch, {kind}"] = lambda search=search: decoded(search, there)
        providers[f"CtcSearch on the CPU, {kind}"] = lambda native=native: decoded(native, batch)
    seconds = take_turns(providers, 2 if quick else 5, warm_up=1, device=device)
    shape = (
        f"libri twice, noisy: utterances={count} frames={frames} labels={len(LABELS)} beam={beam} "
        f"token_min={TOKEN_MIN} margin={MARGIN} blank_skip=0.95"
    )
    return measurements("ctc_texts", shape, "float32", seconds, next(iter(providers)), note=notes)


def run(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """On a GPU batches that fill it; on the CPU, where the C++ search is what one takes, two seconds for the record."""
    if not DATA.exists():
        return
    if device == "cuda":
        for count in (32,) if quick else (32, 128):
            for beam in (16,) if quick else (16, 100):
                yield rows(device, beam, count, 750, quick)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield rows(device, 16, 4, 100, quick)
    torch.set_num_threads(threads)
