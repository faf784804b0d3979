"""The search: where scorers, which know models, and the fused step, which knows numbers, meet."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shallowfusion.config import BeamSettings
from shallowfusion.fusion.rules import Rule
from shallowfusion.fusion.step import Backend, fused_step, row_statistics
from shallowfusion.scorers.base import Context, Scorer
from shallowfusion.scorers.slots import moves_to_front
from shallowfusion.search.beam_state import BeamState, FinishedHypothesis
from shallowfusion.values import Candidates, Normalize, Unmapped

__all__ = ["SearchOutcome", "SearchPlan", "StageClock", "search"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SearchPlan:
    """Everything about one batch of searches that is not a model.

    Args:
        settings: width, stop rule and ranking.
        rule: weights of the language models by step.
        maps: per source the id of each acoustic token (see `fused_step`); maps[0] is None.
        unmapped: per source what it says of tokens without counterpart.
        normalize: of the fused row.
        suppressed: acoustic ids never to be generated; `first_suppressed`: not as the first token.
        min_new_tokens: the end token is forbidden before this many tokens.
        end_threshold: where the rule fuses, the end token is a candidate only if its acoustic log-prob exceeds
            end_threshold times that of the best token (1904.02619, section 3.1.2); None = always.
    """

    settings: BeamSettings
    rule: Rule
    maps: tuple[Tensor | None, ...]
    unmapped: tuple[Unmapped, ...]
    normalize: Normalize = "none"
    temperatures: tuple[float, ...] | None = None
    suppressed: tuple[int, ...] = ()
    first_suppressed: tuple[int, ...] = ()
    min_new_tokens: int = 0
    end_threshold: float | None = None
    length_bonus: float = 0.0
    backend: Backend = "auto"

    @property
    def end_id(self) -> int:
        return self.settings.end_ids[0]


@dataclass
class StageClock:
    """Seconds and calls per stage of one or more searches."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start
        self.calls[stage] += 1


@dataclass(frozen=True)
class SearchOutcome:
    """The finished hypotheses of one utterance, best first, and whether a model returned NaN for it."""

    hypotheses: list[FinishedHypothesis]
    saw_nan: bool


def search(
    scorers: Sequence[Scorer], contexts: Sequence[Context], names: Sequence[str], plan: SearchPlan, clock: StageClock
) -> list[SearchOutcome]:
    """Beam search for argmax over y of sum_t increment(y_t), `fused_step`'s increments, under the plan's length rule.

    Utterances leave the batch when their search ends. Synchronises with the device once per step.

    Args:
        scorers: the acoustic scorer first; `contexts` and `names` (stages of the clock) likewise.

    Returns:
        One outcome per utterance, with at most beam_size hypotheses.
    """
    num_utterances = len(contexts[0].prompts)
    beams = BeamState(plan.settings, num_utterances, len(scorers))
    rows = _Rows(plan, len(scorers), num_utterances)
    states = []
    for scorer, context, name in zip(scorers, contexts, names, strict=True):
        with clock(name):
            states.append(scorer.start(context))
    active = np.arange(num_utterances)
    saw_nan = np.zeros(num_utterances, dtype=bool)
    for step in range(plan.settings.max_new_tokens):
        with clock("fusion"):
            candidates = rows.candidates([state.logits for state in states], step)
        with clock("search"):
            flagged = rows.flagged(candidates)
            saw_nan[active] |= flagged
            moved = beams.advance(active, *rows.arrays(candidates), flagged)
            rows.follow(candidates, moved.tokens, moved.parents, moved.totals)
            kept = np.flatnonzero(~moved.done)
            if len(kept) == 0:
                break
            _, order = moves_to_front(kept.tolist())
        for i, (scorer, name) in enumerate(zip(scorers, names, strict=True)):
            with clock(name):
                states[i] = scorer.fork(states[i], moved.parents)
                if len(kept) < len(active):
                    states[i] = scorer.keep(states[i], order)
                _, states[i] = scorer.score(states[i], rows.own_ids(moved.tokens[order], i))
        rows.keep(order)
        active = active[order]
    return [SearchOutcome(beams.results(u, plan.settings.beam_size), bool(saw_nan[u])) for u in range(num_utterances)]


