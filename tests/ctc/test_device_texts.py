"""Phrases, whole words and word n-grams in the device search against the C++ one and the automaton."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import shallowfusion.ctc.device_texts as module
from shallowfusion.ctc.device_frames import blocks_of
from shallowfusion.ctc.device_search import DeviceCtcSearch
from shallowfusion.ctc.device_step import Frame, advance
from shallowfusion.ctc.device_texts import PhraseTracker, WordTracker, trackers_of
from shallowfusion.ctc.search import CtcSearch
from shallowfusion.ctc.settings import CtcAlphabet, CtcLanguage, CtcOptions
from shallowfusion.phrases.device_tables import DevicePhraseTable
from tests.ctc.conftest import (
    LIBRI_LABELS,
    LIBRI_TEXT,
    assert_chunks_give_the_same,
    assert_replays_equal_the_native_search,
    assert_same,
    libri,
    random_log_probs,
    searched,
)
from tests.ctc.test_device_search import letter_table
from tests.ctc.test_hotwords import DELIMITED, MARKED
from tests.ctc.test_language import random_table

ALPHABETS = (
    CtcAlphabet(("_", "|", "a", "b", "c", "'"), delimiter=1),
    CtcAlphabet(("▁a", "_", "b", "ab", "▁", "▁b▁"), blank=1, word_start="▁"),
    CtcAlphabet(("_", "|", "b", "éa", "a", "é"), delimiter=1),
    CtcAlphabet(("_", "a", "b", "c", "d", "e")),
)
HOTWORDS: list[dict[str, Any]] = [
    {"hotwords": {"a": 2.0}},
    {"hotwords": {"b a": 4.0, "b": 1.0, "ab b ab": 6.0}},
    {"hotwords": {"ab": -2.0, "b": 8.0, "ba": 3.0, "b b": 2.5}},
    {"hotwords": ("ab", "b", "ab a"), "hotword_form": "words", "hotword_weight": 3.0},
    {"hotwords": ("abab", "ba"), "hotword_form": "words", "hotword_weight": -1.5},
    {},
]
CHOICES = st.fixed_dictionaries(
    {
        "beam_size": st.sampled_from([1, 2, 5, 30]),
        "merge": st.sampled_from(["logsumexp", "max"]),
        "length_bonus": st.sampled_from([0.0, 0.4]),
        "token_min_log_prob": st.sampled_from([None, -3.0]),
        "top_labels": st.sampled_from([None, 2, 4]),
        "beam_margin": st.sampled_from([None, 5.0]),
        "blank_skip": st.sampled_from([None, 0.4]),
        "hotwords_inside_words": st.booleans(),
        "word_bonus": st.sampled_from([0.0, 1.5]),
    }
)


def options_of(alphabet: CtcAlphabet, chosen: dict[str, Any], hotwords: dict[str, Any]) -> CtcOptions:
    chosen = {**chosen, **hotwords, "merge_texts": False, "lm_weight": 0.6}
    if not alphabet.has_words:
        given_phrases = {"ab": 3.0, "b": -1.0, "bcb": 6.0} if hotwords else {}
        chosen = {**chosen, "word_bonus": 0.0, "hotwords": given_phrases, "hotword_form": "phrases"}
    if chosen.get("hotword_form") == "words":
        chosen["hotwords_inside_words"] = False
    return CtcOptions(**chosen)


def language_of(alphabet: CtcAlphabet, kind: str | None, seed: int) -> CtcLanguage | None:
    if kind is None or (kind != "labels" and not alphabet.has_words):
        return None
    if kind == "labels":
        return CtcLanguage(letter_table(seed % 5, alphabet), unit="labels")
    table = random_table(seed % 7)
    if kind == "sets":
        return CtcLanguage(table, prefixes=((("ab", "abab"), -3.0), (("b", "ba"), 1.0)), score_boundary=False)
    return CtcLanguage(table, words=None if seed % 2 else ("ab", "b"), unknown_word=-3.0, unknown_prefix=-2.0)


@settings(max_examples=250, deadline=None)
@given(
    st.integers(0, 3), CHOICES, st.sampled_from(HOTWORDS), st.sampled_from([None, "labels", "words", "sets"]),
    st.integers(0, 2**31), st.integers(0, 12),
)  # fmt: skip
def test_device_and_native_search_agree(
    which: int, chosen: dict[str, Any], hotwords: dict[str, Any], kind: str | None, seed: int, frames: int
) -> None:
    alphabet = ALPHABETS[which]
    options, language = options_of(alphabet, chosen, hotwords), language_of(alphabet, kind, seed)
    log_probs, lengths = random_log_probs(seed, (3, frames, 6)), [frames, frames // 2, frames]
    searches = [made(alphabet, options, language) for made in (CtcSearch, DeviceCtcSearch)]
    states = [search.begin(3) for search in searches]
    for search, state in zip(searches, states, strict=True):
        search.step(state, log_probs, lengths)
    for ended in (False, True):
        pairs = [s.end(t, 7) if ended else s.results(t, 7) for s, t in zip(searches, states, strict=True)]
        for native, device in zip(*pairs, strict=True):
            assert_same(native, device, 1e-8)
            assert [h.lm_state for h in native.hypotheses] == [h.lm_state for h in device.hypotheses]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 6), max_size=5), st.sampled_from(HOTWORDS[:4]))
def test_chunks_of_any_size_give_the_same(seed: int, sizes: list[int], hotwords: dict[str, Any]) -> None:
    options = CtcOptions(beam_size=6, blank_skip=0.4 if seed % 2 else None, word_bonus=0.5, **hotwords)
    search = DeviceCtcSearch(ALPHABETS[0], options)
    assert_chunks_give_the_same(search, seed, sizes, 6, 1e-9)


def test_sorted_arcs_find_what_the_dense_table_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty phrases of letters: both tables in one search."""
    rng = np.random.default_rng(0)
    phrases = {" ".join("".join(rng.choice(list("abc'"), 3)) for _ in range(2)): 4.0 for _ in range(20)}
    options, alphabet = CtcOptions(beam_size=20, hotwords=phrases), ALPHABETS[0]
    log_probs = random_log_probs(7, (3, 40, 6), 1.0)
    native = searched(CtcSearch(alphabet, options), log_probs, 5)
    dense = DeviceCtcSearch(alphabet, options)
    monkeypatch.setattr(module, "DevicePhraseTable", lambda arcs, device: DevicePhraseTable(arcs, device, 0))
    sparse = DeviceCtcSearch(alphabet, options)
    assert [_table(dense).is_dense, _table(sparse).is_dense] == [True, False]
    for search in (dense, sparse):
        for one, other in zip(native, searched(search, log_probs, 5), strict=True):
            assert_same(one, other, 1e-8)


