"""The C++ core from several Python threads at once: each answer is that of one thread alone, and nothing is lost."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from shallowfusion.ctc.lexicon import LexiconOptions, LexiconSearch, LexiconWords
from shallowfusion.ctc.prefix_scores import PrefixScores
from shallowfusion.ctc.search import CtcSearch
from shallowfusion.ctc.settings import CtcAlphabet, CtcOptions
from shallowfusion.fusion.native_step import fused_step_cpu, row_statistics_cpu
from shallowfusion.ngrams.estimate import EstimateSettings, estimate
from shallowfusion.ngrams.table import NgramTable
from shallowfusion.phrases.automaton import PhraseAutomaton
from shallowfusion.phrases.patterns import patterns
from shallowfusion.scorers.page_pool import PagePool
from shallowfusion.scorers.row_rounding import round_rows
from tests.ctc.conftest import random_log_probs, searched
from tests.step_cases import make_request

NUM_THREADS = 4
ALPHABET = CtcAlphabet(("_", " ", *"abcd"), delimiter=1)
LOG_PROBS = random_log_probs(0, (4, 12, 6))


class Calls:
    """What every thread may call at any time, on objects they share."""

    def __init__(self) -> None:
        self.request = make_request(utterances=3, vocabs=(700, 650))
        self.search = CtcSearch(ALPHABET, CtcOptions(beam_size=9, hotwords={"ab": 1.0}), threads=3)
        words = [["a", "b"], ["b", "a", "c"], ["c"]]
        self.table = NgramTable(estimate(words, EstimateSettings(order=2)).model)
        self.automaton = PhraseAutomaton(patterns({"abc": 1.0, "bd": 2.0}, lambda text: [[ord(c) - 97 for c in text]]))
        self.pool = PagePool(num_pages=256, page_size=2)

    def step(self, threads: int) -> Any:
        found = fused_step_cpu(self.request, threads=threads)
        return found.totals.tolist(), found.token_ids.tolist()

    def statistics(self, threads: int) -> Any:
        found = row_statistics_cpu(self.request.sources[0], 1.0, threads=threads)
        return found.log_sum_exp.tolist(), round_rows(self.request.sources[1])[0].sum().item()

    def ctc(self, threads: int) -> Any:
        return [result.best.total for result in searched(self.search, LOG_PROBS, 3)]

    def prefix_scores(self, threads: int) -> Any:
        own = PrefixScores(LOG_PROBS, blank=0, threads=threads)
        rows = np.zeros((4, 2), np.int64)
        own.follow(rows, np.array([[2, 3]] * 4))
        return own.scores(rows, np.array([[4, 5]] * 4)).tolist()

    def lookups(self, threads: int) -> Any:
        states = np.arange(self.table.native.num_states)
        scores = self.table.score(states, np.zeros_like(states))[0].tolist()
        arcs = self.automaton.step(np.arange(self.automaton.num_states))
        return scores, self.table.dense(states).sum().item(), [array.tolist() for array in arcs]

    def pages(self, threads: int) -> Any:
        """Sequences of one's own in the pool of all: the numbers of slots are no others'."""
        sequence = self.pool.create()
        slots = self.pool.append(sequence, 5).slots.tolist()
        fork = self.pool.fork(sequence)
        self.pool.append(fork, 3)
        seen = self.pool.slots(sequence).tolist() == slots and self.pool.length(fork) == 8
        self.pool.release(sequence)
        self.pool.release(fork)
        return seen

    def all(self) -> list[Callable[[int], Any]]:
        return [self.step, self.statistics, self.ctc, self.prefix_scores, self.lookups, self.pages]


def in_threads(work: Callable[[int], None], count: int = NUM_THREADS) -> None:
    """Run work(0) .. work(count - 1) at once; the first failure is raised here."""
    failures: list[BaseException] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            start.wait()
            work(number)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if failures:
        raise failures[0]


def test_calls_of_every_part_at_once_answer_as_one_by_one() -> None:
    calls = Calls()
    wanted = [call(1) for call in calls.all()]
    made = [0] * NUM_THREADS
    end = time.monotonic() + 2.0

    def work(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end or made[number] < len(wanted):
            which = draw.randrange(len(wanted))
            assert calls.all()[which](draw.randint(1, 4)) == wanted[which]
            made[number] += 1

    in_threads(work)
    assert min(made) >= len(wanted)
    assert calls.pool.num_used == calls.pool.num_sequences == 0


@pytest.mark.parametrize("with_lexicon", [True, False])
def test_threads_may_share_a_lexicon_search(with_lexicon: bool) -> None:
    words = LexiconWords([[[2, 3, 1]], [[3, 1]]] if with_lexicon else None, [0] * 5)
    search = LexiconSearch(5, 0, 1, words, LexiconOptions(beam_size=20))
    emissions = random_log_probs(1, (200, 5))

    def work(number: int) -> None:
        for _ in range(10):
            search.step(emissions)
            assert search.results()

    in_threads(work)
    search.end()
    frames = NUM_THREADS * 10 * 200
    assert {len(result.labels) for result in search.results()} == {frames + 2}


def test_threads_may_share_a_ctc_state() -> None:
    search = CtcSearch(ALPHABET, CtcOptions(beam_size=9), threads=2)
    state = search.begin(4)

    def work(number: int) -> None:
        for _ in range(20):
            search.step(state, LOG_PROBS)
            assert len(search.live(state)) == 4

    in_threads(work)
    assert state.num_frames == [NUM_THREADS * 20 * 12] * 4
    assert all(torch.isfinite(torch.tensor(result.best.total)) for result in search.end(state))
