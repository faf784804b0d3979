"""The `hf` stop rule against transformers' own beam search on a tiny random GPT-2."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from shallowfusion.config import BeamSettings
from shallowfusion.search.beam_state import FinishedHypothesis

PROMPT = [3, 7]
MAX_NEW_TOKENS = 9
EARLY_STOPPING = {"heuristic": False, "first": True, "never": "never"}


def tiny_model(seed: int, end_boost: float, end_ids: tuple[int, ...]) -> GPT2LMHeadModel:
    """A 13-token GPT-2 whose logits differ enough to make beams cross and end at many lengths."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=13, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.6)
    model = GPT2LMHeadModel(config).float().eval()
    model.generation_config.eos_token_id = list(end_ids)
    model.generation_config.pad_token_id = 0
    model.generation_config.bos_token_id = None
    forward = model.forward

    def boosted(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        output.logits = output.logits.clone()
        output.logits[..., list(end_ids)] += end_boost
        return output

    model.forward = boosted
    return model


@torch.no_grad()
def our_search(
    state_class: type, model: GPT2LMHeadModel, prompts: list[list[int]], settings: BeamSettings
) -> list[list[FinishedHypothesis]]:
    """Run the beam with an uncached forward pass over every live hypothesis and a plain torch top-k."""
    state = state_class(settings, len(prompts), 1)
    vocab = model.config.vocab_size
    lanes = {utterance: [list(prompt)] for utterance, prompt in enumerate(prompts)}
    sums = {utterance: torch.zeros(1) for utterance in lanes}
    while lanes:
        totals, parents, tokens, parts = [], [], [], []
        for utterance, rows in lanes.items():
            log_probs = torch.log_softmax(model(torch.tensor(rows)).logits[:, -1].float(), dim=-1)
            flat = (sums[utterance][:, None] + log_probs).flatten()
            best = torch.topk(flat, min(settings.num_candidates, len(flat)))
            padding = settings.num_candidates - len(best.indices)
            totals.append(torch.nn.functional.pad(best.values, (0, padding), value=-torch.inf))
            parents.append(torch.nn.functional.pad(best.indices // vocab, (0, padding), value=-1))
            tokens.append(torch.nn.functional.pad(best.indices % vocab, (0, padding), value=-1))
            parts.append(torch.nn.functional.pad(log_probs.flatten()[best.indices], (0, padding))[:, None])
        active = list(lanes)
        columns = (torch.stack(column).numpy() for column in (totals, parents, tokens, parts))
        step = state.advance(np.array(active), *columns)
        for row, utterance in enumerate(active):
            live = int(np.isfinite(step.totals[row]).sum())
            old = lanes.pop(utterance)
            if not step.done[row]:
                assert live == state.num_live(utterance)
                pairs = zip(step.parents[row, :live], step.tokens[row, :live], strict=True)
                lanes[utterance] = [[*old[parent], int(token)] for parent, token in pairs]
                sums[utterance] = torch.from_numpy(step.totals[row, :live])
    return [state.results(utterance, settings.beam_size) for utterance in range(len(prompts))]


@pytest.mark.parametrize("early_stopping", ["heuristic", "first", "never"])
@pytest.mark.parametrize("length_penalty", [-0.7, 0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("beam_size", [2, 3, 4, 5])
@pytest.mark.parametrize("end_ids", [(0,), (0, 5)])
def test_hf_rule_finds_what_generate_finds(
    state_class: type, early_stopping: str, length_penalty: float, beam_size: int, end_ids: tuple[int, ...]
) -> None:
    settings = BeamSettings(
        beam_size, end_ids, MAX_NEW_TOKENS, length_penalty=length_penalty, early_stopping=early_stopping
    )
    for seed, end_boost in ((1, 0.0), (2, 1.5), (3, 3.0), (4, 6.0)):
        model = tiny_model(seed, end_boost, end_ids)
        theirs = model.generate(
            torch.tensor([PROMPT]),
            num_beams=beam_size,
            num_return_sequences=beam_size,
            max_new_tokens=MAX_NEW_TOKENS,
            length_penalty=length_penalty,
            early_stopping=EARLY_STOPPING[early_stopping],
            do_sample=False,
            use_cache=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        (ours,) = our_search(state_class, model, [PROMPT], settings)
        assert len(ours) == beam_size
        for hypothesis, sequence, score in zip(ours, theirs.sequences, theirs.sequences_scores, strict=True):
            tokens = sequence[len(PROMPT) :].tolist()
            count = len(hypothesis.token_totals)
            assert tuple(tokens[: len(hypothesis.token_ids)]) == hypothesis.token_ids
            if hypothesis.ended:
                assert tokens[len(hypothesis.token_ids)] in end_ids
            assert not any(tokens[count:])
            assert hypothesis.key == pytest.approx(float(score), abs=1e-5)
            assert hypothesis.forced == (not hypothesis.ended)