def _table(search: DeviceCtcSearch) -> DevicePhraseTable:
    tracker = search.rules.trackers[0]
    assert isinstance(tracker, PhraseTracker)
    return tracker.table


@pytest.mark.parametrize("alphabet", [DELIMITED, MARKED], ids=["delimiter", "word start"])
def test_totals_hold_each_phrase_once_and_its_loan_never(alphabet: CtcAlphabet) -> None:
    """Against a search without phrases that sees everything: what a text gains is the phrases in it."""
    log_probs = random_log_probs(3, (1, 6, 4))
    options = CtcOptions(beam_size=1000, merge_texts=False)
    named = dataclasses.replace(options, hotwords={"ab": 3.0, "a b": 2.0, "b": -0.75, "ab a": 4.0})
    plain, boosted = (searched(DeviceCtcSearch(alphabet, chosen), log_probs, 1000)[0] for chosen in (options, named))
    totals = {tuple(hypothesis.label_ids): hypothesis.total for hypothesis in plain.hypotheses}
    worth = {"ab": 3.0, "b": -0.75, "a": 0.0, "aab": 0.0, "": 0.0, "ab a": 7.0, "a a": 0.0}
    worth |= {"a b": 1.25} if alphabet is DELIMITED else {"b ab": 2.25}
    found = [(h.text, h.total - totals[tuple(h.label_ids)]) for h in boosted.hypotheses]
    assert worth.keys() <= {text for text, _ in found}
    for text, gained in found:
        assert text not in worth or gained == pytest.approx(worth[text], abs=1e-5), text


