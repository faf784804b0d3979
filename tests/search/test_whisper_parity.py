"""The `whisper` stop rule, end to end, against openai-whisper's BeamSearchDecoder over the same tiny model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from shallowfusion.decoder import FusionDecoder
from tests.tiny import END, NO_TIMESTAMPS, START, random_encoder_output, tiny_decoder

decoding = pytest.importorskip("whisper.decoding")

NEW_TOKENS = 12


@torch.inference_mode()
def their_search(model: FusionDecoder, states: torch.Tensor, beam_size: int, patience: float) -> tuple[list, list]:
    """openai-whisper's loop for one recording: finished token lists with their summed log-probs."""
    whisper = model.acoustic.scorer.model
    cache = SimpleNamespace(rearrange_kv_cache=lambda sources: None)
    search = decoding.BeamSearchDecoder(beam_size, END, cache, patience)
    tokens = torch.tensor([[START, NO_TIMESTAMPS]] * beam_size)
    totals = torch.zeros(beam_size)
    for _ in range(NEW_TOKENS):
        hidden = whisper.model.decoder(
            input_ids=tokens, encoder_hidden_states=states.expand(beam_size, -1, -1), use_cache=False
        ).last_hidden_state
        tokens, completed = search.update(tokens, whisper.proj_out(hidden[:, -1]), totals)
        if completed:
            break
    found, sums = search.finalize(tokens.reshape(1, beam_size, -1), totals.reshape(1, -1))
    texts = [row[2 : (row == END).nonzero()[0, 0]].tolist() for row in found[0]]
    return texts, sums[0]


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
        texts, sums = their_search(model, own[None], beam_size, patience)
        if any(len(text) == 0 for text in texts):
            continue  # openai-whisper divides by zero when it ranks an empty hypothesis
        best = ranker.rank([[torch.tensor(text) for text in texts]], [sums])[0]
        assert list(result.n_best[0].token_ids) == texts[best]
        theirs = dict(zip(map(tuple, texts), sums, strict=True))
        for hypothesis in result.n_best:
            assert hypothesis.total == pytest.approx(theirs[hypothesis.token_ids], abs=1e-4)
        compared += 1
    assert compared >= 3
