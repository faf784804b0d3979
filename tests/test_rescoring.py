"""Texts scored in trees against the uncached model, the stepwise twin and the search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.evaluation import word_errors
from shallowfusion.evaluation.line_search import line_search
from shallowfusion.evaluation.nbest import read_nbest, with_scores
from shallowfusion.rescoring import score_texts, score_texts_stepwise
from shallowfusion.scorers.causal_lm import CausalLMScorer
from tests.shipped import clip, decoder
from tests.tiny import END, TEXT_TOKENS, moved, tiny_lm, vocabulary

SHARED_DATA = Path(__file__).parents[1].parent / "shared" / "data"

LM = tiny_lm()
ids = st.lists(st.integers(0, 3) | st.integers(0, TEXT_TOKENS - 1), max_size=10)


@torch.inference_mode()
def uncached(scorer: CausalLMScorer, text: list[int], context: tuple[int, ...] = ()) -> np.ndarray:
    """Log-softmax of the whole text in one plain pass of the model, the end token last."""
    prompt = scorer.prompt(context)
    ids = torch.tensor([[*prompt, *text]], device=scorer.device)
    logits = scorer.model(input_ids=ids, use_cache=False).logits[0].double().cpu()
    log_probs = torch.log_softmax(logits, dim=1)[len(prompt) - 1 :]
    return log_probs.gather(1, torch.tensor([*text, scorer.vocabulary.end_id])[:, None])[:, 0].numpy()


@given(st.lists(ids, max_size=8), st.sampled_from([1, 7, 1024]), st.lists(st.integers(0, 9), max_size=3))
@settings(deadline=None)
def test_scores_equal_the_uncached_model_in_any_batch(texts: list[list[int]], batch: int, context: list[int]) -> None:
    found = score_texts(LM, texts, batch_tokens=batch, context=tuple(context))
    assert len(found) == len(texts)
    for own, text in zip(found, texts, strict=True):
        assert own.dtype == np.float32
        np.testing.assert_allclose(own, uncached(LM, text, tuple(context)), atol=1e-4)


@given(st.lists(ids, max_size=5), st.booleans())
@settings(deadline=None)
def test_the_stepwise_twin_says_the_same(texts: list[list[int]], include_end: bool) -> None:
    ours = score_texts(LM, texts, include_end=include_end)
    twin = score_texts_stepwise(LM, texts, include_end=include_end)
    for own, other, text in zip(ours, twin, texts, strict=True):
        assert len(own) == len(other) == len(text) + include_end
        np.testing.assert_allclose(own, other, atol=1e-4)


@pytest.mark.gpu
def test_scores_on_a_gpu_equal_the_uncached_model() -> None:
    scorer = moved(tiny_lm(), "cuda")
    texts = [[1, 2, 3, 4], [1, 2, 5], [], [6, 7, 8, 9, 10]]
    for own, text in zip(score_texts(scorer, texts), texts, strict=True):
        np.testing.assert_allclose(own, uncached(scorer, text), atol=1e-4)


def test_a_rotary_model_scores_the_same() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TEXT_TOKENS + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=END, eos_token_id=END,
    )  # fmt: skip
    scorer = CausalLMScorer(LlamaForCausalLM(config).eval(), vocabulary(TEXT_TOKENS + 1, END))
    texts = [[1, 2, 3, 4], [1, 2, 5], [1], [6, 7, 8, 9, 10]]
    for own, text in zip(score_texts(scorer, texts), texts, strict=True):
        np.testing.assert_allclose(own, uncached(scorer, text), atol=1e-4)


def test_what_texts_share_is_read_once(monkeypatch) -> None:
    passes: list[int] = []
    plain = CausalLMScorer.tree_hidden_states

    def counted(self: CausalLMScorer, tokens: list[int], parents: list[int]) -> torch.Tensor:
        passes.append(len(tokens))
        return plain(self, tokens, parents)

    monkeypatch.setattr(CausalLMScorer, "tree_hidden_states", counted)
    texts = [[1, 2, 3, i] for i in range(10)] * 3
    score_texts(LM, texts)
    assert passes == [1 + 3 + 10]
    passes.clear()
    score_texts(LM, texts, batch_tokens=8)
    assert sum(passes) > 14
    assert max(passes) <= 8


def test_texts_beyond_the_window_move_it_as_a_search_does() -> None:
    scorer = tiny_lm(positions=16)
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, TEXT_TOKENS, size).tolist() for size in (14, 15, 16, 30)]
    found = score_texts(scorer, texts)
    for own, text in zip(found[:2], texts[:2], strict=True):
        np.testing.assert_allclose(own, uncached(scorer, text), atol=1e-4)
    for own, other in zip(found, score_texts_stepwise(scorer, texts), strict=True):
        np.testing.assert_allclose(own, other, atol=1e-4)
    assert all(np.isfinite(own).all() for own in found)


def test_texts_of_a_search_score_as_they_did_in_it() -> None:
    fused = decoder()
    result = fused.transcribe([clip(2)], beam_size=3, n_best=3, lm_weight=0.3, end_policy="lm")[0]
    found = score_texts(fused.language_models[0], [hypothesis.text for hypothesis in result.n_best])
    for own, hypothesis in zip(found, result.n_best, strict=True):
        assert own.sum() == pytest.approx(hypothesis.parts["lm"], abs=1e-2)


def test_lists_of_another_recogniser_are_rescored() -> None:
    path = SHARED_DATA / "nbest" / "pocketsphinx_librispeech_test_other.jsonl.gz"
    if not path.exists():
        pytest.skip("the public n-best lists are not beside this checkout")
    lists = read_nbest(path)[:6]
    texts = [hypothesis.text for entry in lists for hypothesis in entry.hypotheses]
    scores = [own.sum() for own in score_texts(decoder().language_models[0], texts)]
    scored = with_scores(lists, "lm", scores)
    curve = line_search(scored, "lm", {"total": 1.0}, 0.0, 0.1)
    choice = [max(entry.hypotheses, key=lambda hypothesis: hypothesis.total).text for entry in lists]
    assert curve.errors_at(0.0) == sum(word_errors([str(entry.reference) for entry in lists], choice).errors)
    assert curve.best.errors <= curve.errors_at(0.0)


def test_bad_input_is_refused() -> None:
    assert score_texts(LM, []) == score_texts_stepwise(LM, []) == []
    with pytest.raises(InvalidArgumentError, match="without a tokenizer"):
        score_texts(LM, ["words"])
    with pytest.raises(InvalidArgumentError, match="a token id must be from 0 to 40"):
        score_texts(LM, [[41]])
    with pytest.raises(InvalidArgumentError, match="cannot hold the end token"):
        score_texts(LM, [[1, END]])
    with pytest.raises(InvalidArgumentError, match="batch_tokens"):
        score_texts(LM, [[1]], batch_tokens=0)
