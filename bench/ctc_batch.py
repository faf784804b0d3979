"""CTC decoding alone, of 1,000 utterances of 15 s: the CPU search against its peers, the device search against greedy.

The emissions are a stored LibriSpeech sentence of a real network said twice, with a break of its own frames between,
and noise of one seed per utterance on the logits. Peers decode the same utterances with the same beam and pruning.
"""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench.ctc import DATA, log_softmax, optional
from bench.timing import Measurement, measurements, take_turns
from shallowfusion.compat import pyctcdecode as front
from shallowfusion.ctc.device_search import DeviceCtcSearch
from shallowfusion.ctc.search import CtcSearch
from shallowfusion.ctc.settings import CtcAlphabet, CtcOptions

__all__ = ["run"]

LABELS = (" ", *"abcdefghijklmnopqrstuvwxyz", "'", "")
BLANK, SPACE = 28, 0
ALPHABET = CtcAlphabet(LABELS, BLANK)
SENTENCE = "i have a good deal of will you remember and what i have set my mind upon no doubt i shall some day achieve"
REFERENCE = f"{SENTENCE} {SENTENCE}"
NUM_UTTERANCES, TURNS = 1000, 10
NUM_FRAMES = 750  # of 20 ms
NOISE = 2.0  # standard deviation, on logits
BEAM, TOKEN_MIN, MARGIN = 100, -5.0, 10.0  # pyctcdecode's defaults
LANGUAGE_WORDS = 200_003

Decode = Callable[[Sequence[np.ndarray]], list[str]]


