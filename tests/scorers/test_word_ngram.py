from __future__ import annotations

import numpy as np
import pytest

from shallowfusion.audio.reading import read_audio
from shallowfusion.config import BeamSettings
from shallowfusion.demo.shipped import HERE, read_manifest
from shallowfusion.features.log_mel import log_mel
from shallowfusion.fusion import static
from shallowfusion.ngrams.estimate import EstimateSettings, estimate
from shallowfusion.ngrams.table import NgramTable, word_log_probs
from shallowfusion.ngrams.words import WordNgram
from shallowfusion.scorers.base import Context
from shallowfusion.scorers.word_ngram import WordNgramScorer
from shallowfusion.search.loop import SearchOutcome, SearchPlan, StageClock, search
from shallowfusion.values import Unmapped
from tests.shipped import decoder

CLIPS = read_manifest(HERE / "clips")[:4]
TABLE = NgramTable(estimate([clip.text.split() for clip in CLIPS], EstimateSettings(order=2)).model)


def decode(weight: float | None, unk_score_offset: float = -2.0, clips: int = 4) -> list[SearchOutcome]:
    acoustic = decoder(with_lm=False).acoustic
    features = log_mel([read_audio(clip.path, 16000) for clip in CLIPS[:clips]], acoustic.features)
    prefix = [acoustic.tokens.start, acoustic.tokens.no_timestamps]
    plan = SearchPlan(
        BeamSettings(beam_size=3, end_ids=(acoustic.tokens.end,), max_new_tokens=150),
        static(()),
        (None,),
        (Unmapped("neutral"),),
        suppressed=acoustic.tokens.suppressed,
    )
    context = Context([prefix] * clips, 3, 150, acoustic.scorer.encode(features))
    words = WordNgram(TABLE, acoustic.scorer.vocabulary.tokens, unk_score_offset=unk_score_offset)
    late = [] if weight is None else [WordNgramScorer(words, acoustic.tokens.end, clips, weight)]
    return search([acoustic.scorer], [context], ["asr"], plan, StageClock(), late)


def text_of(token_ids: tuple[int, ...]) -> str:
    return decoder(with_lm=False).acoustic.tokenizer.decode(list(token_ids), skip_special_tokens=True)


def test_weight_zero_changes_no_bit() -> None:
    for with_source, without in zip(decode(0.0), decode(None), strict=True):
        found = [(h.token_ids, h.total) for h in with_source.hypotheses]
        assert found == [(h.token_ids, h.total) for h in without.hypotheses]


def test_parts_sum_to_the_score_of_the_words() -> None:
    for outcome in decode(0.3):
        for hypothesis in outcome.hypotheses:
            words = text_of(hypothesis.token_ids).split()
            wanted = float(word_log_probs(TABLE, words, end=hypothesis.ended).astype(float).sum())
            wanted += -2.0 * sum(word not in TABLE.model.words for word in words)
            assert hypothesis.ended
            assert hypothesis.parts[:, 1].sum() == pytest.approx(wanted, abs=1e-3)
            total = hypothesis.parts[:, 0].sum() + 0.3 * hypothesis.parts[:, 1].sum()
            assert hypothesis.total == pytest.approx(total, abs=1e-3)


def test_utterances_that_leave_take_their_state_with_them() -> None:
    together, alone = decode(0.3), decode(0.3, clips=1)
    assert len({len(outcome.hypotheses[0].token_ids) for outcome in together}) > 1
    assert alone[0].hypotheses[0].token_ids == together[0].hypotheses[0].token_ids
    np.testing.assert_allclose(alone[0].hypotheses[0].total, together[0].hypotheses[0].total, atol=1e-3)


def test_known_words_win() -> None:
    plain = [text_of(outcome.hypotheses[0].token_ids).split() for outcome in decode(None)]
    fused = [text_of(outcome.hypotheses[0].token_ids).split() for outcome in decode(0.5)]
    strangers = [sum(word not in TABLE.model.words for words in texts for word in words) for texts in (plain, fused)]
    assert strangers[1] < strangers[0]
