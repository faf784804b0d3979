"""The `espnet` stop rule against ESPnet's own searches (`pip install --no-deps espnet`), fed with random tables.

Where espnet is not installed this is skipped; with espnet 202511 it passed on 2026-11-21, and with it
`pytest --hypothesis-profile explore` on 1,000 searches drawn at random.
"""

from __future__ import annotations

import zlib
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shallowfusion.config import BeamSettings
from shallowfusion.search.beam_state import BeamState, FinishedHypothesis
from shallowfusion.search.beam_state_reference import ReferenceBeamState

espnet = pytest.importorskip("espnet.nets.beam_search")
batched = pytest.importorskip("espnet.nets.batch_beam_search")
interfaces = pytest.importorskip("espnet.nets.scorer_interface")

END, VOCAB, START = 0, 14, 13
WEIGHTS = {"decoder": 0.7, "lm": 0.4, "length_bonus": 0.5}
Prefix = tuple[int, ...]


@cache
def log_probs_of(seed: int, source: str, growth: float, prefix: Prefix) -> torch.Tensor:
    """Nats [vocab] that depend on the whole prefix; the end token gets likelier with length."""
    if source == "length_bonus":
        return torch.ones(VOCAB)
    generator = np.random.default_rng([seed, zlib.crc32(repr((source, prefix)).encode())])
    logits = generator.normal(size=VOCAB) * 3
    logits[END] += growth * (len(prefix) - 3)
    return torch.log_softmax(torch.from_numpy(logits.astype(np.float32)), dim=-1)


class Table(interfaces.BatchScorerInterface):
    """A scorer of ESPnet that reads `log_probs_of`."""

    def __init__(self, seed: int, source: str, growth: float) -> None:
        self.of = (seed, source, growth)

    def score(self, y: torch.Tensor, state: Any, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return log_probs_of(*self.of, tuple(y[1:].tolist())), None

    def batch_score(self, ys: torch.Tensor, states: list[Any], xs: torch.Tensor) -> tuple[torch.Tensor, list[None]]:
        return torch.stack([self.score(y, None, xs)[0] for y in ys]), [None] * len(ys)


def their_search(
    kind: type, seed: int, growth: float, beam_size: int, frames: int, max_len_ratio: float, normalize: bool
) -> list[tuple[Prefix, float]]:
    """ESPnet's list, best first: tokens without start and ends, and the raw total."""
    search = kind(
        {source: Table(seed, source, growth) for source in WEIGHTS}, WEIGHTS, beam_size, VOCAB, START, END,
        normalize_length=normalize,
    )  # fmt: skip
    with torch.inference_mode():
        found = search(torch.zeros(frames, 2), maxlenratio=max_len_ratio)
    texts = [[int(token) for token in hypothesis.yseq[1:]] for hypothesis in found]
    scores = [float(hypothesis.score) for hypothesis in found]
    return [(tuple(text[: text.index(END)]), score) for text, score in zip(texts, scores, strict=True)]


def our_search(state_class: type, seed: int, growth: float, beam: BeamSettings) -> tuple[list[FinishedHypothesis], int]:
    """All hypotheses, best first, and the number of steps."""
    state: Any = state_class(beam, 1, 1)
    prefixes: list[Prefix] = [()]
    totals, steps = torch.zeros(1), 0
    while not state.is_done(0):
        increments = torch.zeros(len(prefixes), VOCAB)
        for source, weight in WEIGHTS.items():
            increments += weight * torch.stack([log_probs_of(seed, source, growth, prefix) for prefix in prefixes])
        flat = (increments + totals[:, None]).flatten()
        best = torch.topk(flat, min(beam.num_candidates, len(flat)))
        parents, tokens = best.indices // VOCAB, best.indices % VOCAB
        parts = increments.flatten()[best.indices]
        step = state.advance([0], best.values[None], parents[None], tokens[None], parts[None, :, None])
        live = state.num_live(0)
        pairs = zip(step.parents[0, :live], step.tokens[0, :live], strict=True)
        prefixes = [(*prefixes[parent], int(token)) for parent, token in pairs]
        totals, steps = torch.from_numpy(step.totals[0, :live]), steps + 1
    return state.results(0, 10_000), steps


CASES = {
    "kind": st.sampled_from([espnet.BeamSearch, batched.BatchBeamSearch]),
    "state_class": st.sampled_from([BeamState, ReferenceBeamState]),
    "seed": st.integers(0, 10**6),
    "growth": st.sampled_from([-0.5, 0.0, 0.3, 1.5]),
    "beam_size": st.sampled_from([1, 2, 5, 9]),
    "frames": st.integers(1, 24),
}


@given(normalize=st.booleans(), **CASES)
def test_hypotheses_totals_and_order_equal_espnets(
    kind, state_class, seed, growth, beam_size, frames, normalize
) -> None:
    """maxlenratio = 0, where ESPnet looks for the end; normalize_length is length_penalty 1."""
    theirs = their_search(kind, seed, growth, beam_size, frames, 0.0, normalize)
    beam = BeamSettings(beam_size, (END,), frames, stop_rule="espnet", length_penalty=float(normalize))
    ours, steps = our_search(state_class, seed, growth, beam)
    totals = {hypothesis.token_ids: hypothesis.total for hypothesis in ours}
    assert len(totals) == len(ours) == len(theirs)
    assert totals == pytest.approx(dict(theirs), abs=1e-5)
    # At the limit ESPnet gives every hypothesis one end token more, those that just ended too, and counts it.
    keys = [h.total if not normalize else h.total / _their_length(h, steps, frames) for h in ours]
    order = sorted(range(len(ours)), key=lambda i: -keys[i])
    assert [ours[i].token_ids for i in order] == [text for text, _ in theirs]
    if steps < frames or not normalize:
        assert [hypothesis.token_ids for hypothesis in ours] == [text for text, _ in theirs]


def _their_length(hypothesis: FinishedHypothesis, steps: int, frames: int) -> int:
    length = len(hypothesis.token_ids) + hypothesis.ended
    return length + (steps == frames == length)


@pytest.mark.parametrize("kind", [espnet.BeamSearch, batched.BatchBeamSearch])
@pytest.mark.parametrize("beam_size", [2, 5, 9])
def test_ours_looks_for_the_end_under_any_limit(state_class: type, kind: type, beam_size: int) -> None:
    """With maxlenratio != 0 ESPnet goes on to the limit; ours is what it had found when ours stopped."""
    early = 0
    for seed in range(20):
        theirs = their_search(kind, seed, 1.5, beam_size, 50, -20.0, False)
        beam = BeamSettings(beam_size, (END,), 20, stop_rule="espnet", length_penalty=0.0)
        ours, steps = our_search(state_class, seed, 1.5, beam)
        until = [(text, total) for text, total in theirs if len(text) < steps or steps == 20]
        assert [hypothesis.token_ids for hypothesis in ours] == [text for text, _ in until]
        assert [hypothesis.total for hypothesis in ours] == pytest.approx([total for _, total in until], abs=1e-5)
        assert ours[0].token_ids == theirs[0][0]
        early += len(ours) < len(theirs)
    assert early >= 2
