"""What phrases cost a CTC search: none, ten and 20,000, on stored emissions of a real network, decoder only."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from bench.ctc import DATA, Emissions, stored
from bench.timing import Measurement, measurements
from shallowfusion.ctc.search import CtcSearch
from shallowfusion.ctc.settings import CtcAlphabet, CtcOptions

__all__ = ["lm_phrases", "run"]

COUNTS = (0, 10, 20_000)
BEAM = 100
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
    """Each set with all labels and pruned; the searches take turns, and the CPU time of the thread is what counts."""
    if not DATA.exists():
        return
    phrases = list(lm_phrases(COUNTS[-1]).items())
    for data in stored(quick):
        if not data.name.startswith("libri"):
            continue
        for kind, pruning in (("all labels", {}), ("pruned as pyctcdecode", PRUNED)):
            plain = CtcOptions(beam_size=BEAM, **pruning)  # type: ignore[arg-type]
            searches = {
                f"{count:,} phrases": searcher(data, replace(plain, hotwords=dict(phrases[:count]))) for count in COUNTS
            }
            shape = (
                f"{data.name} utterances={len(data.utterances)} frames={data.num_frames} beam={BEAM} {kind}, 1 thread"
            )
            seconds = thread_turns(searches, 5 if quick else 20)
            yield measurements("ctc_phrases", shape, "float32", seconds, "0 phrases")


def thread_turns(searches: dict[str, Callable[[], list[str]]], repeats: int) -> dict[str, list[float]]:
    """Seconds of CPU of this thread; a search with one thread runs in the caller's."""
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    for turn in range(repeats + 2):
        for name, decode in searches.items():
            start = time.thread_time()
            decode()
            if turn > 1:
                seconds[name].append(time.thread_time() - start)
    return seconds


if __name__ == "__main__":
    for rows in run("cpu", True):
        for row in rows:
            print(row.shape, row.provider, f"{row.median_ms:.2f}", f"{row.ratio:.3f}")
