"""The lexicon search of the ASG criterion, in C++ and Python: against flashlight-text, and against all alignments."""

from __future__ import annotations

import gzip
import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shallowfusion.ctc.lexicon import LexiconOptions, LexiconResult, LexiconSearch, LexiconWords, packed_repeats
from shallowfusion.ctc.lexicon_reference import ReferenceLexiconSearch
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.ngrams.table import NgramTable
from tests.ctc.conftest import shared_file

BASE_10 = 1.0 / math.log(10.0)
LABELS = ["|", "a", "b", "c", "<1>"]
SILENCE, REPEAT = 0, 4
CLOSED = {"ab": ["a b |"], "abb": ["a b b |", "a b c |"], "cab": ["c a b |"], "cc": ["c c |"]}  # end in silence
WORDS = {**CLOSED, "a": ["a"]}
ARPA = """\\data\\
ngram 1=8
ngram 2=4

\\1-grams:
-1.5\t<unk>
-99\t<s>\t-0.4
-1.1\t</s>
-0.7\tab\t-0.3
-0.9\tabb\t-0.2
-1.3\tcab\t-0.1
-1.7\tcc\t-0.2
-2.0\ta\t-0.5

\\2-grams:
-0.2\t<s> ab
-0.3\tab cab
-0.6\tcab </s>
-0.4\tcab a

\\end\\
"""


def numbers(spelling: str) -> list[int]:
    return packed_repeats([LABELS.index(label) for label in spelling.split()], [REPEAT])


def lexicon(table: NgramTable | None, spelled: dict[str, list[str]] | None = None) -> LexiconWords:
    """The words and one outside of them; without them the labels."""
    words = [*(LABELS if spelled is None else spelled), "<unk>"]
    spellings = spelled and [[numbers(one) for one in spelled.get(word, [])] for word in words]
    return LexiconWords(spellings, [table.model.id_of(w) if table else 0 for w in words], unknown=len(words) - 1)


