from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.ngrams.estimate import EstimateSettings, estimate
from shallowfusion.ngrams.table import NgramTable, word_log_probs
from shallowfusion.ngrams.trie import OUTSIDE, ROOT, ByteTrie
from shallowfusion.ngrams.words import WordNgram

SENTENCES = ["the cat sat", "the cat ate the cake", "a cat", "it ate", "été"]
TABLE = NgramTable(estimate([line.split() for line in SENTENCES], EstimateSettings(order=3)).model)
PIECES = (*(bytes([byte]) for byte in b" abcehistkz"), b" the", b"at", b"e c", b"  ", "é".encode(), b"\xc3", None)
SPECIAL = len(PIECES) - 1


def run(words: WordNgram, tokens: list[int]) -> float:
    state, total = words.start(), 0.0
    for token in tokens:
        increments, _, state = words.step(state, [token])
        total += float(increments[0])
    return total + float(words.end(state)[0])


def ids(text: str) -> list[int]:
    return [PIECES.index(bytes([byte])) for byte in text.encode()]


def test_a_trie_knows_beginnings_and_words() -> None:
    trie = ByteTrie(["cat", "ca", "dog", "été"])
    node, found = np.array([ROOT]), []
    for byte in b"cats":
        node = trie.descend(node, np.array([byte]))
        found.append((int(node[0]) != OUTSIDE, int(trie.word(node)[0])))
    assert found == [(True, -1), (True, 1), (True, 0), (False, -1)]
    assert trie.descend(np.array([OUTSIDE]), np.array([99])).tolist() == [OUTSIDE]
    assert len(trie) == 1 + 3 + 3 + 5
    assert ByteTrie([]).descend(np.array([ROOT]), np.array([99])).tolist() == [OUTSIDE]


@settings(max_examples=100, deadline=None)
@given(st.sets(st.text("ab", min_size=1, max_size=5)), st.text("ab", max_size=6))
def test_a_trie_is_a_set_of_beginnings(words: set[str], text: str) -> None:
    given_words = sorted(words)
    trie = ByteTrie(given_words)
    nodes = np.array([ROOT])
    for letter in text:
        nodes = trie.descend(nodes, np.array([ord(letter)]))
    assert (nodes[0] != OUTSIDE) == (text == "" or any(word.startswith(text) for word in words))
    assert trie.word(nodes)[0] == (given_words.index(text) if text in words else -1)


def test_bad_words_are_refused() -> None:
    for words in (["a", ""], ["a", "a"]):
        with pytest.raises(InvalidArgumentError):
            ByteTrie(words)


def test_words_are_scored_where_a_space_completes_them() -> None:
    words = WordNgram(TABLE, PIECES)
    state, scores, counts = words.start(), [], []
    for token in ids(" the cat"):
        increments, completed, state = words.step(state, [token])
        scores.append(float(increments[0]))
        counts.append(int(completed[0]))
    assert counts == [0, 0, 0, 0, 1, 0, 0, 0]
    the, cat, end = word_log_probs(TABLE, ["the", "cat"]).astype(float)
    assert scores == pytest.approx([0, 0, 0, 0, the, 0, 0, 0])
    assert words.end(state)[0] == pytest.approx(cat + end)


def test_the_offset_is_charged_where_no_known_word_begins_so() -> None:
    words = WordNgram(TABLE, PIECES, unk_score_offset=-7.0)
    state, scores, known = words.start(), [], []
    for token in ids("tzz the"):
        increments, _, state = words.step(state, [token])
        scores.append(float(increments[0]))
        known.append(bool(state.is_known[0]))
    unknown = float(word_log_probs(TABLE, ["tzz"], end=False)[0])
    assert scores == pytest.approx([0, -7.0, 0, unknown, 0, 0, 0])  # the offset was paid before
    assert known == [True, False, False, True, True, True, True]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(range(len(PIECES))), max_size=14), st.booleans())
def test_increments_sum_to_the_score_of_the_words(tokens: list[int], is_open: bool) -> None:
    words = WordNgram(TABLE, PIECES, unk_score_offset=-3.0, open_vocabulary=is_open)
    said = [word.decode(errors="surrogateescape") for word in b"".join(PIECES[t] or b"" for t in tokens).split()]
    num_unknown = sum(word not in TABLE.model.words for word in said)
    wanted = float(word_log_probs(TABLE, said).astype(float).sum())
    if num_unknown:
        wanted += num_unknown * (-3.0 if is_open else -math.inf)
    assert run(words, tokens) == pytest.approx(wanted, abs=1e-4) or wanted == run(words, tokens) == -math.inf


def test_rows_are_independent_and_may_be_forked() -> None:
    words = WordNgram(TABLE, PIECES)
    rng = np.random.default_rng(0)
    state, histories, totals = words.start(1), [[]], np.zeros(1)
    for _ in range(12):
        parents = rng.integers(0, len(histories), 5)
        tokens = rng.integers(-1, len(PIECES), 5)
        increments, _, state = words.step(state.take(parents), tokens)
        totals = totals[parents] + increments
        histories = [histories[p] + ([t] if t >= 0 else []) for p, t in zip(parents, tokens.tolist(), strict=True)]
    alone = [run(words, history) for history in histories]
    np.testing.assert_allclose(totals + words.end(state), alone, rtol=1e-5)


def test_another_vocabulary_says_which_words_are_known() -> None:
    words = WordNgram(TABLE, PIECES, vocabulary=["zeb", "cat"], open_vocabulary=False)
    assert run(words, ids("the")) == -math.inf
    assert math.isfinite(run(words, ids("cat")))
    unknown, end = word_log_probs(TABLE, ["zeb"])
    assert run(words, ids("zeb")) == pytest.approx(float(unknown + end))  # allowed, though the model does not know it


def test_bad_arguments_are_refused() -> None:
    words = WordNgram(TABLE, PIECES)
    for tokens in ([len(PIECES)], [-2], [0, 1], ["a"]):
        with pytest.raises(InvalidArgumentError, match="tokens"):
            words.step(words.start(), tokens)
    with pytest.raises(InvalidArgumentError, match="unk_score_offset"):
        WordNgram(TABLE, PIECES, unk_score_offset=1.0)
