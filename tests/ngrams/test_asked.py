"""Models asked in Python: KenLM's files say what the ARPA file says; the mean is the mean; the search takes both."""

from __future__ import annotations

import gc
import math
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion.ctc.search import CtcSearch
from shallowfusion.ctc.search_reference import ReferenceCtcSearch
from shallowfusion.ctc.settings import CtcAlphabet, CtcLanguage, CtcOptions
from shallowfusion.errors import InvalidArgumentError, ModelError
from shallowfusion.ngrams.asked import KenlmTable, MeanTable, Share, is_kenlm_binary
from shallowfusion.ngrams.table import NgramTable
from tests.ctc.conftest import assert_same, random_log_probs, searched

FOLDER = Path(__file__).parent / "kenlm"  # words.arpa, and what KenLM's build_binary makes of it
ARPA = FOLDER / "words.arpa"
ALPHABET = CtcAlphabet(("_", " ", *"abdeghinorstuwy", "é", "l"), delimiter=1)


@pytest.fixture(params=["probing.bin", "trie.bin", "words.arpa"])
def asked(request: pytest.FixtureRequest) -> KenlmTable:
    pytest.importorskip("kenlm")
    return KenlmTable(FOLDER / request.param)


def test_scores_are_those_of_the_arpa_file(asked: KenlmTable) -> None:
    table = NgramTable.from_arpa(ARPA)
    assert asked.order == table.model.order == 3
    assert set(asked.model.words) == set(table.model.words)
    words = [*table.model.words, "zebra"]
    rng = np.random.default_rng(0)
    for start in ("start_state", "null_state"):
        own, other = [getattr(asked, start)] * 40, [getattr(table, start)] * 40
        for _ in range(6):
            drawn = [words[number] for number in rng.integers(0, len(words), 40)]
            log_probs, states = asked.score(own, [asked.model.ids.get(w, asked.model.unknown_word) for w in drawn])
            wanted, following = table.score(other, [table.model.id_of(word) for word in drawn])
            np.testing.assert_allclose(log_probs, wanted, atol=1e-4)
            own, other = states.tolist(), following.tolist()
            np.testing.assert_allclose(asked.end(own), table.end(other), atol=1e-4)
            assert len(set(zip(own, other, strict=True))) == len(set(own)) == len(set(other))


@pytest.mark.parametrize("unigrams", [None, frozenset({"bunny", "bugs", "the", "élan"})])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_search_finds_what_it_finds_with_the_arpa_file(asked: KenlmTable, unigrams: Any, threads: int) -> None:
    log_probs = random_log_probs(5, (6, 14, len(ALPHABET.labels)))
    options = CtcOptions(beam_size=30, word_bonus=1.0)
    found = []
    for table in (asked, NgramTable.from_arpa(ARPA)):
        language = CtcLanguage(table, words=unigrams, unknown_word=-2.0, unknown_prefix=-1.0)
        found.append(searched(CtcSearch(ALPHABET, options, language, threads), log_probs, 30))
    for one, other in zip(*found, strict=True):
        assert [own.text for own in one.hypotheses] == [own.text for own in other.hypotheses]
        np.testing.assert_allclose([h.total for h in one.hypotheses], [h.total for h in other.hypotheses], atol=1e-3)


def mean(weights: tuple[float, float] = (0.4, 0.9), boundary: bool = False) -> MeanTable:
    first, second = NgramTable.from_arpa(ARPA), NgramTable.from_arpa(ARPA)
    return MeanTable(
        [
            Share(first, weights[0], {"bunny", "bugs", "the", "a"}, -3.0),
            Share(second, weights[1], None, -1.0, boundary),
        ]
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["bunny", "bugs", "the", "snug", "sun", "zebra"]), max_size=6), st.booleans())
def test_the_mean_is_that_of_the_models(words: list[str], boundary: bool) -> None:
    table, made = NgramTable.from_arpa(ARPA), mean(boundary=boundary)
    states = [table.start_state, table.start_state if boundary else table.null_state]
    state = made.start_state
    for word in words:
        wanted = 0.0
        for place, (weight, known, unknown) in enumerate(
            [(0.4, {"bunny", "bugs", "the", "a"}, -3.0), (0.9, set(table.model.ids), -1.0)]
        ):
            log_probs, following = table.score([states[place]], [table.model.id_of(word)])
            wanted += 0.5 * weight * (float(log_probs[0]) + (0.0 if word in known else unknown))
            states[place] = int(following[0])
        number = made.model.ids.get(word, made.model.unknown_word)
        said, state = made.score_word(state, number)
        assert said == pytest.approx(wanted, abs=1e-5)
    ends = [0.4 * float(table.end([states[0]])[0]), 0.9 * float(table.end([states[1]])[0]) if boundary else 0.0]
    assert float(made.end([state])[0]) == pytest.approx(sum(ends) / 2, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 7), st.sampled_from([1, 4, 300]), st.booleans())