def emissions_of(frames: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores that are no log-probs, and transitions, some of them forbidden in odd seeds."""
    rng = np.random.default_rng(seed)
    transitions = rng.normal(size=(5, 5)).astype(np.float32)
    if seed % 2:
        transitions[rng.integers(0, 5, 3), rng.integers(0, 5, 3)] = -np.inf
    return (rng.normal(size=(frames, 5)) * 2).astype(np.float32), transitions


@pytest.fixture
def arpa(tmp_path: Path) -> Path:
    path = tmp_path / "words.arpa"
    path.write_text(ARPA, encoding="utf-8")
    return path


OPTIONS: list[dict[str, Any]] = [
    {},
    {"log_add": True},
    {"beam_size": 4, "beam_threshold": 6.0},
    {"beam_size_token": 3, "word_score": 1.5, "sil_score": -0.7},
    {"unk_score": -2.0, "lm_weight": 0.7},
]


def ours(options: dict[str, Any]) -> LexiconOptions:
    return LexiconOptions(
        beam_size=options.get("beam_size", 50),
        top_labels=options.get("beam_size_token"),
        beam_margin=options.get("beam_threshold", 50.0),
        lm_weight=options.get("lm_weight", 2.0),
        lm_scale=BASE_10,
        word_score=options.get("word_score", 0.0),
        unknown_score=options.get("unk_score", -math.inf),
        silence_score=options.get("sil_score", 0.0),
        log_add=options.get("log_add", False),
    )


def flashlight(
    arpa: Path | None,
    emissions: np.ndarray,
    transitions: np.ndarray,
    options: dict[str, Any],
    spelled: dict[str, list[str]] | None = None,
) -> list[tuple[float, list[int], list[str]]]:
    """Scores, labels of frames, and words of flashlight-text's decoder under the ASG criterion."""
    library = pytest.importorskip("flashlight.lib.text.decoder")
    names = pytest.importorskip("flashlight.lib.text.dictionary")
    settings = {"beam_size": 50, "beam_size_token": 5, "beam_threshold": 50.0, "lm_weight": 2.0, "sil_score": 0.0}
    settings |= {"log_add": False, **options, "criterion_type": library.CriterionType.ASG}
    labels = names.Dictionary(LABELS)
    words = names.Dictionary([*(LABELS if spelled is None else spelled), "<unk>"])
    words.set_default_index(words.get_index("<unk>"))
    model = library.ZeroLM()
    if arpa is not None:
        model = pytest.importorskip("flashlight.lib.text.decoder.kenlm").KenLM(str(arpa), words)
    after = transitions.ravel().tolist()
    if spelled is None:
        settings = {name: value for name, value in settings.items() if name not in ("word_score", "unk_score")}
        decoder = library.LexiconFreeDecoder(library.LexiconFreeDecoderOptions(**settings), model, SILENCE, -1, after)
    else:
        settings = {"word_score": 0.0, "unk_score": -math.inf, **settings}
        trie, start = library.Trie(len(LABELS), SILENCE), model.start(False)
        for word, spellings in spelled.items():
            number = words.get_index(word)
            for spelling in spellings:
                packed = names.pack_replabels([labels.get_index(label) for label in spelling.split()], labels, 1)
                trie.insert(packed, number, model.score(start, number)[1])
        trie.smear(library.SmearingMode.MAX)
        unknown = words.get_index("<unk>")
        options_made = library.LexiconDecoderOptions(**settings)
        decoder = library.LexiconDecoder(options_made, trie, model, SILENCE, -1, unknown, after, False)
    found = decoder.decode(np.ascontiguousarray(emissions).ctypes.data, *emissions.shape)
    return [(one.score, list(one.tokens), [words.get_entry(w) for w in one.words if w >= 0]) for one in found]


def assert_same(found: list[LexiconResult], theirs: list[tuple[float, list[int], list[str]]], names: list[str]) -> None:
    """Equal scores in order; equal contents wherever a score is alone."""
    scores = [score for score, _, _ in theirs]
    np.testing.assert_allclose([one.score for one in found], scores, atol=2e-4, rtol=1e-6)
    for one, (score, labels, words) in zip(found, theirs, strict=True):
        if sum(abs(score - other) < 1e-3 for other in scores) == 1:
            assert one.labels.tolist() == labels
            assert [names[word] for word in one.words] == words


def decoded(search: LexiconSearch | ReferenceLexiconSearch, emissions: np.ndarray) -> list[LexiconResult]:
    cut = len(emissions) // 3
    search.step(emissions[:cut])
    search.step(emissions[cut:])
    search.end()
    return search.results()


@pytest.mark.parametrize("twin", [LexiconSearch, ReferenceLexiconSearch])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_lm", [False, True])
def test_words_of_a_lexicon_score_as_in_flashlight(arpa, twin, options, with_lm) -> None:
    table = NgramTable.from_arpa(arpa) if with_lm else None
    spelled = WORDS if with_lm else CLOSED  # else "a" and its place in the lexicon tie, and the beam cuts one of them
    for seed in range(6):
        emissions, transitions = emissions_of(14, seed)
        search = twin(5, None, SILENCE, lexicon(table, spelled), ours(options), table, transitions)
        theirs = flashlight(arpa if with_lm else None, emissions, transitions, options, spelled)
        assert theirs
        assert_same(decoded(search, emissions), theirs, [*spelled, "<unk>"])


@pytest.mark.parametrize("twin", [LexiconSearch, ReferenceLexiconSearch])
@pytest.mark.parametrize("options", [*OPTIONS[:3], {"sil_score": 0.5, "beam_size_token": 4}], ids=str)
def test_labels_alone_score_as_in_flashlight_which_leaves_transitions_out_there(tmp_path, twin, options) -> None:
    """Its decoder without a lexicon ranks by scores to which transitions are not added; ours adds them, see below."""
    arpa = tmp_path / "labels.arpa"
    grams = "".join(f"-{0.5 + i / 10}\t{label}\t-0.2\n" for i, label in enumerate(LABELS))
    arpa.write_text(
        f"\\data\\\nngram 1={len(LABELS) + 3}\nngram 2=2\n\n\\1-grams:\n-2\t<unk>\n-99\t<s>\t-0.3\n-1\t</s>\n{grams}"
        "\n\\2-grams:\n-0.1\ta b\n-0.3\t<s> b\n\n\\end\\\n",
        encoding="utf-8",
    )
    for seed, path in itertools.product(range(4), (None, arpa)):
        table = None if path is None else NgramTable.from_arpa(path)
        emissions, transitions = emissions_of(10, seed)
        search = twin(5, None, SILENCE, lexicon(table), ours(options), table, np.zeros((5, 5)))
        theirs = flashlight(path, emissions, transitions, options)
        assert theirs
        assert_same(decoded(search, emissions), [(score, labels, []) for score, labels, _ in theirs], [])


@pytest.mark.parametrize("seed", range(12))
def test_twins_agree_on_random_settings(arpa, seed) -> None:
    rng = random.Random(seed)
    table = rng.choice([None, NgramTable.from_arpa(arpa)])
    options = LexiconOptions(
        beam_size=rng.choice([1, 3, 10, 200]),
        top_labels=rng.choice([None, 2, 4]),
        beam_margin=rng.choice([3.0, 50.0]),
        lm_weight=rng.choice([0.0, 0.8]),
        word_score=rng.choice([0.0, 1.0]),
        unknown_score=rng.choice([-math.inf, -1.0]),
        silence_score=rng.choice([0.0, -0.5]),
        log_add=rng.random() < 0.5,
    )
    emissions, transitions = emissions_of(9, seed)
    arguments = (5, None, SILENCE, lexicon(table, rng.choice([None, WORDS])), options, table, transitions)
    theirs = decoded(ReferenceLexiconSearch(*arguments), emissions)
    assert_same(
        decoded(LexiconSearch(*arguments), emissions),
        [(one.score, one.labels.tolist(), [str(word) for word in one.words]) for one in theirs],
        [str(word) for word in range(6)],
    )


def most_words(labels: tuple[int, ...]) -> int | None:
    """The most words that the labels of all frames can be read as, None = no words; silence between words is free."""
    runs = [label for label, _ in itertools.groupby(labels)]
    found: list[int] = []

    def read(at: int, words: int) -> None:
        if at == len(runs):
            found.append(words)
            return
        if runs[at] == SILENCE:
            read(at + 1, words)
        for spelling in (numbers(one) for own in CLOSED.values() for one in own):
            if runs[at : at + len(spelling)] == spelling:
                read(at + len(spelling), words + 1)

    read(0, 0)
    return max(found, default=None)


@pytest.mark.parametrize("twin", [LexiconSearch, ReferenceLexiconSearch])
@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_finds_the_best_alignment_of_all(twin, seed) -> None:
    emissions, transitions = emissions_of(6, seed)
    options = LexiconOptions(beam_size=100_000, beam_margin=1e9, word_score=3.0)
    best = -math.inf
    for path in itertools.product(range(5), repeat=6):
        count = most_words(path)
        if count is not None:
            heard = sum(float(emissions[frame, label]) for frame, label in enumerate(path))
            after = sum(float(transitions[label, before]) for before, label in itertools.pairwise(path))
            best = max(best, heard + after + 3.0 * count)
    found = decoded(twin(5, None, SILENCE, lexicon(None, CLOSED), options, None, transitions), emissions)
    assert found[0].score == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("twin", [LexiconSearch, ReferenceLexiconSearch])
@pytest.mark.parametrize("seed", range(3))
def test_labels_alone_find_the_best_sequence_of_labels_of_all(arpa, twin, seed) -> None:
    """Labels in a row are words of the language model, said once however long they last."""
    table = NgramTable.from_arpa(arpa)
    labels = LexiconWords(None, [table.model.id_of(word) for word in ["a", "ab", "abb", "cab", "cc"]])
    emissions, transitions = emissions_of(5, seed)
    totals: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(5), repeat=5):
        runs = tuple(label for label, _ in itertools.groupby((SILENCE, *path)))[1:]
        heard = sum(float(emissions[frame, label]) for frame, label in enumerate(path))
        after = sum(float(transitions[label, before]) for before, label in itertools.pairwise(path))
        state, said = table.start_state, 0.0
        for label in runs:
            log_probs, states = table.score([state], [labels.ids[label]])
            state, said = int(states[0]), said + float(log_probs[0])
        totals[path] = heard + after + 0.9 * (said + float(table.end([state])[0]))
    options = LexiconOptions(beam_size=100_000, beam_margin=1e9, lm_weight=0.9)
    best = decoded(twin(5, None, SILENCE, labels, options, table, transitions), emissions)[0]
    path = max(totals, key=totals.__getitem__)
    assert best.score == pytest.approx(totals[path], abs=1e-4)
    assert best.labels.tolist() == [SILENCE, *path, SILENCE]


