"""CTC scores of tokens that are spelled in labels: against enumeration of alignments, and against the tokens' own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from shallowfusion.ctc.label_spelling import FRESH, LetterSpelling, PieceSpelling, TokenSpelling
from shallowfusion.ctc.prefix_scorer import CTCPrefixScorer, token_labels
from shallowfusion.ctc.prefix_scores import END as LAST
from shallowfusion.ctc.prefix_scores import PrefixScores
from shallowfusion.ctc.prefix_scores_reference import ReferencePrefixScores
from shallowfusion.ctc.settings import CtcAlphabet
from shallowfusion.ctc.spelled_scorer import SpelledPrefixScorer
from shallowfusion.text.vocabulary import Vocabulary
from tests import tiny
from tests.ctc.conftest import random_log_probs

Make = Callable[..., Any]
TOKENS: tuple[bytes | None, ...] = (None, None, b" a", b"ab", b" b", b"A", b"a.", b"...", b" ", b"ba b", b"7")
END, SPECIAL = 0, 1
ALPHABET = CtcAlphabet(("", "|", "A", "B"), 0, 1)
FORBIDDEN = 10


@pytest.fixture(params=[PrefixScores, ReferencePrefixScores], ids=["native", "reference"])
def make(request: pytest.FixtureRequest) -> Make:
    return request.param


def spelling() -> LetterSpelling:
    return LetterSpelling(Vocabulary(TOKENS, END, None, "toy"), ALPHABET, (), "forbid")


def scorer_of(make: Make, log_probs: np.ndarray, lengths: Any = None, weight: float = 1.0) -> SpelledPrefixScorer:
    scores = make(log_probs, lengths, blank=0, delimiter=1)
    return SpelledPrefixScorer(scores, spelling(), END, weight, np.zeros(len(log_probs), dtype=bool))


def text_probabilities(log_probs: np.ndarray) -> dict[str, float]:
    """Probability of every text, without the spaces before it, over all alignments."""
    found: dict[str, float] = {}
    probs = np.exp(log_probs.astype(np.float64))
    for alignment in itertools.product(range(probs.shape[1]), repeat=len(probs)):
        labels = [label for label, _ in itertools.groupby(alignment) if label]
        text = "".join(" " if label == 1 else ALPHABET.labels[label] for label in labels).lstrip()
        found[text] = found.get(text, 0.0) + float(np.prod(probs[np.arange(len(alignment)), alignment]))
    return found


def single_spaced(text: str) -> str:
    words = " ".join(text.split())
    return words + " " if words and text.endswith(" ") else words


def plain(tokens: tuple[int, ...]) -> str:
    text = b"".join(TOKENS[token] or b"" for token in tokens).decode().upper().replace(".", "")
    return single_spaced(text)


def test_every_text_of_tokens_equals_enumeration(make: Make) -> None:
    log_probs = random_log_probs(4, (2, 6, 4))
    lengths = [6, 4]
    wanted = [text_probabilities(log_probs[u, :length]) for u, length in enumerate(lengths)]
    said = list(range(2, FORBIDDEN))
    for tokens in itertools.product(said, repeat=2):
        scorer = scorer_of(make, log_probs, lengths)
        totals = np.zeros(2)
        for token in tokens:
            here = np.array([[token, END]] * 2)
            totals += scorer.increments(np.zeros((2, 2), dtype=int), here)[:, 0]
            scorer.follow(np.zeros((2, 1), dtype=int), np.full((2, 1), token))
        ends = scorer.increments(np.zeros((2, 1), dtype=int), np.full((2, 1), END))[:, 0]
        text = plain(tokens)
        for utterance, probabilities in enumerate(wanted):
            starts = sum(p for other, p in probabilities.items() if other.startswith(text))
            np.testing.assert_allclose(np.exp(totals[utterance]), starts, rtol=1e-6, atol=1e-12)
            words = text.rstrip() if starts else "nothing that is said"
            whole = sum(p for other, p in probabilities.items() if other.rstrip() == words)
            np.testing.assert_allclose(np.exp(totals[utterance] + ends[utterance]), whole, rtol=1e-6, atol=1e-12)


def test_what_adds_nothing_scores_nothing_and_what_cannot_be_said_is_impossible(make: Make) -> None:
    scorer = scorer_of(make, random_log_probs(0, (1, 8, 4)))
    tokens = np.array([[7, 8, SPECIAL, FORBIDDEN, -1, 2]])
    found = scorer.increments(np.array([[0, 0, 0, 0, -1, 0]]), tokens)[0]
    assert found[[0, 1, 2, 4]].tolist() == [0.0] * 4
    assert found[3] == -np.inf
    assert found[5] < 0
    scorer.follow(np.array([[0, 0, 0]]), np.array([[FORBIDDEN, 7, END]]))
    after = scorer.increments(np.array([[0, 1, 2]]), np.array([[2, 2, 2]]))[0]
    assert after.tolist() == [-np.inf, found[5], -np.inf]


class Cut:
    """A tokenizer of three words."""

    def __call__(self, word: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": {"t": [1], "th": [1, 2], "the": [3]}[word]}


def test_a_word_in_the_making_is_lent_its_score_and_gives_it_back(make: Make) -> None:
    log_probs = random_log_probs(2, (1, 12, 4))
    tokens = Vocabulary((None, b" t", b"h", b"e", b" t"), END, None, "toy")
    pieces = PieceSpelling(tokens, CtcAlphabet(("", "_t", "h", "_the"), 0, None, "_"), Cut())
    scorer = SpelledPrefixScorer(make(log_probs, blank=0), pieces, END, 1.0, np.zeros(1, dtype=bool))
    given, texts = 0.0, ((1, (1,)), (2, (1, 2)), (3, (3,)), (4, (3, 1)), (END, (3, 1, LAST)))
    for token, labels in texts:
        scores, wanted = make(log_probs, blank=0), 0.0
        for label in labels:
            wanted += scores.scores([[0]], [[label]])[0, 0]
            scores.follow([[0]], [[label]])
        given += scorer.increments(np.array([[0]]), np.array([[token]]))[0, 0]
        assert given == pytest.approx(wanted, abs=1e-9)
        scorer.follow(np.array([[0]]), np.array([[token]]))


def test_an_utterance_of_nan_says_nan_alone(make: Make) -> None:
    log_probs = random_log_probs(0, (3, 8, 4))
    log_probs[1] = -np.inf
    scores = make(log_probs, blank=0, delimiter=1)
    scorer = SpelledPrefixScorer(scores, spelling(), END, 1.0, np.array([False, True, False]))
    lanes, tokens = np.zeros((3, 2), dtype=int), np.full((3, 2), 2)
    assert np.isnan(scorer.increments(lanes, tokens)).tolist() == [[False] * 2, [True] * 2, [False] * 2]
    scorer.follow(lanes, tokens)
    scorer.keep([1, 2])
    assert np.isnan(scorer.increments(lanes[:2], tokens[:2])).tolist() == [[True] * 2, [False] * 2]


def walk(scorers: list[Any], tokens: list[int], seed: int, utterances: int) -> None:
    """The same random search through several scorers, exactly; some steps ask nothing before they follow."""
    generator = np.random.default_rng(seed)
    rows = 1
    for _ in range(7):
        picked = generator.choice(tokens, size=(utterances, 9))
        lanes = generator.integers(-1, rows, size=(utterances, 9))
        if generator.random() < 0.8:
            found = [scorer.increments(lanes, np.where(lanes < 0, -1, picked)) for scorer in scorers]
            for other in found[1:]:
                assert np.array_equal(found[0], other)
        chosen = generator.choice(tokens, size=(utterances, 4))
        parents = generator.integers(rows, size=(utterances, 4))
        for scorer in scorers:
            scorer.follow(parents, chosen)
        rows = 4
        if utterances > 1 and generator.random() < 0.4:
            order = generator.permutation(utterances)[:-1].tolist()
            for scorer in scorers:
                scorer.keep(order)
            utterances -= 1


@pytest.mark.parametrize("seed", range(8))
def test_tokens_that_are_labels_score_as_before_to_the_bit(make: Make, seed: int) -> None:
    vocabulary = tiny.vocabulary(tiny.ACOUSTIC_VOCAB)
    labels = token_labels(vocabulary, np.array([-1, *range(6)]))
    log_probs = random_log_probs(seed, (3, 20, 7))
    old = CTCPrefixScorer(make(log_probs, [20, 11, 1]), labels, 0.4)
    spelled = SpelledPrefixScorer(
        make(log_probs, [20, 11, 1]), TokenSpelling(labels.tolist()), tiny.END, 0.4, np.zeros(3, dtype=bool)
    )
    walk([old, spelled], [*range(8), tiny.END, tiny.START], seed, 3)


@pytest.mark.parametrize("seed", range(8))
def test_batches_change_no_bit(make: Make, seed: int) -> None:
    log_probs = random_log_probs(seed, (4, 16, 4))
    lengths = [16, 3, 9, 0]
    together = scorer_of(make, log_probs, lengths)
    alone = [scorer_of(make, log_probs[u : u + 1], lengths[u : u + 1]) for u in range(4)]
    generator = np.random.default_rng(seed)
    rows = 1
    for _ in range(6):
        tokens, lanes = generator.integers(len(TOKENS), size=(4, 7)), generator.integers(rows, size=(4, 7))
        found = together.increments(lanes, tokens)
        each = [own.increments(lanes[u : u + 1], tokens[u : u + 1]) for u, own in enumerate(alone)]
        assert np.array_equal(found, np.concatenate(each))
        together.follow(lanes[:, :3], tokens[:, :3])
        for u, own in enumerate(alone):
            own.follow(lanes[u : u + 1, :3], tokens[u : u + 1, :3])
        rows = 3


def test_long_tokens_score_as_their_letters_in_a_row(make: Make) -> None:
    log_probs = random_log_probs(9, (1, 30, 4))
    letters = spelling()
    for token in (3, 9):
        scorer, scores = scorer_of(make, log_probs), make(log_probs, blank=0, delimiter=1)
        wanted = 0.0
        for label in letters.spell(FRESH, token)[0]:
            wanted += scores.scores([[0]], [[label]])[0, 0]
            scores.follow([[0]], [[label]])
        assert scorer.increments(np.array([[0]]), np.array([[token]]))[0, 0] == wanted
