"""CTC prefix scores of both classes: published vector, enumeration of alignments, windows, border checks."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from shallowfusion import _native
from shallowfusion.ctc.prefix_scores import END, NOTHING, PrefixScores
from shallowfusion.ctc.prefix_scores_reference import ReferencePrefixScores
from shallowfusion.errors import InvalidArgumentError
from tests.ctc.conftest import libri, random_log_probs, shared_matrix
from tests.ctc.test_search import HTR_LABELS

VECTOR = np.log(np.array([[[0.5, 0.3, 0.2], [0.4, 0.5, 0.1], [0.6, 0.1, 0.3]]]))  # METHODS 1.8; blank, a, b

Make = Callable[..., Any]


@pytest.fixture(params=[PrefixScores, ReferencePrefixScores], ids=["native", "reference"])
def make(request: pytest.FixtureRequest) -> Make:
    return request.param


def log_psi(scores: Any, text: tuple[int, ...], utterance: int = 0, count: int = 1) -> tuple[float, float]:
    """log psi of a text as a beginning, and as the whole, from fresh scores; other utterances stay at nothing."""
    total = 0.0
    for label in text:
        labels = np.full((count, 1), NOTHING)
        labels[utterance] = label
        total += scores.scores(np.zeros((count, 1), dtype=int), labels)[utterance, 0]
        scores.follow(np.zeros((count, 1), dtype=int), labels)
    ends = np.full((count, 1), NOTHING)
    ends[utterance] = END
    return total, total + scores.scores(np.zeros((count, 1), dtype=int), ends)[utterance, 0]


def collapsed(alignment: tuple[int, ...], blank: int) -> tuple[int, ...]:
    return tuple(label for label, _ in itertools.groupby(alignment) if label != blank)


def enumerated(log_probs: np.ndarray, blank: int) -> dict[tuple[int, ...], float]:
    """Probability of every text, over all alignments."""
    found: dict[tuple[int, ...], float] = {}
    probs = np.exp(log_probs.astype(np.float64))
    for alignment in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        text = collapsed(alignment, blank)
        found[text] = found.get(text, 0.0) + float(np.prod(probs[np.arange(len(alignment)), alignment]))
    return found


def test_published_vector(make: Make) -> None:
    a, b = 1, 2
    beginnings = {(a,): 0.570, (b,): 0.310, (a, b): 0.186, (b, a): 0.115}
    wholes = {(a,): 0.372, (a, b): 0.183, (b,): 0.171, (): 0.120, (b, a): 0.085, (b, a, b): 0.030, (b, b): 0.024,
              (a, a): 0.012, (a, b, a): 0.003}  # fmt: skip
    for text in wholes:
        beginning, whole = log_psi(make(VECTOR), text)
        assert np.exp(whole) == pytest.approx(wholes[text], abs=1e-7)
        if text in beginnings:
            assert np.exp(beginning) == pytest.approx(beginnings[text], abs=1e-7)


@pytest.mark.parametrize("blank", [0, 1, 2])
def test_every_text_of_every_length_equals_enumeration(make: Make, blank: int) -> None:
    log_probs = random_log_probs(blank, (2, 5, 3))
    lengths = [5, 3]
    labels = [label for label in range(3) if label != blank]
    for utterance, length in enumerate(lengths):
        wanted = enumerated(log_probs[utterance, :length], blank)
        for size in range(5):
            for text in itertools.product(labels, repeat=size):
                scores = make(log_probs, lengths, blank=blank)
                beginning, whole = log_psi(scores, text, utterance, 2)
                starts = sum(p for other, p in wanted.items() if other[:size] == text)
                np.testing.assert_allclose(np.exp(beginning), starts, rtol=1e-6, atol=1e-12)
                np.testing.assert_allclose(np.exp(whole), wanted.get(text, 0.0), rtol=1e-6, atol=1e-12)


def test_scores_of_all_labels_and_the_end_sum_to_one(make: Make) -> None:
    log_probs = random_log_probs(3, (1, 30, 6))
    scores = make(log_probs, blank=5)
    for label in (0, 0, 3, 1):
        labels = np.array([[0, 1, 2, 3, 4, END]])
        assert np.exp(scores.scores(np.zeros_like(labels), labels)).sum() == pytest.approx(1.0, abs=1e-5)
        scores.follow([[0]], [[label]])


def random_walk(seed: int, makes: tuple[Make, ...], **options: Any) -> None:
    """The same random search through several objects; scores must agree at every step."""
    generator = np.random.default_rng(seed)
    utterances, frames, labels = 4, int(generator.integers(1, 40)), 7
    log_probs = random_log_probs(seed, (utterances, frames, labels), scale=float(generator.choice([1.0, 6.0])))
    log_probs[generator.random(log_probs.shape) < 0.05] = -np.inf
    lengths = generator.integers(0, frames + 1, size=utterances)
    blank = int(generator.integers(labels))
    if options.get("delimiter"):
        options["delimiter"] = (blank + int(generator.integers(1, labels))) % labels
    objects = [make(log_probs, lengths, blank=blank, **options) for make in makes]
    rows, choices = 1, [label for label in (END, NOTHING, *range(labels)) if label != blank]
    for _ in range(8):
        picked = generator.choice(choices, size=(utterances, 11))
        lanes = generator.integers(rows, size=(utterances, 11))
        lanes = np.where((picked == NOTHING) & (generator.random(picked.shape) < 0.5), -1, lanes)
        found = [each.scores(lanes, picked) for each in objects]
        assert (found[0][picked == NOTHING] == 0.0).all()
        for other in found[1:]:
            np.testing.assert_allclose(found[0], other, rtol=1e-9, atol=1e-7)
        tokens = generator.choice(choices, size=(utterances, 5))
        parents = generator.integers(rows, size=(utterances, 5))
        for each in objects:
            each.follow(parents, tokens)
        rows = 5
        if utterances > 1 and generator.random() < 0.3:
            order = generator.permutation(utterances)[:-1].tolist()
            for each in objects:
                each.keep(order)
            utterances -= 1


@pytest.mark.parametrize("seed", range(12))
def test_both_agree_on_random_searches(seed: int) -> None:
    random_walk(seed, (PrefixScores, ReferencePrefixScores))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("margin", [None, 9.0])
def test_both_agree_with_a_delimiter(seed: int, margin: float | None) -> None:
    random_walk(seed, (PrefixScores, ReferencePrefixScores), delimiter=True, margin=margin)


def words(text: tuple[int, ...], delimiter: int) -> tuple[int, ...]:
    """A text without the delimiters that part no words, but the last one after the last word."""
    plain: list[int] = []
    for label in text:
        if label != delimiter or (plain and plain[-1] != delimiter):
            plain.append(label)
    return tuple(plain)


@pytest.mark.parametrize(("blank", "delimiter"), [(0, 1), (3, 0), (1, 3)])
def test_words_of_every_length_equal_enumeration(make: Make, blank: int, delimiter: int) -> None:
    log_probs = random_log_probs(blank, (2, 6, 4))
    lengths = [6, 4]
    labels = [label for label in range(4) if label != blank]
    for utterance, length in enumerate(lengths):
        wanted: dict[tuple[int, ...], float] = {}
        for text, p in enumerated(log_probs[utterance, :length], blank).items():
            begun = tuple(itertools.dropwhile(lambda label: label == delimiter, text))
            wanted[begun] = wanted.get(begun, 0.0) + p
        for size in range(5):
            for text in itertools.product(labels, repeat=size):
                plain = words(text, delimiter)
                scores = make(log_probs, lengths, blank=blank, delimiter=delimiter)
                beginning, whole = log_psi(scores, text, utterance, 2)
                starts = sum(p for other, p in wanted.items() if other[: len(plain)] == plain)
                np.testing.assert_allclose(np.exp(beginning), starts, rtol=1e-6, atol=1e-12)
                said = plain[:-1] if plain[-1:] == (delimiter,) else plain
                ends = sum(
                    p
                    for other, p in wanted.items()
                    if other[: len(said)] == said and set(other[len(said) :]) <= {delimiter}
                )
                ends = ends if starts else 0.0  # what no alignment says has no end
                np.testing.assert_allclose(np.exp(whole), ends, rtol=1e-6, atol=1e-12)


def test_a_delimiter_between_words_alone_is_heard(make: Make) -> None:
    scores = make(random_log_probs(1, (1, 12, 4)), blank=0, delimiter=3)
    assert scores.scores([[0]], [[3]]).tolist() == [[0.0]]
    scores.follow([[0]], [[1]])
    assert scores.scores([[0]], [[3]])[0, 0] < 0
    scores.follow([[0]], [[3]])
    before = scores.scores([[0, 0]], [[3, 2]])
    assert before[0, 0] == 0.0
    scores.follow([[0]], [[3]])
    assert scores.scores([[0, 0]], [[3, 2]]).tolist() == before.tolist()


def test_threads_change_nothing() -> None:
    random_walk(5, (lambda *a, **o: PrefixScores(*a, **o, threads=1), lambda *a, **o: PrefixScores(*a, **o, threads=4)))


@pytest.mark.parametrize("margin", [5.0, 12.0, 60.0])
def test_a_margin_loses_at_most_what_it_says(make: Make, margin: float) -> None:
    log_probs = random_log_probs(7, (1, 60, 5), scale=3.0)
    texts = [(0, 1, 0, 2), (3, 3, 1), (2, 0, 1, 3, 0, 1, 2)]
    for text in texts:
        exact, windowed = make(log_probs, blank=4), make(log_probs, blank=4, margin=margin)
        psi, seen, sum_of_psi = 1.0, 1.0, 1.0
        for label in text:
            psi *= np.exp(exact.scores([[0]], [[label]])[0, 0])
            seen *= np.exp(windowed.scores([[0]], [[label]])[0, 0])
            assert psi * (1 + 1e-9) >= seen >= psi - 2 * np.exp(-margin) * sum_of_psi - 1e-12 * psi
            sum_of_psi += psi
            exact.follow([[0]], [[label]])
            windowed.follow([[0]], [[label]])


def test_both_have_the_same_window() -> None:
    log_probs = random_log_probs(8, (1, 80, 4), scale=4.0)
    native = PrefixScores(log_probs, blank=0, margin=8.0)
    reference = ReferencePrefixScores(log_probs, blank=0, margin=8.0)
    for label in (1, 2, 3, 3, 1, 2):
        rows, labels = [[0, 0, 0, 0]], [[1, 2, 3, END]]
        np.testing.assert_allclose(native.scores(rows, labels), reference.scores(rows, labels), rtol=1e-9, atol=1e-7)
        native.follow([[0]], [[label]])
        reference.follow([[0]], [[label]])


def test_a_window_takes_less_memory() -> None:
    log_probs = random_log_probs(8, (1, 1500, 4), scale=0.1)
    sizes = []
    for margin in (None, 20.0):
        scores = PrefixScores(log_probs, blank=0, margin=margin)
        for label in (1, 2, 3, 1):
            scores.follow([[0]], [[label]])
        sizes.append(scores.num_bytes)
    assert sizes[1] < sizes[0] - 5_000


def test_a_long_text_does_not_underflow() -> None:
    frames, labels = 2000, 5
    log_probs = random_log_probs(1, (1, frames, labels), scale=0.1)
    text = [1 + i % 4 for i in range(600)]
    total, whole = log_psi(PrefixScores(log_probs), tuple(text))
    assert -2000 < total < -500
    assert whole < total


def test_stored_emissions(make: Make) -> None:
    log_probs = libri()[None].astype(np.float32)
    labels = (" ", *"abcdefghijklmnopqrstuvwxyz", "'", "")
    text = "i have a good deal of will you remember"
    ids = tuple(labels.index(character) for character in text)
    total, _ = log_psi(make(log_probs, blank=28), ids)
    assert total > np.log(0.2)  # the beginning of the published answer
    worse, _ = log_psi(make(log_probs, blank=28), (*ids[:-1], labels.index("z")))
    assert worse < total - 3


def test_published_probability_of_the_handwriting_reference(make: Make) -> None:
    log_probs = shared_matrix("ctcdecoder_htr/line/rnnOutput.csv")[None].astype(np.float32)
    text = "the fake friend of the family, like the"
    _, whole = log_psi(make(log_probs, blank=79), tuple(HTR_LABELS.index(letter) for letter in text))
    assert np.exp(whole) == pytest.approx(6.31472642886565e-13, rel=1e-6)


def test_after_the_end_everything_is_impossible(make: Make) -> None:
    scores = make(VECTOR)
    scores.follow([[0, 0]], [[END, 1]])
    found = scores.scores([[0, 0, 1]], [[1, END, 2]])
    assert found[0, :2].tolist() == [-np.inf, -np.inf]
    assert np.isfinite(found[0, 2])


def test_an_utterance_without_frames_is_empty(make: Make) -> None:
    scores = make(np.zeros((1, 0, 3), dtype=np.float32))
    assert scores.scores([[0, 0]], [[1, END]]).tolist() == [[-np.inf, 0.0]]
    scores.follow([[0]], [[1]])
    assert scores.scores([[0]], [[END]]).tolist() == [[-np.inf]]


def test_float16_and_tensors_are_read(make: Make) -> None:
    import torch

    tensor = torch.tensor(VECTOR)
    half = make(tensor.half()).scores([[0]], [[1]])
    np.testing.assert_allclose(half, make(tensor).scores([[0]], [[1]]), atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"log_probs": np.zeros((2, 3))}, "shape"),
        ({"log_probs": np.full((1, 2, 3), np.nan)}, "log_softmax"),
        ({"log_probs": np.full((1, 2, 3), 2.0)}, "log_softmax"),
        ({"log_probs": VECTOR, "blank": 3}, "blank"),
        ({"log_probs": VECTOR, "blank": -1}, "blank"),
        ({"log_probs": VECTOR, "delimiter": 3}, "delimiter"),
        ({"log_probs": VECTOR, "delimiter": 0}, "differ"),
        ({"log_probs": VECTOR, "lengths": [4]}, "lengths"),
        ({"log_probs": VECTOR, "margin": 1.0}, "margin"),
        ({"log_probs": VECTOR, "margin": float("nan")}, "margin"),
    ],
)
def test_bad_frames_are_refused(make: Make, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make(**arguments)


@pytest.mark.parametrize(
    ("rows", "labels"),
    [([[1]], [[1]]), ([[-1]], [[1]]), ([[0]], [[3]]), ([[0]], [[-3]]), ([[0]], [[0]]), ([[0, 0]], [[1]]), ([0], [1])],
)
def test_bad_candidates_are_refused(make: Make, rows: list[Any], labels: list[Any]) -> None:
    scores = make(VECTOR)
    with pytest.raises(InvalidArgumentError):
        scores.scores(rows, labels)
    with pytest.raises(InvalidArgumentError):
        scores.follow(rows, labels)
    assert np.exp(scores.scores([[0]], [[1]]))[0, 0] == pytest.approx(0.57)


def test_a_row_must_continue_a_row_and_an_order_hold_places(make: Make) -> None:
    scores = make(VECTOR)
    with pytest.raises(InvalidArgumentError):
        scores.follow([[-1]], [[NOTHING]])
    for order in ([1], [0, 0], [-1]):
        with pytest.raises(InvalidArgumentError):
            scores.keep(order)


def test_the_binding_survives_random_arguments() -> None:
    generator = np.random.default_rng(0)
    scores = PrefixScores(random_log_probs(0, (2, 6, 4)), blank=0)
    done = 0
    for _ in range(400):
        shape = (int(generator.integers(1, 4)), int(generator.integers(0, 4)))
        rows = generator.integers(-2, 4, size=shape)
        labels = generator.integers(-4, 6, size=shape)
        try:
            if generator.random() < 0.5:
                scores.scores(rows, labels)
            elif shape[1]:
                scores.follow(rows, labels)
            done += 1
        except InvalidArgumentError:
            pass
    assert done > 3


def test_the_core_checks_its_own_border() -> None:
    fine = {
        "log_probs": random_log_probs(0, (2, 6, 4)),
        "counts": np.array([6, 3]),
        "blank": 0,
        "delimiter": -1,
        "cut": 0.0,
        "threads": 2,
    }
    changes = [
        {"log_probs": np.zeros((2, 6), dtype=np.float32)},
        {"log_probs": np.zeros((2, 6, 0), dtype=np.float32)},
        {"log_probs": np.full((2, 6, 4), np.nan, dtype=np.float32)},
        {"log_probs": np.full((2, 6, 4), np.inf, dtype=np.float32)},
        {"counts": np.array([6])},
        {"counts": np.array([[6, 3]])},
        {"counts": np.array([7, 3])},
        {"counts": np.array([-1, 3])},
        {"blank": 4},
        {"blank": -1},
        {"delimiter": 4},
        {"delimiter": -2},
        {"delimiter": 0},
        {"cut": 1.0},
        {"cut": -0.1},
        {"cut": float("nan")},
    ]
    for change in changes:
        with pytest.raises(InvalidArgumentError):
            _native.CtcPrefixScores(**{**fine, **change})
    for threads in (-5, 0, 300):
        scores = _native.CtcPrefixScores(**{**fine, "threads": threads})
        rows, labels = np.zeros((2, 1), dtype=np.int64), np.ones((2, 1), dtype=np.int64)
        assert np.isfinite(scores.scores(rows=rows, labels=labels)).all()
        for bad in (rows[0], rows[:1], np.zeros((2, 2), dtype=np.int64), np.full((2, 1), 2**62)):
            with pytest.raises(InvalidArgumentError):
                scores.scores(rows=bad, labels=labels)
        scores.keep(order=np.zeros(0, dtype=np.int64))
        assert scores.scores(rows=rows[:0], labels=labels[:0]).shape == (0, 1)


def test_threads_may_share_one_object() -> None:
    scores = PrefixScores(random_log_probs(0, (2, 200, 6)), blank=0)
    wanted = scores.scores([[0] * 5] * 2, [[1, 2, 3, 4, 5]] * 2)
    wrong: list[int] = []

    def work() -> None:
        for _ in range(200):
            if not np.array_equal(scores.scores([[0] * 5] * 2, [[1, 2, 3, 4, 5]] * 2), wanted):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
