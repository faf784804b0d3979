"""Equal texts of different labels in the device search: against both others where nothing is left out, and narrow."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion.ctc.device_merging import joined
from shallowfusion.ctc.device_search import DeviceCtcSearch
from shallowfusion.ctc.search import CtcSearch
from shallowfusion.ctc.search_reference import ReferenceCtcSearch, log_add
from shallowfusion.ctc.settings import CtcAlphabet, CtcLanguage, CtcOptions
from tests.ctc.conftest import assert_same, random_log_probs, searched
from tests.ctc.test_language import random_table

ALPHABETS = (
    CtcAlphabet(("▁a", "_", "b", "a", "ab", "▁"), blank=1, word_start="▁"),
    CtcAlphabet(("▁a", "_", "b", "▁b▁", "a", "ba"), blank=1, word_start="▁"),
    CtcAlphabet(("_", "|", "b", "ab", "a", "bb"), delimiter=1),
    CtcAlphabet(("_", "a", "b", "ab", "ba", "bab")),
)
NAMED: list[dict[str, Any]] = [{}, {"ab": 2.0, "b": -1.0}, {"a": 1.5, "bab": 6.0}]


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 3), st.sampled_from(["logsumexp", "max"]), st.sampled_from(NAMED), st.booleans(),
    st.integers(0, 2**31), st.integers(0, 4), st.sampled_from([None, 6.0]),
)  # fmt: skip
def test_three_searches_agree_where_nothing_is_left_out(
    which: int, merge: Any, hotwords: dict[str, float], with_lm: bool, seed: int, frames: int,
    margin: float | None,
) -> None:  # fmt: skip
    alphabet = ALPHABETS[which]
    options = CtcOptions(beam_size=1000, merge=merge, hotwords=hotwords, beam_margin=margin)
    language = CtcLanguage(random_table(seed % 7)) if with_lm and alphabet.has_words else None
    log_probs = random_log_probs(seed, (2, frames, 6))
    native, reference, device = (
        searched(kind(alphabet, options, language), log_probs, 7, [frames, frames // 2])
        for kind in (CtcSearch, ReferenceCtcSearch, DeviceCtcSearch)
    )
    for one, other, ours in zip(native, reference, device, strict=True):
        assert_same(other, ours, 1e-5)
        if margin is None:  # with one the native search leaves out what others join before they do
            assert_same(one, ours, 1e-8)
    for own in device:
        texts = [hypothesis.text for hypothesis in own.hypotheses]
        assert len(set(texts)) == len(texts)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3), st.sampled_from([2, 5, 20]), st.integers(0, 2**31))
def test_narrow_beams_hold_each_text_once_an_ending(which: int, beam_size: int, seed: int) -> None:
    """And what they say of a text is no more than all of its alignments are worth."""
    alphabet = ALPHABETS[which]
    log_probs = random_log_probs(seed, (2, 4, 6))
    wide, narrow = (
        searched(DeviceCtcSearch(alphabet, CtcOptions(beam_size=size)), log_probs, size) for size in (1000, beam_size)
    )
    for all_of_it, found in zip(wide, narrow, strict=True):
        exact = {hypothesis.text: hypothesis.total for hypothesis in all_of_it.hypotheses}
        assert found.best.total <= all_of_it.best.total + 1e-9
        for hypothesis in found.hypotheses:
            assert hypothesis.total <= exact[hypothesis.text] + 1e-9


def test_pieces_are_decoded_as_by_the_native_search() -> None:
    """A vocabulary of pieces in which everything may be spelled letter by letter too."""
    rng = np.random.default_rng(5)
    labels = ("_", *"abcd", *(f"▁{text}" for text in "abcd"), "ab", "▁ab", "cd", "▁cd", "abc", "▁da")
    alphabet = CtcAlphabet(labels, word_start="▁")
    options = CtcOptions(beam_size=60, hotwords={"abcd": 3.0, "da ab": 4.0}, beam_margin=20.0)
    probs = rng.dirichlet(np.full(len(labels), 0.05), (4, 30))
    log_probs = np.log(probs * 0.99 + 0.01 / len(labels)).astype(np.float32)
    native, device = (searched(kind(alphabet, options), log_probs, 5) for kind in (CtcSearch, DeviceCtcSearch))
    for one, other in zip(native, device, strict=True):
        assert one.best.text == other.best.text
        assert other.best.total == pytest.approx(one.best.total, abs=1e-3)


@pytest.mark.parametrize("beam_size", [4, 7, 40])
def test_no_pair_that_could_matter_is_left_out(beam_size: int) -> None:
    """A phrase that is worth nothing makes the search look at every pair."""
    letters = "abcdefghijklmno"
    alphabet = CtcAlphabet(("_", *letters, *(f"▁{letter}" for letter in letters)), word_start="▁")
    log_probs = random_log_probs(11, (2, 30, 31), 1.0)
    options = CtcOptions(beam_size=beam_size)
    some, every = (DeviceCtcSearch(alphabet, replace(options, hotwords=own)) for own in ({}, {"abcabc": 0.0}))
    assert len(some.rules.order) < len(every.rules.order) == beam_size * (1 + len(alphabet.labels))
    for one, other in zip(searched(some, log_probs, 5), searched(every, log_probs, 5), strict=True):
        assert_same(one, other, 1e-9)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 2), st.floats(-9, 0), st.booleans()), max_size=20))
def test_masses_meet_in_the_largest_of_their_group(entries: list[tuple[int, int, float, bool]]) -> None:
    texts, last, masses, dead = (list(column) for column in zip(*entries, strict=True)) if entries else ([],) * 4
    label = [-math.inf if is_dead else mass for mass, is_dead in zip(masses, dead, strict=True)]
    blank = [mass - 1 for mass in masses]
    given_tensors = [torch.tensor([column], dtype=torch.int64) for column in (texts, last)]
    given_masses = [torch.tensor([column], dtype=torch.float64) for column in (blank, label)]
    found = joined(*given_tensors, *given_masses, torch.logaddexp)
    keys: tuple[list[Any], ...] = (list(texts), list(zip(texts, last, strict=True)))
    for got, own, key in zip(found, (blank, label), keys, strict=True):
        groups: dict[Any, list[int]] = defaultdict(list)
        for place, name in enumerate(key):
            groups[name].append(place)
        wanted = [-math.inf] * len(own)
        for places in groups.values():
            largest = max(places, key=lambda place: own[place])
            for place in places:
                wanted[largest] = log_add(wanted[largest], own[place])
        assert got[0].tolist() == pytest.approx(wanted)


@pytest.mark.gpu
def test_captured_frames_on_a_gpu_equal_the_ones_on_the_cpu() -> None:
    options = CtcOptions(beam_size=24, hotwords={"ab": 2.0, "b a": 4.0})
    log_probs = torch.from_numpy(random_log_probs(1, (5, 40, 6)))
    for alphabet in ALPHABETS[:3]:
        here, there = (DeviceCtcSearch(alphabet, options, device=name) for name in ("cpu", "cuda"))
        for one, other in zip(searched(here, log_probs, 4), searched(there, log_probs.cuda(), 4), strict=True):
            assert_same(one, other, 1e-8)
