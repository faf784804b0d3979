"""What phrases cost, none, ten and 20,000: a CTC search on stored emissions of a real network, and the fused step."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bench.ctc import DATA, Emissions, stored
from bench.fused_step import ACOUSTIC_VOCAB, END, LANGUAGE_VOCAB, make_inputs
from bench.timing import Measurement, measurements
from shallowfusion import fused_step
from shallowfusion.ctc.search import CtcSearch
from shallowfusion.ctc.settings import CtcAlphabet, CtcOptions
from shallowfusion.phrases.automaton import PhraseAutomaton
from shallowfusion.phrases.patterns import patterns, whole_words
from shallowfusion.search.boosting import PhraseBooster

__all__ = ["lm_phrases", "run"]

COUNTS = (0, 10, 20_000)
BEAM = 100
ROWS, BEAM_SIZE = 40, 5  # of the fused step
WEIGHT = 4.0  # nats a phrase, our default
PRUNED = {"token_min_log_prob": -5.0, "beam_margin": 10.0}  # pyctcdecode's


def lm_phrases(count: int) -> dict[str, float]:
    """Distinct phrases of one to three words of a 3-gram model's vocabulary, in capitals as the model has them."""
    text = gzip.decompress((DATA / "flashlight" / "lm.arpa.gz").read_bytes()).decode().split("\\2-grams:")[0]
    words = [line.split("\t")[1].lower() for line in text.splitlines() if "\t" in line]
    words = [word for word in words if word.isascii() and word.isalpha() and len(word) > 2]
    rng = np.random.default_rng(0)
    found: dict[str, float] = {}
    while len(found) < count:
        found[" ".join(words[number] for number in rng.integers(0, len(words), rng.integers(1, 4)))] = WEIGHT
    return found


def searcher(data: Emissions, options: CtcOptions) -> Callable[[], list[str]]:
    search = CtcSearch(CtcAlphabet(tuple(data.labels), data.blank, data.labels.index(" ")), options, threads=1)

    def decode() -> list[str]:
        texts = []
        for log_probs in data.utterances:
            state = search.begin(1)
            search.step(state, log_probs[None])
            texts.append(search.end(state)[0].best.text)
        return texts

    return decode


def run(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """They take turns on one thread, and its CPU time is what counts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield step_rows(5 if quick else 40)
    if DATA.exists():
        yield from search_rows(quick)
    torch.set_num_threads(threads)


def stepper(count: int) -> Callable[[], object]:
    """A step of 8 utterances, beam 5, with two sources: bonuses, fused step, states of the rows that stay."""
    acoustic, language, totals = make_inputs(ROWS, torch.float32, "cpu")
    weights = torch.tensor([1.0, 0.3]).expand(ROWS, 2).contiguous()
    settings: dict[str, Any] = {"beam_size": BEAM_SIZE, "top_k": 2 * BEAM_SIZE, "end_id": END, "unmapped": 0.0}
    sources = [acoustic, language]
    if count == 0:
        return lambda: fused_step(sources, weights, totals, **settings)
    rng = np.random.default_rng(0)
    spellings = {f"phrase {i}": rng.integers(0, 50_000, rng.integers(2, 8)).tolist() for i in range(count)}
    pieces = [b" a" if token % 2 else b"a" for token in range(ACOUSTIC_VOCAB)]
    made = whole_words(patterns(dict.fromkeys(spellings, 1.0), lambda text: [spellings[text]]), pieces)
    booster = PhraseBooster(PhraseAutomaton(made), ACOUSTIC_VOCAB, ROWS // BEAM_SIZE)
    begun = np.array([spelling[0] for spelling in list(spellings.values())])[np.arange(ROWS) % count]
    booster.follow(np.zeros((ROWS // BEAM_SIZE, BEAM_SIZE), np.int64), begun.reshape(-1, BEAM_SIZE))
    stay = np.tile(np.arange(BEAM_SIZE), (ROWS // BEAM_SIZE, 1))

    def step() -> None:
        bonus = booster.bonus(torch.device("cpu"))
        owed = totals + bonus.refunds
        fused_step(sources, weights, owed, token_bias=booster.first, bonus=bonus.sparse, **settings)
        booster.follow(stay, begun.reshape(-1, BEAM_SIZE))

    return step


def step_rows(repeats: int) -> list[Measurement]:
    """The fused step of a Whisper decoder; every row is within a phrase."""
    steps = {f"{count:,} phrases": stepper(count) for count in COUNTS}
    shape = f"fused step rows={ROWS} beam={BEAM_SIZE} vocabs={ACOUSTIC_VOCAB},{LANGUAGE_VOCAB}, 1 thread"
    return measurements("phrases", shape, "float32", thread_turns(steps, repeats), "0 phrases")


def search_rows(quick: bool) -> Iterator[list[Measurement]]:
    """Each set with all labels and pruned."""
    phrases = list(lm_phrases(COUNTS[-1]).items())
    for data in stored(quick):
        if not data.name.startswith("libri"):
            continue
        for kind, pruning in (("all labels", {}), ("pruned as pyctcdecode", PRUNED)):
            plain = CtcOptions(beam_size=BEAM, **pruning)  # type: ignore[arg-type]
            searches: dict[str, Callable[[], object]] = {
                f"{count:,} phrases": searcher(data, replace(plain, hotwords=dict(phrases[:count]))) for count in COUNTS
            }
            shape = (
                f"{data.name} utterances={len(data.utterances)} frames={data.num_frames} beam={BEAM} {kind}, 1 thread"
            )
            seconds = thread_turns(searches, 5 if quick else 20)
            yield measurements("phrases", shape, "float32", seconds, "0 phrases")


def thread_turns(searches: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of CPU of this thread; a search with one thread runs in the caller's."""
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    for turn in range(repeats + 2):
        for name, decode in searches.items():
            start = time.thread_time()
            decode()
            if turn > 1:
                seconds[name].append(time.thread_time() - start)
    return seconds