class _Rows:
    """What the loop remembers of each live row: its total, and LM log-probs that a `catch_up` rule still owes."""

    def __init__(self, plan: SearchPlan, num_sources: int, num_utterances: int) -> None:
        self.plan = plan
        self.num_sources = num_sources
        self.totals = np.zeros((num_utterances, 1), dtype=np.float32)
        self.owed = np.zeros((num_utterances, 1, num_sources), dtype=np.float64)
        self._vocab_sizes: list[int] = []
        self._ids = [None if given is None else given.cpu().numpy().astype(np.int64) for given in plan.maps]
        self._biases: dict[tuple[int, ...], Tensor | None] = {}

    def candidates(self, logits: Sequence[Tensor], step: int) -> Candidates:
        plan, totals = self.plan, self.totals
        beam_size, rows = totals.shape[1], totals.size
        weights = (1.0, *plan.rule.weights_at(step))
        if plan.rule.catch_up and step == plan.rule.initial_steps:
            totals = (totals + self.owed @ np.array([0.0, *plan.rule.lm_weights])).astype(np.float32)
        device, vocab = logits[0].device, logits[0].shape[1]
        self._vocab_sizes = [source.shape[1] for source in logits]
        return fused_step(
            logits,
            torch.tensor(weights).expand(rows, self.num_sources),
            torch.from_numpy(totals.reshape(-1)),
            beam_size=beam_size,
            top_k=plan.settings.num_candidates,
            end_id=plan.end_id,
            temperatures=plan.temperatures,
            maps=[None if given is None else given.to(device) for given in plan.maps],
            unmapped=plan.unmapped,
            token_bias=self._bias(step, vocab, device),
            allowed=self._allowed(logits[0]),
            length_bonus=plan.length_bonus,
            normalize=plan.normalize,
            backend=plan.backend,
        )

    def arrays(self, candidates: Candidates) -> tuple[Array, Array, Array, Array]:
        """Totals, parents as lanes of their utterance, tokens and parts as numpy arrays."""
        parents = candidates.parent_rows.cpu().numpy()
        lanes = np.where(parents >= 0, parents % self.totals.shape[1], -1)
        return (
            candidates.totals.cpu().numpy(),
            lanes,
            candidates.token_ids.cpu().numpy(),
            candidates.parts.cpu().numpy(),
        )

    def flagged(self, candidates: Candidates) -> Array:
        """Which utterances saw NaN or +inf, bool [utterances]."""
        flags = candidates.flags.cpu().numpy().reshape(self.totals.shape)
        return np.asarray(flags.any(axis=1))

    def follow(self, candidates: Candidates, tokens: Array, parents: Array, totals: Array) -> None:
        """Remember the totals of the new rows and, for `catch_up`, the parts of their tokens."""
        if self.plan.rule.catch_up:
            _, lanes, ids, parts = self.arrays(candidates)
            chosen = ((lanes[:, None] == parents[:, :, None]) & (ids[:, None] == tokens[:, :, None])).argmax(axis=2)
            utterances = np.arange(len(tokens))[:, None]
            self.owed = self.owed[utterances, parents] + parts[utterances, chosen]
        self.totals = totals

    def own_ids(self, tokens: Array, source: int) -> Array:
        """Acoustic ids as ids of a source, -1 where it has no such token."""
        mapping = self._ids[source]
        if source == 0:
            return tokens
        if mapping is not None:
            known: Array = mapping[tokens]
            return known
        return np.where(tokens < self._vocab_sizes[source], tokens, -1)

    def keep(self, order: Sequence[int]) -> None:
        self.totals = self.totals[list(order)]
        self.owed = self.owed[list(order)]

    def _bias(self, step: int, vocab: int, device: torch.device) -> Tensor | None:
        plan = self.plan
        forbidden = plan.suppressed
        if step == 0:
            forbidden += plan.first_suppressed
        if step < plan.min_new_tokens:
            forbidden += plan.settings.end_ids
        if forbidden not in self._biases:
            bias = torch.zeros(vocab)
            bias[list(forbidden)] = float("-inf")
            self._biases[forbidden] = bias.to(device) if forbidden else None
        return self._biases[forbidden]

    def _allowed(self, acoustic: Tensor) -> Tensor | None:
        """Every token, but the end token only where the acoustic model finds it likely enough."""
        plan = self.plan
        if plan.end_threshold is None or not plan.rule.fuses:
            return None
        temperature = 1.0 if plan.temperatures is None else plan.temperatures[0]
        statistics = row_statistics(acoustic, temperature)
        end_log_prob = acoustic[:, plan.end_id].float() / temperature - statistics.log_sum_exp
        refused = end_log_prob < plan.end_threshold * statistics.max_log_prob
        words = torch.full((acoustic.shape[0], (acoustic.shape[1] + 31) // 32), -1, dtype=torch.int32)
        words = words.to(acoustic.device)
        word, bit = divmod(plan.end_id, 32)
        only_end = 1 << bit if bit < 31 else -(1 << 31)
        words[:, word] = torch.where(refused, ~only_end, -1).to(torch.int32)
        return words