def test_without_transitions_worth_anything_repeats_are_still_told_without_a_blank() -> None:
    """Zeros are a matrix too: "b b" needs the label of repeats, and a label that goes on is said once."""
    emissions = np.full((5, 5), -9.0, dtype=np.float32)
    for frame, label in enumerate([*numbers("a b b |"), SILENCE]):
        emissions[frame, label] = 0.0
    for twin in (LexiconSearch, ReferenceLexiconSearch):
        best = decoded(twin(5, None, SILENCE, lexicon(None, WORDS), None, None, np.zeros((5, 5))), emissions)[0]
        assert list(WORDS)[best.words[0]] == "abb"
        assert best.score == 0.0
        free = decoded(twin(5, None, SILENCE, lexicon(None), None, None, np.zeros((5, 5))), emissions)[0]
        assert free.labels.tolist() == [SILENCE, *numbers("a b b |"), SILENCE, SILENCE]


def test_repeats_are_packed_as_flashlight_packs_them() -> None:
    assert packed_repeats([7, 7, 7, 1, 1, 7], [9]) == [7, 9, 7, 1, 9, 7]
    assert packed_repeats([7, 7, 7, 1, 1, 7], [9, 8]) == [7, 8, 1, 9, 7]
    assert packed_repeats([7, 7], []) == [7, 7]
    names = pytest.importorskip("flashlight.lib.text.dictionary")
    dictionary = names.Dictionary(["a", "b", "<1>", "<2>", "<3>"])
    rng = random.Random(0)
    for count in range(1, 4):
        for _ in range(50):
            spelling = [rng.choice([0, 0, 0, 1]) for _ in range(rng.randrange(1, 12))]
            assert packed_repeats(spelling, [2, 3, 4][:count]) == names.pack_replabels(spelling, dictionary, count)


