"""The internal language model: each variant against the transformers decoder it is defined by."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shallowfusion import fusion
from shallowfusion.decoder import FusionDecoder
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.scorers.base import Context
from shallowfusion.scorers.internal_lm import SMALLEST_LOG_PROB, InternalLMScorer
from tests.tiny import DEVICES, END, START, decoder_on, random_encoder_output, tiny_decoder, tiny_whisper

OPTIONS = {"suppress_blank": False, "suppress_tokens": None, "max_new_tokens": 12, "beam_size": 3, "n_best": 3}
TOKENS = [5, 9, 3]


@pytest.fixture(scope="module")
def acoustic():
    return tiny_whisper(3, sharpness=2.0)


def expected(acoustic, variant: str, states: torch.Tensor, substitute: torch.Tensor | None) -> torch.Tensor:
    """Log-probs after the prompt and each of TOKENS, without any cache."""
    heard = {
        "zero_encoder": torch.zeros_like(states),
        "zero_context": None,
        "mean_context": states.mean(dim=1, keepdim=True).expand_as(states),
        "silence": substitute[None] if substitute is not None else None,
    }[variant]
    model = acoustic.scorer.model
    ids = torch.tensor([[START, *TOKENS]])
    with torch.inference_mode():
        hidden = model.model.decoder(input_ids=ids, encoder_hidden_states=heard).last_hidden_state
        return torch.log_softmax(model.proj_out(hidden)[0], dim=-1).clamp_min(SMALLEST_LOG_PROB)


@pytest.mark.parametrize("variant", ["zero_encoder", "zero_context", "mean_context", "silence"])
def test_cached_scores_equal_the_decoder_without_recording(acoustic, variant: str) -> None:
    states = random_encoder_output(acoustic, 1)
    substitute = random_encoder_output(acoustic, 1, seed=7)[0] if variant == "silence" else None
    scorer = InternalLMScorer(acoustic.scorer, variant, substitute)
    state = scorer.start(Context([[START]], 1, 10, states))
    found = [state.logits[0]]
    for token in TOKENS:
        state = scorer.fork(state, np.array([[0]]))
        logits, state = scorer.score(state, np.array([[token]]))
        found.append(logits[0])
    torch.testing.assert_close(torch.stack(found), expected(acoustic, variant, states, substitute), atol=1e-4, rtol=0)


def test_log_probs_are_kept_above_the_floor() -> None:
    sharp = tiny_whisper(3, sharpness=12.0)
    scorer = InternalLMScorer(sharp.scorer, "zero_encoder")
    logits = scorer.start(Context([[START]], 1, 4, random_encoder_output(sharp, 1))).logits
    assert float(logits.min()) == SMALLEST_LOG_PROB


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", ["zero_encoder", "zero_context", "mean_context"])
def test_totals_subtract_it_from_words_and_never_from_the_end(variant: str, device: str) -> None:
    decoder = decoder_on(device, 2)
    states = random_encoder_output(decoder.acoustic, 4).to(device)
    results = decoder.decode(states, rule=fusion.internal_lm(0.5, 0.3, variant), **OPTIONS)
    for hypothesis in (h for result in results for h in result.n_best):
        assert set(hypothesis.parts) == {"asr", "lm", "ilm"}
        wanted = hypothesis.parts["asr"] + 0.5 * hypothesis.parts["lm"] - 0.3 * hypothesis.parts["ilm"]
        assert hypothesis.total == pytest.approx(wanted, abs=1e-4)
        for token in hypothesis.tokens:
            assert token.id != END or token.parts["ilm"] == 0.0


def test_weight_zero_is_bit_identical_to_static_and_it_works_without_any_lm() -> None:
    decoder = tiny_decoder(2)
    states = random_encoder_output(decoder.acoustic, 3)
    none = decoder.decode(states, rule=fusion.internal_lm(0.5, 0.0), **OPTIONS)
    static = decoder.decode(states, rule=fusion.static(0.5), **OPTIONS)
    assert [[h.total for h in r.n_best] for r in none] == [[h.total for h in r.n_best] for r in static]
    alone = FusionDecoder(decoder.acoustic).decode(states, rule=fusion.internal_lm(0.0, 0.2), **OPTIONS)
    assert set(alone[0].n_best[0].parts) == {"asr", "ilm"}


def test_results_do_not_depend_on_the_batch() -> None:
    decoder = tiny_decoder(2)
    states = random_encoder_output(decoder.acoustic, 6)
    for variant in ("zero_context", "mean_context"):
        rule = fusion.internal_lm(0.5, 0.3, variant)
        together = decoder.decode(states, rule=rule, **OPTIONS)
        for i in range(6):
            alone = decoder.decode(states[i : i + 1], rule=rule, **OPTIONS)[0]
            assert [h.token_ids for h in alone.n_best] == [h.token_ids for h in together[i].n_best]


def test_evidence_is_gathered_per_utterance_and_does_not_depend_on_the_batch() -> None:
    decoder = tiny_decoder(2)
    states = random_encoder_output(decoder.acoustic, 6)
    rule = fusion.evidence_gate(0.8, 0.2, scale=0.2)
    together = decoder.decode(states, rule=rule, **OPTIONS)
    assert any(
        [h.token_ids for h in one.n_best] != [h.token_ids for h in other.n_best]
        for one, other in zip(
            together, decoder.decode(states, rule=fusion.internal_lm(0.8, 0.2), **OPTIONS), strict=True
        )
    )
    for i in range(6):
        alone = decoder.decode(states[i : i + 1], rule=rule, **OPTIONS)[0]
        assert [h.token_ids for h in alone.n_best] == [h.token_ids for h in together[i].n_best]
        assert [h.total for h in alone.n_best] == pytest.approx([h.total for h in together[i].n_best], abs=1e-4)


def test_reranking_takes_the_internal_lm_from_the_parts() -> None:
    decoder = tiny_decoder(2)
    states = random_encoder_output(decoder.acoustic, 3)
    result = decoder.decode(states, rule=fusion.internal_lm(0.5, 0.3), **OPTIONS)[0]
    again = result.rerank(fusion.internal_lm(0.5, 0.3))
    assert [h.total for h in again.n_best] == pytest.approx([h.total for h in result.n_best], abs=1e-4)
    plain = decoder.decode(states, rule=fusion.static(0.5), **OPTIONS)[0]
    with pytest.raises(InvalidArgumentError, match="the list has no scores"):
        plain.rerank(fusion.internal_lm(0.5, 0.3))
    with pytest.raises(InvalidArgumentError, match="whole distributions"):
        plain.rerank(fusion.entropy_gate(0.5))


def test_a_trained_context_must_be_given(acoustic) -> None:
    decoder = tiny_decoder(2)
    states = random_encoder_output(decoder.acoustic, 1)
    with pytest.raises(InvalidArgumentError, match="internal_context"):
        decoder.decode(states, rule=fusion.internal_lm(0.5, 0.3, "trained"), **OPTIONS)
    with pytest.raises(InvalidArgumentError, match=r"must be \[frames, 32\]"):
        InternalLMScorer(acoustic.scorer, "trained", torch.zeros(3, 5))
