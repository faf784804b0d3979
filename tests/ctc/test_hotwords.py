"""Phrases that the CTC search is favoured to say: exact totals, loans, spellings, silence, the front."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion.cli.main import main
from shallowfusion.ctc.decoder import CTCDecoder
from shallowfusion.ctc.search import CtcSearch
from shallowfusion.ctc.search_reference import ReferenceCtcSearch
from shallowfusion.ctc.settings import CtcAlphabet, CtcLanguage, CtcOptions
from shallowfusion.errors import InvalidArgumentError
from tests.ctc.conftest import LIBRI_LABELS, LIBRI_TEXT, assert_same, libri, random_log_probs, searched
from tests.ctc.test_language import random_table
from tests.ctc.test_models import recordings
from tests.ctc.test_search import ALPHABETS, enumerated
from tests.ctc.tiny_models import save_tiny_model
from tests.shipped import clip

DELIMITED = CtcAlphabet(("_", " ", "a", "b"), delimiter=1)
MARKED = CtcAlphabet(("_", "▁a", "a", "b"), word_start="▁")
PLAIN = CtcAlphabet(("_", "a", "b", "ab"))
SPELLINGS = {DELIMITED: ("", " ", "a", "b"), MARKED: ("", " a", "a", "b"), PLAIN: ("", "a", "b", "ab")}
PHRASES = {"ab": 3.0, "a b": 2.0, "b": -0.75, "a": 0.5, "ab a": 4.0}


def worth(text: str, phrases: dict[str, float], inside_words: bool) -> float:
    """The weights of all phrases in a text, each place counted."""
    total = 0.0
    for phrase, weight in phrases.items():
        pattern = re.escape(phrase) if inside_words else rf"\b{re.escape(phrase)}\b"
        total += weight * len(re.findall(f"(?={pattern})", text))
    return total


@pytest.mark.parametrize("inside_words", [False, True])
@pytest.mark.parametrize("alphabet", [DELIMITED, MARKED, PLAIN], ids=["delimiter", "word start", "no words"])
def test_totals_hold_each_phrase_once_a_place(search_class: type, alphabet: CtcAlphabet, inside_words: bool) -> None:
    phrases = PHRASES if alphabet.has_words else {text: w for text, w in PHRASES.items() if " " not in text}
    options = CtcOptions(beam_size=5000, hotwords=phrases, hotwords_inside_words=inside_words)
    log_probs = random_log_probs(2, (1, 6, 4))
    (result,) = searched(search_class(alphabet, options), log_probs, 5000)
    exact: dict[str, float] = defaultdict(float)
    for labels, prob in enumerated(log_probs[0], 0).items():
        exact[" ".join("".join(SPELLINGS[alphabet][label] for label in labels).split())] += prob
    found = {hypothesis.text: hypothesis for hypothesis in result.hypotheses}
    assert set(found) == set(exact)
    for text, hypothesis in found.items():
        assert hypothesis.parts["asr"] == pytest.approx(math.log(exact[text]), abs=1e-5)
        gained = hypothesis.total - hypothesis.parts["asr"]
        assert gained == pytest.approx(worth(text, phrases, inside_words), abs=1e-5), text
    totals = [hypothesis.total for hypothesis in result.hypotheses]
    assert totals == sorted(totals, reverse=True)


CHOICES = st.fixed_dictionaries(
    {
        "beam_size": st.sampled_from([1, 3, 20]),
        "merge": st.sampled_from(["logsumexp", "max"]),
        "places": st.sampled_from(["prefixes", "paths"]),
        "times": st.sampled_from(["best", "last"]),
        "word_bonus": st.sampled_from([0.0, 1.5]),
        "length_bonus": st.sampled_from([0.0, 0.25]),
        "beam_margin": st.sampled_from([None, 6.0]),
        "history_words": st.sampled_from([0, 1]),
        "hotwords": st.sampled_from([{"a": 2.0}, {"b a": 4.0, "b": 1.0}, {"ab": -2.0, "b": 8.0, "ba": 3.0}]),
        "hotwords_inside_words": st.booleans(),
    }
)


WIDE = CtcAlphabet(("_", "|", "a", "b", "é", "'", *(chr(0x4E00 + i) for i in range(130))), delimiter=1)


@settings(max_examples=25, deadline=None)
@given(CHOICES, st.integers(0, 2**31), st.integers(1, 5))
def test_twins_agree_where_labels_are_too_many_to_remember(chosen: Any, seed: int, frames: int) -> None:
    phrases = {"a": 2.0, "b a": 4.5, "ab": -2.0, "é'b": 6.0, "一丁": 3.0, "b": 1.0}
    options = CtcOptions(**(chosen | {"hotwords": phrases, "top_labels": 12}))
    log_probs = random_log_probs(seed, (1, frames, len(WIDE.labels)))
    log_probs[:, :, :8] += 6.0
    log_probs -= np.logaddexp.reduce(log_probs, axis=2, keepdims=True)
    twins = (made(WIDE, options, None, 1) for made in (CtcSearch, ReferenceCtcSearch))
    (one,), (other,) = (searched(search, log_probs, 50) for search in twins)
    assert_same(one, other)


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 3), CHOICES, st.integers(0, 2**31), st.integers(0, 12), st.booleans())
def test_twins_agree_with_phrases(which: int, chosen: Any, seed: int, frames: int, has_lm: bool) -> None:
    alphabet = (*ALPHABETS[:3], CtcAlphabet(("_", "|", "b", "éa", "a", "'"), delimiter=1))[which]
    if not alphabet.has_words:
        chosen |= {"word_bonus": 0.0, "hotwords": {"ab": 3.0, "b": -1.0, "bcb": 6.0}}
    if alphabet.is_ambiguous and chosen["length_bonus"] == 0:
        frames = min(frames, 5)  # only the twin merges equal texts among candidates that cannot stay
        chosen |= {"beam_size": 5000, "beam_margin": None}
    language = CtcLanguage(random_table(seed % 7)) if has_lm and alphabet.has_words else None
    log_probs = random_log_probs(seed, (2, frames, 6))
    results = [
        searched(kind(alphabet, CtcOptions(**chosen), language), log_probs, 7, [frames, frames // 2])
        for kind in (CtcSearch, ReferenceCtcSearch)
    ]
    for one, other in zip(*results, strict=True):
        assert_same(one, other, 1e-5)


def test_a_phrase_counts_as_a_whole(search_class: type) -> None:
    """Its words alone earn nothing; with hotword_form="words" each does."""
    options = CtcOptions(beam_size=500, hotwords={"ab ba": 5.0})
    words = dataclasses.replace(options, hotwords=("ab ba",), hotword_weight=5.0, hotword_form="words")
    log_probs = random_log_probs(3, (1, 7, 4))
    for chosen, wanted in (
        (options, {"ab": 0.0, "ba": 0.0, "ab ba": 5.0}),
        (words, {"ab": 5.0, "ba": 5.0, "ab ba": 10.0}),
    ):
        (result,) = searched(search_class(DELIMITED, chosen), log_probs, 5000)
        found = {h.text: h.total - h.parts["asr"] for h in result.hypotheses}
        assert {text: found[text] for text in wanted} == pytest.approx(wanted, abs=1e-5)


def test_all_spellings_of_a_phrase_are_one(search_class: type) -> None:
    log_probs = random_log_probs(5, (1, 4, 4), 0.5)
    options = CtcOptions(beam_size=500, hotwords={"ab": 2.0}, hotwords_inside_words=True, merge_texts=False)
    (apart,) = searched(search_class(PLAIN, options), log_probs, 500)
    bonuses = {tuple(h.label_ids.tolist()): h.total - h.parts["asr"] for h in apart.hypotheses}
    assert bonuses[1, 2] == bonuses[3,] == pytest.approx(2.0, abs=1e-5)
    (merged,) = searched(search_class(PLAIN, dataclasses.replace(options, merge_texts=True)), log_probs, 500)
    masses: dict[str, float] = defaultdict(float)
    for hypothesis in apart.hypotheses:
        masses[hypothesis.text] += math.exp(hypothesis.total)
    assert {h.text: pytest.approx(math.exp(h.total), rel=1e-5) for h in merged.hypotheses} == masses


def test_silence_earns_no_reward(search_class: type) -> None:
    """Neither blanks nor a beginning that comes to nothing."""
    log_probs = np.full((1, 80, 4), math.log(1e-5), np.float32)
    log_probs[..., 0] = math.log(1 - 3e-5)
    plain, boosted = (
        searched(search_class(DELIMITED, CtcOptions(beam_size=20, hotwords=hotwords)), log_probs, 20)[0]
        for hotwords in ({}, {"ab": 8.0, "bab ab": 12.0})
    )
    assert boosted.best.text == ""
    assert boosted.best.total == pytest.approx(plain.best.total, abs=1e-6)
    assert boosted.best.total == pytest.approx(boosted.best.parts["asr"], abs=1e-9)
    for hypothesis in boosted.hypotheses:
        gained = hypothesis.total - hypothesis.parts["asr"]
        assert gained == pytest.approx(worth(hypothesis.text, {"ab": 8.0, "bab ab": 12.0}, False), abs=1e-5)


def test_a_phrase_in_the_making_keeps_its_place_by_a_loan(search_class: type) -> None:
    log_probs = np.full((1, 5, 4), -12.0, np.float32)
    for frame, (likely, other) in enumerate([(2, 2), (3, 2), (3, 3), (0, 3), (0, 0)]):
        log_probs[0, frame, other], log_probs[0, frame, likely] = math.log(0.3), math.log(0.69)
    options = CtcOptions(beam_size=2, hotwords={"abab": -4.0, "aab": 6.0})
    log_probs[0, 1, 0] = math.log(0.3)  # a _ b or a blank a b
    search = search_class(DELIMITED, options)
    state = search.begin(1)
    for frame in range(5):
        search.step(state, log_probs[:, frame : frame + 1])
        for hypothesis in search.results(state, 9)[0].hypotheses:
            assert hypothesis.total == pytest.approx(hypothesis.parts["asr"], abs=1e-6)  # words are not closed
    whole = searched(search, log_probs, 9)
    assert_same(search.end(state, 9)[0], whole[0])


@pytest.mark.parametrize("kind", ["delimiter", "pieces"])
def test_what_no_labels_spell_is_refused(search_class: type, kind: str) -> None:
    alphabet = DELIMITED if kind == "delimiter" else MARKED
    for phrase in ("abc", "ab cd", "A"):
        with pytest.raises(InvalidArgumentError, match="no labels spell"):
            search_class(alphabet, CtcOptions(hotwords={phrase: 4.0}))
    search_class(alphabet, CtcOptions(hotwords={"  ab \t b ": 4.0}))


def test_bad_weights_and_forms_are_refused() -> None:
    for bad in ({"a": math.inf}, {"a": 101.0}, [("a", 1.0, 2.0)]):
        with pytest.raises(InvalidArgumentError, match="hotwords"):
            CtcOptions(hotwords=bad)  # type: ignore[arg-type]
    for more in ({"hotwords": {"a": 1.0}}, {"hotwords_inside_words": True}):
        with pytest.raises(InvalidArgumentError, match="whole words"):
            CtcOptions(hotword_form="words", **more)  # type: ignore[arg-type]
    assert CtcOptions(hotwords="Fallot").weighted_hotwords == {"Fallot": 4.0}
    mixed = CtcOptions(hotwords=["a", ("b", 2)], hotword_weight=3.0)
    assert mixed.weighted_hotwords == {"a": 3.0, "b": 2.0}
    assert hash(dataclasses.replace(mixed, beam_size=3)) != hash(mixed)


def test_the_front_takes_weighted_phrases() -> None:
    decoder = CTCDecoder(LIBRI_LABELS, blank="", delimiter=" ")
    plain = decoder.decode(libri()[None], beam_size=20)[0].best
    named = decoder.decode(libri()[None], beam_size=20, hotwords={"good deal": 4.0, "good will": 9.0})[0].best
    assert named.text == plain.text == LIBRI_TEXT
    assert named.total == pytest.approx(plain.total + 4.0, abs=1e-3)
    forced = decoder.decode(libri()[None], beam_size=50, hotwords={"a good seal": 40.0})[0].best
    assert forced.text.startswith("i have a good seal of will")
    for backend in ("native", "auto", "device"):
        assert decoder.decode(libri()[None], beam_size=20, hotwords="good deal", backend=backend)[0].text == LIBRI_TEXT


def test_models_and_the_command_line_take_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "model"
    save_tiny_model("wav2vec2", directory)
    decoder = CTCDecoder.from_pretrained(directory, device="cpu", threads=1)
    sound = recordings(1)
    plain = decoder.transcribe(sound, beam_size=20)[0]
    word = plain.text.split()[0]
    boosted = decoder.transcribe(sound, beam_size=20, hotwords={word: 6.0})[0]
    count = plain.text.split().count(word)
    assert boosted.best.total >= plain.best.total + 6.0 * count - 1e-3
    missing = "tho" if "tho" not in plain.text else "dul"
    command = ["transcribe", str(clip(2)), "--asr", str(directory), "--device", "cpu", "--beam-size", "20"]
    assert main([*command, "--hotword", f"{missing}=6", "--hotwords-inside-words"]) == 0
    chosen: dict[str, Any] = {"hotwords": {missing: 6.0}, "hotwords_inside_words": True}
    assert capsys.readouterr().out.strip() == decoder.transcribe(clip(2), beam_size=20, **chosen)[0].text
    assert main([*command, "--hotword", "tetralogy of Fallot=6"]) == 2
    assert "no labels spell" in capsys.readouterr().err
