"""Several language models as one distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shallowfusion import fusion
from shallowfusion.decoder import FusionDecoder
from shallowfusion.errors import InvalidArgumentError, VocabularyError
from shallowfusion.scorers.base import DEAD, Context
from shallowfusion.scorers.mixture import MixtureScorer
from tests.tiny import END, random_encoder_output, tiny_lm, tiny_whisper

OPTIONS = {"suppress_blank": False, "suppress_tokens": None, "max_new_tokens": 12, "beam_size": 3, "n_best": 3}
PRIORS = (0.7, 0.3)


def uncached(models: list, priors: tuple[float, ...], text: list[int], forgetting: float | None) -> torch.Tensor:
    """Log-probs of the mixture after the text, every model read from its beginning."""
    log_weights = torch.tensor(priors).log()
    with torch.inference_mode():
        rows = [
            torch.log_softmax(model.model(input_ids=torch.tensor([[END, *text]])).logits[0], dim=-1) for model in models
        ]
    if forgetting is not None:
        for place, token in enumerate(text):
            said = torch.stack([row[place, token] for row in rows])
            log_weights = torch.log_softmax(forgetting * log_weights + said, dim=0)
    return torch.logsumexp(torch.stack([w + row[-1] for w, row in zip(log_weights, rows, strict=True)]), dim=0)


@pytest.mark.parametrize("forgetting", [None, 0.9])
def test_beams_of_several_sizes_score_as_alone(forgetting: float | None) -> None:
    models = [tiny_lm(1), tiny_lm(2)]
    scorer = MixtureScorer(models, PRIORS, forgetting)
    state = scorer.start(Context([[]], 2, 8))
    state = scorer.fork(state, np.array([[0, 0]]))
    _, state = scorer.score(state, np.array([[3, 4]]))
    state = scorer.admit(state, scorer.start(Context([[]], 1, 8)))
    state = scorer.fork(state, np.array([[1, 0], [0, 0]]))
    _, state = scorer.score(state, np.array([[5, 6], [7, DEAD]]))
    state = scorer.admit(state, scorer.start(Context([[], []], 1, 8)))
    state = scorer.fork(scorer.keep(state, [0, 1, 3]), np.array([[1, 0], [0, 0], [0, 0]]))
    logits, state = scorer.score(state, np.array([[8, 9], [1, DEAD], [2, DEAD]]))
    wanted = [uncached(models, PRIORS, text, forgetting) for text in ([3, 6, 8], [4, 5, 9], [7, 1], [2])]
    torch.testing.assert_close(logits, torch.stack(wanted), atol=1e-4, rtol=0)


@pytest.mark.parametrize("forgetting", [None, 0.9, 1.0])
def test_scores_equal_the_uncached_sum_of_probabilities_after_reorders(forgetting: float | None) -> None:
    models = [tiny_lm(1), tiny_lm(2)]
    scorer = MixtureScorer(models, PRIORS, forgetting)
    state = scorer.start(Context([[], []], 2, 8))
    texts = [[[]], [[]]]
    rng = np.random.default_rng(0)
    for _ in range(6):
        parents = rng.integers(0, len(texts[0]), (2, 2))
        tokens = rng.integers(0, 40, (2, 2))
        state = scorer.fork(state, parents)
        texts = [[texts[u][parents[u, k]] + [int(tokens[u, k])] for k in range(2)] for u in range(2)]
        logits, state = scorer.score(state, tokens)
        wanted = torch.stack([uncached(models, PRIORS, text, forgetting) for own in texts for text in own])
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
        torch.testing.assert_close(logits.exp().sum(dim=1), torch.ones(4), atol=1e-4, rtol=0)


def test_the_model_that_predicts_the_text_gains_weight() -> None:
    models = [tiny_lm(1), tiny_lm(2)]
    scorer = MixtureScorer(models, (0.5, 0.5), forgetting=1.0)
    state = scorer.start(Context([[]], 1, 12))
    for _ in range(8):
        favourite = int(state.log_probs[1, 0].argmax())
        state = scorer.fork(state, np.array([[0]]))
        _, state = scorer.score(state, np.array([[favourite]]))
    assert math.exp(float(state.log_weights[1, 0, 0])) > 0.9


@pytest.mark.parametrize("forgetting", [None, 0.95])
def test_decoding_with_a_mixture_does_not_depend_on_the_batch(forgetting: float | None) -> None:
    decoder = FusionDecoder(tiny_whisper(1), [tiny_lm(1), tiny_lm(2)])
    states = random_encoder_output(decoder.acoustic, 5)
    rule = fusion.mixture(PRIORS, 0.5, forgetting)
    together = decoder.decode(states, rule=rule, end_policy="lm", **OPTIONS)
    for hypothesis in (h for result in together for h in result.n_best):
        assert set(hypothesis.parts) == {"asr", "lm"}
        assert hypothesis.total == pytest.approx(hypothesis.parts["asr"] + 0.5 * hypothesis.parts["lm"], abs=1e-4)
    for i in range(5):
        alone = decoder.decode(states[i : i + 1], rule=rule, end_policy="lm", **OPTIONS)[0]
        assert [h.token_ids for h in alone.n_best] == [h.token_ids for h in together[i].n_best]


def test_a_mixture_of_equal_models_is_that_model() -> None:
    acoustic = tiny_whisper(1)
    twice = FusionDecoder(acoustic, [tiny_lm(1), tiny_lm(1)])
    states = random_encoder_output(acoustic, 3)
    mixed = twice.decode(states, rule=fusion.mixture(PRIORS, 0.5), **OPTIONS)
    single = FusionDecoder(acoustic, [tiny_lm(1)]).decode(states, rule=fusion.static(0.5), **OPTIONS)
    for one, other in zip(mixed, single, strict=True):
        assert [h.token_ids for h in one.n_best] == [h.token_ids for h in other.n_best]
        assert [h.total for h in one.n_best] == pytest.approx([h.total for h in other.n_best], abs=1e-4)


def test_bad_mixtures_are_refused() -> None:
    models = [tiny_lm(1), tiny_lm(2)]
    for weights, words in (((1.0,), "one weight per language model"), ((0.5, 0.0), "above 0")):
        with pytest.raises(InvalidArgumentError, match=words):
            MixtureScorer(models, weights)
    with pytest.raises(InvalidArgumentError, match="forgetting must be"):
        MixtureScorer(models, PRIORS, forgetting=1.5)
    with pytest.raises(VocabularyError, match="have different tokens"):
        MixtureScorer([tiny_lm(1), tiny_lm(2, size=45)], PRIORS)
    decoder = FusionDecoder(tiny_whisper(1), models)
    with pytest.raises(InvalidArgumentError, match="mixes 3 language models, but 2 are loaded"):
        decoder.decode(random_encoder_output(decoder.acoustic, 1), rule=fusion.mixture((0.4, 0.3, 0.3), 0.5))
