"""A language model that is subtracted in the internal one's place: density ratio and LODR."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from shallowfusion import FusionDecoder, fusion
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.ngrams.arpa import write_arpa
from shallowfusion.ngrams.estimate import EstimateSettings, estimate
from shallowfusion.ngrams.units import tokens
from shallowfusion.scorers.base import Context
from shallowfusion.scorers.loading import load_language_model
from shallowfusion.scorers.source_domain import SourceDomainScorer
from tests.shipped import ASR, clip, decoder
from tests.tiny import random_encoder_output, tiny_lm, tiny_whisper
from tests.training.worlds import ROWS

PLAIN = {"suppress_blank": False, "suppress_tokens": None}


def test_scores_are_those_of_the_model_kept_above_minus_twenty() -> None:
    model, scorer = tiny_lm(3), SourceDomainScorer(tiny_lm(3))
    own = model.start(Context([model.prompt()] * 2, 3, 6))
    kept = scorer.start(Context([[7], [8]], 3, 6, torch.zeros((2, 4, 8))))  # prompts of the acoustic model are ignored
    rng = np.random.default_rng(0)
    width = 1
    for _ in range(5):
        wanted = torch.log_softmax(own.logits.float(), dim=1).clamp_min(-20)
        torch.testing.assert_close(kept.logits, wanted)
        assert float(kept.logits.min()) >= -20
        torch.testing.assert_close(scorer.end_scores(kept), wanted[:, model.vocabulary.end_id])
        parents, ids = rng.integers(0, width, (2, 3)), rng.integers(0, 40, (2, 3))
        width = 3
        own, kept = model.fork(own, parents), scorer.fork(kept, parents)
        _, own = model.score(own, ids)
        _, kept = scorer.score(kept, ids)


@pytest.mark.parametrize("name", ["density_ratio", "lodr"])
def test_totals_are_weighted_parts_and_the_end_is_left_alone(name: str) -> None:
    whisper, models = tiny_whisper(), [tiny_lm(1), tiny_lm(2)]
    own = FusionDecoder(whisper, models)
    rule = getattr(fusion, name)(0.6, 0.3)
    results = own.decode(
        random_encoder_output(whisper, 2), rule=rule, beam_size=3, n_best=3, max_new_tokens=10, **PLAIN
    )
    for result in results:
        for hypothesis in result.n_best:
            parts = hypothesis.parts
            assert set(parts) == {"asr", "lm", "ilm"}
            assert hypothesis.total == pytest.approx(parts["asr"] + 0.6 * parts["lm"] - 0.3 * parts["ilm"], abs=1e-3)
            if hypothesis.ended:
                assert hypothesis.tokens[-1].parts["ilm"] == 0.0
    again = results[0].rerank(rule)
    assert [h.token_ids for h in again.n_best] == [h.token_ids for h in results[0].n_best]


def test_the_subtracted_parts_are_what_the_model_says_of_the_text() -> None:
    whisper, models = tiny_whisper(), [tiny_lm(1), tiny_lm(2)]
    own = FusionDecoder(whisper, models)
    result = own.decode(random_encoder_output(whisper, 1), rule=fusion.lodr(0.6, 0.3), max_new_tokens=8, **PLAIN)[0]
    ids = result.best.token_ids
    text = torch.tensor([[models[1].vocabulary.begin_id, *ids]])
    with torch.inference_mode():
        rows = torch.log_softmax(models[1].model(input_ids=text).logits[0], dim=-1)
    wanted = rows[torch.arange(len(ids)), torch.tensor(ids)].tolist()
    assert [token.parts["ilm"] for token in result.best.tokens[: len(ids)]] == pytest.approx(wanted, abs=1e-4)


def test_a_bigram_of_pieces_is_subtracted_from_the_demo_models(tmp_path) -> None:
    units = tokens(ASR)
    texts = [row["text"] for row in ROWS]
    write_arpa(estimate(units.split(texts), EstimateSettings(2), units.vocabulary).model, tmp_path / "bigram.arpa")
    acoustic = decoder().acoustic
    bigram = load_language_model(
        str(tmp_path / "bigram.arpa"), acoustic.scorer.vocabulary, acoustic.scorer.device, torch.float32
    )
    own = FusionDecoder(acoustic, [*decoder().language_models, bigram])
    rule = fusion.parse_rule("lodr(0.8, 0.2)")
    result = own.transcribe([clip(2)], rule=rule, beam_size=3)[0]
    parts = result.best.parts
    assert result.best.total == pytest.approx(parts["asr"] + 0.8 * parts["lm"] - 0.2 * parts["ilm"], abs=1e-3)
    guarded = own.transcribe([clip(2)], rule=fusion.trusted(rule, -0.001), beam_size=3)[0]
    assert "lm_distrusted" in guarded.flags


def test_rules_that_do_not_fit_what_is_loaded_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="subtracts one more, the last, but 1 are loaded"):
        decoder().transcribe([clip(2)], rule=fusion.lodr(0.8, 0.2))
    with pytest.raises(InvalidArgumentError, match="source_weight must be above 0"):
        fusion.density_ratio(0.8, 0.0)
    mixed = fusion.mixture([0.5, 0.5], 0.5)
    with pytest.raises(InvalidArgumentError, match="without mixture or delay"):
        replace(mixed, ilm_weight=0.2, ilm_variant="source_lm")
