"""Language models of other kinds behind the pyctcdecode front: KenLM's binaries and models, several at once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from shallowfusion.compat import pyctcdecode as ours
from shallowfusion.errors import (
    InvalidArgumentError,
)
from tests.compat.test_pyctcdecode import BUNNY_LABELS, assert_same_beams, random_logits
from tests.ctc.conftest import shared_file

KENLM = Path(__file__).parents[1] / "ngrams" / "kenlm"


@pytest.mark.parametrize("name", ["probing.bin", "trie.bin"])
@pytest.mark.parametrize("boundary", [True, False])
def test_kenlm_binaries_are_read_as_pyctcdecode_reads_them(
    theirs: Any, name: str, boundary: bool, tmp_path: Path
) -> None:
    unigrams = ["bunny", "bugs", "sun", "snug", "zebra"]
    given = (BUNNY_LABELS, str(KENLM / name), unigrams, 0.7, 1.2, -5.0, boundary)
    own, other = ours.build_ctcdecoder(*given), theirs.build_ctcdecoder(*given)
    plain = ours.build_ctcdecoder(BUNNY_LABELS, KENLM / "words.arpa", *given[2:])
    own.save_to_dir(tmp_path)
    again = ours.BeamSearchDecoderCTC.load_from_dir(tmp_path)
    assert (tmp_path / "language_model" / name).read_bytes() == (KENLM / name).read_bytes()
    for seed in range(4):
        logits = random_logits(seed, 20, len(BUNNY_LABELS))
        found = own.decode_beams(logits, beam_width=30)
        assert_same_beams(found, other.decode_beams(logits, beam_width=30))
        assert_same_beams(found, plain.decode_beams(logits, beam_width=30))
        assert [beam[0] for beam in found] == [beam[0] for beam in again.decode_beams(logits, beam_width=30)]
        assert own.decode(logits) == other.decode(logits)
    first = own.decode_beams(random_logits(1, 12, len(BUNNY_LABELS)))[0]
    before = theirs.build_ctcdecoder(*given).decode_beams(random_logits(1, 12, len(BUNNY_LABELS)))[0]
    second = random_logits(2, 12, len(BUNNY_LABELS))
    assert_same_beams(
        own.decode_beams(second, lm_start_state=first.last_lm_state),
        other.decode_beams(second, lm_start_state=before[1]),
    )


def test_models_of_kenlm_are_taken_as_they_are() -> None:
    kenlm = pytest.importorskip("kenlm")
    for name in ("trie.bin", "words.arpa"):
        model = ours.LanguageModel(kenlm.Model(str(KENLM / name)))
        assert model.order == 3
        assert {"bunny", "bugs", "élan"} < model.known_words
    with pytest.raises(InvalidArgumentError, match=r"a kenlm\.Model or a table, got int"):
        ours.LanguageModel(3)


@pytest.mark.parametrize("boundaries", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("hotwords", [None, ["snug"]])
def test_several_models_score_as_pyctcdecodes_do(theirs: Any, boundaries: tuple[bool, bool], hotwords: Any) -> None:
    kenlm = pytest.importorskip("kenlm")
    bunny = str(shared_file("pyctcdecode/bugs_bunny_kenlm.arpa"))
    models: list[list[Any]] = [[], []]
    settings = ((["bunny", "bugs"], 0.7, 1.2, -5.0), (["bugs", "sun", "snug", "bunny"], 0.3, 2.0, -8.0))
    for path, own, boundary in zip((bunny, KENLM / "words.arpa"), settings, boundaries, strict=True):
        models[0].append(ours.LanguageModel(str(path), *own, boundary))
        models[1].append(theirs.LanguageModel(kenlm.Model(str(path)), *own, boundary))
    both = ours.MultiLanguageModel(models[0])
    own = ours.BeamSearchDecoderCTC(ours.Alphabet.build_alphabet(BUNNY_LABELS), both)
    alphabet = theirs.Alphabet.build_alphabet(BUNNY_LABELS)
    other = theirs.BeamSearchDecoderCTC(alphabet, theirs.language_model.MultiLanguageModel(models[1]))
    assert both.order == 3
    for seed in range(6):
        logits = random_logits(seed, 20, len(BUNNY_LABELS))
        for more in ({"beam_width": 30}, {"beam_width": 10, "prune_history": True}):
            beams = [decoder.decode_beams(logits, hotwords=hotwords, **more) for decoder in (own, other)]
            assert_same_beams(*beams)
        assert own.decode(logits, hotwords=hotwords) == other.decode(logits, hotwords=hotwords)
    with pytest.raises(InvalidArgumentError, match="cannot be saved"):
        both.save_to_dir("anywhere")


def test_reset_params_leaves_several_models_alone(caplog: pytest.LogCaptureFixture) -> None:
    path = KENLM / "words.arpa"
    both = ours.MultiLanguageModel([ours.LanguageModel(path), ours.LanguageModel(path, beta=0.5)])
    decoder = ours.BeamSearchDecoderCTC(ours.Alphabet.build_alphabet(BUNNY_LABELS), both)
    before = decoder.decode_beams(random_logits(0, 20, len(BUNNY_LABELS)))
    with caplog.at_level(logging.WARNING):
        decoder.reset_params(alpha=3.0)
    assert "stay as they are" in caplog.text
    assert [beam[-1] for beam in before] == [b[-1] for b in decoder.decode_beams(random_logits(0, 20, 8))]
    assert both.beta == 1.0
