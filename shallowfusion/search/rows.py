"""What the search loop remembers of its live rows, and the numbers it gives the fused step for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shallowfusion.fusion.gates import StepView
from shallowfusion.fusion.weighing import step_weights
from shallowfusion.search.boosting import PhraseBooster
from shallowfusion.search.candidates import (
    WIDENING,
    CandidateArrays,
    CandidateScorer,
    owed_of,
    with_candidate_scores,
)
from shallowfusion.search.guards import RepeatGuard
from shallowfusion.search.step_calls import StepCall, run_together
from shallowfusion.search.timestamp_guard import TimestampGuard
from shallowfusion.values import Unmapped

if TYPE_CHECKING:
    from shallowfusion.search.loop import SearchPlan

__all__ = ["Rows"]

Array = npt.NDArray[Any]
NOTHING = Unmapped("floor", 0.0)


class Rows:
    """Totals of the live rows and, for rules that look back, what each source said of their tokens.

    Args:
        top_k: candidates per utterance; None = as many as the beam needs.
    """

    def __init__(
        self,
        plan: SearchPlan,
        num_sources: int,
        prompts: Sequence[Sequence[int]],
        scorers: Sequence[CandidateScorer] = (),
        top_k: int | None = None,
    ) -> None:
        num_utterances = len(prompts)
        self.plan = plan
        self.scorers = scorers
        self.top_k = plan.settings.num_candidates * (WIDENING if scorers else 1) if top_k is None else top_k
        self.num_sources = num_sources
        self.totals = np.zeros((num_utterances, 1), dtype=np.float32)
        self.sums = np.zeros((num_utterances, 1, num_sources + len(scorers)), dtype=np.float64)
        self._keeps_sums = plan.rule.catch_up or (plan.rule.gate is not None and plan.rule.gate.needs_sums)
        self._vocab_sizes: list[int] = []
        self._ids = [None if given is None else given.cpu().numpy().astype(np.int64) for given in plan.maps]
        self.guard = RepeatGuard(plan.no_repeat_ngram_size, prompts) if plan.no_repeat_ngram_size else None
        self.timestamps = TimestampGuard(plan.timestamps, num_utterances) if plan.timestamps is not None else None
        self.booster = (
            PhraseBooster(plan.phrases, plan.vocab_size, num_utterances) if plan.phrases is not None else None
        )
        self._biases: dict[tuple[int, ...], Tensor | None] = {}

    def candidates(self, logits: Sequence[Tensor], step: int) -> CandidateArrays:
        """The best continuations of every utterance under the plan's rule."""
        return self.survivors(run_together([self.call(logits, step)])[0])

    def survivors(self, found: CandidateArrays) -> CandidateArrays:
        """What is left of the fused step's candidates when late sources have had their say."""
        if not self.scorers:
            return found
        return with_candidate_scores(found, self.scorers, self.plan.settings.num_candidates)

    def call(self, logits: Sequence[Tensor], step: int) -> StepCall:
        """What this step asks of the fused step."""
        plan, totals = self.plan, self.totals
        if plan.rule.catch_up and step == plan.rule.initial_steps:
            lm_sums = self.sums[:, :, 1 : 1 + len(plan.rule.lm_weights)]
            totals = (totals + lm_sums @ np.array(plan.rule.lm_weights)).astype(np.float32)
        device, vocab = logits[0].device, logits[0].shape[1]
        self._vocab_sizes = [source.shape[1] for source in logits]
        temperatures = plan.temperatures or (1.0,) * len(logits)
        maps = [None if given is None else given.to(device) for given in plan.maps]
        view = StepView(logits, temperatures, step, maps, self._sums(device), totals.shape[1])
        numbers = step_weights(plan.rule, view).with_acoustic(plan.acoustic_weight)
        boost = None if self.booster is None else self.booster.bonus(device)
        sums = torch.from_numpy(totals.reshape(-1)).to(device)
        for shift in (numbers.shift, None if boost is None else boost.refunds):
            sums = sums if shift is None else sums + shift
        looks = plan.class_sources
        weights = [numbers.weights, *(look.factor * numbers.weights[:, look.source, None] for look in looks)]
        allowed = self._allowed(view)
        same: dict[str, Any] = {
            "top_k": self.top_k,
            "end_id": plan.end_id,
            "length_bonus": plan.length_bonus,
            "combine": "log_linear" if plan.rule.mixture is None else "mixture",
            "normalize": plan.normalize,
            "backend": plan.backend,
        }
        shape = (totals.shape[1], tuple(self._vocab_sizes), self.num_sources, self._forbidden(step), allowed is None)
        identity = (*same.values(), tuple(temperatures), tuple(map(id, plan.maps)), tuple(plan.unmapped))
        return StepCall(
            sources=[*logits, *(logits[look.source] for look in looks)],
            weights=torch.cat(weights, dim=1) if looks else numbers.weights,
            totals=sums,
            allowed=allowed,
            beam_size=totals.shape[1],
            parts=self.num_sources,
            settings={
                **same,
                "temperatures": [*temperatures, *(temperatures[look.source] for look in looks)],
                "maps": [*maps, *(look.map.to(device) for look in looks)],
                "unmapped": [*plan.unmapped, *[NOTHING] * len(looks)],
                "token_bias": self._bias(step, vocab, device),
                "bonus": None if boost is None else boost.sparse,
            },
            key=None if looks or boost is not None else (shape, identity),
        )

    def follow(self, candidates: CandidateArrays, tokens: Array, parents: Array, totals: Array) -> None:
        """Remember the totals of the new rows and, for rules that look back, the parts of their tokens."""
        if self._keeps_sums:
            same_parent = candidates.lanes[:, None] == parents[:, :, None]
            chosen = (same_parent & (candidates.tokens[:, None] == tokens[:, :, None])).argmax(axis=2)
            utterances = np.arange(len(tokens))[:, None]
            self.sums = self.sums[utterances, parents] + candidates.parts[utterances, chosen]
        self.totals = totals
        for follower in self._followers():
            follower.follow(parents, tokens)

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
        """Drop utterances: place i of the new batch holds what was at place order[i]."""
        self.totals = self.totals[list(order)]
        self.sums = self.sums[list(order)]
        for follower in self._followers():
            follower.keep(order)
        for scorer in self.scorers:
            owed = owed_of(scorer)
            if owed is not None and scorer.weight:
                self.totals = (self.totals + scorer.weight * owed).astype(np.float32)

    def _followers(self) -> list[CandidateScorer | RepeatGuard | TimestampGuard | PhraseBooster]:
        return [*self.scorers, *(own for own in (self.guard, self.timestamps, self.booster) if own is not None)]

    def _sums(self, device: torch.device) -> Tensor | None:
        if not self._keeps_sums:
            return None
        own = self.sums[:, :, : self.num_sources].reshape(-1, self.num_sources)
        return torch.from_numpy(own.astype(np.float32)).to(device)

    def _forbidden(self, step: int) -> tuple[int, ...]:
        plan = self.plan
        forbidden = plan.suppressed
        if step == 0:
            forbidden += plan.first_suppressed
        if step < plan.min_new_tokens:
            forbidden += plan.settings.end_ids
        return forbidden

    def _bias(self, step: int, vocab: int, device: torch.device) -> Tensor | None:
        forbidden = self._forbidden(step)
        if forbidden not in self._biases:
            bias = torch.zeros(vocab) if self.booster is None else self.booster.first.clone()
            bias[list(forbidden)] = float("-inf")
            self._biases[forbidden] = bias.to(device) if forbidden or self.booster is not None else None
        return self._biases[forbidden]

    def _allowed(self, view: StepView) -> Tensor | None:
        """What the guards of repetitions and timestamps let pass, the end token only where it is likely enough."""
        plan, acoustic = self.plan, view.logits[0]
        needs_threshold = plan.end_threshold is not None and (plan.rule.fuses or plan.fuses_late)
        if not needs_threshold and self.guard is None and self.timestamps is None:
            return None
        words = torch.full((acoustic.shape[0], (acoustic.shape[1] + 31) // 32), -1, dtype=torch.int32)
        repeated = None if self.guard is None else self.guard.forbidden()
        if repeated is not None:
            _forbid(words.numpy(), *repeated)
        words = words.to(acoustic.device)
        if self.timestamps is not None:
            words &= self.timestamps.allowed(acoustic, view.temperatures[0], self._forbidden(view.step), repeated)
        if needs_threshold:
            refused = self._end_is_unlikely(view)
            word, bit = divmod(plan.end_id, 32)
            words[:, word] &= torch.where(refused, ~_bit(bit), -1).to(torch.int32)
        return words

    def _end_is_unlikely(self, view: StepView) -> Tensor:
        assert self.plan.end_threshold is not None
        end_logit = view.logits[0][:, self.plan.end_id].float() / view.temperatures[0]
        return end_logit - view.acoustic.log_sum_exp < self.plan.end_threshold * view.acoustic.max_log_prob


def _forbid(words: Array, rows: Array, tokens: Array) -> None:
    np.bitwise_and.at(words, (rows, tokens // 32), ~(np.uint32(1) << (tokens % 32).astype(np.uint32)).view(np.int32))


def _bit(place: int) -> int:
    """1 << place as a signed 32-bit integer."""
    return 1 << place if place < 31 else -(1 << 31)
