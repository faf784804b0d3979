"""The CTC search against exact sums over alignments, its twin and published answers."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion.ctc.search import CtcSearch
from shallowfusion.ctc.search_reference import ReferenceCtcSearch
from shallowfusion.ctc.settings import CtcAlphabet, CtcOptions
from tests.ctc.conftest import (
    LIBRI_LABELS,
    LIBRI_TEXT,
    assert_same,
    libri,
    ocr,
    random_log_probs,
    searched,
    shared_file,
    shared_matrix,
)

EXAMPLE = np.log(np.array([[[0.5, 0.3, 0.2], [0.4, 0.5, 0.1], [0.6, 0.1, 0.3]]]))
EXAMPLE_PROBS = {
    "a": 0.372, "ab": 0.183, "b": 0.171, "": 0.120, "ba": 0.085, "bab": 0.030, "bb": 0.024, "aa": 0.012, "aba": 0.003,
}  # fmt: skip
HTR_LABELS = (*" !\"#&'()*+,-./0123456789:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", "")


def enumerated(log_probs: np.ndarray, blank: int, merge: str = "logsumexp") -> dict[tuple[int, ...], float]:
    """Probability of every labelling, over all paths; the best path's with merge="max"."""
    probs = np.exp(log_probs.astype(np.float64))
    found: dict[tuple[int, ...], float] = defaultdict(float)
    for path in itertools.product(range(probs.shape[1]), repeat=len(probs)):
        prob = math.prod(probs[t, label] for t, label in enumerate(path))
        labels = tuple(label for label, _ in itertools.groupby(path) if label != blank)
        found[labels] = max(found[labels], prob) if merge == "max" else found[labels] + prob
    return dict(found)


def test_worked_example_is_exact(any_search_class: type) -> None:
    (result,) = searched(any_search_class(CtcAlphabet(("", "a", "b"))), EXAMPLE, n_best=99)
    assert {h.text: pytest.approx(math.exp(h.total), abs=1e-6) for h in result.hypotheses} == EXAMPLE_PROBS
    assert [h.text for h in result.hypotheses] == list(EXAMPLE_PROBS)
    assert dict(result.best.parts) == {"asr": result.best.total}


@pytest.mark.parametrize("merge", ["logsumexp", "max"])
@pytest.mark.parametrize("seed", range(6))
def test_wide_beam_equals_the_sum_over_all_paths(any_search_class: type, seed: int, merge: Any) -> None:
    labels, blank = 3 + seed % 2, seed % 3
    log_probs = random_log_probs(seed, (1, 5, labels))
    exact = enumerated(log_probs[0], blank, merge)
    alphabet = CtcAlphabet(tuple("abcd"[:labels]), blank=blank)
    (result,) = searched(any_search_class(alphabet, CtcOptions(beam_size=1000, merge=merge)), log_probs, n_best=1000)
    assert len(result.hypotheses) == len(exact)
    for hypothesis in result.hypotheses:
        assert hypothesis.total == pytest.approx(math.log(exact[tuple(hypothesis.label_ids.tolist())]), abs=1e-5)
    totals = [hypothesis.total for hypothesis in result.hypotheses]
    assert totals == sorted(totals, reverse=True)


def test_bonuses_count_labels_and_words(search_class: type) -> None:
    log_probs = random_log_probs(3, (1, 5, 4))
    alphabet = CtcAlphabet(("", " ", "a", "b"), delimiter=1)
    options = CtcOptions(beam_size=5000, word_bonus=0.7, length_bonus=-0.2)
    (result,) = searched(search_class(alphabet, options), log_probs, n_best=5000)
    exact: dict[str, float] = defaultdict(float)
    for labels, prob in enumerated(log_probs[0], 0).items():
        exact[" ".join("".join("_ ab"[label] for label in labels).split())] += prob
    assert {h.text for h in result.hypotheses} == set(exact)
    for hypothesis in result.hypotheses:
        bonus = 0.7 * len(hypothesis.text.split()) - 0.2 * len(hypothesis.label_ids)
        assert hypothesis.total - hypothesis.parts["asr"] == pytest.approx(bonus, abs=1e-9)
        assert math.exp(hypothesis.parts["asr"]) == pytest.approx(exact[hypothesis.text], rel=1e-5)


TOYS = ("parlance_seq1", "parlance_seq2", "ctcdecoder_mini")