def test_twins_agree_on_tables_in_python_and_several_word_sets(
    seed: int, frames: int, beam_size: int, boundary: bool
) -> None:
    table = mean(boundary=boundary)
    sets = (({"bunny", "bugs"}, -1.5), ({"sun", "snug", "a"}, -0.25), (set(table.model.words), -0.5))
    alphabet = CtcAlphabet(("_", " ", "b", "u", "s", "n", "a"), delimiter=1)
    language = CtcLanguage(table, unknown_word=-1.0, score_empty_word=True, prefixes=sets)
    options = CtcOptions(beam_size=beam_size, lm_weight=1.0, word_bonus=0.5)
    log_probs = random_log_probs(seed, (2, frames, 7))
    twins = [made(alphabet, options, language, 1) for made in (CtcSearch, ReferenceCtcSearch)]
    for one, other in zip(*(searched(search, log_probs, 20) for search in twins), strict=True):
        assert_same(one, other)


class Failing:
    """A table that breaks, or says no number."""

    def __init__(self, answer: Any) -> None:
        self._table, self._answer = NgramTable.from_arpa(ARPA), answer
        self.model, self.start_state, self.null_state = self._table.model, 0, 0

    def score(self, states: Any, words: Any) -> Any:
        if isinstance(self._answer, Exception):
            raise self._answer
        return np.array([self._answer]), np.array([0])

    def end(self, states: Any) -> Any:
        return np.zeros(len(states))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (KeyError("gone"), KeyError, "gone"),
        (math.nan, InvalidArgumentError, "the language model says nan"),
        (math.inf, InvalidArgumentError, "the language model says inf"),
    ],
)
def test_what_breaks_in_python_is_raised(threads: int, answer: Any, error: type, words: str) -> None:
    search = CtcSearch(ALPHABET, CtcOptions(beam_size=20), CtcLanguage(Failing(answer)), threads)  # type: ignore[arg-type]
    with pytest.raises(error, match=words):
        searched(search, random_log_probs(1, (4, 10, len(ALPHABET.labels))), 1)


def test_threads_of_python_ask_one_table() -> None:
    language = CtcLanguage(mean(), prefixes=(({"bunny"}, -1.0),))
    search = CtcSearch(ALPHABET, CtcOptions(beam_size=20, lm_weight=1.0), language, threads=2)
    data = [random_log_probs(seed, (3, 10, len(ALPHABET.labels))) for seed in range(4)]
    wanted = [[result.best.text for result in searched(search, own, 1)] for own in data]
    found: dict[int, list[str]] = {}
    shared = [CtcSearch(ALPHABET, search.options, CtcLanguage(mean(), prefixes=language.prefixes), threads=2)]

    def decode(number: int) -> None:
        found[number] = [result.best.text for result in searched(shared[0], data[number], 1)]

    threads = [threading.Thread(target=decode, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [found[number] for number in range(4)] == wanted
    shared.clear()
    gc.collect()


def test_what_kenlm_cannot_give_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kenlm")
    assert is_kenlm_binary(FOLDER / "trie.bin")
    assert not is_kenlm_binary(ARPA)
    assert not is_kenlm_binary(tmp_path / "none")
    with pytest.raises(ModelError, match="no list of its words"):
        KenlmTable(FOLDER / "bare.bin")
    cut = tmp_path / "cut.bin"
    cut.write_bytes((FOLDER / "probing.bin").read_bytes()[:300])
    with pytest.raises(ModelError, match="cannot be read by kenlm"):
        KenlmTable(cut)
    shutil.copy(FOLDER / "trie.bin", tmp_path / "trie.bin")
    table = KenlmTable(tmp_path / "trie.bin")
    for state, word in ((10_000, 0), (0, 10_000), (-1, 0)):
        with pytest.raises(InvalidArgumentError):
            table.score([state], [word])
    with pytest.raises(InvalidArgumentError, match="at least one model"):
        MeanTable([])
    monkeypatch.setitem(sys.modules, "kenlm", None)
    with pytest.raises(ModelError, match="pip install kenlm"):
        KenlmTable(tmp_path / "trie.bin")