def utterances(count: int) -> list[np.ndarray]:
    """Log-probs float32 [750, 29] of each."""
    logits = np.array(json.loads((DATA / "pyctcdecode" / "libri_logits.json").read_text(encoding="utf-8")))
    best = logits.argmax(axis=1)
    blank, space = logits[best == BLANK][:1], logits[best == SPACE][:1]
    gap = NUM_FRAMES - 2 * len(logits) - 2
    pause = np.concatenate([np.repeat(blank, gap // 2, 0), np.repeat(space, 2, 0), np.repeat(blank, gap - gap // 2, 0)])
    whole = np.concatenate([logits, pause, logits])
    assert len(whole) == NUM_FRAMES
    return [
        log_softmax(whole + np.random.default_rng(seed).normal(size=whole.shape) * NOISE) for seed in range(count)
    ]  # fmt: skip


def joined(labels: Sequence[int]) -> str:
    return " ".join("".join(LABELS[label] for label in labels).split())


def word_error_rate(texts: Sequence[str]) -> float:
    import jiwer

    return float(jiwer.wer([REFERENCE] * len(texts), list(texts)))


def compared(
    kind: str, data: Sequence[np.ndarray], providers: dict[str, Decode], clock: Callable[[], float], unit: str
) -> list[Measurement]:
    """Every provider decodes every utterance, in turns of a tenth of them; the first provider is ours."""
    size = max(1, len(data) // TURNS)
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    texts: dict[str, list[str]] = {name: [] for name in providers}
    for decode in providers.values():
        decode(data[:2])
    for first in range(0, len(data), size):
        for name, decode in providers.items():
            start = clock()
            texts[name] += decode(data[first : first + size])
            seconds[name].append(clock() - start)
    shape = f"libri twice, noisy: utterances={len(data)} of 15 s, in turns of {size}; beam={BEAM} {kind}"
    rows = measurements("ctc_batch", shape, "float32", seconds, next(iter(providers)))
    noted = []
    for row in rows:
        rtfx = 15.0 * len(data) / sum(seconds[row.provider])
        wer = word_error_rate(texts[row.provider])
        noted.append(replace(row, note=f"{unit} of a turn; WER {100 * wer:.3f} %; {rtfx:.0f} s of audio per second"))
    ours, *others = (word_error_rate(texts[name]) for name in providers)
    assert all(ours <= wer + 1e-3 for wer in others), f"our WER {ours} is above another's, {others}"
    return noted


def each(decode: Callable[[np.ndarray], str]) -> Decode:
    return lambda data: [decode(own) for own in data]


def native(options: CtcOptions) -> Decode:
    search = CtcSearch(ALPHABET, options, threads=1)

    def decode(log_probs: np.ndarray) -> str:
        state = search.begin(1)
        search.step(state, log_probs[None])
        return joined(search.end(state)[0].best.label_ids.tolist())

    return each(decode)


def pyctcdecode_rows(data: Sequence[np.ndarray]) -> Iterator[list[Measurement]]:
    """Alone and with its pool of two processes, without and with a word 3-gram."""
    peer = optional("pyctcdecode")
    if peer is None:
        return
    kind = f"token_min={TOKEN_MIN} margin={MARGIN}"
    ours, theirs = front.build_ctcdecoder(list(LABELS)), peer.build_ctcdecoder(list(LABELS))
    yield compared(
        f"{kind}, no LM, 1 thread", data, {"ours decode": each(ours.decode), "pyctcdecode": each(theirs.decode)},
        time.process_time, "CPU time",
    )  # fmt: skip
    with multiprocessing.get_context("fork").Pool(2) as pool:
        yield compared(
            f"{kind}, no LM, 2 cores", data,
            {"ours decode_batch": lambda own: ours.decode_batch(None, list(own)),
             "pyctcdecode decode_batch, pool of 2": lambda own: theirs.decode_batch(pool, list(own))},
            time.perf_counter, "wall time",
        )  # fmt: skip
    if optional("kenlm") is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        arpa = Path(folder) / "lm.arpa"
        arpa.write_bytes(gzip.decompress((DATA / "flashlight" / "lm.arpa.gz").read_bytes()))
        text = arpa.read_text(encoding="utf-8").split("\\2-grams:")[0]
        words = [line.split("\t")[1] for line in text.splitlines() if "\t" in line]
        ours, theirs = (made.build_ctcdecoder(list(LABELS), str(arpa), words) for made in (front, peer))
    yield compared(
        f"{kind}, word 3-gram of {LANGUAGE_WORDS} words, 1 thread", data,
        {"ours decode": each(ours.decode), "pyctcdecode": each(theirs.decode)}, time.process_time, "CPU time",
    )  # fmt: skip


def flashlight_rows(data: Sequence[np.ndarray]) -> Iterator[list[Measurement]]:
    library = optional("flashlight.lib.text.decoder")
    if library is None:
        return
    options = library.LexiconFreeDecoderOptions(
        beam_size=BEAM, beam_size_token=len(LABELS), beam_threshold=MARGIN, lm_weight=0.0, sil_score=0.0,
        log_add=True, criterion_type=library.CriterionType.CTC,
    )  # fmt: skip
    decoder = library.LexiconFreeDecoder(options, library.ZeroLM(), -1, BLANK, [])

    def decode(log_probs: np.ndarray) -> str:
        best = decoder.decode(log_probs.ctypes.data, *log_probs.shape)[0]
        return joined([label for label, _ in itertools.groupby(best.tokens) if label not in (-1, BLANK)])

    providers = {"ours CtcSearch": native(CtcOptions(BEAM, beam_margin=MARGIN)), "flashlight-text": each(decode)}
    kind = f"all labels, margin={MARGIN}, no LM, sums, 1 thread"
    yield compared(kind, data, providers, time.process_time, "CPU time")


def fast_ctc_rows(data: Sequence[np.ndarray]) -> Iterator[list[Measurement]]:
    library = optional("fast_ctc_decode")
    if library is None:
        return
    order = [BLANK, *range(BLANK)]  # it wants the blank first
    letters = "".join(chr(0x4E00 + number) for number in range(len(order)))  # and one character each

    def decode(log_probs: np.ndarray) -> str:
        probs = np.ascontiguousarray(np.exp(log_probs[:, order]))
        found, _ = library.beam_search(probs, letters, BEAM, float(np.exp(TOKEN_MIN)))
        return joined([ord(letter) - 0x4E01 for letter in found])

    options = CtcOptions(BEAM, token_min_log_prob=TOKEN_MIN)
    providers = {"ours CtcSearch": native(options), "fast-ctc-decode": each(decode)}
    kind = f"token_min={TOKEN_MIN}, no margin, no LM, sums, 1 thread"
    yield compared(kind, data, providers, time.process_time, "CPU time")


def greedy(log_probs: torch.Tensor) -> list[str]:
    """Best label of each frame, on the device; repeats and blanks go, texts are made on the host."""
    best = log_probs.argmax(2)
    fresh = torch.ones_like(best, dtype=torch.bool)
    fresh[:, 1:] = best[:, 1:] != best[:, :-1]
    found = best.masked_fill(~fresh | (best == BLANK), -1).cpu().numpy()
    return [joined(row[row >= 0].tolist()) for row in found]


def device_rows(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """The search in torch against greedy on the same device, and the CPU search with all its threads."""
    beams = (4, 16) if quick else (4, 16, 128)
    for count in (4,) if quick else ((32, 128) if device == "cuda" else (32,)):
        batch = torch.from_numpy(np.stack(utterances(count)))
        there = batch.to(device)
        providers: dict[str, Callable[[], object]] = {"greedy": lambda there=there: greedy(there)}
        notes = {"greedy": f"WER {100 * word_error_rate(greedy(there)):.3f} %"}
        for beam in beams:
            for skip in (None, 0.95):
                options = CtcOptions(beam, beam_margin=MARGIN, token_min_log_prob=TOKEN_MIN, blank_skip=skip)
                kind = f"beam {beam}" + ("" if skip is None else ", blank_skip 0.95")
                for name, search, given in (
                    ("DeviceCtcSearch", DeviceCtcSearch(ALPHABET, options, device=device), there),
                    ("CtcSearch on the CPU", CtcSearch(ALPHABET, options), batch),
                ):
                    found = decoded(search, given)
                    notes[f"{name} {kind}"] = f"WER {100 * word_error_rate(found):.3f} %"
                    providers[f"{name} {kind}"] = lambda search=search, given=given: decoded(search, given)
        seconds = take_turns(providers, 2 if quick else 3, warm_up=1, device=device)
        shape = f"libri twice, noisy: one batch of {count} utterances of 15 s, labels=29, token_min, margin={MARGIN}"
        yield measurements("ctc_batch", shape, "float32", seconds, "greedy", note=notes)


def decoded(search: CtcSearch | DeviceCtcSearch, log_probs: torch.Tensor) -> list[str]:
    state = search.begin(len(log_probs))
    search.step(state, log_probs)
    return [joined(result.best.label_ids.tolist()) for result in search.end(state)]


def run(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """Peers on one thread in CPU time; then the device search. Our WER must be no higher, within 0.1 points."""
    if not DATA.exists():
        return
    threads = torch.get_num_threads()
    for name in ("pyctcdecode", "shallowfusion.compat.pyctcdecode"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if device == "cuda":
        yield from device_rows(device, quick)
        return
    torch.set_num_threads(1)
    data = utterances(TURNS if quick else NUM_UTTERANCES)
    for rows in (pyctcdecode_rows, fast_ctc_rows, flashlight_rows):
        yield from rows(data)
    yield from device_rows(device, quick)
    torch.set_num_threads(threads)