def test_a_real_sentence_with_phrases_and_a_model_of_letters() -> None:
    alphabet = CtcAlphabet(LIBRI_LABELS, blank=28, delimiter=0)
    phrases = {"a good seal": 30.0, "set my mind": 3.0, "remember": 2.0}
    for language in (None, CtcLanguage(letter_table(1, alphabet, 4), unit="labels")):
        options = CtcOptions(beam_size=12, hotwords=phrases, lm_weight=0.1, token_min_log_prob=-8.0)
        native, device = (
            searched(kind(alphabet, options, language), libri()[None], 5)[0] for kind in (CtcSearch, DeviceCtcSearch)
        )
        # Not the times: in frame 52 space and blank are equally likely.
        for ours, theirs in zip(native.hypotheses, device.hypotheses, strict=True):
            assert ours.label_ids.tolist() == theirs.label_ids.tolist()
            assert (ours.total, dict(ours.parts)) == (
                pytest.approx(theirs.total, abs=1e-8),
                pytest.approx(dict(theirs.parts), abs=1e-8),
            )
    options = CtcOptions(beam_size=50, hotwords={"set my mind": 3.0})
    best = searched(DeviceCtcSearch(alphabet, options), libri()[None])[0].best
    assert best.text == LIBRI_TEXT
    assert best.total == pytest.approx(best.parts["asr"] + 3.0, abs=1e-5)


def test_long_words_and_flags_stay_apart() -> None:
    """A word of more characters than are counted is one that no hotword begins with; its site stays a site."""
    (tracker,) = trackers_of(DELIMITED, CtcOptions(hotwords=("ab",), hotword_form="words"), None, torch.device("cpu"))
    assert isinstance(tracker, WordTracker)
    sites, label = torch.tensor([tracker.start]), torch.tensor([2])
    total = 0.0
    for _ in range(5000):
        gains, sites = tracker.extended(sites, label)
        total += float(gains)
    assert total == float(tracker.held(sites)) == float(tracker.ending(sites)) == 0.0
    assert tracker.is_open(sites).all()
    gains, sites = tracker.extended(sites, torch.tensor([1]))
    assert not tracker.is_open(sites).any()
    for label in (2, 3):
        gains, sites = tracker.extended(sites, torch.tensor([label]))
    assert float(tracker.held(sites)) == float(tracker.ending(sites)) == 4.0


def test_no_trackers_without_words_and_phrases() -> None:
    cpu = torch.device("cpu")
    assert trackers_of(DELIMITED, CtcOptions(length_bonus=1.0), None, cpu) == []
    assert [type(t) for t in trackers_of(DELIMITED, CtcOptions(hotwords="ab", word_bonus=1.0), None, cpu)] == [
        PhraseTracker,
        WordTracker,
    ]


def test_an_utterance_that_fails_stays_alone() -> None:
    log_probs = random_log_probs(5, (3, 20, 6))
    log_probs[1, 12, 2] = math.nan
    options = CtcOptions(beam_size=8, hotwords={"ab c": 5.0})
    results = [searched(kind(ALPHABETS[0], options), log_probs, 3) for kind in (CtcSearch, DeviceCtcSearch)]
    for native, device in zip(*results, strict=True):
        assert_same(native, device, 1e-8)
        assert str(native.error) == str(device.error)
    assert results[1][1].error is not None


class NothingWaits(TorchDispatchMode):
    """Refuses whatever needs a value on the host."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert not any(word in name for word in self.WAITING), name
        if name == "aten::index.Tensor":
            assert all(index is None or index.dtype != torch.bool for index in args[1])
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dense_bytes", [0, 2**27])
def test_a_frame_waits_for_nothing(dense_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DevicePhraseTable", lambda arcs, device: DevicePhraseTable(arcs, device, dense_bytes))
    options = CtcOptions(beam_size=8, hotwords={"ab": 3.0, "b a": 4.0}, word_bonus=1.0)
    search = DeviceCtcSearch(ALPHABETS[0], options, language_of(ALPHABETS[0], "words", 3))
    state = search.begin(2)
    scores, counts = torch.from_numpy(random_log_probs(1, (2, 5, 6))), torch.tensor([5, 5])
    (block,) = blocks_of(scores, counts, state.frames, state.errors, options, 0, search.rules.looked_at)
    frame = Frame(block.log_probs[0], block.labels[0], block.values[0], block.blank[0], block.numbers[0])
    with NothingWaits() as watched:
        beam, _ = advance(state.beam, frame, search.rules)
    assert watched.count > 100
    assert len(beam.sites) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("hotwords", HOTWORDS[1:4], ids=["phrases", "disliked", "words"])
@pytest.mark.parametrize("kind", [None, "labels", "words"])
def test_captured_frames_on_a_gpu_equal_the_native_search(hotwords: dict[str, Any], kind: str | None) -> None:
    alphabet = ALPHABETS[0]
    options = CtcOptions(beam_size=16, blank_skip=0.6, beam_margin=15.0, lm_weight=0.4, word_bonus=0.5, **hotwords)
    language = language_of(alphabet, kind, 3)
    assert_replays_equal_the_native_search(alphabet, options, language)
