"""The `whisper` stop rule against openai-whisper's own decoder class, fed with random tables."""

from __future__ import annotations

import zlib
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from shallowfusion.config import BeamSettings
from shallowfusion.search.beam_state import FinishedHypothesis

decoding = pytest.importorskip("whisper.decoding")

END, VOCAB, START = 0, 12, 99
Prefix = tuple[int, ...]


@cache
def logits_of(seed: int, prefix: Prefix) -> torch.Tensor:
    """Logits [vocab] that depend on the whole prefix; the end token gets likelier with length.

    Never first, though: openai-whisper divides by zero when it ranks an empty hypothesis.
    """
    generator = np.random.default_rng([seed, zlib.crc32(repr(prefix).encode())])
    logits = generator.normal(size=VOCAB) * 2
    logits[END] += len(prefix) * 0.6 - 0.5 if prefix else -50
    return torch.from_numpy(logits.astype(np.float32))


class NoCache:
    """Stands in for the model's cache, which this search does without."""

    def rearrange_kv_cache(self, source_indices: list[int]) -> None:
        pass


def their_search(seed: int, beam: BeamSettings) -> tuple[list[tuple[Prefix, float]], int]:
    """openai-whisper's loop for one recording: finished (tokens, total) in its order, and which one it selects."""
    decoder = decoding.BeamSearchDecoder(beam.beam_size, END, NoCache(), beam.patience)
    tokens = torch.full((beam.beam_size, 1), START)
    totals = torch.zeros(beam.beam_size)
    for _ in range(beam.max_new_tokens):
        logits = torch.stack([logits_of(seed, tuple(row[1:])) for row in tokens.tolist()])
        tokens, completed = decoder.update(tokens, logits, totals)
        if completed:
            break
    sequences, sums = decoder.finalize(tokens[None], totals[None])
    words = [[sequence[1 : (sequence == END).nonzero()[0, 0]] for sequence in sequences[0]]]
    selected = decoding.MaximumLikelihoodRanker(beam.length_penalty).rank(words, sums)[0]
    return [(tuple(row.tolist()), total) for row, total in zip(words[0], sums[0], strict=True)], int(selected)


def our_search(state_class: type, seed: int, beam: BeamSettings) -> list[FinishedHypothesis]:
    state: Any = state_class(beam, 1, 1)
    prefixes: list[Prefix] = [()]
    totals = torch.zeros(1)
    while not state.is_done(0):
        log_probs = torch.log_softmax(torch.stack([logits_of(seed, prefix) for prefix in prefixes]), dim=-1)
        flat = (totals[:, None] + log_probs).flatten()
        best = torch.topk(flat, min(beam.num_candidates, len(flat)))
        parents, tokens = best.indices // VOCAB, best.indices % VOCAB
        parts = log_probs.flatten()[best.indices]
        step = state.advance([0], best.values[None], parents[None], tokens[None], parts[None, :, None])
        live = state.num_live(0)
        pairs = zip(step.parents[0, :live], step.tokens[0, :live], strict=True)
        prefixes = [(*prefixes[parent], int(token)) for parent, token in pairs]
        totals = torch.from_numpy(step.totals[0, :live])
    return state.results(0, 100)


@pytest.mark.parametrize("beam_size", [1, 2, 5, 9])
@pytest.mark.parametrize("patience", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("penalty", [None, 0.0, 0.6, 1.0])
def test_whisper_rule_finds_what_openai_whisper_finds(
    state_class: type, beam_size: int, patience: float, penalty: float | None
) -> None:
    ended = set()
    for seed in range(6):
        max_new_tokens = (3, 12)[seed % 2]
        beam = BeamSettings(
            beam_size, (END,), max_new_tokens, stop_rule="whisper", length_penalty=penalty, patience=patience
        )
        theirs, selected = their_search(seed, beam)
        theirs_words, theirs_total = theirs[selected]
        ours = our_search(state_class, seed, beam)
        assert ours[0].token_ids == theirs_words
        assert ours[0].total == pytest.approx(theirs_total, abs=1e-5)
        totals = {hypothesis.token_ids: hypothesis.total for hypothesis in ours}
        assert totals == pytest.approx(dict(theirs), abs=1e-5)
        assert len(totals) == len(ours) == len(theirs)
        ended |= {hypothesis.ended for hypothesis in ours}
    assert True in ended
