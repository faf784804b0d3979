"""Whole searches of transformers and openai-whisper over the models of `tests.tiny`, to compare ours with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput

from shallowfusion.decoder import FusionDecoder
from tests.tiny import END, NO_TIMESTAMPS, START

__all__ = ["PROMPT", "by_openai_whisper", "generated"]

PROMPT = (START, NO_TIMESTAMPS)


def generated(
    model: FusionDecoder,
    states: torch.Tensor,
    num_beams: int,
    new_tokens: int,
    prompt: Sequence[int] = PROMPT,
    **options: Any,
) -> list[list[tuple[list[int], float | None]]]:
    """Per utterance the (tokens, score) pairs of transformers' search, best first; greedy ones have no score."""
    found = GenerationMixin.generate(
        model.acoustic.scorer.model,
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        decoder_input_ids=torch.tensor([list(prompt)] * len(states), device=states.device),
        num_beams=num_beams,
        num_return_sequences=num_beams,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    pairs = []
    for i, row in enumerate(found.sequences.tolist()):
        said = row[len(prompt) :]
        score = float(found.sequences_scores[i]) if num_beams > 1 else None
        pairs.append((said[: said.index(END)] if END in said else said, score))
    return [pairs[i : i + num_beams] for i in range(0, len(pairs), num_beams)]


@torch.inference_mode()
def by_openai_whisper(
    model: FusionDecoder,
    states: torch.Tensor,
    beam_size: int,
    new_tokens: int,
    prompt: Sequence[int] = PROMPT,
    patience: float | None = None,
    filtered: Callable[[torch.Tensor, torch.Tensor], None] = lambda logits, tokens: None,
) -> tuple[list[list[int]], list[float]]:
    """openai-whisper's loop for one recording: finished token lists with their summed log-probs.

    Args:
        filtered: changes logits [beams, vocab] in place, given the tokens before.
    """
    decoding = pytest.importorskip("whisper.decoding")
    whisper = model.acoustic.scorer.model
    cache = SimpleNamespace(rearrange_kv_cache=lambda sources: None)
    search = decoding.BeamSearchDecoder(beam_size, END, cache, patience)
    if beam_size == 1:
        search = decoding.GreedyDecoder(0.0, END)
    tokens, totals = torch.tensor([list(prompt)] * beam_size), torch.zeros(beam_size)
    for _ in range(new_tokens):
        hidden = whisper.model.decoder(
            input_ids=tokens, encoder_hidden_states=states.expand(beam_size, -1, -1), use_cache=False
        ).last_hidden_state
        logits = whisper.proj_out(hidden[:, -1])
        filtered(logits, tokens)
        tokens, completed = search.update(tokens, logits, totals)
        if completed:
            break
    found, sums = search.finalize(tokens.reshape(1, beam_size, -1), totals.reshape(1, -1))
    texts = [row[len(prompt) : (row == END).nonzero()[0, 0]].tolist() for row in found[0]]
    return texts, sums[0]
