"""The lexicon search in C++ and its twin in Python: the same hypotheses, and what they must satisfy."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowfusion import _native
from shallowfusion.ctc.lexicon import LexiconOptions, LexiconSearch, LexiconWords
from shallowfusion.ctc.lexicon_reference import ReferenceLexiconSearch
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.ngrams.estimate import EstimateSettings, estimate
from shallowfusion.ngrams.table import NgramTable

BLANK, SILENCE = 0, 1
SPELLINGS = ([[2, 3, 1]], [[2, 2, 1], [2, 3, 1], [3, 1]], [[2, 3, 2, 1]], [[4]], [])


@pytest.fixture(scope="module")
def table() -> NgramTable:
    return NgramTable(estimate([["w0", "w1"], ["w2", "w0"], ["w3", "w1", "w0"]], EstimateSettings(order=2)).model)


def words_of(table: NgramTable | None, with_lexicon: bool) -> LexiconWords:
    ids = [0 if table is None else table.model.id_of(f"w{i}") for i in range(5)]
    return LexiconWords(SPELLINGS if with_lexicon else None, ids, unknown=4)


def scores(frames: int, seed: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(frames, 5)) * 2
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


@pytest.mark.parametrize("with_lexicon", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_twins_agree_on_random_settings(table, with_lexicon, seed) -> None:
    rng = random.Random(seed)
    options = LexiconOptions(
        beam_size=rng.choice([1, 3, 10, 200]),
        top_labels=rng.choice([None, 2, 4]),
        beam_margin=rng.choice([3.0, 50.0]),
        lm_weight=rng.choice([0.0, 0.8]),
        lm_scale=rng.choice([1.0, 0.43]),
        word_score=rng.choice([0.0, 1.0]),
        unknown_score=rng.choice([-math.inf, -1.0]),
        silence_score=rng.choice([0.0, -0.5]),
        log_add=rng.random() < 0.5,
    )
    model = rng.choice([None, table])
    arguments = (5, BLANK, SILENCE, words_of(model, with_lexicon), options, model)
    native, reference = LexiconSearch(*arguments), ReferenceLexiconSearch(*arguments)
    emissions = scores(9, seed)
    for search in (native, reference):
        search.step(emissions[:4])
        search.step(emissions[4:])
        search.end()
    ours, theirs = native.results(), reference.results()
    told_apart = not with_lexicon or (model is not None and options.lm_weight > 0)  # two words share a spelling
    np.testing.assert_allclose([r.score for r in ours], [r.score for r in theirs], atol=1e-4)
    alone = {round(r.score, 3) for r in theirs if sum(abs(r.score - o.score) < 1e-3 for o in theirs) == 1}
    for one, other in zip(ours, theirs, strict=True):
        if told_apart and round(other.score, 3) in alone:
            assert one.words.tolist() == other.words.tolist()
            assert one.labels.tolist() == other.labels.tolist()
        assert len(one.labels) == 9 + 2


def spoken(labels: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Word sequences whose spellings, side by side, are the collapsed labels; silence between words is free."""
    collapsed = [label for i, label in enumerate(labels) if label != BLANK and (i == 0 or labels[i - 1] != label)]
    found: set[tuple[int, ...]] = set()

    def read(at: int, words: tuple[int, ...]) -> None:
        if at == len(collapsed):
            found.add(words)
            return
        if collapsed[at] == SILENCE:
            read(at + 1, words)
        for word, spellings in enumerate(SPELLINGS[:3]):
            for spelling in spellings:
                if collapsed[at : at + len(spelling)] == spelling:
                    read(at + len(spelling), (*words, word))

    read(0, ())
    return found


@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_finds_the_best_alignment_of_all(seed) -> None:
    emissions = scores(5, seed)
    words = LexiconWords(SPELLINGS[:3], [0, 0, 0])
    search = LexiconSearch(5, BLANK, SILENCE, words, LexiconOptions(beam_size=100_000, beam_margin=1e9, word_score=3.0))
    search.step(emissions)
    search.end()
    best = max(
        sum(float(emissions[t, label]) for t, label in enumerate(path)) + 3.0 * max(map(len, spoken(path)))
        for path in itertools.product(range(5), repeat=5)
        if spoken(path)
    )
    assert search.results()[0].score == pytest.approx(best, abs=1e-4)


def test_another_utterance_starts_afresh(table) -> None:
    search = LexiconSearch(5, BLANK, SILENCE, words_of(table, True), LexiconOptions(lm_weight=0.5), table)
    other = search.again()
    for one in (search, other):
        one.step(scores(6, 3))
        one.end()
    assert [r.score for r in search.results()] == [r.score for r in other.results()]
    assert len(search.again().results()) == 1


