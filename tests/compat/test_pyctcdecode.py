"""Our pyctcdecode front against pyctcdecode itself and the answers it publishes."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shallowfusion.compat import pyctcdecode as ours
from shallowfusion.errors import (
    AcousticScoresError,
    InvalidArgumentError,
    ModelError,
    VocabularyError,
)
from tests.ctc.conftest import LIBRI_LABELS, LIBRI_TEXT, libri, log_softmax, ocr, shared_file

BUNNY_LABELS = [" ", "b", "g", "n", "s", "u", "y", ""]
WORDS = ["bugs", "bunny", "good", "deal", "remember", "what", "mind", "upon", "doubt", "shall"]


def bunny_logits(text: str = "bunny bunny", other: str = "bugs bunny") -> np.ndarray:
    """Logits whose best path is `text`, with `other` a little behind."""
    logits = np.full((22, len(BUNNY_LABELS)), -6.0)
    for which, (words, height) in enumerate(((text, 4.0), (other, 3.0))):
        for place, letter in enumerate(words):
            logits[2 * place, BUNNY_LABELS.index(letter)] = max(height, logits[2 * place, BUNNY_LABELS.index(letter)])
            logits[2 * place + 1, 7] = 4.0
        logits[2 * len(words) :, 7] = 4.0 - which
    return logits


def random_logits(seed: int, frames: int, labels: int, peak: float = 6.0) -> np.ndarray:
    """Noise with one or two labels that stand out in each frame, blank (last) most often."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(frames, labels))
    for _ in range(2):
        chosen = np.where(rng.random(frames) < 0.4, labels - 1, rng.integers(0, labels, frames))
        logits[np.arange(frames), chosen] += rng.random(frames) * peak
    return logits


def assert_same_beams(own: Any, other: Any, tolerance: float = 1e-3) -> None:
    """Equal texts and scores in equal order; ties may stand either way."""
    assert [beam[0] for beam in own][:1] == [beam[0] for beam in other][:1]
    scores = [{beam[0]: (beam[-2], beam[-1]) for beam in beams} for beams in (own, other)]
    assert scores[0].keys() == scores[1].keys()
    for text, (logit_score, lm_score) in scores[0].items():
        assert logit_score == pytest.approx(scores[1][text][0], abs=tolerance)
        assert lm_score == pytest.approx(scores[1][text][1], abs=tolerance)


def assert_same_frames(own: Any, other: Any) -> None:
    """Equal words with equal frames in every hypothesis."""
    found, wanted = ({beam[0]: beam[-3] for beam in beams} for beams in (own, other))
    for text, frames in found.items():
        assert frames == [(word, (int(start), int(end))) for word, (start, end) in wanted[text]], text


def test_published_bugs_bunny_cases() -> None:
    path = shared_file("pyctcdecode/bugs_bunny_kenlm.arpa")
    for alpha, text in ((0.0, "bunny bunny"), (1.0, "bugs bunny")):
        decoder = ours.build_ctcdecoder(BUNNY_LABELS, str(path), alpha=alpha, beta=0.0)
        assert decoder.decode(bunny_logits()) == text
        decoder.reset_params(alpha=1.0 - alpha)
        assert decoder.decode(bunny_logits()) != text


def test_librispeech_sentence_and_its_frames() -> None:
    decoder = ours.build_ctcdecoder(list(LIBRI_LABELS))
    assert decoder.decode(libri()) == LIBRI_TEXT
    beam = decoder.decode_beams(libri())[0]
    assert beam.text == LIBRI_TEXT
    assert [word for word, _ in beam.text_frames] == LIBRI_TEXT.split()
    assert beam.last_lm_state is None
    assert beam.logit_score == beam.lm_score


def test_librispeech_beams_equal_pyctcdecode(theirs: Any) -> None:
    own = ours.build_ctcdecoder(list(LIBRI_LABELS)).decode_beams(libri())
    other = theirs.build_ctcdecoder(list(LIBRI_LABELS)).decode_beams(libri())
    assert_same_beams(own, other)
    assert_same_frames(own, other)


