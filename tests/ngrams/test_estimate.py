from __future__ import annotations

import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.ngrams import units
from shallowfusion.ngrams.arpa import read_arpa, write_arpa
from shallowfusion.ngrams.estimate import FALLBACK_DISCOUNTS, EstimateSettings, estimate
from shallowfusion.ngrams.model import LOG_10, NgramModel
from shallowfusion.ngrams.perplexity import perplexity
from shallowfusion.ngrams.table import NgramTable, word_log_probs
from tests.ngrams.conftest import SHARED_DATA


def random_text(sentences: int = 400, words: int = 30, seed: int = 0) -> list[list[str]]:
    """Words of a Zipf distribution with some order among them, so that counts of counts are none of them 0."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(sentences):
        row, last = [], 0
        for _ in range(rng.integers(1, 12)):
            last = (last + int(rng.zipf(1.6))) % words if rng.random() < 0.5 else int(600 ** rng.random())
            row.append(f"w{last}")
        made.append(row)
    return made


def probabilities(model: NgramModel) -> dict[tuple[str, ...], tuple[float, float]]:
    """Probability and back-off weight of each n-gram."""
    found = {}
    for ngrams in model.orders:
        for ids, log_prob, back_off in zip(ngrams.words.tolist(), ngrams.log_probs, ngrams.back_offs, strict=True):
            found[tuple(model.words[i] for i in ids)] = (math.exp(log_prob), math.exp(back_off))
    return found


def test_a_bigram_worked_by_hand() -> None:
    # Lower counts: a after {<s>}, b after {a}, </s> after {b, a}, 4 in all. 4 words to share the rest: <unk> </s> a b.
    # Discounts 0.5 (seen once) and 1 (seen twice), as so small a text has no counts of counts.
    found = estimate([["a", "b"], ["a"]], EstimateSettings(order=2))
    assert found.discounts == (FALLBACK_DISCOUNTS, FALLBACK_DISCOUNTS)
    assert len(found.notes) == 2
    assert "order 1" in found.notes[0]
    assert "counts 1, 2, 3, 4" in found.notes[0]
    wanted = {
        ("<unk>",): (0.125, 1.0),
        ("a",): (0.5 / 4 + 0.5 * 0.25, 0.5),
        ("b",): (0.25, 0.5),
        ("</s>",): (1 / 4 + 0.5 * 0.25, 1.0),
        ("<s>", "a"): ((2 - 1) / 2 + 0.5 * 0.25, 1.0),
        ("a", "b"): (0.5 / 2 + 0.5 * 0.25, 1.0),
        ("a", "</s>"): (0.5 / 2 + 0.5 * 0.375, 1.0),
        ("b", "</s>"): (0.5 / 1 + 0.5 * 0.375, 1.0),
    }
    probs = probabilities(found.model)
    assert set(probs) == {*wanted, ("<s>",)}
    for ngram, numbers in wanted.items():
        assert probs[ngram] == pytest.approx(numbers, rel=1e-6)
    assert probs[("<s>",)][1] == pytest.approx(0.5)
    assert (found.num_sentences, found.num_words, found.num_unknown) == (2, 3, 0)


def slow_probability(text: list[list[str]], order: int):
    """p(w | h) by the textbook, from dictionaries of whole n-grams; and the discounts of each order."""
    said: list[Counter[tuple[str, ...]]] = [Counter() for _ in range(order + 1)]
    for sentence in text:
        padded = ["<s>", *sentence, "</s>"]
        for size in range(1, order + 1):
            said[size].update(tuple(padded[i : i + size]) for i in range(len(padded) - size + 1))
    counts: list[dict[tuple[str, ...], int]] = [{} for _ in range(order + 1)]
    for size in range(1, order + 1):
        before = Counter(ngram[1:] for ngram in said[size + 1]) if size < order else {}
        for ngram, count in said[size].items():
            counts[size][ngram] = count if size == order or ngram[0] == "<s>" else before[ngram]
    del counts[1][("<s>",)]
    discounts = [(0.0, 0.0, 0.0)]
    for size in range(1, order + 1):
        n = Counter(counts[size].values())
        ratio = n[1] / (n[1] + 2 * n[2])
        discounts.append(tuple(k - (k + 1) * ratio * n[k + 1] / n[k] for k in (1, 2, 3)))
    vocabulary = {ngram[0] for ngram in counts[1]} | {"<unk>"}
    after: list[dict[tuple[str, ...], list[tuple[str, int]]]] = [defaultdict(list) for _ in range(order + 1)]
    for size in range(1, order + 1):
        for ngram, count in counts[size].items():
            after[size][ngram[:-1]].append((ngram[-1], count))

    def probability(history: tuple[str, ...], word: str) -> float:
        size = len(history) + 1
        below = 1 / len(vocabulary) if size == 1 else probability(history[1:], word)
        followers = after[size].get(history)
        if not followers:
            return below
        taken = [discounts[size][min(count, 3) - 1] for _, count in followers]
        total = sum(count for _, count in followers)
        own = sum(count - cut for (v, count), cut in zip(followers, taken, strict=True) if v == word)
        return own / total + sum(taken) / total * below

    return probability, discounts[1:]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_equal_those_of_the_textbook(order: int) -> None:
    text = random_text()
    found = estimate(text, EstimateSettings(order=order))
    probability, discounts = slow_probability(text, order)
    assert not found.notes
    np.testing.assert_allclose(found.discounts, discounts, rtol=1e-12)
    table = NgramTable(found.model)
    for sentence in [*text[:40], ["w1", "neverheardof", "w2"], []]:
        history = ("<s>",)
        for word, log_prob in zip([*sentence, "</s>"], word_log_probs(table, sentence), strict=True):
            known = word if found.model.id_of(word) != found.model.unknown_word else "<unk>"
            context = history[max(0, len(history) - order + 1) :] if order > 1 else ()
            assert math.exp(log_prob) == pytest.approx(probability(context, known), rel=1e-5)
            history = (*history, known)


SETTINGS = [
    EstimateSettings(order=1),
    EstimateSettings(order=3),
    EstimateSettings(order=4, prune=(0, 0, 1)),
    EstimateSettings(order=3, prune=(0, 1, 2)),
    EstimateSettings(order=3, vocab_limit=10),
    EstimateSettings(order=5, vocab_limit=12, prune=(0, 1)),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("sentences", [1, 3, 400])
def test_every_context_sums_to_one(settings: EstimateSettings, sentences: int, tmp_path: Path) -> None:
    write_arpa(estimate(random_text(sentences), settings).model, tmp_path / "lm.arpa")
    table = NgramTable.from_arpa(tmp_path / "lm.arpa")  # as it is after a round through the file
    states = np.arange(table.native.num_states)
    probs = np.exp(table.dense(states).astype(np.float64))
    probs[:, table.model.begin_word] = 0.0
    assert np.abs(probs.sum(axis=1) - 1.0).max() < 1e-6


def test_pruning_leaves_out_rare_ngrams_and_keeps_their_contexts() -> None:
    text = random_text()
    said = Counter(tuple(s[i : i + 3]) for s in (["<s>", *row, "</s>"] for row in text) for i in range(len(s) - 2))
    pruned = probabilities(estimate(text, EstimateSettings(order=3, prune=(0, 0, 1))).model)
    whole = probabilities(estimate(text, EstimateSettings(order=3)).model)
    kept = {ngram for ngram in pruned if len(ngram) == 3}
    assert kept == {ngram for ngram, count in said.items() if count > 1}
    assert {ngram for ngram in pruned if len(ngram) < 3} == {ngram for ngram in whole if len(ngram) < 3}
    for ngram in kept:
        assert pruned[ngram][0] >= whole[ngram][0] * (1 - 1e-6)  # the pruned share comes back through shorter n-grams


def test_a_limited_vocabulary_counts_the_rest_as_unknown() -> None:
    text = [["a", "b", "a", "c"], ["a", "b"]]
    found = estimate(text, EstimateSettings(order=2, vocab_limit=2))
    assert found.model.words == ("<unk>", "<s>", "</s>", "a", "b")
    assert found.num_unknown == 1
    assert ("a", "<unk>") in probabilities(found.model)


def test_a_given_vocabulary_gets_unigrams_for_unseen_words() -> None:
    found = estimate([["a", "b", "z"]], EstimateSettings(order=2), vocabulary=("a", "b", "c", "d"))
    assert found.model.words == ("<unk>", "<s>", "</s>", "a", "b", "c", "d")
    assert found.num_unknown == 1
    probs = probabilities(found.model)
    assert probs[("c",)][0] == probs[("d",)][0] > 0


def test_sentences_shorter_than_the_order_make_a_lower_order() -> None:
    assert estimate([["a"], ["b"]], EstimateSettings(order=6)).model.order == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [([], "no words"), ([[], []], "no words"), ([["a"], ["b", "<s>"]], "sentence 2"), ([["</s>"]], "sentence 1")],
)
def test_bad_texts_are_refused(text: list[list[str]], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        estimate(text)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"order": 0}, "order must be"),
        ({"prune": (1,)}, "prune must be"),
        ({"prune": (0, 2, 1)}, "prune must be"),
        ({"prune": (0, 0, 0, 1)}, "prune must be"),
        ({"vocab_limit": 0}, "vocab_limit must be"),
    ],
)
def test_bad_settings_are_refused(names: dict, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        EstimateSettings(**names)


def test_kenlm_gives_our_file_the_same_scores(tmp_path: Path) -> None:
    kenlm = pytest.importorskip("kenlm")
    text = random_text()
    write_arpa(estimate(text, EstimateSettings(order=4, prune=(0, 0, 1))).model, tmp_path / "lm.arpa")
    theirs, table = kenlm.Model(str(tmp_path / "lm.arpa")), NgramTable.from_arpa(tmp_path / "lm.arpa")
    for sentence in [*random_text(50, words=40, seed=1)]:
        wanted = [score for score, _, _ in theirs.full_scores(" ".join(sentence))]
        np.testing.assert_allclose(word_log_probs(table, sentence) / LOG_10, wanted, atol=2e-5)


def test_perplexity_is_that_of_its_definition() -> None:
    table = NgramTable(estimate(random_text(), EstimateSettings(order=3)).model)
    held_out = [["w1", "w2"], ["w3", "neverheardof", "w4"], [], ["w0"]]
    scores = [word_log_probs(table, sentence).astype(float) for sentence in held_out if sentence]
    found = perplexity(table, held_out)
    assert (found.num_words, found.num_unknown) == (9, 1)
    assert found.value == pytest.approx(math.exp(-sum(s.sum() for s in scores) / 9))
    known = sum(s.sum() for s in scores) - scores[1][1]
    assert found.of_known == pytest.approx(math.exp(-known / 8))
    with pytest.raises(InvalidArgumentError, match="no words"):
        perplexity(table, [[]])


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the shared texts are not here")
def test_perplexities_of_real_texts_are_sane(tmp_path: Path) -> None:
    def lines(name: str) -> list[list[str]]:
        return list(units.words().split(units.read_lines([SHARED_DATA / "text" / f"{name}.txt.gz"], lower=True)))

    books, held_out, medical = (lines(n) for n in ("gen_gutenberg_train", "gen_gutenberg_test", "med_pubmed_valid"))
    by_order = [estimate(books, EstimateSettings(order=order)) for order in (1, 2, 3)]
    assert not any(found.notes for found in by_order)
    tables = [NgramTable(found.model) for found in by_order]
    ours = [perplexity(table, held_out).of_known for table in tables]
    assert ours[0] > 1.8 * ours[1] > 1.8 * ours[2]
    assert perplexity(tables[2], books).value < 0.15 * ours[2]  # a text it has seen
    assert perplexity(tables[2], medical).value > 3 * ours[2]  # another domain
    write_arpa(by_order[2].model, tmp_path / "books.arpa.gz")
    again = perplexity(NgramTable(read_arpa(tmp_path / "books.arpa.gz")), held_out)
    assert again.of_known == pytest.approx(ours[2], rel=1e-6)