@pytest.mark.parametrize("name", TOYS)
def test_published_toys(any_search_class: type, name: str) -> None:
    cases = json.loads(shared_file("toy_cases.json").read_text(encoding="utf-8"))
    (case,) = [case for case in cases if case["name"] == name]
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.array([case["probs"]]))
    alphabet = CtcAlphabet(tuple(case["alphabet"]), blank=case["blank"])
    best_path = CtcOptions(beam_size=4, merge="max")
    greedy = case["published"].get("greedy", case["published"].get("best_path"))
    assert searched(any_search_class(alphabet, best_path), log_probs)[0].best.text == greedy
    beam = case["published"].get("beam20", case["published"].get("beam"))
    assert searched(any_search_class(alphabet, CtcOptions(beam_size=20)), log_probs)[0].best.text == beam
    (wide,) = searched(any_search_class(alphabet, CtcOptions(beam_size=100)), log_probs)
    assert wide.best.label_ids.tolist() == case["exact_top"][0]["labels"]
    if any_search_class is ReferenceCtcSearch:
        return  # enumerating is for the fast one
    for merge, column in (("logsumexp", "prob"), ("max", "viterbi")):
        search = CtcSearch(alphabet, CtcOptions(beam_size=200_000, merge=merge))
        probs = {
            tuple(h.label_ids.tolist()): math.exp(h.total) for h in searched(search, log_probs, 200_000)[0].hypotheses
        }
        for entry in case["exact_top"]:
            assert probs[tuple(entry["labels"])] == pytest.approx(entry[column], rel=1e-5)


def test_handwriting_line_and_word(any_search_class: type) -> None:
    alphabet = CtcAlphabet(HTR_LABELS, blank=79)
    best_path, beam = CtcOptions(beam_size=4, merge="max"), CtcOptions(beam_size=25)
    line = shared_matrix("ctcdecoder_htr/line/rnnOutput.csv")[None]
    assert searched(any_search_class(alphabet, best_path), line)[0].best.text == "the fak friend of the fomly hae tC"
    assert searched(any_search_class(alphabet, beam), line)[0].best.text == "the fak friend of the fomcly hae tC"
    word = shared_matrix("ctcdecoder_htr/word/rnnOutput.csv")[None]
    assert searched(any_search_class(alphabet, best_path), word)[0].best.text == "aircrapt"


def test_probability_of_the_handwriting_reference() -> None:
    """All labels but those of the reference are made impossible, so that the beam holds its sum."""
    alphabet = CtcAlphabet(HTR_LABELS, blank=79)
    text = "the fake friend of the family, like the"
    log_probs = shared_matrix("ctcdecoder_htr/line/rnnOutput.csv").copy()
    allowed = {HTR_LABELS.index(letter) for letter in text} | {79}
    log_probs[:, [label for label in range(80) if label not in allowed]] = -math.inf
    hotwords = ("the", "fake", "friend", "of", "family,", "like")
    alphabet = CtcAlphabet(HTR_LABELS, blank=79, delimiter=0)
    search = CtcSearch(
        alphabet, CtcOptions(beam_size=20_000, hotwords=hotwords, hotword_weight=20.0, hotword_form="words")
    )
    found = {h.text: h.parts["asr"] for h in searched(search, log_probs[None], 20_000)[0].hypotheses}
    assert math.exp(found[text]) == pytest.approx(6.31472642886565e-13, rel=1e-3)


def test_librispeech_sentence(any_search_class: type) -> None:
    alphabet = CtcAlphabet(LIBRI_LABELS, blank=28, delimiter=0)
    result = searched(any_search_class(alphabet, CtcOptions(beam_size=20)), libri()[None])[0]
    assert result.best.text == LIBRI_TEXT
    assert [word for word, _ in result.best.words] == LIBRI_TEXT.split()
    times = result.best.label_frames
    assert (times[1:, 0] >= times[:-1, 1]).all()
    assert (times[:, 1] > times[:, 0]).all()


def test_viterbi_search_is_the_best_path_on_all_stored_lines() -> None:
    import jiwer

    labels, lines, records = ocr()
    log_probs = padded(lines)
    search = CtcSearch(CtcAlphabet(labels), CtcOptions(beam_size=4, merge="max"))
    texts = [result.best.text.strip() for result in searched(search, log_probs, lengths=[len(line) for line in lines])]
    assert texts == [record["greedy"] for record in records]
    references = [record["ref"] for record in records]
    assert jiwer.cer(references, texts) == pytest.approx(0.101, abs=5e-4)
    assert jiwer.wer(references, texts) == pytest.approx(0.351, abs=5e-4)


def test_summing_alignments_is_no_worse_than_the_best_path_on_stored_lines() -> None:
    import jiwer

    labels, lines, records = ocr()
    search = CtcSearch(CtcAlphabet(labels), CtcOptions(beam_size=20))
    texts = [result.best.text.strip() for result in searched(search, padded(lines), lengths=[len(x) for x in lines])]
    references = [record["ref"] for record in records]
    assert jiwer.cer(references, texts) <= 0.1015


