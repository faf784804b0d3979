"""Stand-ins of a delayed model: their scores on the way, and nothing of them left at the end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from shallowfusion import DecodingOptions, fusion
from shallowfusion.decoder import FusionDecoder
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.rescoring import score_texts
from shallowfusion.scorers.base import Context
from shallowfusion.search.delayed import DelayedLM
from shallowfusion.search.late import finished
from shallowfusion.search.loop import StageClock, search
from shallowfusion.search.proxy import DenseCandidates, ReplacedProxy
from tests.delayed_world import OPTIONS, bpe_lm, spoken
from tests.tiny import END, random_encoder_output, tiny_lm

WEIGHT, PROXY = 0.4, 0.3


@pytest.fixture(scope="module")
def model() -> FusionDecoder:
    """A delayed model on another tokenizer, and a stand-in on the acoustic tokens."""
    acoustic = spoken(0)
    proxy = tiny_lm(9)
    proxy.vocabulary = type(proxy.vocabulary)(
        acoustic.scorer.vocabulary.tokens[: len(proxy.vocabulary)], END, END, "stand-in"
    )
    return FusionDecoder(acoustic, [bpe_lm(), proxy])


@pytest.mark.parametrize("interval", [1, 2, 4, None])
def test_a_replaced_stand_in_leaves_nothing_behind(model, interval: Any) -> None:
    states = random_encoder_output(model.acoustic, 4, 1)
    rule = fusion.delayed(WEIGHT, "interval", interval, proxy_weight=PROXY)
    assert rule.delay is not None
    assert rule.delay.tail == "free"
    for result in model.decode(states, rule=rule, beam_size=4, n_best=4, end_policy="lm", **OPTIONS):
        for h in result.n_best:
            text = float(score_texts(model.language_models[0], [h.text], include_end=h.ended)[0].sum())
            assert h.parts["lm1"] == pytest.approx(0.0, abs=1e-3)
            assert h.parts["lm0"] == pytest.approx(text, abs=1e-3)
            assert h.total == pytest.approx(h.parts["asr"] + WEIGHT * text, abs=1e-3)


def test_an_added_stand_in_stays(model) -> None:
    states = random_encoder_output(model.acoustic, 4, 1)
    rule = fusion.delayed(WEIGHT, "interval", 3, proxy_weight=PROXY, proxy_form="add")
    for result in model.decode(states, rule=rule, beam_size=4, n_best=4, end_policy="lm", **OPTIONS):
        for h in result.n_best:
            ids = [*h.token_ids]
            alone = float(score_texts(model.language_models[1], [ids], include_end=h.ended)[0].sum())
            assert h.parts["lm1"] == pytest.approx(alone, abs=1e-3)
            wanted = h.parts["asr"] + WEIGHT * h.parts["lm0"] + PROXY * alone
            assert h.total == pytest.approx(wanted, abs=1e-3)


def test_on_the_way_the_stand_in_speaks_for_what_is_not_scored_and_for_nothing_else(model) -> None:
    states, clock = random_encoder_output(model.acoustic, 3, 5), StageClock()
    rule = fusion.delayed(WEIGHT, "interval", 2, proxy_weight=PROXY)
    own = model.sources(states, DecodingOptions.of(rule=rule, beam_size=4, **OPTIONS))
    delayed, proxy = own.late
    assert isinstance(delayed, DelayedLM)
    assert isinstance(proxy, ReplacedProxy)
    looked = []

    class Watched:
        """The stand-in, with what it has said of every live row checked after each step."""

        name, weight = proxy.name, proxy.weight

        @property
        def owed(self) -> np.ndarray:
            return proxy.owed

        def increments(self, lanes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
            return proxy.increments(lanes, tokens)

        def follow(self, parents: np.ndarray, tokens: np.ndarray) -> None:
            proxy.follow(parents, tokens)

        def keep(self, order: Any) -> None:
            proxy.keep(order)
            for rows, covered, kept in zip(delayed.rows, delayed.covered(), proxy._said, strict=True):
                for row, count, said in zip(rows, covered, kept, strict=True):
                    if row is not None:
                        ids = list(row.said.tokens)
                        scores = score_texts(model.language_models[1], [ids], include_end=False)[0]
                        assert sum(said) == pytest.approx(float(scores[count:].sum()), abs=1e-3)
                        assert said[:count] == (0.0,) * count
                        looked.append(count)

    late = (delayed, Watched())
    finished(search(own.scorers, own.contexts, own.names, own.plan, clock, late), (delayed, proxy), clock)
    assert max(looked) > 2


def test_a_dense_scorer_as_candidates_says_what_it_says() -> None:
    scorer = tiny_lm(3)
    context = Context([scorer.prompt()] * 2, 2, 8)
    source = DenseCandidates(scorer, context, [*range(40), -1, -1], 0.5)
    lanes, tokens = np.array([[0, 0, -1], [0, 0, 0]]), np.array([[1, 40, -1], [2, 3, 41]])
    state = scorer.start(context)
    first = torch.log_softmax(state.logits, dim=1).double().numpy()
    found = source.increments(lanes, tokens)
    assert found[0, :2] == pytest.approx([first[0, 1], first[0].max()], abs=1e-5)
    assert found[1] == pytest.approx([first[1, 2], first[1, 3], first[1].max()], abs=1e-5)
    source.follow(np.array([[0, 0], [0, 0]]), np.array([[1, 2], [3, 4]]))
    source.keep([1])
    said = score_texts(scorer, [[3, 7], [4, 8]], include_end=False)
    found = source.increments(np.array([[0, 1]]), np.array([[7, 8]]))
    assert found[0] == pytest.approx([said[0][1], said[1][1]], abs=1e-4)


def test_an_n_gram_model_cannot_be_delayed() -> None:
    acoustic = spoken(0)
    decoder = FusionDecoder(acoustic, [object()])  # type: ignore[list-item]
    with pytest.raises(InvalidArgumentError, match="needs a causal language model first"):
        decoder.decode(random_encoder_output(acoustic, 1), rule=fusion.delayed(0.3))
