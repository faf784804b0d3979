"""The `hf` stop rule against transformers' own beam search on tiny random GPT-2 models."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from shallowfusion.config import BeamSettings
from shallowfusion.search.beam_state import FinishedHypothesis

PROMPTS = [[3, 7], [1, 1], [9, 2]]
MAX_NEW_TOKENS = 8
EARLY_STOPPING = {"heuristic": False, "first": True, "never": "never"}
SEED_AND_END_BOOST = [(1, 0.0), (1, 1.5), (2, 1.5), (3, 4.5), (4, 6.0)]


class BoostedGPT2(GPT2LMHeadModel):
    """A GPT-2 whose end tokens are likelier by a constant, so that beams end at many lengths."""

    end_ids: tuple[int, ...] = ()
    end_boost: float = 0.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits[..., list(self.end_ids)] += self.end_boost
        return output


@cache
def tiny_model(seed: int, end_boost: float, end_ids: tuple[int, ...]) -> BoostedGPT2:
    """13 tokens, one layer, and weights large enough to make beams cross."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 13, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**shape, initializer_range=0.7, bos_token_id=None, eos_token_id=None)
    model = BoostedGPT2(config).float().eval()
    model.end_ids, model.end_boost = end_ids, end_boost
    model.generation_config.eos_token_id = list(end_ids)
    model.generation_config.pad_token_id = 0
    return model


@cache
def generated(
    seed: int, end_boost: float, end_ids: tuple[int, ...], beam_size: int, penalty: float, early_stopping: str
) -> list[list[tuple[list[int], float]]]:
    """What transformers finds: per prompt the new tokens, padded, and the score of each returned sequence."""
    output = tiny_model(seed, end_boost, end_ids).generate(
        torch.tensor(PROMPTS),
        attention_mask=torch.ones(len(PROMPTS), 2, dtype=torch.int64),
        num_beams=beam_size,
        num_return_sequences=beam_size,
        max_new_tokens=MAX_NEW_TOKENS,
        length_penalty=penalty,
        early_stopping=EARLY_STOPPING[early_stopping],
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    scores = output.sequences_scores.tolist() if beam_size > 1 else [0.0] * len(PROMPTS)
    pairs = [(sequence[2:], score) for sequence, score in zip(output.sequences.tolist(), scores, strict=True)]
    return [pairs[first : first + beam_size] for first in range(0, len(pairs), beam_size)]


@torch.no_grad()
def our_search(state_class: type, model: BoostedGPT2, settings: BeamSettings) -> list[list[FinishedHypothesis]]:
    """Run the beam with an uncached forward pass over every live hypothesis and a plain torch top-k."""
    state = state_class(settings, len(PROMPTS), 1)
    vocab, wanted = model.config.vocab_size, settings.num_candidates
    lanes = {utterance: [list(prompt)] for utterance, prompt in enumerate(PROMPTS)}
    sums = {utterance: torch.zeros(1) for utterance in lanes}
    while lanes:
        columns: tuple[list[Any], ...] = ([], [], [], [])
        for utterance, rows in lanes.items():
            log_probs = torch.log_softmax(model(torch.tensor(rows)).logits[:, -1].float(), dim=-1)
            flat = (sums[utterance][:, None] + log_probs).flatten()
            best = torch.topk(flat, min(wanted, len(flat)))
            padding = (0, wanted - len(best.indices))
            found = (best.values, best.indices // vocab, best.indices % vocab, log_probs.flatten()[best.indices])
            for column, values, fill in zip(columns, found, (-torch.inf, -1, -1, 0), strict=True):
                column.append(torch.nn.functional.pad(values, padding, value=fill))
        totals, parents, tokens, parts = (torch.stack(column).numpy() for column in columns)
        active = list(lanes)
        step = state.advance(np.array(active), totals, parents, tokens, parts[:, :, None])
        for row, utterance in enumerate(active):
            old = lanes.pop(utterance)
            live = state.num_live(utterance)
            assert np.isfinite(step.totals[row]).sum() == live
            if not step.done[row]:
                pairs = zip(step.parents[row, :live], step.tokens[row, :live], strict=True)
                lanes[utterance] = [[*old[parent], int(token)] for parent, token in pairs]
                sums[utterance] = torch.from_numpy(step.totals[row, :live])
    return [state.results(utterance, settings.beam_size) for utterance in range(len(PROMPTS))]


def assert_same(ours: list[FinishedHypothesis], theirs: list[tuple[list[int], float]], settings: BeamSettings) -> None:
    assert len(ours) == len(theirs)
    for hypothesis, (tokens, score) in zip(ours, theirs, strict=True):
        length = len(hypothesis.token_ids)
        assert tuple(tokens[:length]) == hypothesis.token_ids
        if hypothesis.ended:
            assert tokens[length] in settings.end_ids
        assert not any(tokens[len(hypothesis.token_totals) :])
        assert hypothesis.forced == (not hypothesis.ended)
        if settings.beam_size > 1:
            assert hypothesis.key == pytest.approx(score, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("beam_size", [1, 2, 3, 5])
@pytest.mark.parametrize("early_stopping", ["heuristic", "first", "never"])
@pytest.mark.parametrize("penalty", [-0.7, 0.0, 1.0, 2.0])
def test_hf_rule_finds_what_generate_finds(
    state_class: type, penalty: float, early_stopping: str, beam_size: int
) -> None:
    for end_ids in ((0,), (0, 5)):
        settings = BeamSettings(
            beam_size, end_ids, MAX_NEW_TOKENS, length_penalty=penalty, early_stopping=early_stopping
        )
        for seed, end_boost in SEED_AND_END_BOOST:
            theirs = generated(seed, end_boost, end_ids, beam_size, penalty, early_stopping)
            ours = our_search(state_class, tiny_model(seed, end_boost, end_ids), settings)
            for mine, wanted in zip(ours, theirs, strict=True):
                assert_same(mine, wanted, settings)


def test_models_reach_every_way_to_stop() -> None:
    """The oracle is only strong if its runs stop early, stop late and disagree with each other."""
    runs = {
        early_stopping: [
            generated(seed, end_boost, (0,), 3, penalty, early_stopping)
            for seed, end_boost in SEED_AND_END_BOOST
            for penalty in (-0.7, 1.0, 2.0)
        ]
        for early_stopping in EARLY_STOPPING
    }
    assert runs["heuristic"] != runs["first"] != runs["never"] != runs["heuristic"]
    lengths = {len(tokens) for run in runs["heuristic"] for pairs in run for tokens, _ in pairs}
    assert min(lengths) < MAX_NEW_TOKENS == max(lengths)