def padded(lines: list[np.ndarray]) -> np.ndarray:
    batch = np.full((len(lines), max(map(len, lines)), lines[0].shape[1]), np.nan, dtype=lines[0].dtype)
    for row, line in zip(batch, lines, strict=True):
        row[: len(line)] = line  # the padding is NaN: it must not be looked at
    return batch


ALPHABETS = (
    CtcAlphabet(tuple("_abcde")),
    CtcAlphabet((" ", *"abcd", "_"), blank=5, delimiter=0),
    CtcAlphabet(("▁a", "_", "b", "ab", "▁", "▁b▁"), blank=1, word_start="▁"),
    CtcAlphabet(("_", "|", "é", "éa", "a", "aé"), delimiter=1),
)
OPTION_CHOICES = st.fixed_dictionaries(
    {
        "beam_size": st.sampled_from([1, 2, 5, 30]),
        "merge": st.sampled_from(["logsumexp", "max"]),
        "places": st.sampled_from(["prefixes", "paths"]),
        "word_bonus": st.sampled_from([0.0, 1.5, -1.0]),
        "length_bonus": st.sampled_from([0.0, 0.4]),
        "token_min_log_prob": st.sampled_from([None, -3.0]),
        "top_labels": st.sampled_from([None, 1, 3]),
        "beam_margin": st.sampled_from([None, 4.0]),
        "blank_skip": st.sampled_from([None, 0.6]),
        "history_words": st.sampled_from([0, 1, 2]),
        "hotwords": st.sampled_from([(), ("ab",), ("b", "a éa")]),
        "hotword_weight": st.sampled_from([2.0, -1.0]),
        "hotword_form": st.just("words"),
        "times": st.sampled_from(["best", "last"]),
    }
)


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 3), OPTION_CHOICES, st.integers(0, 2**31), st.integers(0, 12), st.sampled_from([0.7, 3.0]))
def test_twins_agree(which: int, chosen: dict[str, Any], seed: int, frames: int, scale: float) -> None:
    alphabet = ALPHABETS[which]
    if not alphabet.has_words:
        chosen |= {"word_bonus": 0.0, "hotwords": ()}
    if alphabet.is_ambiguous and chosen["length_bonus"] == 0:
        frames = min(frames, 5)  # only the twin merges equal texts among candidates that cannot stay
        chosen |= {"beam_size": 5000, "beam_margin": None}
    options = CtcOptions(**chosen)
    log_probs = random_log_probs(seed, (2, frames, 6), scale)
    lengths = [frames, frames // 2]
    results = [searched(kind(alphabet, options), log_probs, 7, lengths) for kind in (CtcSearch, ReferenceCtcSearch)]
    for one, other in zip(*results, strict=True):
        assert_same(one, other)


def test_equal_texts_of_different_labels_meet(search_class: type) -> None:
    alphabet = CtcAlphabet(("_", "a", "b", "ab"))
    log_probs = random_log_probs(1, (1, 4, 4), 0.5)
    (result,) = searched(search_class(alphabet, CtcOptions(beam_size=500)), log_probs, 500)
    exact: dict[str, float] = defaultdict(float)
    for labels, prob in enumerated(log_probs[0], 0).items():
        exact["".join(alphabet.labels[label] for label in labels)] += prob
    assert {h.text: pytest.approx(math.exp(h.total), rel=1e-5) for h in result.hypotheses} == exact


def test_doubled_letters_survive_skipped_blanks(any_search_class: type) -> None:
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.array([[[0.02, 0.98], [0.97, 0.03], [0.01, 0.99]]]))
    search = any_search_class(CtcAlphabet(("", "a")), CtcOptions(blank_skip=0.95))
    assert searched(search, log_probs)[0].best.text == "aa"


def test_best_label_is_never_pruned(any_search_class: type) -> None:
    log_probs = np.log(np.full((1, 3, 30), 1 / 30)) - np.arange(30) * 1e-3
    search = any_search_class(
        CtcAlphabet(tuple("_bcdefghijklmnopqrstuvwxyz12345"[:30])), CtcOptions(token_min_log_prob=-1.0)
    )
    assert searched(search, log_probs)[0].best.text == ""


def test_runs_of_delimiters_are_one(any_search_class: type) -> None:
    rows = [" ", "a", "_", " ", "_", " ", "b", " ", "_"]
    labels = ("_", " ", "a", "b")
    log_probs = np.full((1, len(rows), 4), -8.0)
    for frame, label in enumerate(rows):
        log_probs[0, frame, labels.index(label)] = -0.001
    result = searched(any_search_class(CtcAlphabet(labels, delimiter=1)), log_probs)[0]
    assert result.best.text == "a b"
    assert result.best.words == [("a", (1, 2)), ("b", (6, 7))]