def test_the_published_logits_as_they_are_loaded_are_whole_numbers_and_decode_alike(theirs: Any) -> None:
    raw = np.array(json.loads(shared_file("pyctcdecode/libri_logits.json").read_text(encoding="utf-8")))
    assert raw.dtype.kind == "i"
    own, other = (module.build_ctcdecoder(list(LIBRI_LABELS)) for module in (ours, theirs))
    assert own.decode(raw) == other.decode(raw) == LIBRI_TEXT
    assert_same_beams(own.decode_beams(raw), other.decode_beams(raw))
    said = np.eye(len(LIBRI_LABELS), dtype=np.uint8)[[1, 28, 2]]  # probabilities of one and zero
    assert own.decode(said) == other.decode(said) == "ab"


SETTINGS: list[dict[str, Any]] = [
    {},
    {"beam_width": 5},
    {"beam_width": 20, "prune_history": True},
    {"beam_prune_logp": -4.0, "token_min_logp": -3.0},
    {"beam_width": 30, "token_min_logp": -8.0, "beam_prune_logp": -30.0},
    {"hotwords": ["bun", "sun gun"], "hotword_weight": 3.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("with_lm", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_random_emissions_equal_pyctcdecode(theirs: Any, settings: dict[str, Any], with_lm: bool, seed: int) -> None:
    path = str(shared_file("pyctcdecode/bugs_bunny_kenlm.arpa")) if with_lm else None
    arguments: dict[str, Any] = {"alpha": 0.6, "beta": 1.0, "unk_score_offset": -4.0} if with_lm else {}
    logits = random_logits(seed, 30 + 7 * seed, len(BUNNY_LABELS))
    decoders = [module.build_ctcdecoder(BUNNY_LABELS, path, **arguments) for module in (ours, theirs)]
    own, other = (decoder.decode_beams(logits, **settings) for decoder in decoders)
    assert_same_beams(own, other)
    assert_same_frames(own, other)


@pytest.mark.parametrize("boundary", [True, False])
def test_flashlight_model_on_the_librispeech_sentence_equals_pyctcdecode(
    theirs: Any, boundary: bool, tmp_path: Path
) -> None:
    import gzip

    arpa = tmp_path / "lm.arpa"
    arpa.write_bytes(gzip.decompress(shared_file("flashlight/lm.arpa.gz").read_bytes()))
    known = [line.split("\t")[1] for line in arpa.read_text(encoding="utf-8").splitlines() if line.count("\t") >= 1]
    words = [word for word in known if " " not in word][:150_000]
    decoders = [
        module.build_ctcdecoder(list(LIBRI_LABELS), str(arpa), words, 0.5, 1.5, lm_score_boundary=boundary)
        for module in (ours, theirs)
    ]
    noisy = libri() + np.random.default_rng(0).normal(size=libri().shape) * 1.5
    for logits in (libri(), noisy):
        own, other = (decoder.decode_beams(logits) for decoder in decoders)
        assert_same_beams(own, other)
        assert_same_frames(own, other)
        assert decoders[0].decode(logits) == decoders[1].decode(logits)


@pytest.mark.parametrize("space", [0.3, 0.45, 0.55, 0.7])
def test_texts_with_and_without_a_last_space_are_charged_as_by_pyctcdecode(theirs: Any, space: float) -> None:
    """Of the equal texts it keeps the one met last, and charges a word more if that one ends with a space."""
    path = str(shared_file("pyctcdecode/bugs_bunny_kenlm.arpa"))
    probs = np.full((6, len(BUNNY_LABELS)), 0.001)
    for frame, letter in enumerate("bugs"):
        probs[frame, BUNNY_LABELS.index(letter)] = 0.99
    probs[4:, 0], probs[4:, 7] = space, 0.99 - space
    own, other = (
        module.build_ctcdecoder(BUNNY_LABELS, path, alpha=0.6).decode_beams(np.log(probs)) for module in (ours, theirs)
    )
    assert_same_beams(own, other)
    assert_same_frames(own, other)


def test_word_pieces_equal_pyctcdecode(theirs: Any) -> None:
    """With room for all: ours merges equal texts among what can stay in the beam, theirs among all extensions."""
    labels = ["<unk>", "▁bu", "gs", "nn", "y", "▁", "b", "u", "n", "▁bun", "ny"]
    path = str(shared_file("pyctcdecode/bugs_bunny_kenlm.arpa"))
    for seed in range(2):
        logits = random_logits(seed, 6, len(labels) + 1)
        logits[:, [0, 5]] -= 30.0  # pyctcdecode lets the break after <unk> and a lone "▁" leak into other beams
        for lm in (None, path):
            own, other = (
                module.build_ctcdecoder(labels, lm).decode_beams(logits, beam_width=100_000, beam_prune_logp=-600.0)
                for module in (ours, theirs)
            )
            assert_same_beams(own, other)


def test_stored_lines_equal_pyctcdecode(theirs: Any) -> None:
    labels, lines, _ = ocr()
    renamed = [label if label != " " or number == 96 else "\u00a0" for number, label in enumerate(labels)]
    decoders = [module.build_ctcdecoder(renamed) for module in (ours, theirs)]
    for line in lines[::15]:
        logits = log_softmax(line.astype(np.float64))
        own, other = (decoder.decode_beams(logits) for decoder in decoders)
        assert_same_beams(own, other)
        assert_same_frames(own, other)


def test_stateful_decoding_equals_pyctcdecode(theirs: Any) -> None:
    path = str(shared_file("pyctcdecode/bugs_bunny_kenlm.arpa"))
    beams = []
    for module in (ours, theirs):
        decoder = module.build_ctcdecoder(BUNNY_LABELS, path, lm_score_boundary=True)
        first = decoder.decode_beams(bunny_logits("bugs", "bugs"))[0]
        beams.append(decoder.decode_beams(bunny_logits(), lm_start_state=first[1]))
    assert_same_beams(*beams)
    assert_same_frames(*beams)
    assert isinstance(beams[0][0].last_lm_state, int)


def test_batches_equal_single_calls() -> None:
    decoder = ours.build_ctcdecoder(BUNNY_LABELS)
    several = [random_logits(seed, 10 + 5 * seed, len(BUNNY_LABELS)) for seed in range(5)]
    assert decoder.decode_batch(None, several) == [decoder.decode(logits) for logits in several]
    batch = decoder.decode_beams_batch(None, several, hotwords=["sun"])
    for own, logits in zip(batch, several, strict=True):
        single = decoder.decode_beams(logits, hotwords=["sun"])
        assert [(beam.text, beam.lm_score, beam.text_frames) for beam in own] == [
            (beam.text, beam.lm_score, beam.text_frames) for beam in single
        ]
    assert decoder.decode_batch(None, []) == []


@pytest.mark.parametrize("with_lm", [False, True])
@pytest.mark.parametrize("boundary", [False, True])
def test_no_frames_say_and_score_what_they_do_in_pyctcdecode(theirs: Any, with_lm: bool, boundary: bool) -> None:
    path = str(shared_file("pyctcdecode/bugs_bunny_kenlm.arpa")) if with_lm else None
    own, other = (
        module.build_ctcdecoder(BUNNY_LABELS, path, alpha=0.6, beta=1.0, lm_score_boundary=boundary)
        for module in (ours, theirs)
    )
    nothing = np.zeros((0, len(BUNNY_LABELS)))
    assert own.decode(nothing) == other.decode(nothing) == ""
    for settings in ({}, {"hotwords": ["bugs"], "token_min_logp": -100.0}):
        assert_same_beams(own.decode_beams(nothing, **settings), other.decode_beams(nothing, **settings))
        assert_same_frames(own.decode_beams(nothing, **settings), other.decode_beams(nothing, **settings))


def test_an_utterance_without_numbers_or_frames_leaves_the_others_of_the_batch_alone(caplog) -> None:
    decoder = ours.build_ctcdecoder(BUNNY_LABELS)
    good = [random_logits(seed, 20, len(BUNNY_LABELS)) for seed in range(2)]
    broken = random_logits(3, 20, len(BUNNY_LABELS))
    broken[7, 2] = math.nan
    given = [good[0], broken, np.zeros((0, len(BUNNY_LABELS))), good[1]]
    assert decoder.decode_batch(None, given) == [decoder.decode(good[0]), "", "", decoder.decode(good[1])]
    assert caplog.text.count("utterance 1 was not decoded") == 1
    assert "NaN" in caplog.text
    beams = decoder.decode_beams_batch(None, given)
    assert [[tuple(beam) for beam in own] for own in beams[1:3]] == [
        [("", [], -math.inf, -math.inf)],
        [("", [], 0.0, 0.0)],
    ]
    for own, logits in ((beams[0], good[0]), (beams[3], good[1])):
        assert [beam.lm_score for beam in own] == [beam.lm_score for beam in decoder.decode_beams(logits)]
    with pytest.raises(InvalidArgumentError, match="logits"):  # not a bad recording: a wrong call
        decoder.decode_batch(None, [good[0], good[1][:, :5]])


def test_hotwords_pull_their_words() -> None:
    decoder = ours.build_ctcdecoder(BUNNY_LABELS)
    assert decoder.decode(bunny_logits()) == "bunny bunny"
    assert decoder.decode(bunny_logits(), hotwords=["bugs"], hotword_weight=20.0) == "bugs bunny"


def test_probabilities_logits_and_tensors_are_understood() -> None:
    decoder = ours.build_ctcdecoder(BUNNY_LABELS)
    logits = random_logits(2, 40, len(BUNNY_LABELS))
    expected = decoder.decode_beams(logits)[0]
    for given in (np.exp(log_softmax(logits)), log_softmax(logits), torch.from_numpy(logits), logits + 100):
        beam = decoder.decode_beams(given)[0]
        assert beam.text == expected.text
        assert beam.lm_score == pytest.approx(expected.lm_score, abs=1e-4)


@pytest.mark.parametrize("name", ["decode", "decode_batch", "decode_beams", "decode_beams_batch", "reset_params"])
def test_names_and_defaults_are_pyctcdecode_s(theirs: Any, name: str) -> None:
    def arguments(function: Any) -> dict[str, Any]:
        return {key: value.default for key, value in inspect.signature(function).parameters.items()}

    assert arguments(getattr(ours.BeamSearchDecoderCTC, name)) == arguments(getattr(theirs.BeamSearchDecoderCTC, name))
    assert arguments(ours.build_ctcdecoder) == arguments(theirs.build_ctcdecoder)


ALPHABETS = [
    [*"abc", " ", ""],
    ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABC"],
    ["_", *"ab", " "],
    [*"abc"],
    ["[PAD]", "[UNK]", "the", "##re", "a"],
    ["<unk>", "▁the", "re", "▁a"],
]


@pytest.mark.parametrize("labels", ALPHABETS, ids=str)
def test_alphabets_equal_pyctcdecode(theirs: Any, labels: list[str]) -> None:
    own, other = ours.Alphabet.build_alphabet(labels), theirs.Alphabet.build_alphabet(labels)
    assert (own.labels, own.is_bpe) == (other.labels, other.is_bpe)
    assert ours.Alphabet.loads(own.dumps()).labels == own.labels


@pytest.mark.parametrize("with_lm", [False, True])
def test_saved_decoders_are_read_by_both_libraries(theirs: Any, with_lm: bool, tmp_path: Path) -> None:
    path = str(shared_file("pyctcdecode/bugs_bunny_kenlm.arpa")) if with_lm else None
    arguments: dict[str, Any] = {"alpha": 0.8, "beta": 0.25, "unk_score_offset": -3.0} if with_lm else {}
    logits = random_logits(5, 40, len(BUNNY_LABELS))
    for writer in (ours, theirs):
        decoder = writer.build_ctcdecoder(BUNNY_LABELS, path, **arguments)
        folder = tmp_path / writer.__name__
        folder.mkdir()
        decoder.save_to_dir(str(folder))
        own, other = (module.BeamSearchDecoderCTC.load_from_dir(str(folder)) for module in (ours, theirs))
        assert_same_beams(own.decode_beams(logits), decoder.decode_beams(logits))
        assert_same_beams(other.decode_beams(logits), decoder.decode_beams(logits))


def test_saved_tables_and_packed_files_are_written_as_arpa(tmp_path: Path) -> None:
    import gzip

    path = shared_file("pyctcdecode/bugs_bunny_kenlm.arpa")
    packed = tmp_path / "lm.arpa.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    logits = random_logits(6, 30, len(BUNNY_LABELS))
    wanted = ours.build_ctcdecoder(BUNNY_LABELS, path, ["bugs"]).decode_beams(logits)
    ours.build_ctcdecoder(BUNNY_LABELS, packed, ["bugs"]).save_to_dir(tmp_path / "new" / "folder")
    assert (tmp_path / "new/folder/language_model/lm.arpa").is_file()
    assert_same_beams(ours.BeamSearchDecoderCTC.load_from_dir(tmp_path / "new/folder").decode_beams(logits), wanted)


def test_broken_decoder_folders_are_refused(tmp_path: Path) -> None:
    load = ours.BeamSearchDecoderCTC.load_from_dir
    with pytest.raises(ModelError, match=r"alphabet\.json cannot be read"):
        load(tmp_path)
    ours.build_ctcdecoder(BUNNY_LABELS, shared_file("pyctcdecode/bugs_bunny_kenlm.arpa")).save_to_dir(tmp_path)
    folder = tmp_path / "language_model"
    attributes = (folder / "attrs.json").read_text(encoding="utf-8")
    for bad in ("{", "[]", "{}", attributes.replace("true", "3"), attributes.replace("0.5", "NaN")):
        (folder / "attrs.json").write_text(bad, encoding="utf-8")
        with pytest.raises(ModelError, match=r"attrs\.json"):
            load(tmp_path)
    (folder / "attrs.json").write_text(attributes, encoding="utf-8")
    (folder / "bugs_bunny_kenlm.arpa").rename(folder / "lm.bin")
    with pytest.raises(ModelError, match="no KenLM binary"):
        load(tmp_path)
    (folder / "other").write_text("", encoding="utf-8")
    with pytest.raises(ModelError, match="one ARPA file"):
        load(tmp_path)
    (folder / "unigrams.txt").write_bytes(b"\xff")
    with pytest.raises(ModelError, match="unigrams"):
        load(tmp_path)
    for bad in ("{}", "{", '{"labels": 3, "is_bpe": false}', '{"labels": [3], "is_bpe": false}'):
        with pytest.raises(VocabularyError, match="stored alphabet"):
            ours.Alphabet.loads(bad)
    with pytest.raises(InvalidArgumentError, match="2 to 32 models"):
        ours.MultiLanguageModel([])


def test_bad_input_is_refused() -> None:
    decoder = ours.build_ctcdecoder(BUNNY_LABELS)
    for bad in (np.zeros((4, 7)), np.zeros(8), np.zeros((1, 4, 8)), np.zeros((4, 8), bool), "logits", None):
        with pytest.raises(InvalidArgumentError, match="logits"):
            decoder.decode(bad)
    with pytest.raises(AcousticScoresError, match="NaN"):
        decoder.decode(np.full((4, 8), math.nan))
    for settings in ({"beam_width": 0}, {"beam_prune_logp": 1.0}, {"hotword_weight": math.nan}):
        with pytest.raises(InvalidArgumentError):
            decoder.decode(np.zeros((4, 8)), **settings)
    with pytest.raises(VocabularyError, match="twice"):
        ours.build_ctcdecoder(["a", "a", ""])
    with pytest.raises(VocabularyError, match="spaces"):
        ours.build_ctcdecoder(["▁a", " b", ""])
    with pytest.raises(ModelError, match="ARPA"):
        ours.build_ctcdecoder(BUNNY_LABELS, "model.bin")
    with pytest.raises(VocabularyError, match="keys"):
        ours.Alphabet.loads("{}")
