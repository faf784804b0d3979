"""N-gram models of words as `lm=` of the decoder: which files are such, what they add, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shallowfusion import FusionDecoder, fusion
from shallowfusion.demo.shipped import HERE, read_manifest
from shallowfusion.errors import InvalidArgumentError, VocabularyError
from shallowfusion.evaluation.word_errors import word_errors
from shallowfusion.ngrams import units
from shallowfusion.ngrams.arpa import write_arpa
from shallowfusion.ngrams.estimate import EstimateSettings, estimate
from shallowfusion.ngrams.table import NgramTable, word_log_probs
from shallowfusion.scorers.word_ngram import WordLanguage, is_of_words
from tests.shipped import ASR, MEDICAL, decoder
from tests.tiny import tiny_lm

CLIPS = read_manifest(HERE / "clips")[:4]
PATHS = [clip.path for clip in CLIPS]
TEXTS = [clip.text for clip in CLIPS]


@pytest.fixture(scope="module")
def words_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lm") / "words.arpa"
    write_arpa(estimate(units.words().split(TEXTS), EstimateSettings(order=2)).model, path)
    return path


@pytest.fixture(scope="module")
def fused(words_file: Path) -> FusionDecoder:
    return FusionDecoder.from_pretrained(ASR, words_file, device="cpu")


def test_an_arpa_file_of_words_is_one_of_words_and_one_of_pieces_of_pieces(fused, words_file: Path) -> None:
    assert isinstance(fused.language_models[0], WordLanguage)
    acoustic = decoder(with_lm=False).acoustic.scorer.vocabulary
    pieces = estimate(units.characters(leading_space=True).split(TEXTS), EstimateSettings(order=2)).model
    assert not is_of_words(pieces, acoustic)
    assert fused.source_names == ("asr", "lm")
    assert len(set(fused.fingerprints)) == 2


@pytest.mark.parametrize("policy", ["lm", "neutral", "asr_only"])
def test_the_part_is_the_score_of_the_words_and_of_the_end(fused, words_file: Path, policy: str) -> None:
    table = NgramTable.from_arpa(words_file)
    for result in fused.transcribe(PATHS, rule=fusion.static(0.5), end_policy=policy, n_best=3):
        for hypothesis in result.n_best:
            words = hypothesis.text.split()
            scores = word_log_probs(table, words, end=True).astype(float)
            wanted = scores[:-1].sum() - 10.0 * sum(word not in table.model.words for word in words)
            state = table.start_state
            for word in words:
                state = int(table.score([state], [table.model.id_of(word)])[1][0])
            if policy == "lm":
                wanted += scores[-1]
            elif policy == "neutral":
                wanted += float(table.dense(np.array([state]))[0].max())
            assert hypothesis.ended
            assert hypothesis.parts["lm"] == pytest.approx(wanted, abs=1e-3)
            assert hypothesis.total == pytest.approx(hypothesis.parts["asr"] + 0.5 * hypothesis.parts["lm"], abs=1e-3)


def test_it_corrects_words_and_weight_zero_changes_nothing(fused) -> None:
    plain = decoder(with_lm=False).transcribe(PATHS)
    silent = fused.transcribe(PATHS, rule=fusion.static(0.0))
    assert [(r.best.token_ids, r.best.total) for r in silent] == [(r.best.token_ids, r.best.total) for r in plain]
    heard = fused.transcribe(PATHS, rule=fusion.static(0.5), beam_size=10)
    before, after = (sum(word_errors(TEXTS, [r.text for r in own]).errors) for own in (plain, heard))
    assert after < before


def test_results_do_not_depend_on_the_batch_and_initial_steps_keep_it_silent(fused) -> None:
    rule = fusion.piecewise(0.5, initial_steps=12)
    together = fused.transcribe(PATHS, rule=rule)
    alone = [fused.transcribe([path], rule=rule)[0] for path in PATHS]
    assert [r.best.token_ids for r in together] == [r.best.token_ids for r in alone]
    first = together[0].best
    quiet = sum(token.parts["asr"] for token in first.tokens[:12])
    assert sum(token.total for token in first.tokens[:12]) == pytest.approx(quiet, abs=1e-3)


def test_it_goes_with_a_neural_model_and_stands_in_for_a_delayed_one(words_file: Path) -> None:
    both = FusionDecoder.from_pretrained(ASR, [MEDICAL, words_file], device="cpu")
    found = both.transcribe(PATHS[:2], rule=fusion.static([0.4, 0.2]))
    for result in found:
        parts = result.best.parts
        assert set(parts) == {"asr", "lm0", "lm1"}
        assert result.best.total == pytest.approx(parts["asr"] + 0.4 * parts["lm0"] + 0.2 * parts["lm1"], abs=1e-3)
    for result in both.transcribe(PATHS[:2], rule=fusion.delayed(0.5, interval=8, proxy_weight=0.3)):
        assert result.best.parts["lm1"] == pytest.approx(0, abs=1e-4)  # all of it is taken back
        assert result.best.total == pytest.approx(result.best.parts["asr"] + 0.5 * result.best.parts["lm0"], abs=1e-3)


def test_what_it_cannot_do_is_said(fused, words_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="n-grams of words"):
        fused.transcribe(PATHS[:1], rule=fusion.entropy_gate(1.0))
    with pytest.raises(InvalidArgumentError, match="end_factored"):
        fused.transcribe(PATHS[:1], end_policy="end_factored")
    with pytest.raises(InvalidArgumentError, match="name those that share its tokens first"):
        FusionDecoder.from_pretrained(ASR, [words_file, MEDICAL], device="cpu")
    capitals = estimate([text.upper().split() for text in TEXTS], EstimateSettings(order=2)).model
    with pytest.raises(VocabularyError, match="as the acoustic model writes it"):
        WordLanguage(capitals, decoder(with_lm=False).acoustic.scorer.vocabulary)
    with pytest.raises(VocabularyError):
        FusionDecoder(fused.acoustic, [tiny_lm()]).transcribe(PATHS[:1])
