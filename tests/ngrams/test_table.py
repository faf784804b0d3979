from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.ngrams.model import LOG_10, NgramModel, NgramOrder
from shallowfusion.ngrams.table import NgramTable, word_log_probs
from shallowfusion.ngrams.table_reference import ReferenceNgramTable
from tests.ngrams.conftest import ARPA_FILES, SHARED_DATA, shared_model

NUM_WORDS = 6  # <s>, </s>, <unk> and three words


def make_model(orders: list[dict[tuple[int, ...], tuple[float, float]]], num_words: int = NUM_WORDS) -> NgramModel:
    made = []
    for order, ngrams in enumerate(orders, start=1):
        made.append(
            NgramOrder(
                np.array(list(ngrams), dtype=np.int32).reshape(-1, order),
                np.array([log_prob for log_prob, _ in ngrams.values()], dtype=np.float32),
                np.array([back_off for _, back_off in ngrams.values()], dtype=np.float32),
            )
        )
    return NgramModel(("<s>", "</s>", "<unk>", *"abc")[:num_words], tuple(made), 0, 1, 2)


def unigrams() -> dict[tuple[int, ...], tuple[float, float]]:
    return {(word,): (-1.0 - word, -0.1 * word) for word in range(NUM_WORDS)}


@st.composite
def models(draw: st.DrawFn) -> NgramModel:
    """Any order up to 5, any n-grams: suffixes and contexts may be missing, back-offs may be 0."""
    number = st.floats(-8.0, 0.0, width=32)
    back_off = st.one_of(st.just(0.0), st.floats(-4.0, 1.0, width=32))
    orders = [{(word,): (draw(number), draw(back_off)) for word in range(NUM_WORDS)}]
    for order in range(2, draw(st.integers(1, 5)) + 1):
        words = st.tuples(*[st.integers(0, NUM_WORDS - 1)] * order)
        orders.append(draw(st.dictionaries(words, st.tuples(number, back_off), min_size=1, max_size=12)))
    return make_model(orders)


def test_the_longest_ngram_wins_and_contexts_left_pay_their_back_off(table_class: type) -> None:
    bigrams = {(3, 4): (-0.5, -0.25), (4, 5): (-0.75, -0.125)}
    table = table_class(make_model([unigrams(), bigrams, {(3, 4, 5): (-0.0625, 0.0)}]))
    found, state = table.score([table.null_state], [3])
    assert found.tolist() == [-4.0]
    found, state = table.score(state, [4])
    assert found.tolist() == [-0.5]
    trigram, _ = table.score(state, [5])
    assert trigram.tolist() == [-0.0625]
    backed_off, after = table.score(state, [3])  # from a-b over b to nothing
    np.testing.assert_allclose(backed_off, [-0.25 - 0.4 - 4.0], rtol=1e-6)
    again, _ = table.score(after, [4])
    assert again.tolist() == [-0.5]
    np.testing.assert_allclose(table.end(state), [-0.25 - 0.4 - 2.0], rtol=1e-6)
    assert found.dtype == np.float32
    assert state.dtype == np.int64


def test_a_context_that_is_no_ngram_itself_is_kept_in_the_state(table_class: type) -> None:
    table = table_class(make_model([unigrams(), {}, {(3, 4, 5): (-0.5, 0.0)}]))
    _, state = table.score([table.null_state], [3])
    log_prob, state = table.score(state, [4])
    np.testing.assert_allclose(log_prob, [-0.3 - 5.0], rtol=1e-6)
    assert table.score(state, [5])[0].tolist() == [-0.5]


def test_states_that_cannot_be_told_apart_are_equal() -> None:
    flat = {(word,): (-1.0, 0.0) for word in range(NUM_WORDS)}
    table = NgramTable(make_model([flat, {(3, 4): (-0.5, 0.0), (4, 5): (-0.5, 0.0)}, {(3, 4, 5): (-0.1, 0.0)}]))
    _, after_b = table.score([table.null_state], [4])
    _, after_ab = table.score(table.score([table.null_state], [3])[1], [4])
    _, after_cb = table.score(table.score([table.null_state], [5])[1], [4])
    _, after_c = table.score([table.null_state], [5])
    assert after_cb.tolist() == after_b.tolist()
    assert after_ab.tolist() != after_b.tolist()
    assert after_c.tolist() == [table.null_state]  # nothing starts with c, and its back-off is 0


