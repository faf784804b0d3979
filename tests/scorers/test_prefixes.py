"""Prompts read once: the same scores as read anew, shared by content, forgotten under a byte budget."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shallowfusion import FusionDecoder
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.scorers.base import Context
from shallowfusion.scorers.prefixes import BLOCK, PrefixCache, Prefixes
from tests.tiny import random_encoder_output, tiny_decoder, tiny_lm, tiny_whisper

OPTIONS = {"suppress_blank": False, "suppress_tokens": None, "max_new_tokens": 8, "beam_size": 3, "n_best": 3}
LM = tiny_lm(3)


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Prompts that begin alike."""
    generator = torch.Generator().manual_seed(seed)
    long = torch.randint(0, 40, (90,), generator=generator).tolist()
    return [LM.prompt(long[:length]) for length in lengths]


@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=5), rounds=st.integers(1, 3), seed=st.integers(0, 3))
def test_reused_prompts_score_as_prompts_read_anew(lengths: list[int], rounds: int, seed: int) -> None:
    cache, counts = PrefixCache(), Counter()
    prompts = prompts_of(lengths, seed)
    fresh = LM.start(Context(prompts, 2, 8))
    tokens = torch.randint(0, 40, (len(prompts), 2), generator=torch.Generator().manual_seed(seed)).numpy()
    parents = torch.zeros((len(prompts), 2), dtype=torch.int64).numpy()
    wanted = LM.score(LM.fork(fresh, parents), tokens)[0]
    for _ in range(rounds):
        state = LM.start(Context(prompts, 2, 8, prefixes=Prefixes(cache, counts)))
        assert torch.allclose(state.logits, LM.start(Context(prompts, 2, 8)).logits, atol=1e-4)
        assert torch.allclose(LM.score(LM.fork(state, parents), tokens)[0], wanted, atol=1e-4)
    assert counts["prefix_hits"] + counts["prefix_misses"] == rounds * len(prompts)
    assert counts["prefix_misses"] == len({tuple(prompt) for prompt in prompts})
    assert counts["prefix_tokens_reused"] + counts["prefix_tokens_read"] == rounds * sum(map(len, prompts))


def test_a_longer_prompt_reads_only_what_is_new_after_whole_blocks() -> None:
    cache, counts = PrefixCache(), Counter()
    first, longer = prompts_of([40, 60])
    LM.start(Context([first], 2, 8, prefixes=Prefixes(cache, counts)))
    assert counts["prefix_tokens_read"] == len(first)
    LM.start(Context([longer], 2, 8, prefixes=Prefixes(cache, counts)))
    read = len(first) + len(longer) - 2 * BLOCK
    assert counts["prefix_tokens_read"] == read
    other = [*longer[: BLOCK * 2], 39, 38]
    LM.start(Context([other], 2, 8, prefixes=Prefixes(cache, counts)))
    assert counts["prefix_tokens_read"] == read + 2


def test_the_oldest_go_when_bytes_are_over_the_budget() -> None:
    counts: Counter[str] = Counter()
    prompts = [LM.prompt([token] * 30) for token in range(4)]
    probe = PrefixCache()
    LM.start(Context(prompts[:1], 2, 8, prefixes=Prefixes(probe, counts)))
    one = probe.used_bytes
    assert one == 31 * 2 * 2 * 32 * 4 + 41 * 4  # tokens * (keys, values) * layers * width * float32, and the logits
    cache = PrefixCache(2 * one)
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[2]):
        LM.start(Context([prompt], 2, 8, prefixes=Prefixes(cache, counts)))
    assert cache.used_bytes == 2 * one
    assert cache.num_evictions == 1
    assert cache.exact(LM, prompts[0]) is not None
    assert cache.exact(LM, prompts[1]) is None
    cache.resize(one)
    assert len(cache) == 1
    cache.clear()
    assert cache.used_bytes == len(cache) == 0


def test_a_prompt_over_the_whole_budget_is_scored_and_not_kept() -> None:
    cache, prompts = PrefixCache(10), prompts_of([20, 20, 3])
    state = LM.start(Context(prompts, 2, 8, prefixes=Prefixes(cache, {})))
    assert torch.allclose(state.logits, LM.start(Context(prompts, 2, 8)).logits, atol=1e-4)
    assert cache.used_bytes == 0


def test_models_do_not_share_prompts() -> None:
    cache, other = PrefixCache(), tiny_lm(4)
    for model in (LM, other, LM):
        state = model.start(Context([model.prompt([1, 2])], 2, 8, prefixes=Prefixes(cache, {})))
        assert torch.allclose(state.logits, model.start(Context([model.prompt([1, 2])], 2, 8)).logits, atol=1e-5)
    assert len(cache) == 2


def test_a_decoder_that_hears_recordings_shares_nothing() -> None:
    model, cache = tiny_whisper(), PrefixCache()
    heard = random_encoder_output(model, 2)
    state = model.scorer.start(Context([[41, 42]] * 2, 2, 8, heard, Prefixes(cache, {})))
    assert torch.equal(state.logits, model.scorer.start(Context([[41, 42]] * 2, 2, 8, heard)).logits)
    assert len(cache) == 0


def test_results_tell_the_hit_rate_and_a_domain_prompt_changes_what_the_lm_says() -> None:
    decoder = tiny_decoder(1)
    states = random_encoder_output(decoder.acoustic, 3)
    options = {**OPTIONS, "lm_weight": 0.5, "end_policy": "lm"}
    first = decoder.decode(states, lm_prompt="the renal cortex and so on", **options)
    again = decoder.decode(states, lm_prompt="the renal cortex and so on", **options)
    assert first[0].timing.counts["prefix_misses"] == 1
    assert first[0].timing.counts["prefix_hits"] == 2
    assert again[0].timing.counts["prefix_hits"] == 3
    assert "prefix_misses" not in again[0].timing.counts
    plain = decoder.decode(states, **options)
    for one, same, other in zip(first, again, plain, strict=True):
        assert [h.token_ids for h in one.n_best] == [h.token_ids for h in same.n_best]
        assert one.best.parts["lm"] == pytest.approx(same.best.parts["lm"], abs=1e-4)
        assert one.best.parts["lm"] != pytest.approx(other.best.parts["lm"], abs=1e-2)


def test_a_domain_prompt_equals_a_context_of_its_tokens() -> None:
    decoder = tiny_decoder(1)
    lm, tokenizer = decoder.language_models[0], decoder.acoustic.tokenizer
    result = decoder.decode(
        random_encoder_output(decoder.acoustic, 1), lm_prompt="renal", lm_weight=0.0, end_policy="lm", **OPTIONS
    )[0]
    prompt = lm.prompt(tokenizer.encode(" renal"))
    ids = [*prompt, *result.best.token_ids]
    with torch.inference_mode():
        logits = torch.log_softmax(lm.model(torch.tensor([ids])).logits[0], dim=-1)
    wanted = [float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(result.best.token_ids)]
    assert [token.parts["lm"] for token in result.best.tokens][: len(wanted)] == pytest.approx(wanted, abs=1e-3)


def test_a_delayed_rule_takes_no_domain_prompt() -> None:
    from shallowfusion import fusion

    decoder = tiny_decoder(1)
    with pytest.raises(InvalidArgumentError, match="lm_prompt"):
        decoder.decode(random_encoder_output(decoder.acoustic, 1), rule=fusion.delayed(0.3), lm_prompt="renal")


def test_caches_are_each_decoders_own() -> None:
    assert FusionDecoder(tiny_whisper()).prefixes is not FusionDecoder(tiny_whisper()).prefixes
