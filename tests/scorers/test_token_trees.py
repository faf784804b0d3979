"""Trees of texts against the uncached model: growth, forks, deaths, windows, batches, and nothing read in vain."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from shallowfusion.rescoring import score_texts_stepwise
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.scorers.token_trees import Request, TokenTrees
from tests.tiny import END, TEXT_TOKENS, tiny_lm, vocabulary

LM = tiny_lm()
texts = st.lists(st.integers(0, 3) | st.integers(0, TEXT_TOKENS - 1), max_size=8)


@torch.inference_mode()
def uncached(scorer: CausalLMScorer, ids: list[int], context: tuple[int, ...] = ()) -> tuple[float, float, float]:
    """Log-prob of the text, of its end, and of the favourite there."""
    prompt = scorer.prompt(context)
    logits = scorer.model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0].double()
    log_probs = torch.log_softmax(logits, dim=1)[len(prompt) - 1 :]
    total = sum(float(log_probs[i, token]) for i, token in enumerate(ids))
    return total, float(log_probs[-1, scorer.vocabulary.end_id]), float(log_probs[-1].max())


@given(st.lists(st.lists(st.tuples(st.integers(0, 2), texts, st.booleans()), max_size=5), max_size=5), st.data())
@settings(deadline=None, max_examples=40)
def test_random_histories_equal_the_uncached_model_and_leak_no_slot(
    rounds: list[list[tuple[int, list[int], bool]]], data: st.DataObject
) -> None:
    trees = TokenTrees(LM, 3, context=(7, 8))
    held = []
    for asked in rounds:
        requests = [Request(place, trees.grow(place, ids), ends) for place, ids, ends in asked]
        ends = trees.score(requests)
        for (_, ids, wants_end), request, found in zip(asked, requests, ends, strict=True):
            total, end, favourite = uncached(LM, ids, (7, 8))
            assert request.node.total == pytest.approx(total, abs=1e-4)
            assert request.node.tokens() == [*LM.prompt((7, 8)), *ids]
            if wants_end:
                assert found == pytest.approx([end, favourite], abs=1e-4)
            else:
                assert np.isnan(found).all()
        held += [(request.place, request.node) for request in requests]
        while held and data.draw(st.booleans()):
            trees.drop(*held.pop(data.draw(st.integers(0, len(held) - 1))))
    for place, node in held:
        trees.drop(place, node)
    assert trees.num_used in (0, 3 * len(LM.prompt((7, 8))))  # the prompts alone


def test_the_last_token_is_read_when_something_after_it_is_scored() -> None:
    trees = TokenTrees(LM, 1)
    trees.score([Request(0, trees.grow(0, [1, 2, 3]))])
    assert (trees.num_calls, trees.num_tokens) == (1, 3)  # the begin token, 1 and 2
    trees.score([Request(0, trees.grow(0, [1, 2, 3]))])
    assert trees.num_calls == 1
    trees.score([Request(0, trees.grow(0, [1, 2, 3, 4])), Request(0, trees.grow(0, [1, 2, 3, 5]))])
    assert (trees.num_calls, trees.num_tokens) == (2, 4)  # 3, once
    trees.score([Request(0, trees.grow(0, [1, 9]))])
    assert (trees.num_calls, trees.num_tokens) == (2, 4)  # what 1 is followed by was known


def test_texts_of_one_utterance_share_what_they_have_in_common() -> None:
    trees = TokenTrees(LM, 2)
    nodes = [trees.grow(0, [1, 2, 3, last, 0]) for last in range(10, 20)] * 3
    trees.score([Request(0, node) for node in nodes])
    assert trees.num_tokens == 2 + 3 + 10  # a begin token each, the common part, and the ten that differ
    assert trees.num_used == 2 + 3 + 10


def test_scores_do_not_depend_on_the_batch() -> None:
    generator = np.random.default_rng(0)
    asked = [(place, generator.integers(0, 40, generator.integers(1, 9)).tolist()) for place in (0, 1, 1, 2, 3, 3, 3)]
    together = TokenTrees(LM, 4)
    requests = [Request(place, together.grow(place, ids), True) for place, ids in asked]
    ends = together.score(requests)
    for (_, ids), request, end in zip(asked, requests, ends, strict=True):
        alone = TokenTrees(LM, 1)
        node = alone.grow(0, ids)
        assert alone.score([Request(0, node, True)])[0] == pytest.approx(end, abs=1e-5)
        assert node.total == pytest.approx(request.node.total, abs=1e-5)


def test_an_utterance_may_be_read_while_others_rest() -> None:
    trees = TokenTrees(LM, 3)
    for round_ in range(4):
        ids = [1, 2, 3, 4, 5][: round_ + 2]
        node = trees.grow(round_ % 3, ids)
        trees.score([Request(round_ % 3, node)])
        assert node.total == pytest.approx(uncached(LM, ids)[0], abs=1e-4)


@pytest.mark.parametrize("step", [1, 3, 30])
def test_texts_beyond_the_window_move_it_as_a_search_does(step: int) -> None:
    scorer = tiny_lm(positions=16)
    ids = np.random.default_rng(0).integers(0, TEXT_TOKENS, 40).tolist()
    trees = TokenTrees(scorer, 1)
    wanted = score_texts_stepwise(scorer, [ids])[0]
    for count in [*range(step, len(ids), step), len(ids)]:
        node = trees.grow(0, ids[:count])
        ends = trees.score([Request(0, node, count == len(ids))])
        assert node.total == pytest.approx(float(wanted[:count].sum()), abs=1e-3)
    assert ends[0, 0] == pytest.approx(float(wanted[-1]), abs=1e-4)


def test_a_rotary_model_and_a_temperature() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TEXT_TOKENS + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=END, eos_token_id=END,
    )  # fmt: skip
    scorer = CausalLMScorer(LlamaForCausalLM(config).eval(), vocabulary(TEXT_TOKENS + 1, END))
    trees = TokenTrees(scorer, 2)
    for ids in ([1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 9]):
        node = trees.grow(1, ids)
        trees.score([Request(1, node)])
        assert node.total == pytest.approx(uncached(scorer, ids)[0], abs=1e-4)
    flat = TokenTrees(LM, 1, temperature=1e6)
    node = flat.grow(0, [1, 2])
    flat.score([Request(0, node)])
    assert node.total == pytest.approx(-2 * math.log(41), abs=1e-3)


def test_nothing_to_score_is_no_call() -> None:
    trees = TokenTrees(LM, 2)
    assert trees.score([]).shape == (0, 2)
    node = trees.grow(0, [])
    assert trees.score([Request(0, node)]).shape == (1, 2)
    assert node.total == 0.0
    assert trees.num_calls == 0