@settings(max_examples=150, deadline=None)
@given(models(), st.lists(st.integers(0, NUM_WORDS - 1), max_size=12), st.booleans())
def test_native_equals_reference(model: NgramModel, history: list[int], from_start: bool) -> None:
    tables = [NgramTable(model), ReferenceNgramTable(model)]
    states = [[table.start_state if from_start else table.null_state] for table in tables]
    for word in history:
        np.testing.assert_allclose(tables[0].dense(states[0]), tables[1].dense(states[1]), atol=1e-5)
        scored = [table.score(state, [word]) for table, state in zip(tables, states, strict=True)]
        np.testing.assert_allclose(scored[0][0], scored[1][0], atol=1e-5)
        states = [list(after) for _, after in scored]
    np.testing.assert_allclose(tables[0].end(states[0]), tables[1].end(states[1]), atol=1e-5)


@pytest.mark.parametrize("name", ARPA_FILES)
def test_dense_holds_every_score(name: str) -> None:
    table = NgramTable(shared_model(name))
    states = [table.start_state, table.null_state]
    rng = np.random.default_rng(0)
    for ngrams in table.model.orders[1:]:  # histories the model knows
        for words in ngrams.words[rng.integers(0, len(ngrams), 2)]:
            state = table.null_state
            for word in words:
                state = int(table.score([state], [word])[1][0])
            states.append(state)
    words = rng.integers(0, len(table.model.words), 200)
    words[0] = table.model.end_word
    dense = table.dense(states)
    assert dense.shape == (len(states), len(table.model.words))
    for row, state in zip(dense, states, strict=True):
        assert row[words].tolist() == table.score([state] * len(words), words)[0].tolist()
    assert dense[:, table.model.end_word].tolist() == table.end(states).tolist()


@pytest.mark.parametrize("name", ARPA_FILES)
@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("end", [True, False])
def test_scores_equal_kenlm_on_random_histories(name: str, begin: bool, end: bool) -> None:
    kenlm, model = pytest.importorskip("kenlm"), shared_model(name)
    theirs = kenlm.Model(str(SHARED_DATA / name))
    table = NgramTable(model)
    rng = np.random.default_rng([begin, end])
    known = [word for word in model.words if word not in ("<s>", "</s>", "<UNK>")]
    for _ in range(60):
        if rng.random() < 0.7 and model.order > 1:  # n-grams of the model, one after the other
            orders = [model.orders[rng.integers(1, model.order)] for _ in range(3)]
            ids = np.concatenate([ngrams.words[rng.integers(len(ngrams))] for ngrams in orders])
            words = [model.words[i] for i in ids if model.words[i] in known]
        else:
            words = rng.choice(known, rng.integers(0, 8)).tolist()
        words = [word if rng.random() < 0.9 else "neverheardof" for word in words]
        wanted = [score for score, _, _ in theirs.full_scores(" ".join(words), bos=begin, eos=end)]
        found = word_log_probs(table, words, begin, end) / LOG_10
        np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-5)


def test_published_scores_of_parlance() -> None:
    table = NgramTable(shared_model("ctc/parlance/test.arpa"))
    found = word_log_probs(table, ["looking", "on", "a", "little"], end=False) / LOG_10
    np.testing.assert_allclose(found, [-0.484652, -0.348837, -0.0155266, -0.00306122], atol=2e-6)


def test_published_scores_of_flashlight() -> None:
    table = NgramTable(shared_model("ctc/flashlight/lm.arpa.gz"))
    words = ["the", "cat", "sat", "on", "the", "mat"]
    found = word_log_probs(table, words, end=False) / LOG_10
    np.testing.assert_allclose(found, [-1.05971, -4.19448, -3.33383, -2.76726, -1.16237, -4.64589], atol=1e-5)
    total = word_log_probs(table, words).astype(float).sum() / LOG_10
    assert total == pytest.approx(-19.5123, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "text", "total"),
    [
        ("ctc/torchaudio_toy/kenlm.arpa", "a b a", -1.98554),
        ("lm/an4/an4_full.trigram.arpa", "enter nine one six nine", -12.0219),
        ("lm/an4/an4_full.bigram.arpa", "enter nine one six nine", -11.5467),
    ],
)
def test_published_totals(table_class: type, name: str, text: str, total: float) -> None:
    found = word_log_probs(table_class(shared_model(name)), text.split()).astype(float).sum() / LOG_10
    assert found == pytest.approx(total, abs=1e-4)