@pytest.mark.parametrize("twin", [LexiconSearch, ReferenceLexiconSearch])
def test_bad_calls_are_refused(twin) -> None:
    words = words_of(None, True)
    for wrong in (
        lambda: twin(5, 5, SILENCE, words),
        lambda: twin(5, BLANK, -1, words),
        lambda: LexiconOptions(beam_size=0),
        lambda: LexiconOptions(lm_weight=math.inf),
        lambda: LexiconOptions(unknown_score=math.inf),
        lambda: twin(5, BLANK, SILENCE, words).step(np.zeros((2, 4))),
        lambda: twin(5, BLANK, SILENCE, words).step(np.full((2, 5), np.nan)),
    ):
        with pytest.raises(InvalidArgumentError):
            wrong()


def test_the_core_refuses_labels_and_words_out_of_range(table) -> None:
    for words in (LexiconWords([[[5]]], [0]), LexiconWords([[[]]], [0]), LexiconWords([[[2]]], [0], unknown=1)):
        with pytest.raises(InvalidArgumentError):
            LexiconSearch(5, BLANK, SILENCE, words)
    with pytest.raises(InvalidArgumentError):
        LexiconSearch(5, BLANK, SILENCE, LexiconWords(None, [0, 0]))
    with pytest.raises(InvalidArgumentError):
        LexiconSearch(5, BLANK, SILENCE, LexiconWords([[[2]]], [10**6]), None, table)


NUMBERS = st.one_of(st.integers(-2, 6), st.floats(), st.none(), st.text(max_size=2), st.integers(-(2**80), 2**80))
FRAMES = (
    np.zeros((2, 3), np.float32), np.zeros((3, 3), np.float32), np.full((3, 3), -np.inf, np.float32),
    np.full((1, 3), np.nan, np.float32), np.zeros((0, 3), np.float32), np.zeros((3, 2)), np.zeros(9), None, "text",
)  # fmt: skip


@given(st.data())
def test_the_binding_never_crashes(data: st.DataObject) -> None:
    """Whatever is given, the binding works or raises; nothing else."""
    draw = data.draw
    sane = draw(st.booleans())
    number = st.integers(0, 2) if sane else st.integers(-1, 3)
    spelling = st.tuples(number, st.lists(number, min_size=int(sane), max_size=3), st.floats())
    transitions = draw(st.sampled_from([None, FRAMES[1], FRAMES[2]] if sane else FRAMES))
    numbers = {name: draw(st.floats()) for name in ("beam_margin", "lm_weight", "lm_scale", "word_score")}
    numbers |= {name: draw(st.floats()) for name in ("unknown_score", "silence_score")}
    try:
        spellings = draw(st.lists(spelling, max_size=4))
        trie = _native.SpellingTrie(spellings=spellings, num_labels=3, num_words=3) if draw(st.booleans()) else None
        search = _native.LexiconSearch(
            num_labels=3,
            blank=draw(st.integers(0, 2) if transitions is None else st.just(-1)) if sane else draw(NUMBERS),
            silence=draw(number if sane else NUMBERS),
            beam_size=draw(st.integers(1, 4) if sane else NUMBERS),
            top_labels=draw(st.integers(1, 4) if sane else NUMBERS),
            **numbers,
            log_add=draw(st.booleans()),
            trie=trie,
            unknown_word=draw(st.integers(0, 2) if sane else NUMBERS),
            table=None,
            ids=[0, 1, 2] if sane else draw(st.lists(st.integers(-1, 3), max_size=4)),
            transitions=transitions,
        )
        for _ in range(draw(st.integers(0, 3))):
            search.step(emissions=draw(st.sampled_from(FRAMES[:5] if sane else FRAMES)))
        search.end()
    except (InvalidArgumentError, TypeError, ValueError):
        return
    assert all(len(labels) == search.num_frames + 2 for _, labels, _ in search.results())


def test_the_core_refuses_other_widths_and_a_lexicon_of_more_words() -> None:
    """Whatever the caller says of them: the numbers would be read past their end."""
    small = LexiconSearch(5, BLANK, SILENCE, LexiconWords(None, [0] * 5))
    with pytest.raises(InvalidArgumentError):
        small._native.step(emissions=np.zeros((3, 4), np.float32))
    large = LexiconSearch(5, BLANK, SILENCE, LexiconWords([[[2]], [[3]], [[4, 3]]], [0, 0, 0]))
    large._words = LexiconWords([[[2]]], [0])
    with pytest.raises(InvalidArgumentError):
        large._made()
