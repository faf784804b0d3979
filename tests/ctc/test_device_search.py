"""The search in torch against the C++ one: random problems, stored emissions, chunks, language models of labels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion.ctc.device_frames import FrameErrors, blocks_of
from shallowfusion.ctc.device_search import DeviceCtcSearch, device_obstacle
from shallowfusion.ctc.device_step import DeviceRules
from shallowfusion.ctc.search import CtcSearch
from shallowfusion.ctc.settings import CtcAlphabet, CtcLanguage, CtcOptions
from shallowfusion.errors import AcousticScoresError, InvalidArgumentError
from shallowfusion.ngrams.model import NgramModel, NgramOrder
from shallowfusion.ngrams.table import NgramTable
from tests.ctc.conftest import (
    LIBRI_LABELS,
    LIBRI_TEXT,
    assert_replays_equal_the_native_search,
    assert_same,
    libri,
    ocr,
    random_log_probs,
    searched,
)

ALPHABETS = (
    CtcAlphabet(tuple("_abcde")),
    CtcAlphabet((" ", *"abcd", "_"), blank=5, delimiter=0),
    CtcAlphabet(("▁a", "_", "b", "ab", "▁", "▁b▁"), blank=1, word_start="▁"),
    CtcAlphabet(("_", "|", "é", "éa", "a", "aé"), delimiter=1),
)
OPTION_CHOICES = st.fixed_dictionaries(
    {
        "beam_size": st.sampled_from([1, 2, 3, 5, 30]),
        "merge": st.sampled_from(["logsumexp", "max"]),
        "length_bonus": st.sampled_from([0.0, 0.4, -0.3]),
        "token_min_log_prob": st.sampled_from([None, -3.0, -1.0]),
        "top_labels": st.sampled_from([None, 1, 2, 4, 9]),
        "beam_margin": st.sampled_from([None, 4.0, 0.0]),
        "blank_skip": st.sampled_from([None, 0.5, 0.2]),
    }
)


def letter_table(seed: int, alphabet: CtcAlphabet, order: int = 3) -> NgramTable:
    """A random back-off model of the labels."""
    rng = np.random.default_rng(seed)
    texts = {
        "<space>" if number == alphabet.delimiter else label
        for number, label in enumerate(alphabet.labels)
        if number != alphabet.blank
    }
    words = ("<s>", "</s>", "<unk>", *sorted(texts))
    count = len(words)
    orders = [NgramOrder(np.arange(count, dtype=np.int32)[:, None], *_scores(rng, count))]
    for length in range(2, order + 1):
        ngrams = np.unique(rng.integers(0, count, (40, length)).astype(np.int32), axis=0)
        orders.append(NgramOrder(ngrams, *_scores(rng, len(ngrams))))
    return NgramTable(NgramModel(words, tuple(orders), 0, 1, 2))


def _scores(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    return -rng.random(count).astype(np.float32) * 4, -rng.random(count).astype(np.float32)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 3), OPTION_CHOICES, st.booleans(), st.integers(0, 2**31), st.integers(0, 12),
    st.sampled_from([0.7, 3.0]),
)  # fmt: skip
def test_device_and_native_search_agree(
    which: int, chosen: dict[str, Any], with_lm: bool, seed: int, frames: int, scale: float
) -> None:
    alphabet = ALPHABETS[which]
    options = CtcOptions(**chosen, merge_texts=False, lm_weight=0.6)
    language = CtcLanguage(letter_table(seed % 5, alphabet), unit="labels") if with_lm else None
    log_probs = random_log_probs(seed, (3, frames, 6), scale)
    lengths = [frames, frames // 2, frames]
    results = [
        searched(kind(alphabet, options, language), log_probs, 7, lengths) for kind in (CtcSearch, DeviceCtcSearch)
    ]
    for native, device in zip(*results, strict=True):
        assert_same(native, device, 1e-8)
        assert [h.lm_state for h in native.hypotheses] == [h.lm_state for h in device.hypotheses]


STORED_OPTIONS = [
    CtcOptions(beam_size=4, blank_skip=0.95, merge_texts=False),
    CtcOptions(beam_size=16, beam_margin=20.0, merge_texts=False),
    CtcOptions(beam_size=30, merge="max", token_min_log_prob=-5.0, merge_texts=False),
    CtcOptions(beam_size=100, top_labels=12, beam_margin=12.0, blank_skip=0.99, merge_texts=False),
]


@pytest.mark.parametrize("options", STORED_OPTIONS, ids=lambda options: f"beam {options.beam_size}")
def test_stored_lines_are_decoded_label_by_label_as_by_the_native_search(options: CtcOptions) -> None:
    labels, lines, _ = ocr()
    lines = lines[::14]
    batch = np.full((len(lines), max(map(len, lines)), len(labels)), np.nan, np.float16)
    for row, line in zip(batch, lines, strict=True):
        row[: len(line)] = line  # the padding is NaN: it must not be looked at
    alphabet, lengths = CtcAlphabet(labels), [len(line) for line in lines]
    native = searched(CtcSearch(alphabet, options), batch, 3, lengths)
    device = searched(DeviceCtcSearch(alphabet, options), torch.from_numpy(batch), 3, lengths)
    for one, other in zip(native, device, strict=True):
        assert one.best.label_ids.tolist() == other.best.label_ids.tolist()
        assert one.best.label_frames.tolist() == other.best.label_frames.tolist()
        assert [h.total for h in one.hypotheses] == pytest.approx([h.total for h in other.hypotheses], abs=1e-8)


def test_librispeech_sentence_with_a_language_model_of_letters() -> None:
    alphabet = CtcAlphabet(LIBRI_LABELS, blank=28, delimiter=0)
    language = CtcLanguage(letter_table(1, alphabet, 4), unit="labels")
    options = CtcOptions(beam_size=12, lm_weight=0.2, token_min_log_prob=-8.0)
    native, device = (
        searched(kind(alphabet, options, language), libri()[None], 5)[0] for kind in (CtcSearch, DeviceCtcSearch)
    )
    assert_same(native, device, 1e-8)
    plain = searched(DeviceCtcSearch(alphabet, CtcOptions(beam_size=12)), libri()[None])[0]
    assert plain.best.text == LIBRI_TEXT


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 7), max_size=6))
def test_chunks_of_any_size_give_the_same(seed: int, sizes: list[int]) -> None:
    options = CtcOptions(beam_size=6, merge="max" if seed % 3 else "logsumexp", blank_skip=0.5 if seed % 2 else None)
    search = DeviceCtcSearch(ALPHABETS[1], options)
    log_probs = random_log_probs(seed, (2, sum(sizes), 6))
    state, at = search.begin(2), 0
    for size in sizes:
        search.step(state, log_probs[:, at : at + size], [size, max(0, size - 1)])  # the second skips a frame
        at += size
        search.results(state)  # looking changes nothing
    starts = np.cumsum([0, *sizes]).tolist()
    for number, result in enumerate(search.end(state, 4)):
        pieces = [
            log_probs[number, first : first + max(0, size - number)] for first, size in zip(starts, sizes, strict=False)
        ]
        own = np.concatenate([np.zeros((0, 6), np.float32), *pieces])
        assert_same(result, searched(search, own[None], 4)[0], 1e-9)


def test_small_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import shallowfusion.ctc.device_frames as device_frames

    search = DeviceCtcSearch(ALPHABETS[1], CtcOptions(beam_size=5, blank_skip=0.4))
    log_probs = random_log_probs(3, (3, 40, 6))
    log_probs[1, 25, 2] = math.nan
    whole = searched(search, log_probs, 4)
    monkeypatch.setattr(device_frames, "BLOCK_VALUES", 90)  # 5 frames
    for one, other in zip(whole, searched(search, log_probs, 4), strict=True):
        assert_same(one, other, 1e-9)
        assert str(one.error) == str(other.error)


def test_runs_of_blank_frames_become_one_frame() -> None:
    probs = np.full((1, 9, 3), 0.01)
    for frame, label in enumerate([0, 0, 1, 0, 0, 0, 1, 0, 0]):
        probs[0, frame, label] = 0.98
    state = torch.zeros(1, dtype=torch.int64)
    (block,) = blocks_of(
        torch.from_numpy(np.log(probs)), torch.tensor([9]), state, FrameErrors.none(1, state.device),
        CtcOptions(blank_skip=0.95), 0, 3,
    )  # fmt: skip
    assert block.numbers[:, 0].tolist() == [0, 2, 3, 6, 7]
    assert block.blank[:, 0].tolist() == pytest.approx(
        [2 * math.log(0.98), math.log(0.01), 3 * math.log(0.98), math.log(0.01), 2 * math.log(0.98)]
    )
    assert state.tolist() == [9]


def test_no_pair_that_could_matter_is_left_out() -> None:
    """Wide beams are compared with rules that look at every pair."""
    for beam_size, delimiter in ((1, None), (7, None), (7, 1), (64, 1)):
        labels = CtcAlphabet(tuple("a" * 97), delimiter=delimiter)
        rules = DeviceRules(labels, CtcOptions(beam_size=beam_size), torch.device("cpu"))
        assert rules.looked_at <= beam_size + 3
        assert len(rules.order) <= beam_size * (5 + math.log(beam_size)) + 1
    log_probs = random_log_probs(11, (2, 30, 97), 1.0)
    alphabet = CtcAlphabet(tuple(chr(0x4E00 + number) for number in range(97)), delimiter=1)
    for beam_size in (1, 2, 7, 64):
        options = CtcOptions(beam_size=beam_size)
        native, device = (searched(kind(alphabet, options), log_probs, 5) for kind in (CtcSearch, DeviceCtcSearch))
        for one, other in zip(native, device, strict=True):
            assert_same(one, other, 1e-8)


def test_a_search_that_loses_everything_says_so() -> None:
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.array([[[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]], [[0.9, 0.1], [0.5, 0.5], [0.5, 0.5]]]))
    log_probs[0, 1] = [-20.0, 0.0]
    alphabet = CtcAlphabet(("_", "a"))
    for options in (CtcOptions(token_min_log_prob=-2.0, beam_size=1), CtcOptions(top_labels=1)):
        results = [searched(kind(alphabet, options), log_probs, 2) for kind in (CtcSearch, DeviceCtcSearch)]
        for native, device in zip(*results, strict=True):
            assert_same(native, device, 1e-9)
            assert str(native.error) == str(device.error)


def test_errors_are_worded_alike() -> None:
    log_probs = random_log_probs(0, (6, 8, 6))
    log_probs[0, 5, 2] = math.nan
    log_probs[1, 0, 2] = math.inf
    log_probs[2, 3] = -math.inf
    log_probs[3] = np.exp(log_probs[3])
    log_probs[4] = np.minimum(log_probs[4] + 1.5, 0)
    searches = [kind(ALPHABETS[0]) for kind in (CtcSearch, DeviceCtcSearch)]
    states = [search.begin(6) for search in searches]
    for search, state in zip(searches, states, strict=True):
        search.step(state, log_probs)
        search.step(state, log_probs[:, :3])
    assert states[0].num_frames == states[1].num_frames
    for native, device in zip(
        *(search.end(state) for search, state in zip(searches, states, strict=True)), strict=True
    ):
        assert str(native.error) == str(device.error)
    assert [type(result.error) for result in searches[1].end(states[1])][:5] == [AcousticScoresError] * 5


REFUSED: list[tuple[dict[str, Any], CtcAlphabet, str]] = [
    ({"places": "paths"}, ALPHABETS[1], "places='prefixes'"),
    ({"history_words": 2}, ALPHABETS[1], "history_words=2"),
    ({"beam_size": 1001}, ALPHABETS[1], "at most 1000"),
]


@pytest.mark.parametrize(("chosen", "alphabet", "words"), REFUSED)
def test_what_the_device_does_not_know_is_refused_with_a_cure(
    chosen: dict[str, Any], alphabet: CtcAlphabet, words: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=words) as caught:
        DeviceCtcSearch(alphabet, CtcOptions(**chosen))
    assert 'backend="native"' in str(caught.value)


def test_late_scores_and_other_models_are_refused() -> None:
    table = letter_table(0, ALPHABETS[1])
    assert device_obstacle(ALPHABETS[1], CtcOptions(), CtcLanguage(table)) is None
    with pytest.raises(InvalidArgumentError, match="score_empty_word"):
        DeviceCtcSearch(ALPHABETS[1], language=CtcLanguage(table, score_empty_word=True))
    search = DeviceCtcSearch(ALPHABETS[1])
    for call in (lambda: search.live(search.begin(1)), lambda: search.set_extras(search.begin(1), [[0.0]])):
        with pytest.raises(InvalidArgumentError, match="native"):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("with_lm", [False, True])
def test_captured_frames_on_a_gpu_equal_the_native_search(with_lm: bool) -> None:
    alphabet = ALPHABETS[1]
    language = CtcLanguage(letter_table(2, alphabet), unit="labels") if with_lm else None
    options = CtcOptions(beam_size=16, blank_skip=0.6, beam_margin=15.0, lm_weight=0.4)
    assert_replays_equal_the_native_search(alphabet, options, language)