def published() -> tuple[np.ndarray, np.ndarray, list[str], list[list[int]]]:
    """Emissions, transitions, words and packed spellings of flashlight's own test; its label of repeats comes last."""
    frames, labels = np.fromfile(shared_file("flashlight/TN.bin"), np.int32)
    emissions = np.fromfile(shared_file("flashlight/emission.bin"), np.float32).reshape(frames, labels)
    transitions = np.fromfile(shared_file("flashlight/transition.bin"), np.float32).reshape(labels, labels)
    letters = {name: label for label, name in enumerate(shared_file("flashlight/letters.lst").read_text().split())}
    lines = gzip.decompress(shared_file("flashlight/words.lst.gz").read_bytes()).decode().splitlines()
    entries = [line.split() for line in lines if line.strip()]
    spellings = [packed_repeats([letters[letter] for letter in spelling], [len(letters)]) for _, *spelling in entries]
    return emissions, transitions, [word for word, *_ in entries], spellings


def test_published_totals_of_flashlights_own_test() -> None:
    emissions, transitions, names, spellings = published()
    table = NgramTable.from_arpa(shared_file("flashlight/lm.arpa.gz"))
    words = LexiconWords(
        [*([one] for one in spellings), []], [table.model.id_of(w) for w in [*names, "<unk>"]], len(names)
    )
    options = LexiconOptions(
        beam_size=2500, beam_margin=100.0, lm_weight=2.0, lm_scale=BASE_10, word_score=2.0, silence_score=-1.0
    )
    found = decoded(LexiconSearch(29, None, 0, words, options, table, transitions), emissions)
    assert len(found) == 16
    totals = [-284.0998, -284.108, -284.119, -284.127, -284.296]
    np.testing.assert_allclose([one.score for one in found[:5]], totals, atol=5e-4)
    narrow = LexiconOptions(
        beam_size=10, beam_margin=100.0, lm_weight=2.0, lm_scale=BASE_10, word_score=2.0, silence_score=-1.0
    )
    arguments = (29, None, 0, words, narrow, table, transitions)
    theirs = decoded(ReferenceLexiconSearch(*arguments), emissions)
    assert_same(
        decoded(LexiconSearch(*arguments), emissions),
        [(one.score, one.labels.tolist(), [names[word] for word in one.words]) for one in theirs],
        names,
    )


@pytest.mark.parametrize("twin", [LexiconSearch, ReferenceLexiconSearch])
def test_bad_transitions_are_refused(twin) -> None:
    words = lexicon(None)
    for blank, transitions, said in (
        (0, np.zeros((5, 5)), "blank must be None"),
        (None, None, "blank must be a label"),
        (None, np.zeros((5, 4)), r"must be \[5, 5\], got \[5, 4\]"),
        (None, np.zeros(25), r"got \[25\]"),
        (None, np.full((5, 5), np.nan), "NaN or inf"),
        (None, np.full((5, 5), np.inf), "NaN or inf"),
    ):
        with pytest.raises(InvalidArgumentError, match=said):
            twin(5, blank, SILENCE, words, None, None, transitions)


def test_the_core_refuses_transitions_of_another_shape_or_beside_a_blank() -> None:
    """Whatever the caller says of them: the numbers would be read past their end."""
    search = LexiconSearch(5, None, SILENCE, lexicon(None), None, None, np.zeros((5, 5)))
    for change in ({"_transitions": np.zeros((5, 4), np.float32)}, {"_transitions": np.zeros(25, np.float32)}):
        search.__dict__.update(change)
        with pytest.raises(InvalidArgumentError, match="labels, labels"):
            search._made()
    search._transitions = None
    with pytest.raises(InvalidArgumentError, match="blank"):
        search._made()
    search._transitions, search._rules["blank"] = np.zeros((5, 5), np.float32), 1
    with pytest.raises(InvalidArgumentError, match="blank"):
        search._made()
