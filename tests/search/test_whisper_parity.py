"""The `whisper` stop rule, end to end, against openai-whisper's BeamSearchDecoder over the same tiny model."""

from __future__ import annotations

import pytest
import torch

from tests.oracles import by_openai_whisper
from tests.tiny import random_encoder_output, tiny_decoder

decoding = pytest.importorskip("whisper.decoding")

NEW_TOKENS = 12


@pytest.mark.parametrize("length_penalty", [None, 0.6])
@pytest.mark.parametrize(("beam_size", "patience"), [(2, 1.0), (5, 1.0), (3, 2.0), (4, 0.5)])
def test_hypotheses_totals_and_choice_equal_openai_whisper(beam_size, patience, length_penalty) -> None:
    model = tiny_decoder(1)
    states = random_encoder_output(model.acoustic, 6, seed=4)
    ours = model.decode(
        states, beam_size=beam_size, n_best=beam_size, patience=patience, length_penalty=length_penalty,
        stop_rule="whisper", lm_weight=0.0, suppress_tokens=None, suppress_blank=False, max_new_tokens=NEW_TOKENS,
    )  # fmt: skip
    ranker = decoding.MaximumLikelihoodRanker(length_penalty)
    compared = 0
    for result, own in zip(ours, states, strict=True):
        texts, sums = by_openai_whisper(model, own[None], beam_size, NEW_TOKENS, patience=patience)
        if any(len(text) == 0 for text in texts):
            continue  # openai-whisper divides by zero when it ranks an empty hypothesis
        best = ranker.rank([[torch.tensor(text) for text in texts]], [sums])[0]
        assert list(result.n_best[0].token_ids) == texts[best]
        theirs = dict(zip(map(tuple, texts), sums, strict=True))
        for hypothesis in result.n_best:
            assert hypothesis.total == pytest.approx(theirs[hypothesis.token_ids], abs=1e-4)
        compared += 1
    assert compared >= 3
