"""N-gram look-ups and phrase bonuses: against KenLM where it has the operation, one thread both sides."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from bench.timing import Measurement, measurements, take_turns
from shallowfusion.ngrams.arpa import read_arpa, write_arpa
from shallowfusion.ngrams.estimate import EstimateSettings, estimate
from shallowfusion.ngrams.model import LOG_10
from shallowfusion.ngrams.table import NgramTable
from shallowfusion.phrases.automaton import PhraseAutomaton
from shallowfusion.phrases.patterns import patterns, whole_words

__all__ = ["run"]

ORDER = 4


def zipf_text(num_words: int, vocab: int, seed: int = 0) -> list[list[str]]:
    """Sentences of ten words whose frequencies fall as in a language; each word depends on the one before."""
    rng = np.random.default_rng(seed)
    draws = (vocab ** rng.random((num_words // 10, 10))).astype(int)
    follows = rng.random(draws.shape) < 0.5
    for place in range(1, 10):
        linked = (draws[:, place - 1] * 7 + draws[:, place] % 3) % vocab
        draws[:, place] = np.where(follows[:, place], linked, draws[:, place])
    return [[f"w{word}" for word in row] for row in draws.tolist()]


def run(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """Reading a file, scoring rows, whole next-word rows, phrase steps. Scores are compared with KenLM's first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for vocab in (1_000, 50_000):
            yield from _tables(vocab, 20_000 if quick else 1_000_000, 5 if quick else 30)
        for count in (100, 20_000):
            yield _phrases(count, 5 if quick else 50)
    finally:
        torch.set_num_threads(threads)


def _tables(vocab: int, num_words: int, repeats: int) -> Iterator[list[Measurement]]:
    import kenlm

    text = zipf_text(num_words, vocab)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.arpa"
        write_arpa(estimate(text, EstimateSettings(order=ORDER)).model, path)
        table, theirs = NgramTable(read_arpa(path)), kenlm.Model(str(path))
        ngrams = sum(map(len, table.model.orders))
        readers = {"ngrams": lambda: NgramTable(read_arpa(path)), "kenlm": lambda: kenlm.Model(str(path))}
        seconds = take_turns(readers, max(3, repeats // 5), warm_up=1)
        yield measurements("ngram read", f"{ngrams} {ORDER}-grams, vocab {vocab}", "float32", seconds, "kenlm")
    columns = list(zip(*[[*row[:8]] for row in zipf_text(400, vocab, seed=1)], strict=True))
    ids = [np.array([table.model.id_of(word) for word in column]) for column in columns]
    ours, wanted = _batched(table, ids), _one_by_one(theirs, columns)
    np.testing.assert_allclose(ours / LOG_10, wanted, atol=1e-3)
    scorers = {"ngrams": lambda: _batched(table, ids), "kenlm": lambda: _one_by_one(theirs, columns)}
    shape = f"{len(columns[0])} rows, {len(columns)} words each, {ngrams} n-grams"
    yield measurements("ngram score", shape, "float32", take_turns(scorers, repeats), "kenlm")
    states = np.full(len(columns[0]), table.start_state)
    for column in ids[:3]:
        states = table.score(states, column)[1]
    if vocab <= 1_000:
        dense = {
            "ngrams": lambda: table.dense(states),
            "kenlm": lambda: _every_word(theirs, columns[:3], table.model.words),
        }
        seconds = take_turns(dense, max(2, repeats // 10), warm_up=1)
        yield measurements("ngram dense", f"{len(states)} rows, vocab {vocab}", "float32", seconds, "kenlm")
    else:
        seconds = take_turns({"ngrams": lambda: table.dense(states)}, repeats)
        yield measurements("ngram dense", f"{len(states)} rows, vocab {vocab}", "float32", seconds, "ngrams")


def _batched(table: NgramTable, columns: list[np.ndarray]) -> np.ndarray:
    states, totals = np.full(len(columns[0]), table.start_state), np.zeros(len(columns[0]))
    for column in columns:
        log_probs, states = table.score(states, column)
        totals += log_probs
    return totals


def _one_by_one(model, columns: list[tuple[str, ...]]) -> np.ndarray:
    """As a search holds states: KenLM's Python face scores one word of one state a call."""
    totals = []
    for words in zip(*columns, strict=True):
        state, total = _begun(model), 0.0
        for word in words:
            after = type(state)()
            total += model.BaseScore(state, word, after)
            state = after
        totals.append(total)
    return np.array(totals)


def _every_word(model, columns: list[tuple[str, ...]], vocabulary: tuple[str, ...]) -> None:
    after = type(_begun(model))()
    for words in zip(*columns, strict=True):
        state = _begun(model)
        for word in words:
            following = type(state)()
            model.BaseScore(state, word, following)
            state = following
        for word in vocabulary:
            model.BaseScore(state, word, after)


def _begun(model):
    import kenlm

    state = kenlm.State()
    model.BeginSentenceWrite(state)
    return state


def _phrases(count: int, repeats: int) -> list[Measurement]:
    """One search step of 40 rows: entries, refunds, new states."""
    rng = np.random.default_rng(0)
    spellings = {f"phrase {i}": rng.integers(0, 50_000, rng.integers(2, 8)).tolist() for i in range(count)}
    made = patterns(dict.fromkeys(spellings, 1.0), lambda text: [spellings[text]])
    automaton = PhraseAutomaton(made)
    starts = np.array([spelling[0] for spelling in list(spellings.values())[:40]])
    states = automaton.advance(np.zeros(40, dtype=np.int64), starts)

    def step(shared_first: bool) -> None:
        automaton.step(states, shared_first)
        automaton.refunds(states)
        automaton.advance(states, starts)

    pieces = [b" a" if token % 2 else b"a" for token in range(50_000)]
    ways = {"all entries": lambda: step(False), "shared first tokens": lambda: step(True)}
    whole = PhraseAutomaton(whole_words(made, pieces))
    begun = whole.advance(np.full(40, whole.start_state), starts)

    def whole_step() -> None:
        whole.step(begun, True)
        whole.refunds(begun)
        whole.advance(begun, starts)

    ways["whole words, shared first tokens"] = whole_step
    seconds = take_turns(ways, repeats)
    return measurements("phrase step", f"40 rows, {count} phrases", "float32", seconds, "all entries")
