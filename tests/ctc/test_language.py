"""Language models inside the CTC search: exact sums, words, labels, hotwords, boundaries."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion.ctc.search import CtcSearch
from shallowfusion.ctc.search_reference import ReferenceCtcSearch
from shallowfusion.ctc.settings import CtcAlphabet, CtcLanguage, CtcOptions, is_uniquely_decodable
from shallowfusion.errors import InvalidArgumentError, VocabularyError
from shallowfusion.ngrams.model import NgramModel, NgramOrder
from shallowfusion.ngrams.table import NgramTable, word_log_probs
from tests.ctc.conftest import assert_same, random_log_probs, searched, shared_file, shared_matrix
from tests.ctc.test_search import EXAMPLE, HTR_LABELS, enumerated

MARKS = ("<unk>", "<s>", "</s>")
IMPOSSIBLE = -1e5  # nats


def table_of(
    unigrams: dict[str, float], bigrams: dict[tuple[str, str], float] | None = None, end: float = 0.0
) -> NgramTable:
    """A table from probabilities as logs; marks not given are as good as impossible, back-offs are 0."""
    given = {"<unk>": IMPOSSIBLE, "<s>": IMPOSSIBLE, "</s>": end, **unigrams}
    words = tuple(given)
    orders = [_order([(word,) for word in words], list(given.values()), words)]
    if bigrams:
        orders.append(_order(list(bigrams), list(bigrams.values()), words))
    return NgramTable(NgramModel(words, tuple(orders), words.index("<s>"), words.index("</s>"), words.index("<unk>")))


def _order(ngrams: list[tuple[str, ...]], log_probs: list[float], words: tuple[str, ...]) -> NgramOrder:
    ids = np.array([[words.index(word) for word in ngram] for ngram in ngrams], dtype=np.int32)
    zeros = np.zeros(len(ngrams), dtype=np.float32)
    return NgramOrder(ids, np.array(log_probs, dtype=np.float32), zeros)


def random_table(seed: int) -> NgramTable:
    rng = np.random.default_rng(seed)
    words = ["a", "b", "ab", "ba", "bb", "abab", "<unk>"]
    bigrams = {(one, other): -float(rng.random()) * 4 for one in [*words[:4], "<s>"] for other in [*words[:3], "</s>"]}
    return table_of({word: -float(rng.random()) * 6 for word in words}, bigrams, end=-1.5)


def test_worked_example_with_a_label_model(search_class: type) -> None:
    table = table_of({"a": math.log(0.2), "b": math.log(0.7)})
    language = CtcLanguage(table, unit="labels", score_boundary=False)
    search = search_class(CtcAlphabet(("", "a", "b")), CtcOptions(lm_weight=0.5), language)
    (result,) = searched(search, EXAMPLE, 5)
    expected = {"a": -1.7936, "b": -1.9444, "": -2.1203, "ab": -2.6813, "ba": -3.4482}
    assert [hypothesis.text for hypothesis in result.hypotheses] == list(expected)
    for hypothesis in result.hypotheses:
        assert hypothesis.total == pytest.approx(expected[hypothesis.text], abs=1e-4)
        assert hypothesis.parts["lm"] == pytest.approx(
            sum(math.log({"a": 0.2, "b": 0.7}[letter]) for letter in hypothesis.text), abs=1e-6
        )
        assert hypothesis.total == pytest.approx(hypothesis.parts["asr"] + 0.5 * hypothesis.parts["lm"], abs=1e-9)


@pytest.mark.parametrize("unit", ["words", "labels"])
@pytest.mark.parametrize("alphabet_seed", range(4))
def test_weight_zero_is_the_plain_search(search_class: type, unit: Any, alphabet_seed: int) -> None:
    alphabet = CtcAlphabet(("", "|", "a", "b"), delimiter=1)
    table = table_of({"<space>": -1.0, "a": -2.0, "b": -3.0})
    language = CtcLanguage(table, unit=unit, unknown_word=-5.0, unknown_prefix=0.0)
    log_probs = random_log_probs(alphabet_seed, (3, 20, 4))
    plain = searched(search_class(alphabet, CtcOptions(beam_size=6)), log_probs, 6)
    fused = searched(search_class(alphabet, CtcOptions(beam_size=6, lm_weight=0.0), language), log_probs, 6)
    for one, other in zip(plain, fused, strict=True):
        assert [(h.text, h.total) for h in one.hypotheses] == [(h.text, h.total) for h in other.hypotheses]


@pytest.mark.parametrize("boundary", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_wide_beam_with_a_word_model_equals_the_sum_over_all_paths(
    search_class: type, seed: int, boundary: bool
) -> None:
    """Total of every text: its acoustic sum, its sentence score by the table, a bonus a word, an offset an unknown."""
    alphabet = CtcAlphabet(("", " ", "a", "b"), delimiter=1)
    table = random_table(seed)
    known = {"a", "b", "ab"}
    language = CtcLanguage(table, words=known, unknown_word=-2.0, unknown_prefix=-3.0, score_boundary=boundary)
    options = CtcOptions(beam_size=5000, lm_weight=0.7, word_bonus=0.9)
    log_probs = random_log_probs(seed, (1, 6, 4))
    (result,) = searched(search_class(alphabet, options, language), log_probs, 5000)
    exact: dict[str, float] = defaultdict(float)
    for labels, prob in enumerated(log_probs[0], 0).items():
        exact[" ".join("".join("_ ab"[label] for label in labels).split())] += prob
    assert {hypothesis.text for hypothesis in result.hypotheses} == set(exact)
    for hypothesis in result.hypotheses:
        words = hypothesis.text.split()
        lm = float(word_log_probs(table, words, begin=boundary, end=boundary).sum())
        unknown = sum(word not in known for word in words)
        total = math.log(exact[hypothesis.text]) + 0.7 * (lm - 2.0 * unknown) + 0.9 * len(words)
        assert hypothesis.parts["lm"] == pytest.approx(lm, abs=1e-4)
        assert hypothesis.parts["asr"] == pytest.approx(math.log(exact[hypothesis.text]), abs=1e-5)
        assert hypothesis.total == pytest.approx(total, abs=1e-4)
    totals = [hypothesis.total for hypothesis in result.hypotheses]
    assert totals == sorted(totals, reverse=True)


CHOICES = st.fixed_dictionaries(
    {
        "beam_size": st.sampled_from([1, 3, 20]),
        "merge": st.sampled_from(["logsumexp", "max"]),
        "places": st.sampled_from(["prefixes", "paths"]),
        "lm_weight": st.sampled_from([0.0, 0.5, 2.0, -0.5]),
        "word_bonus": st.sampled_from([0.0, 1.5]),
        "beam_margin": st.sampled_from([None, 6.0]),
        "history_words": st.sampled_from([0, 1]),
        "hotwords": st.sampled_from([(), ("ab", "bbb")]),
        "hotword_weight": st.sampled_from([3.0]),
        "hotword_form": st.sampled_from(["phrases", "words"]),
    }
)
KINDS = st.fixed_dictionaries(
    {
        "unit": st.sampled_from(["words", "words", "labels"]),
        "words": st.sampled_from([None, {"ab", "b"}, set()]),
        "unknown_word": st.sampled_from([-5.0, 1.0]),
        "unknown_prefix": st.sampled_from([-4.0, 0.0, 2.0]),
        "score_boundary": st.booleans(),
        "score_empty_word": st.booleans(),
    }
)


@settings(max_examples=120, deadline=None)
@given(CHOICES, KINDS, st.integers(0, 2**31), st.integers(0, 14))
def test_twins_agree_with_language_models(chosen: Any, kind: Any, seed: int, frames: int) -> None:
    alphabet = CtcAlphabet(("", " ", "a", "b"), delimiter=1)
    table = random_table(seed % 7)
    if kind["unit"] == "labels":
        table = table_of({"a": -1.0, "b": -2.0, "<space>": -0.5}, {("a", "b"): -0.1, ("b", "<space>"): -3.0})
    language, options = CtcLanguage(table, **kind), CtcOptions(**chosen)
    log_probs = random_log_probs(seed, (2, frames, 4))
    results = [
        searched(one(alphabet, options, language), log_probs, 7, [frames, frames // 2])
        for one in (CtcSearch, ReferenceCtcSearch)
    ]
    for one, other in zip(*results, strict=True):
        assert_same(one, other, 1e-7)
        assert [h.lm_state for h in one.hypotheses] == [h.lm_state for h in other.hypotheses]


def test_words_begun_by_pieces_are_scored_like_delimited_ones(search_class: type) -> None:
    table = random_table(1)
    options = CtcOptions(beam_size=3000, lm_weight=0.8, word_bonus=0.3)
    log_probs = random_log_probs(4, (1, 5, 4))
    language = CtcLanguage(table, unknown_word=-1.0)
    alphabet = CtcAlphabet(("", "▁a", "a", "b"), word_start="▁")
    (result,) = searched(search_class(alphabet, options, language), log_probs, 3000)
    exact: dict[str, float] = defaultdict(float)
    for labels, prob in enumerated(log_probs[0], 0).items():
        exact["".join(("", " a", "a", "b")[label] for label in labels).strip()] += prob
    for hypothesis in result.hypotheses:
        words = hypothesis.text.split()
        lm = float(word_log_probs(table, words).sum())
        unknown = sum(word not in table.model.ids for word in words)
        total = math.log(exact[hypothesis.text]) + 0.8 * (lm - unknown) + 0.3 * len(words)
        assert hypothesis.total == pytest.approx(total, abs=1e-4)


def test_state_of_one_piece_starts_the_next(search_class: type) -> None:
    alphabet = CtcAlphabet(("", " ", "a", "b"), delimiter=1)
    table = random_table(2)
    search = search_class(alphabet, CtcOptions(beam_size=50), CtcLanguage(table))
    log_probs = random_log_probs(5, (1, 8, 4))
    first = searched(search, log_probs)[0].best
    state = search.begin(1, [first.lm_state])
    search.step(state, log_probs)
    for hypothesis in search.end(state, 50)[0].hypotheses:
        words = [*first.text.split(), *hypothesis.text.split()]
        both = float(word_log_probs(table, words).sum())
        before = float(word_log_probs(table, first.text.split(), end=False).sum())
        assert hypothesis.parts["lm"] == pytest.approx(both - before, abs=1e-4)


def test_character_model_mends_the_handwriting_line(search_class: type) -> None:
    """Published with bigram counts of the corpus to the power 0.01; unseen bigrams are impossible."""
    corpus = shared_file("ctcdecoder_htr/line/corpus.txt").read_text(encoding="utf-8")
    letters = [letter for letter in corpus if letter in HTR_LABELS]
    pairs = Counter(itertools.pairwise(letters))
    firsts = Counter(letters[:-1])
    bigrams = {(spelled(a), spelled(b)): math.log(n / firsts[a]) for (a, b), n in pairs.items()}
    table = table_of({spelled(letter): IMPOSSIBLE for letter in HTR_LABELS[:79]}, bigrams)
    language = CtcLanguage(table, unit="labels", score_boundary=False)
    alphabet = CtcAlphabet(HTR_LABELS, blank=79, delimiter=0)
    search = search_class(alphabet, CtcOptions(beam_size=25, lm_weight=0.01), language)
    start = int(table.score([table.null_state], [table.model.ids["<space>"]])[1][0])
    state = search.begin(1, [start])
    search.step(state, shared_matrix("ctcdecoder_htr/line/rnnOutput.csv")[None])
    assert search.end(state)[0].best.text == "the fake friend of the family, lie th"


def spelled(letter: str) -> str:
    return "<space>" if letter == " " else letter


def test_published_toy_whose_words_are_those_of_a_model(search_class: type) -> None:
    """The published decoder weighs its word model by 0 but takes paths from the words the labels can spell: "a".

    No silence stands before its first word, so the space is a label like the others.
    """
    cases = json.loads(shared_file("toy_cases.json").read_text(encoding="utf-8"))
    (case,) = [case for case in cases if case["name"] == "parlance_seq2"]
    labels = tuple(case["alphabet"])
    model = NgramTable.from_arpa(shared_file("parlance/test.arpa")).model
    assert [word for word in model.words if set(word) <= set(labels)] == ["a"]
    pairs = dict.fromkeys([("<s>", "a"), ("a", " "), (" ", "a")], 0.0)
    table = table_of(dict.fromkeys(labels, IMPOSSIBLE), pairs)
    alphabet = CtcAlphabet(labels, blank=case["blank"])
    search = search_class(alphabet, CtcOptions(beam_size=20, lm_weight=1.0), CtcLanguage(table, unit="labels"))
    best = searched(search, np.log(np.array([case["probs"]])))[0].best
    assert best.text == case["published"]["beam20_with_test.arpa"] == "a a"
    exact = enumerated(np.log(np.array(case["probs"])), case["blank"])[2, 1, 2]
    assert best.total == pytest.approx(math.log(exact), abs=1e-5)


def test_known_words_mend_handwriting(search_class: type) -> None:
    words = shared_file("ctcdecoder_htr/word/corpus.txt").read_text(encoding="utf-8").split()
    table = table_of(dict.fromkeys([*words, "<unk>"], -math.log(len(words))))
    alphabet = CtcAlphabet((*HTR_LABELS, "|"), blank=79, delimiter=80)
    matrix = shared_matrix("ctcdecoder_htr/word/rnnOutput.csv")
    log_probs = np.concatenate([matrix, np.full((len(matrix), 1), -30.0)], axis=1)[None]
    search = search_class(alphabet, CtcOptions(beam_size=25), CtcLanguage(table))
    assert searched(search, log_probs)[0].best.text == "aircraft"


def test_known_words_read_bentham(search_class: type) -> None:
    labels = tuple(shared_file("wordbeamsearch_bentham/chars.txt").read_text(encoding="utf-8").rstrip("\n"))
    corpus = shared_file("wordbeamsearch_bentham/corpus.txt").read_text(encoding="utf-8").split()
    table = table_of(dict.fromkeys([*corpus, "<unk>"], -math.log(len(set(corpus)))))
    alphabet = CtcAlphabet((*labels, ""), blank=len(labels), delimiter=0)
    log_probs = shared_matrix("wordbeamsearch_bentham/mat_0.csv")[None]
    search = search_class(alphabet, CtcOptions(beam_size=25), CtcLanguage(table))
    wanted = shared_file("wordbeamsearch_bentham/gt_0.txt").read_text(encoding="utf-8").strip()
    assert searched(search, log_probs)[0].best.text == wanted


def test_bad_language_settings_are_refused(search_class: type) -> None:
    table = table_of({"a": -1.0})
    with pytest.raises(InvalidArgumentError, match="delimiter"):
        search_class(CtcAlphabet(("", "a")), language=CtcLanguage(table))
    with pytest.raises(VocabularyError, match=r"label 2 \('b'\)"):
        search_class(CtcAlphabet(("", "a", "b")), language=CtcLanguage(table, unit="labels"))
    for bad in ({"unit": "letters"}, {"unknown_word": -math.inf}, {"unknown_prefix": math.nan}):
        with pytest.raises(InvalidArgumentError):
            CtcLanguage(table, **bad)


def test_a_search_with_other_settings_shares_its_words() -> None:
    alphabet = CtcAlphabet(("", " ", "a", "b"), delimiter=1)
    language = CtcLanguage(random_table(3))
    search = CtcSearch(alphabet, CtcOptions(), language)
    changed = search.with_settings(CtcOptions(lm_weight=0.1, beam_size=7))
    log_probs = random_log_probs(1, (2, 12, 4))
    fresh = CtcSearch(alphabet, CtcOptions(lm_weight=0.1, beam_size=7), language)
    for one, other in zip(searched(changed, log_probs, 3), searched(fresh, log_probs, 3), strict=True):
        assert_same(one, other, 0.0)
    with pytest.raises(InvalidArgumentError, match="keeps the language model"):
        search.with_settings(CtcOptions(), CtcLanguage(random_table(3)))


def test_start_states_must_be_states_of_the_table() -> None:
    search = CtcSearch(CtcAlphabet(("", " ", "a"), delimiter=1), language=CtcLanguage(table_of({"a": -1.0})))
    with pytest.raises(InvalidArgumentError, match="start_states"):
        search.begin(1, [1000])


@pytest.mark.parametrize(
    ("texts", "unique"),
    [
        ("a b c", True), ("a ab b", False), ("a ab", True), ("</s> <s> < a", True), ("<pad> <s> a b", True),
        ("car cart t", False), ("10 010 1", False), ("0 01 11", True), ("0 10 110", True), ("1 011 01110 1110", False),
    ],
)  # fmt: skip
def test_unique_decodability(texts: str, unique: bool) -> None:
    words = texts.split()
    assert is_uniquely_decodable(words) is unique
    found: Counter[str] = Counter()
    for length in range(1, 6):
        found.update("".join(sequence) for sequence in itertools.product(words, repeat=length))
    assert (max(found.values()) == 1) is unique
