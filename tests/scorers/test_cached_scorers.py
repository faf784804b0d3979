"""Cached scores against uncached ones: 1e-4 after random reorders, departures, prompts and windows, batches 1..8."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from shallowfusion.scorers.attention import ATTENTION
from shallowfusion.scorers.base import DEAD, CachedScorer, Context
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.scorers.slots import moves_to_front
from tests.tiny import END, NO_TIMESTAMPS, START, random_encoder_output, tiny_lm, tiny_whisper, vocabulary

STEPS = 12


class Uncached:
    """The slow twin: every row is a list of tokens and is read from its beginning each time."""

    def __init__(self, scorer: CachedScorer, prompts: list[list[int]], states: torch.Tensor | None) -> None:
        self.scorer, self.states = scorer, states
        self.rows = [[list(prompt)] for prompt in prompts]
        self.starts = [[0] for _ in prompts]

    def fork(self, parents: np.ndarray) -> None:
        self.rows = [[list(own[k]) for k in chosen] for own, chosen in zip(self.rows, parents, strict=True)]
        self.starts = [[own[k] for k in chosen] for own, chosen in zip(self.starts, parents, strict=True)]

    def append(self, tokens: np.ndarray) -> None:
        for own, starts, new in zip(self.rows, self.starts, tokens, strict=True):
            for k, token in enumerate(new):
                if token >= 0:
                    own[k].append(int(token))
                    if len(own[k]) - starts[k] > self.scorer.window:
                        starts[k] = len(own[k]) - self.scorer.window // 2

    def keep(self, order: list[int]) -> None:
        self.rows = [self.rows[i] for i in order]
        self.starts = [self.starts[i] for i in order]
        if self.states is not None:
            self.states = self.states[order]

    @torch.inference_mode()
    def log_probs(self) -> torch.Tensor:
        found = []
        for i, (own, starts) in enumerate(zip(self.rows, self.starts, strict=True)):
            for row, start in zip(own, starts, strict=True):
                ids = torch.tensor([row[start:]], device=self.scorer.device)
                if self.states is None:
                    logits = self.scorer.model(input_ids=ids, use_cache=False).logits
                else:
                    hidden = self.scorer.model.model.decoder(
                        input_ids=ids, encoder_hidden_states=self.states[i : i + 1], use_cache=False
                    ).last_hidden_state
                    logits = self.scorer.model.proj_out(hidden)
                found.append(torch.log_softmax(logits[0, -1], dim=-1))
        return torch.stack(found)


def run_random_search(
    scorer: CachedScorer,
    prompts: list[list[int]],
    states: torch.Tensor | None,
    seed: int,
    *,
    uncached: CachedScorer | None = None,
    steps: int = STEPS,
    beams: Sequence[int] = (),
) -> None:
    """`uncached` is read from the beginning each time; None = the same model. `beams` of each; () = one for all."""
    rng = np.random.default_rng(seed)
    own_beams = np.array(beams or [int(rng.integers(1, 6))] * len(prompts))
    beam = int(own_beams.max())
    slow = Uncached(uncached or scorer, prompts, states)
    state = scorer.start(Context(prompts, beam, steps, states))
    torch.testing.assert_close(torch.log_softmax(state.logits, -1), slow.log_probs(), atol=1e-4, rtol=0)
    rows, utterances = 1, len(prompts)
    for step in range(steps):
        parents = rng.integers(0, np.minimum(rows, own_beams)[:, None], (utterances, beam))
        tokens = rng.integers(0, 40, (utterances, beam))
        if states is None:
            tokens[rng.random(tokens.shape) < 0.15] = -1  # a token the language model does not know
        tokens[np.arange(beam) >= own_beams[:, None]] = DEAD
        state = scorer.fork(state, parents)
        slow.fork(parents)
        if step % 4 == 2 and utterances > 1:
            kept = sorted(rng.choice(utterances, utterances - 1, replace=False).tolist())
            _, order = moves_to_front(kept)
            state = scorer.keep(state, order)
            slow.keep(order)
            tokens, own_beams, utterances = tokens[order], own_beams[order], utterances - 1
        logits, state = scorer.score(state, tokens)
        slow.append(tokens)
        rows = beam
        wanted = slow.log_probs()[torch.from_numpy(tokens.reshape(-1) != DEAD)]
        torch.testing.assert_close(torch.log_softmax(logits, -1), wanted, atol=1e-4, rtol=0)
        torch.testing.assert_close(scorer.end_scores(state), wanted[:, END], atol=1e-4, rtol=0)
        assert state.computed_rows == (own_beams.sum() if scorer.packs_rows else utterances * beam)


@pytest.mark.parametrize("utterances", range(1, 9))
def test_whisper_scores_equal_uncached_ones(utterances: int) -> None:
    model = tiny_whisper(utterances)
    rng = np.random.default_rng(utterances)
    previous = [rng.integers(0, 40, rng.integers(0, 7)).tolist() for _ in range(utterances)]
    prompts = [[*text, START, NO_TIMESTAMPS] for text in previous]
    run_random_search(model.scorer, prompts, random_encoder_output(model, utterances), seed=utterances)


@pytest.mark.parametrize("utterances", range(1, 9))
def test_lm_scores_equal_uncached_ones(utterances: int) -> None:
    scorer = tiny_lm(utterances)
    rng = np.random.default_rng(utterances)
    prompts = [scorer.prompt(rng.integers(0, 40, rng.integers(0, 9)).tolist()) for _ in range(utterances)]
    run_random_search(scorer, prompts, None, seed=utterances)


@pytest.mark.parametrize("attention", ["sdpa", ATTENTION])
@pytest.mark.parametrize("beams", [[1, 4, 2, 4], [3, 1, 1, 2], [2, 2, 2, 1]], ids=str)
def test_beams_of_several_sizes_equal_uncached_ones(beams: list[int], attention: str) -> None:
    model, lm = tiny_whisper(3), tiny_lm(3, positions=12)
    for scorer in (model.scorer, lm):
        scorer.model.set_attn_implementation(attention)
    assert lm.packs_rows == (attention == ATTENTION)
    run_random_search(
        model.scorer, [[START, NO_TIMESTAMPS]] * 4, random_encoder_output(model, 4), sum(beams), beams=beams
    )
    run_random_search(lm, [lm.prompt([3] * i) for i in range(4)], None, sum(beams), beams=beams)


@pytest.mark.parametrize("seed", range(4))
def test_lm_rows_beyond_the_window_keep_its_last_half(seed: int) -> None:
    scorer = tiny_lm(seed, positions=8)
    prompts = [scorer.prompt([3] * (seed + i)) for i in range(3)]
    run_random_search(scorer, prompts, None, seed)


def test_lm_starts_from_its_begin_token() -> None:
    assert tiny_lm().prompt([1, 2]) == [END, 1, 2]


def test_keys_and_values_are_not_moved_by_a_reorder() -> None:
    scorer = tiny_lm()
    state = scorer.start(Context([scorer.prompt()] * 2, 3, 8))
    _, state = scorer.score(scorer.fork(state, np.zeros((2, 3), dtype=np.int64)), np.array([[1, 2, 3], [4, 5, 6]]))
    before = [(layer.keys.data_ptr(), layer.keys.clone()) for layer in state.cache.layers]
    scorer.fork(state, np.array([[2, 2, 0], [1, 0, 0]]))
    for layer, (address, keys) in zip(state.cache.layers, before, strict=True):
        assert layer.keys.data_ptr() == address
        assert torch.equal(layer.keys, keys)


def test_cross_attention_keys_are_stored_once_per_utterance() -> None:
    model = tiny_whisper()
    states = random_encoder_output(model, 2)
    state = model.scorer.start(Context([[START, NO_TIMESTAMPS]] * 2, 5, 8, states))
    state = model.scorer.fork(state, np.zeros((2, 5), dtype=np.int64))
    model.scorer.score(state, np.arange(10).reshape(2, 5))
    for layer in state.cache.cross_attention_cache.layers:
        assert layer.keys.shape[0] == 2


def test_two_forks_in_a_row_are_one() -> None:
    lm = tiny_lm(4)
    twice, once = (lm.start(Context([[END]], 3, 8)) for _ in range(2))
    twice, once = (lm.fork(state, np.array([[0, 0, 0]])) for state in (twice, once))
    tokens = np.array([[1, 2, 3]])
    (_, twice), (_, once) = lm.score(twice, tokens), lm.score(once, tokens)
    twice = lm.fork(lm.fork(twice, np.array([[2, 0, 1]])), np.array([[1, 1, 0]]))
    once = lm.fork(once, np.array([[0, 0, 2]]))
    idle = np.array([[4, -1, -1]])  # idle rows repeat the logits of the rows they descend from
    torch.testing.assert_close(lm.score(twice, idle)[0], lm.score(once, idle)[0], atol=1e-5, rtol=0)


def test_slots_of_dead_branches_are_used_again() -> None:
    scorer = tiny_lm()
    state = scorer.start(Context([scorer.prompt()], 4, 40))
    state = scorer.fork(state, np.zeros((1, 4), dtype=np.int64))
    for step in range(20):
        _, state = scorer.score(state, np.full((1, 4), step))
        state = scorer.fork(state, np.zeros((1, 4), dtype=np.int64))  # all rows but the first die
    assert state.slots.num_used == 1 + 20
    assert state.slots.high_water() <= 1 + 20 + 3


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_models_with_rotary_positions_and_grouped_heads_equal_uncached_ones(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    config = AutoConfig.for_model(
        kind, vocab_size=41, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=END, eos_token_id=END, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    scorer = CausalLMScorer(model, vocabulary(41, END, kind))
    run_random_search(scorer, [scorer.prompt(), scorer.prompt([1, 2, 3])], None, seed=3)
