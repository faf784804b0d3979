"""Forced texts: what the search charged for its own tokens is what the models say of them when they are made to."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from shallowfusion import DecodingOptions, FusionDecoder, fusion
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.ngrams.estimate import EstimateSettings, estimate
from shallowfusion.ngrams.pieces import spell_piece
from shallowfusion.scorers.ngram import NgramScorer
from shallowfusion.training.teacher_forcing import ForcedText, Trace, force, text_ids
from tests.tiny import END, random_encoder_output, tiny_decoder

RULES = {
    "static": {"rule": fusion.static(0.6)},
    "internal LM": {"rule": fusion.internal_lm(0.6, 0.2)},
    "temperatures": {"rule": fusion.static(0.6), "asr_temperature": 1.3, "lm_temperature": 0.7},
    "LM's end": {"rule": fusion.static(0.6), "end_policy": "lm"},
    "acoustic end": {"rule": fusion.static(0.6), "end_policy": "asr_only"},
}


@cache
def world():
    decoder = tiny_decoder(3)
    return decoder, random_encoder_output(decoder.acoustic, 4, seed=5)


@pytest.mark.parametrize("name", RULES)
def test_gold_log_probs_are_the_parts_the_search_stored(name: str) -> None:
    decoder, encoded = world()
    options = DecodingOptions(beam_size=3, max_new_tokens=20, **RULES[name])
    results = decoder.decode(encoded, options)
    traces = force(decoder, encoded, [ForcedText.of(result.best.token_ids, END) for result in results], options)
    for result, trace in zip(results, traces, strict=True):
        parts = np.array([list(token.parts.values()) for token in result.best.tokens])
        np.testing.assert_allclose(
            trace.gold[: len(parts)], parts, atol=2e-4
        )  # a hypothesis may have been cut before its end
        assert len(trace) == len(result.best.token_ids) + 1


@pytest.mark.parametrize("rule", [fusion.static((0.5, 0.3)), fusion.mixture([0.6, 0.4], 0.5, forgetting=0.95)], ids=str)
def test_any_scorer_can_be_forced(rule: fusion.Rule) -> None:
    neural, encoded = world()
    pieces = [[spell_piece(f"{(7 * i + k * k) % 40:02d}".encode()) for k in range(9)] for i in range(30)]
    ngram = NgramScorer(estimate(pieces, EstimateSettings(order=3)).model, neural.acoustic.scorer.vocabulary)
    decoder = FusionDecoder(neural.acoustic, [*neural.language_models, ngram])
    options = DecodingOptions(beam_size=3, max_new_tokens=12, rule=rule)
    results = decoder.decode(encoded, options)
    traces = force(decoder, encoded, [ForcedText.of(result.best.token_ids, END) for result in results], options)
    for result, trace in zip(results, traces, strict=True):
        parts = np.array([list(token.parts.values()) for token in result.best.tokens])
        np.testing.assert_allclose(trace.gold[: len(parts)], parts, atol=2e-4)


def forced(top_k: int = 64) -> Trace:
    decoder, encoded = world()
    options = DecodingOptions(rule=fusion.static(0.6))
    return force(decoder, encoded[:1], [ForcedText.of((1, 2, 3, 7), END)], options, top_k)[0]


def test_listed_tokens_and_the_rest_make_the_whole_distribution() -> None:
    whole, short = forced(), forced(top_k=5)
    assert short.ids.shape[1] <= 11
    for trace in (whole, short):
        mass = trace.log_probs[:, :, 0].exp().sum(dim=1) + trace.rest[:, 0].exp()
        torch.testing.assert_close(mass, torch.ones(len(trace)))
        listed = (trace.ids >= 0).sum(dim=1)
        assert (listed + trace.num_rest == 44).all()
        assert ((trace.ids == trace.targets[:, None]).sum(dim=1) == 1).all()
    torch.testing.assert_close(whole.gold, short.gold)
    best = whole.log_probs[:, :, 0].topk(5, dim=1).values
    torch.testing.assert_close(short.log_probs[:, :, 0].topk(5, dim=1).values, best)
    torch.testing.assert_close(short.statistics[0].max_log_prob, best[:, 0])


def test_other_targets_than_the_prefix_says_are_scored_after_the_same_prefix() -> None:
    decoder, encoded = world()
    options = DecodingOptions(rule=fusion.static(0.6))
    own = force(decoder, encoded[:1], [ForcedText((1, 2, 3), (1, 2, 3, END))], options)[0]
    other = force(decoder, encoded[:1], [ForcedText((1, 2, 3), (5, 5, 5, 5))], options)[0]
    torch.testing.assert_close(own.features, other.features)
    assert other.targets.tolist() == [5, 5, 5, 5]
    place = (own.ids[2] == 5).nonzero()[0, 0]
    torch.testing.assert_close(other.gold[2], own.log_probs[2, place])


def test_results_do_not_depend_on_the_batch() -> None:
    decoder, encoded = world()
    options = DecodingOptions(rule=fusion.static(0.6))
    texts = [ForcedText.of(ids, END) for ids in ((1,), (4, 5, 6, 7, 8), (9, 9))]
    together = force(decoder, encoded[:3], texts, options)
    for i, text in enumerate(texts):
        alone = force(decoder, encoded[i : i + 1], [text], options)[0]
        torch.testing.assert_close(together[i].gold, alone.gold, atol=1e-4, rtol=0)
        torch.testing.assert_close(together[i].features, alone.features, atol=1e-4, rtol=1e-4)


def test_bad_texts_are_refused() -> None:
    decoder, encoded = world()
    options = DecodingOptions(rule=fusion.static(0.6))
    with pytest.raises(InvalidArgumentError, match="must pair up, got 1 and 4"):
        force(decoder, encoded, [ForcedText.of((1,), END)], options)
    with pytest.raises(InvalidArgumentError, match="a text has 80 tokens"):
        force(decoder, encoded[:1], [ForcedText.of((1,) * 80, END)], options)
    with pytest.raises(InvalidArgumentError, match="holds no tokens"):
        text_ids(decoder, "")