def test_bad_states_and_words_are_refused(table_class: type) -> None:
    table = table_class(make_model([unigrams(), {(3, 4): (-0.5, 0.0)}]))
    for states, words in ([[-1], [0]], [[10**6], [0]], [[0], [-1]], [[0], [NUM_WORDS]], [[0, 0], [1]], [[[0]], [[1]]]):
        with pytest.raises(InvalidArgumentError):
            table.score(states, words)
    for method in (table.end, table.dense):
        for states in ([-1], [10**6], [[0]], ["a"], [0.5], 3):
            with pytest.raises(InvalidArgumentError):
                method(states)
    assert table.dense([]).shape == (0, NUM_WORDS)
    assert [part.shape for part in table.score([], [])] == [(0,), (0,)]


def broken(order: int, **changes: object) -> NgramModel:
    """A good bigram model in which one array is another."""
    model = make_model([unigrams(), {(3, 4): (-0.5, 0.0), (4, 4): (-0.5, 0.0)}])
    parts = {
        name: changes.get(name, getattr(model.orders[order - 1], name)) for name in ("words", "log_probs", "back_offs")
    }
    orders = [NgramOrder(**parts) if k == order - 1 else model.orders[k] for k in range(2)]
    return NgramModel(model.words, tuple(orders), 0, 1, 2)


NAN = np.array([-1.0, np.nan], dtype=np.float32)
INFINITE = np.array([-1.0, np.inf], dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": 2, "words": np.array([[3, 4], [3, 4]], dtype=np.int32)}, "given twice"),
        ({"order": 2, "words": np.array([[3, 4], [3, 6]], dtype=np.int32)}, "from 0 to 5"),
        ({"order": 2, "words": np.array([[3, 4], [-1, 4]], dtype=np.int32)}, "from 0 to 5"),
        ({"order": 2, "log_probs": NAN}, "NaN"),
        ({"order": 2, "log_probs": INFINITE}, "inf"),
        ({"order": 1, "words": np.zeros((NUM_WORDS, 1), dtype=np.int32)}, "given twice|one unigram"),
    ],
)
def test_bad_models_are_refused(table_class: type, changes: dict, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        table_class(broken(**changes))


@pytest.mark.parametrize("change", [{"words": np.zeros((2, 3), dtype=np.int32)}, {"log_probs": NAN[:1]}])
def test_arrays_of_the_wrong_shape_are_refused(change: dict) -> None:
    with pytest.raises(InvalidArgumentError, match="order 2"):
        broken(2, **change)


def test_a_high_order_is_no_trouble(table_class: type) -> None:
    orders = [unigrams(), *({tuple([3] * order): (-1.0 / order, -0.5)} for order in range(2, 13))]
    table = table_class(make_model(orders))
    state, found = [table.null_state], []
    for _ in range(15):
        log_prob, state = table.score(state, [3])
        found.append(float(log_prob[0]))
    np.testing.assert_allclose(found, [-4.0, *(-1.0 / order for order in range(2, 13)), *[-1.0 / 12] * 3], rtol=1e-6)
    backed_off = -0.5 * 10 - 0.3 - 5.0
    np.testing.assert_allclose(table.score(state, [4])[0], [backed_off], rtol=1e-6)


def test_threads_share_a_table() -> None:
    table = NgramTable(shared_model("lm/an4/an4_full.trigram.arpa"))
    rng = np.random.default_rng(0)
    words = rng.integers(0, len(table.model.words), (200, 8))

    def totals() -> np.ndarray:
        states, total = np.full(200, table.start_state), np.zeros(200)
        for column in words.T:
            scores, states = table.score(states, column)
            total += scores + table.end(states)
        return total

    wanted, found = totals(), [np.zeros(0)] * 4

    def run(place: int) -> None:
        found[place] = totals()

    threads = [threading.Thread(target=run, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in found:
        assert result.tolist() == wanted.tolist()


def test_a_table_outlives_the_arrays_it_was_built_from() -> None:
    model = make_model([unigrams(), {(3, 4): (-0.5, 0.0)}])
    native = NgramTable(model).native
    del model
    gc.collect()
    assert native.score(states=np.array([1 + 3]), words=np.array([4]))[0].tolist() == [-0.5]
