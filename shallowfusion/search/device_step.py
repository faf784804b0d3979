"""One step of a device-driven search: fused step, beams, slots and both models over memory that never moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from shallowfusion.fusion.step import fused_step
from shallowfusion.kernels.beam_advance_arrays import AdvanceTables, BeamArrays, SlotArrays, edit_room
from shallowfusion.kernels.beam_advance_reference import (
    beam_advance_reference,
    follow_slots_reference,
    limit_end_reference,
)
from shallowfusion.scorers.base import CachedScorer, Context
from shallowfusion.scorers.fixed_decoder import FixedDecoder
from shallowfusion.search.device_timestamps import DeviceTimestamps
from shallowfusion.search.loop import SearchPlan
from shallowfusion.values import Candidates, RowStatistics, StepRequest, no_candidates

__all__ = ["DeviceStep", "length_room", "step_tables", "structure"]

Call = Callable[[], object]
IMPOSSIBLE = float("-inf")
LENGTH_ROUNDING = 16  # tokens; so that searches of similar max_new_tokens share a step


def length_room(plan: SearchPlan) -> int:
    """Tokens that a step for this plan has room for."""
    return -(-plan.settings.max_new_tokens // LENGTH_ROUNDING) * LENGTH_ROUNDING


def structure(plan: SearchPlan) -> Hashable:
    """What a step has fixed once its calls are: shapes, kernels and their arguments.

    All else of a plan is a table that `DeviceStep.load` writes anew: weights of all steps, length penalty and bonus,
    max_new_tokens up to `length_room`, early stopping but "first", patience, and which tokens are forbidden.
    """
    settings = plan.settings
    maps = tuple(None if given is None else given.cpu().numpy().tobytes() for given in plan.maps)
    return (
        settings.beam_size, settings.end_ids, settings.stop_rule, settings.early_stopping == "first", length_room(plan),
        settings.recombination, maps, plan.unmapped, plan.normalize, plan.temperatures, _end_limit(plan),
        _has_bias(plan), edit_room(len(_edits(plan))), plan.timestamps, plan.backend,
    )  # fmt: skip


def _end_limit(plan: SearchPlan) -> float | None:
    """The threshold of the end token where there is one."""
    return plan.end_threshold if plan.rule.fuses or plan.fuses_late else None


def _has_bias(plan: SearchPlan) -> bool:
    return bool(plan.suppressed or _edits(plan))


def step_tables(plan: SearchPlan, num_sources: int, device: torch.device) -> AdvanceTables:
    """Weights and masks of every step of a plan without gates, as tables."""
    settings, rule = plan.settings, plan.rule
    weights = [
        [plan.acoustic_weight, *rule.weights_at(step)][:num_sources] for step in range(settings.max_new_tokens + 1)
    ]
    return AdvanceTables.make(settings, torch.tensor(weights), _edits(plan), device, length_room(plan))


def _edits(plan: SearchPlan) -> list[tuple[int, int, float]]:
    """Tokens forbidden for some steps only: (token, steps, bias afterwards)."""
    until = dict.fromkeys(plan.first_suppressed, 1)
    for token in plan.settings.end_ids if plan.min_new_tokens else ():
        until[token] = max(plan.min_new_tokens, until.get(token, 0))
    return [(token, steps, 0.0) for token, steps in until.items() if token not in plan.suppressed]


class DeviceStep:
    """The memory of a batch of device-driven searches and the calls that move it one token on.

    `load` starts searches; then `select` (fused step, beams, ring record) and `read` of every model, in turn. On CUDA
    neither waits for the device, and neither allocates once its kernels are compiled; a CUDA graph may hold both.

    Args:
        scorers: cached decoders, the acoustic one first, on one device.
        plan: one that `refusal` has nothing to say about; later ones of the same `structure` may follow it.
        num_utterances: places; a batch may fill fewer.
        prompt_slots: per scorer, the longest prompt there is room for.
    """

    def __init__(
        self, scorers: Sequence[CachedScorer], plan: SearchPlan, num_utterances: int, prompt_slots: Sequence[int]
    ) -> None:
        self.plan, self.num_utterances, self.device = plan, num_utterances, scorers[0].device
        settings = plan.settings
        self.on_kernels = plan.backend == "triton" or (plan.backend == "auto" and self.device.type == "cuda")
        self.tables = step_tables(plan, len(scorers), self.device)
        self.slots = [
            SlotArrays.make(num_utterances, settings.beam_size, length_room(plan), room, self.device)
            for room in prompt_slots
        ]
        self.decoders = [
            FixedDecoder(scorer, own.ids, own.positions, own.writes, own.table)
            for scorer, own in zip(scorers, self.slots, strict=True)
        ]
        self.maps = tuple(None if given is None else given.to(self.device) for given in plan.maps)
        self._timestamps: DeviceTimestamps | None = None
        self._first_bias = self._length_bonus = torch.empty(0)
        self._selecting: list[Call] = []
        self._following: list[Call] = []

    @property
    def is_ready(self) -> bool:
        """Whether a first batch has been loaded, which fixes every address."""
        return bool(self._selecting)

    @torch.inference_mode()
    def load(self, contexts: Sequence[Context], plan: SearchPlan) -> None:
        """Read the prompts of a batch and start its searches, under a plan of the same structure."""
        for decoder, slots, context in zip(self.decoders, self.slots, contexts, strict=True):
            slots.reset(*decoder.prefill(context))
            if not decoder.reads_table:
                slots.visible(out=decoder.visible)
        self.plan = plan
        if not self.is_ready:
            self._prepare()
        else:
            self.tables = self.tables.take(step_tables(plan, len(self.decoders), self.device))
            self._first_bias.copy_(self._bias(len(self._first_bias)))
            self._length_bonus.fill_(plan.length_bonus)
        self.restart(len(contexts[0].prompts))

    @torch.inference_mode()
    def restart(self, num_searches: int) -> None:
        """Start beams in the first `num_searches` places; the others count as done."""
        self.arrays.reset(self.tables, self._first_bias, num_searches)
        if self._timestamps is not None:
            self._timestamps.reset()

    @torch.inference_mode()
    def select(self) -> None:
        """Fuse the logits, advance the beams, leave the ring record."""
        for call in self._selecting:
            call()

    @torch.inference_mode()
    def read(self, source: int) -> None:
        """Let one model read the new tokens; its slots first."""
        self._following[source]()
        decoder = self.decoders[source]
        if not decoder.reads_table:
            self.slots[source].visible(out=decoder.visible)
        decoder.read()

    def _prepare(self) -> None:
        """Allocate what depends on the vocabularies and fix every call of a step."""
        plan, settings = self.plan, self.plan.settings
        sources = [decoder.logits for decoder in self.decoders]
        rows, vocab = sources[0].shape
        self._first_bias = self._bias(vocab)
        self.arrays = BeamArrays.make(self.tables, self.num_utterances, vocab, settings.num_candidates, len(sources))
        self._length_bonus = torch.full((rows,), plan.length_bonus, device=self.device)
        self._limits_end = limits_end = _end_limit(plan) is not None
        words = (vocab + 31) // 32
        has_mask = limits_end or plan.timestamps is not None
        self.allowed = torch.full((rows, words), -1, dtype=torch.int32, device=self.device) if has_mask else None
        request = StepRequest(
            sources=tuple(sources),
            weights=self.arrays.weights,
            totals=self.arrays.totals,
            beam_size=settings.beam_size,
            top_k=settings.num_candidates,
            end_id=plan.end_id,
            temperatures=plan.temperatures or (1.0,) * len(sources),
            maps=self.maps,
            unmapped=plan.unmapped,
            token_bias=self.arrays.bias if _has_bias(plan) else None,
            allowed=self.allowed,
            bonus=None,
            length_bonus=self._length_bonus,
            combine="log_linear",
            normalize=plan.normalize,
        )
        make = self._launches if self.on_kernels else self._plain_calls
        limiting, choosing, self._following = make(request)
        self._selecting = [*limiting, *choosing]
        if plan.timestamps is not None and self.allowed is not None:
            end_id = plan.end_id if limits_end else None
            parents, tokens = self.arrays.parents, self.arrays.tokens
            own = DeviceTimestamps(plan.timestamps, request, parents, tokens, end_id)
            self._selecting = [*limiting, own.limit, *choosing, own.follow]
            self._timestamps = own

    def _bias(self, vocab: int) -> Tensor:
        """Of the first step."""
        bias = torch.zeros(vocab, device=self.device)
        early = [token for token, until, _ in _edits(self.plan) if until > 0]
        bias[[*self.plan.suppressed, *early]] = IMPOSSIBLE
        return bias

    def _launches(self, request: StepRequest) -> tuple[list[Call], list[Call], list[Call]]:
        """Kernel launches that reuse their memory: the end's limit, what chooses, what follows."""
        from shallowfusion.kernels.beam_advance import plan_beam_advance, plan_follow_slots, plan_limit_end
        from shallowfusion.kernels.fused_step import plan_fused_step, plan_row_statistics

        acoustic, temperature, limiting = request.sources[0], request.temperatures[0], []
        if self._limits_end:
            limiting, statistics = plan_row_statistics(acoustic, temperature)
            limit = (acoustic, statistics, self.allowed, self.plan.end_id, temperature, self.plan.end_threshold)
            limiting = [*limiting, plan_limit_end(*limit)]
        fused, candidates = plan_fused_step(request)
        choosing = [*fused, plan_beam_advance(self.tables, self.arrays, candidates)]
        following = [
            plan_follow_slots(self.arrays, slots, given, source.shape[1])
            for slots, given, source in zip(self.slots, self.maps, request.sources, strict=True)
        ]
        limits, chooses, follows = ([launch.run for launch in own] for own in (limiting, choosing, following))
        return limits, chooses, follows

    def _plain_calls(self, request: StepRequest) -> tuple[list[Call], list[Call], list[Call]]:
        """The same without kernels, for the CPU."""
        utterances, sources = self.num_utterances, len(request.sources)
        candidates = no_candidates(utterances, request.top_k, sources, request.num_rows, self.device)
        numbers: dict[str, Any] = {
            name: getattr(request, name)
            for name in (
                "beam_size", "top_k", "temperatures", "maps", "unmapped", "token_bias", "allowed", "length_bonus",
                "normalize",
            )
        }  # fmt: skip

        def fuse() -> None:
            found = fused_step(
                request.sources, request.weights, request.totals, end_id=request.end_id, backend=self.plan.backend,
                **numbers,
            )  # fmt: skip
            _copy(found, candidates)

        def follow(source: int) -> Call:
            vocab = request.sources[source].shape[1]
            return lambda: follow_slots_reference(self.arrays, self.slots[source], self.maps[source], vocab)

        advance: Call = lambda: beam_advance_reference(self.tables, self.arrays, candidates)  # noqa: E731
        limit: Call = lambda: self._limit_end(request)  # noqa: E731
        return [limit] * self._limits_end, [fuse, advance], [follow(source) for source in range(sources)]

    def _limit_end(self, request: StepRequest) -> None:
        from shallowfusion.fusion.step import row_statistics

        acoustic, temperature = request.sources[0], request.temperatures[0]
        statistics: RowStatistics = row_statistics(acoustic, temperature)
        assert self.allowed is not None
        threshold = self.plan.end_threshold
        limit_end_reference(acoustic, statistics, self.allowed, request.end_id, temperature, threshold or math.inf)


def _copy(found: Candidates, into: Candidates) -> None:
    for name in ("totals", "parent_rows", "token_ids", "parts", "flags"):
        getattr(into, name).copy_(getattr(found, name))
