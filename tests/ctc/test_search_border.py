"""What the border of the CTC search refuses and understands; batches, chunks, threads."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion.ctc.search import CtcSearch
from shallowfusion.ctc.search_reference import ReferenceCtcSearch
from shallowfusion.ctc.settings import CtcAlphabet, CtcOptions
from shallowfusion.errors import AcousticScoresError, InvalidArgumentError, VocabularyError
from tests.ctc.conftest import assert_chunks_give_the_same, assert_same, libri, random_log_probs, searched

LETTERS = CtcAlphabet(tuple("_abcde"))
WORDS = CtcAlphabet(("_", " ", *"abcd"), delimiter=1)


def spoiled(kind: str) -> np.ndarray:
    """Three utterances, the second one bad."""
    log_probs = random_log_probs(0, (3, 8, 6))
    if kind == "nan":
        log_probs[1, 5, 2] = math.nan
    elif kind == "infinite":
        log_probs[1, 0, 2] = math.inf
    elif kind == "impossible":
        log_probs[1, 3] = -math.inf
    elif kind == "probabilities":
        log_probs[1] = np.exp(log_probs[1])
    elif kind == "logits":
        log_probs[1] = log_probs[1] * 3 + 4
    elif kind == "unnormalised":
        log_probs[1] = np.minimum(log_probs[1] + 1.5, 0)
    return log_probs


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nan", "utterance 1 .* frame 5, label 2 is NaN"),
        ("infinite", "utterance 1 .* frame 0, label 2 is inf"),
        ("impossible", "utterance 1 .* frame 3 makes every label impossible"),
        ("probabilities", "utterance 1 .* log_softmax"),
        ("logits", "utterance 1 .* log_softmax"),
        ("unnormalised", "utterance 1 .* sum to .* log_softmax"),
        ("empty", "utterance 1 .* no frames"),
    ],
)
def test_a_bad_utterance_fails_alone(any_search_class: type, kind: str, words: str) -> None:
    search = any_search_class(LETTERS)
    results = searched(search, spoiled(kind), 4, [8, 0 if kind == "empty" else 8, 8])
    assert isinstance(results[1].error, AcousticScoresError)
    with pytest.raises(AcousticScoresError, match=words):
        _ = results[1].best
    assert results[1].hypotheses == ()
    for number in (0, 2):
        assert_same(results[number], searched(search, random_log_probs(0, (3, 8, 6))[number][None], 4)[0])


def test_a_failed_utterance_stays_failed_while_others_go_on(any_search_class: type) -> None:
    search = any_search_class(LETTERS)
    state = search.begin(3)
    search.step(state, spoiled("nan"))
    search.step(state, random_log_probs(1, (3, 4, 6)))
    assert state.num_frames == [12, 5, 12]
    assert [result.error is None for result in search.end(state)] == [True, False, True]


@pytest.mark.parametrize("weights", [{"length_bonus": 800.0}, {"word_bonus": 1e300}])
def test_weights_past_the_range_of_float64_are_said(weights: dict[str, Any]) -> None:
    search = CtcSearch(WORDS, CtcOptions(**weights))
    state = search.begin(2)
    for _ in range(3):
        search.step(state, random_log_probs(2, (2, 8, 6)))
        search.set_extras(state, [[0.0] * len(own) for own in search.live(state)])
    for result in search.end(state):
        with pytest.raises(AcousticScoresError, match="past the range of float64; make weights"):
            _ = result.best


BAD_ARRAYS: list[Any] = [
    np.zeros((2, 3)),
    np.zeros((2, 3, 5)),
    np.zeros((2, 3, 7)),
    np.zeros((1, 3, 6)),
    np.zeros((3, 3, 6)),
    np.zeros((2, 3, 6), np.complex64),
    np.zeros((2, 3, 6), bool),
    torch.zeros(2, 3, 7),
    [[0.0], [0.0, 1.0]],
    "scores",
    None,
    object(),
]


@pytest.mark.parametrize("bad", BAD_ARRAYS, ids=lambda bad: f"{type(bad).__name__}{getattr(bad, 'shape', '')}")
def test_bad_arrays_are_refused_and_change_nothing(any_search_class: type, bad: Any) -> None:
    search = any_search_class(LETTERS)
    state = search.begin(2)
    with pytest.raises(InvalidArgumentError, match="log_probs"):
        search.step(state, bad)
    assert state.num_frames == [0, 0]


@pytest.mark.parametrize("lengths", [[3], [3, 4], [-1, 3], [3, 2.5], "33", [[3, 3]], [3, 2**70]])
def test_bad_lengths_are_refused(any_search_class: type, lengths: Any) -> None:
    search = any_search_class(LETTERS)
    state = search.begin(2)
    with pytest.raises(InvalidArgumentError, match="lengths"):
        search.step(state, np.full((2, 3, 6), -2.0), lengths)


@pytest.mark.parametrize("blank", [-1, 6, 2**40, 1.5, None])
def test_blank_must_be_a_label(blank: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="blank"):
        CtcAlphabet(tuple("_abcde"), blank=blank)


def test_bad_alphabets_are_refused() -> None:
    for arguments in ({"labels": ()}, {"delimiter": 0}, {"delimiter": 6}, {"word_start": ""}):
        with pytest.raises(InvalidArgumentError):
            CtcAlphabet(**{"labels": tuple("_abcde"), **arguments})
    for label in ("\ud800", 3, b"a"):
        with pytest.raises(VocabularyError):
            CtcAlphabet(("_", label))


BAD_OPTIONS = [
    ("beam_size", 0), ("beam_size", 2.5), ("beam_size", 10**7), ("merge", "sum"), ("lm_weight", math.nan),
    ("lm_weight", "1"), ("word_bonus", math.inf), ("length_bonus", None), ("top_labels", 0), ("beam_margin", -1),
    ("beam_margin", math.nan), ("blank_skip", 0), ("blank_skip", 1.5), ("token_min_log_prob", math.nan),
    ("places", "rows"), ("history_words", -1), ("hotwords", 3), ("hotwords", (3,)), ("hotwords", ("a", " ")),
    ("hotwords", {"a": math.nan}), ("hotwords", {"a": "4"}), ("hotwords", {3: 4.0}),
    ("hotword_weight", math.inf), ("hotword_form", "texts"),
    ("hotwords_inside_words", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS)
def test_bad_options_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=name):
        CtcOptions(**{name: value})


def test_options_of_words_need_words(search_class: type) -> None:
    for options in (CtcOptions(word_bonus=1.0), CtcOptions(hotwords=("ab",), hotword_form="words")):
        with pytest.raises(InvalidArgumentError, match="delimiter"):
            search_class(LETTERS, options)


def test_bad_counts_are_refused(any_search_class: type) -> None:
    search = any_search_class(LETTERS)
    for bad in (-1, 1.5, None, 10**9):
        with pytest.raises(InvalidArgumentError):
            search.begin(bad)
    for states in ([0], [0, -1], [0, 2**33], [0.5, 1]):
        with pytest.raises(InvalidArgumentError):
            search.begin(2, states)
    for n_best in (0, -3, 2.5, "4"):
        with pytest.raises(InvalidArgumentError):
            search.end(search.begin(1), n_best)


def layouts(log_probs: np.ndarray) -> dict[str, Any]:
    turned = np.ascontiguousarray(log_probs.transpose(2, 0, 1)).transpose(1, 2, 0)
    apart = np.zeros((*log_probs.shape[:2], 2 * log_probs.shape[2]), log_probs.dtype)
    apart[..., ::2] = log_probs
    return {
        "fortran": np.asfortranarray(log_probs),
        "turned": turned,
        "apart": apart[..., ::2],
        "backwards": np.ascontiguousarray(log_probs[::-1, ::-1, ::-1])[::-1, ::-1, ::-1],
        "double": log_probs.astype(np.float64),
        "torch": torch.from_numpy(log_probs),
        "torch turned": torch.from_numpy(log_probs).permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "big endian": log_probs.astype(">f4"),
    }


def test_any_layout_is_understood(any_search_class: type) -> None:
    log_probs = random_log_probs(5, (2, 7, 6))
    search = any_search_class(WORDS)
    expected = searched(search, log_probs, 3)
    for layout in layouts(log_probs).values():
        for one, other in zip(searched(search, layout, 3), expected, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("dtype", [np.float16, torch.float16, torch.bfloat16])
def test_half_scores_equal_their_float32_values(any_search_class: type, dtype: Any) -> None:
    log_probs = random_log_probs(6, (2, 7, 6))
    half = torch.from_numpy(log_probs).to(dtype) if isinstance(dtype, torch.dtype) else log_probs.astype(dtype)
    full = half.float().numpy() if isinstance(half, torch.Tensor) else half.astype(np.float32)
    search = any_search_class(WORDS)
    for one, other in zip(searched(search, half, 3), searched(search, full, 3), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, torch.int32])
def test_whole_numbers_equal_their_float32_values(any_search_class: type, dtype: Any) -> None:
    log_probs = np.round(random_log_probs(6, (2, 7, 6), scale=9.0)).clip(-100, 0)
    log_probs[:, 0] = -2.0
    whole = torch.from_numpy(log_probs).to(dtype) if isinstance(dtype, torch.dtype) else log_probs.astype(dtype)
    search = any_search_class(WORDS)
    for one, other in zip(searched(search, whole, 3), searched(search, log_probs, 3), strict=True):
        assert one.error is None
        assert_same(one, other)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_gives_what_each_utterance_gives(threads: int) -> None:
    log_probs = random_log_probs(7, (9, 40, 6))
    lengths = [40, 1, 17, 40, 3, 22, 39, 8, 40]
    search = CtcSearch(WORDS, CtcOptions(beam_size=12, word_bonus=0.5), threads=threads)
    together = searched(search, log_probs, 5, lengths)
    for own, length, result in zip(log_probs, lengths, together, strict=True):
        assert_same(searched(search, own[None, :length], 5)[0], result, 0.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 7), max_size=9), st.booleans())
def test_chunks_of_any_size_give_the_same(seed: int, sizes: list[int], native: bool) -> None:
    options = CtcOptions(
        beam_size=6, places="paths" if seed % 2 else "prefixes", merge="max" if seed % 3 else "logsumexp"
    )
    search = (CtcSearch if native else ReferenceCtcSearch)(WORDS, options)
    assert_chunks_give_the_same(search, seed, sizes, 6, 0.0)


def test_long_recordings_forget_what_they_no_longer_need() -> None:
    search = CtcSearch(WORDS, CtcOptions(beam_size=50))
    log_probs = random_log_probs(8, (1, 500, 6))
    state = search.begin(1)
    sizes = []
    for _ in range(40):
        search.step(state, log_probs)
        sizes.append(state.num_prefixes[0])
    length = len(search.end(state)[0].best.label_ids)
    assert state.num_frames == [20_000]
    assert length > 5000
    assert max(sizes) < 8 * length
    whole = searched(search, np.tile(log_probs, (1, 40, 1)))[0]
    assert_same(search.end(state)[0], whole, 0.0)
    times = whole.best.label_frames
    assert (times[1:, 0] >= times[:-1, 1]).all()


def test_very_unlikely_frames_do_not_underflow(any_search_class: type) -> None:
    log_probs = np.full((1, 300, 6), -60.0, np.float32)
    log_probs[:, :, 0] = -50.0
    result = searched(any_search_class(LETTERS, CtcOptions(beam_size=3)), log_probs)[0]
    assert result.best.text == ""
    assert result.best.total == pytest.approx(-50.0 * 300, rel=1e-6)


def test_partial_results_close_no_word(search_class: type) -> None:
    search = search_class(
        CtcAlphabet((" ", *"abcdefghijklmnopqrstuvwxyz", "'", ""), 28, 0), CtcOptions(beam_size=10, word_bonus=1.0)
    )
    state = search.begin(1)
    search.step(state, libri()[None, :60])
    partial = search.results(state)[0].best
    assert partial.text.startswith("i have a g")
    ended = search.end(state)[0].best
    assert ended.total - partial.total == pytest.approx(1.0)
    search.step(state, libri()[None, 60:])
    assert search.end(state)[0].best.text.startswith("i have a good deal of will")


def test_threads_may_share_a_search_and_a_state() -> None:
    search = CtcSearch(WORDS, CtcOptions(beam_size=8), threads=2)
    log_probs = random_log_probs(9, (4, 30, 6))
    expected = searched(search, log_probs)
    shared = search.begin(4)

    def work() -> None:
        for _ in range(20):
            for one, other in zip(searched(search, log_probs), expected, strict=True):
                assert_same(one, other, 0.0)
            search.step(shared, log_probs)
            search.end(shared)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert shared.num_frames == [2400] * 4
