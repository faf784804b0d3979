from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from shallowfusion.decoder import FusionDecoder
from shallowfusion.demo.corpus import MEDICAL_SOURCES, read_sentences
from shallowfusion.demo.shipped import HERE, read_manifest
from shallowfusion.errors import ModelError, VocabularyError
from shallowfusion.evaluation.word_errors import word_errors
from shallowfusion.fusion import static
from shallowfusion.ngrams import units
from shallowfusion.ngrams.arpa import write_arpa
from shallowfusion.ngrams.estimate import EstimateSettings, estimate
from shallowfusion.ngrams.model import NgramModel
from shallowfusion.ngrams.pieces import spell_piece
from shallowfusion.ngrams.table import NgramTable
from shallowfusion.scorers.base import Context
from shallowfusion.scorers.ngram import NgramScorer
from shallowfusion.text.vocabulary import Vocabulary
from tests.ngrams.conftest import SHARED_DATA
from tests.shipped import ASR, MEDICAL, clip, decoder

# Ids 2 and 6 are special, 5 is the end; two tokens spell "b", as added tokens of real tokenizers sometimes do.
VOCABULARY = Vocabulary((b" a", b"b", None, b"c", b"b", None, None, None), end_id=5, name="toy")


def piece_model(lines: list[list[bytes]], order: int = 3) -> NgramModel:
    return estimate([[spell_piece(piece) for piece in line] for line in lines], EstimateSettings(order=order)).model


@pytest.fixture
def scorer() -> NgramScorer:
    return NgramScorer(piece_model([[b" a", b"b", b"b"], [b" a", b" a"], [b"b"]]), VOCABULARY)


def test_columns_are_the_acoustic_tokens(scorer: NgramScorer) -> None:
    table = NgramTable(piece_model([[b" a", b"b", b"b"], [b" a", b" a"], [b"b"]]))
    ids = [table.model.id_of(word) for word in ("Ġa", "b", "</s>", "<unk>")]
    state = scorer.start(Context([scorer.prompt()] * 2, beam_size=2, max_new_tokens=5))
    assert state.logits.shape == (2, 6)  # up to the end token
    a, b, end, unknown = table.dense([table.start_state])[0, ids].tolist()
    wanted = [a, b, -np.inf, unknown, b, end]  # "c" is a piece the model lacks
    np.testing.assert_allclose(state.logits, [wanted] * 2, rtol=1e-6)
    np.testing.assert_allclose(scorer.end_scores(state), torch.log_softmax(state.logits, 1)[:, 5])


def test_scores_follow_forks_and_utterances_that_leave(scorer: NgramScorer) -> None:
    rng = np.random.default_rng(0)
    beam, histories = 3, [[[]] for _ in range(4)]
    state = scorer.start(Context([[]] * 4, beam, 9))
    for step in range(8):
        rows = len(histories[0])
        parents = rng.integers(0, rows, (len(histories), beam))
        state = scorer.fork(state, parents)
        histories = [[list(old[k]) for k in own] for old, own in zip(histories, parents, strict=True)]
        if step in (2, 5):
            order = [2, 0] if step == 5 else [3, 1, 2]
            state = scorer.keep(state, order)
            histories = [histories[i] for i in order]
        tokens = rng.choice([0, 1, 3, 4, -1], (len(histories), beam))
        logits, state = scorer.score(state, tokens)
        for history, row in zip(histories, tokens, strict=True):
            for own, token in zip(history, row.tolist(), strict=True):
                own += [token] if token >= 0 else []
        prompts = [history for own in histories for history in own]
        alone = scorer.start(Context(prompts, 1, 9)).logits
        assert logits.shape == (len(prompts), 6)
        assert torch.equal(logits, alone)


def test_models_of_other_units_are_refused_and_gaps_are_told(caplog: pytest.LogCaptureFixture) -> None:
    words = estimate([["the", "cat", "b"], ["sat"]], EstimateSettings(order=2)).model
    with pytest.raises(VocabularyError, match=r"3 of its 4 words.*build-ngram --units tokens toy"):
        NgramScorer(words, VOCABULARY)
    with caplog.at_level(logging.WARNING):
        NgramScorer(piece_model([[b" a", b"b"]]), VOCABULARY)
    assert "1 of its 3 pieces are scored as <unk>" in caplog.text


def test_plain_characters_with_a_space_word_are_pieces_too() -> None:
    vocabulary = Vocabulary((b" ", b"a", b"b", None), end_id=3, name="letters")
    lines = ["a b", "ab a", "b"]
    plain = estimate(units.characters(leading_space=True).split(lines), EstimateSettings(order=3)).model
    spelled = piece_model([[bytes([byte]) for byte in (" " + line).encode()] for line in lines])
    states = [NgramScorer(model, vocabulary).start(Context([[], [0], [0, 1]], 1, 1)) for model in (plain, spelled)]
    torch.testing.assert_close(states[0].logits, states[1].logits)


def character_file(path: Path, lines: list[str], order: int = 3) -> Path:
    tokens = units.tokens(ASR)
    write_arpa(estimate(tokens.split(lines), EstimateSettings(order=order), tokens.vocabulary).model, path)
    return path


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [entry.text for entry in read_manifest(HERE / "clips")]
    return character_file(tmp_path_factory.mktemp("lm") / "small.arpa.gz", texts)


def test_weight_zero_is_the_acoustic_model_to_the_bit(small_file: Path) -> None:
    paths = [clip(i) for i in range(4)]
    with_lm = FusionDecoder.from_pretrained(ASR, small_file, device="cpu")
    # asr_only: the one end policy under which the acoustic model's numbers are not even rearranged.
    for names in ({"end_policy": "asr_only"}, {"end_policy": "lm"}):
        found = with_lm.transcribe(paths, lm_weight=0.0, n_best=3, **names)
        alone = decoder(with_lm=False).transcribe(paths, n_best=3)
        for ours, plain in zip(found, alone, strict=True):
            assert [h.token_ids for h in ours.n_best] == [h.token_ids for h in plain.n_best]
            assert [h.total for h in ours.n_best] == [h.total for h in plain.n_best]


def test_parts_are_the_scores_of_the_table(small_file: Path) -> None:
    found = FusionDecoder.from_pretrained(ASR, small_file, device="cpu").transcribe([clip(1)], lm_weight=0.3)[0]
    best = found.n_best[0]
    table, state = NgramTable.from_arpa(small_file), NgramTable.from_arpa(small_file).start_state
    vocabulary = decoder(with_lm=False).acoustic.scorer.vocabulary
    wanted = []
    for token in best.token_ids:
        dense = table.dense([state])[0].astype(float)
        pieces = np.exp(np.delete(dense, [table.model.begin_word, table.model.unknown_word])).sum()
        word = table.model.id_of(spell_piece(vocabulary.tokens[token]))
        wanted.append(dense[word] - np.log(pieces))
        state = int(table.score([state], [word])[1][0])
    np.testing.assert_allclose([t.parts["lm"] for t in best.tokens][: len(wanted)], wanted, atol=1e-4)


def test_an_ngram_model_goes_with_a_neural_one(small_file: Path) -> None:
    both = FusionDecoder.from_pretrained(ASR, [small_file, MEDICAL], device="cpu")
    found = both.transcribe([clip(0)], rule=static([0.1, 0.2]), end_policy="lm", length_penalty=0.0)[0].n_best[0]
    assert set(found.parts) == {"asr", "lm0", "lm1"}
    weighted = found.parts["asr"] + 0.1 * found.parts["lm0"] + 0.2 * found.parts["lm1"]
    assert found.total == pytest.approx(weighted, abs=1e-3)


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a file"):
        FusionDecoder.from_pretrained(ASR, tmp_path / "nowhere.arpa", device="cpu")
    (tmp_path / "lm.arpa").write_text("no model", encoding="utf-8")
    with pytest.raises(ModelError, match="an ARPA file"):
        FusionDecoder.from_pretrained(ASR, tmp_path / "lm.arpa", device="cpu")


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the shared texts are not here")
def test_characters_of_medical_text_lower_word_errors(tmp_path: Path) -> None:
    clips = read_manifest(HERE / "dev")
    lines = [sentence.text for sentence in read_sentences(SHARED_DATA, MEDICAL_SOURCES, speakable=False)]
    path = character_file(tmp_path / "medical.arpa.gz", lines[:15000], order=5)
    references, paths = [entry.text for entry in clips], [entry.path for entry in clips]
    alone = decoder(with_lm=False).transcribe(paths)
    fused = FusionDecoder.from_pretrained(ASR, path, device="cpu").transcribe(paths, lm_weight=0.4, asr_temperature=2.0)
    before, after = (sum(word_errors(references, [r.text for r in found]).errors) for found in (alone, fused))
    assert after < 0.8 * before
