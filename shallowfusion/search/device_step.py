"""One step of a device-driven search: fused step, beams, slots and both models over memory that never moves."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from shallowfusion.fusion.step import fused_step
from shallowfusion.kernels.beam_advance_arrays import (
    AdvanceTables,
    BeamArrays,
    SlotArrays,
    edit_room,
    mask_words,
    slot_capacity,
)
from shallowfusion.kernels.beam_advance_reference import (
    beam_advance_reference,
    follow_slots_reference,
    limit_end_reference,
)
from shallowfusion.scorers.base import CachedScorer, Context
from shallowfusion.scorers.fixed_decoder import FixedDecoder, sent
from shallowfusion.search.device_timestamps import DeviceTimestamps
from shallowfusion.search.loop import SearchPlan
from shallowfusion.values import Candidates, RowStatistics, StepRequest, no_candidates

__all__ = ["DeviceStep", "Rooms", "step_tables", "structure"]

Call = Callable[[], object]
LENGTH_ROUNDING = 16  # tokens; so that searches of similar max_new_tokens share a step
PROMPT_ROUNDING = 16  # tokens; so that prompts of similar length do


@dataclass(frozen=True)
class Rooms:
    """How much a step has room for.

    Args:
        places: utterances. tokens: of the longest search. edits: mask words that change in the first steps.
        prompts: slots of the longest prompt, per scorer.
    """

    places: int
    tokens: int
    edits: int
    prompts: tuple[int, ...]

    @classmethod
    def wanted(cls, scorers: Sequence[Any], contexts: Sequence[Context], plan: SearchPlan, places: int) -> Rooms:
        """What these prompts and this plan need, in few distinct sizes."""
        longest = (
            min(scorer.window - 1, max(len(prompt) for prompt in context.prompts))
            for scorer, context in zip(scorers, contexts, strict=True)
        )
        tokens = -(-plan.settings.max_new_tokens // LENGTH_ROUNDING) * LENGTH_ROUNDING
        prompts = tuple(-(-length // PROMPT_ROUNDING) * PROMPT_ROUNDING for length in longest)
        return cls(places, tokens, edit_room(_edits(plan)), prompts)

    def capacities(self, beam_size: int) -> list[int]:
        """Slots of a place, per scorer."""
        return [slot_capacity(beam_size, self.tokens, prompt) for prompt in self.prompts]

    def holds(self, other: Rooms) -> bool:
        """Whether whatever fits the other fits here."""
        pairs = zip(self.prompts, other.prompts, strict=True)
        most = self.places >= other.places and self.tokens >= other.tokens and self.edits >= other.edits
        return most and all(own >= wanted for own, wanted in pairs)


def structure(plan: SearchPlan) -> Hashable:
    """What a step has fixed once its calls are, beside its `Rooms`: kernels and their arguments.

    All else of a plan is a table that `DeviceStep.start` writes for the places in which it is searched: weights of all
    steps, length penalty and bonus, max_new_tokens, early stopping but "first", patience, and forbidden tokens.
    """
    settings = plan.settings
    maps = tuple(None if given is None else given.cpu().numpy().tobytes() for given in plan.maps)
    return (
        settings.beam_size, settings.end_ids, settings.stop_rule, settings.early_stopping == "first",
        settings.recombination, maps, plan.unmapped, plan.normalize, plan.temperatures, _end_limit(plan),
        _has_mask(plan), plan.timestamps, plan.backend,
    )  # fmt: skip


def _end_limit(plan: SearchPlan) -> float | None:
    """The threshold of the end token where there is one."""
    return plan.end_threshold if plan.rule.fuses or plan.fuses_late else None


def _has_mask(plan: SearchPlan) -> bool:
    limited = plan.timestamps is not None or _end_limit(plan) is not None
    return bool(limited or plan.suppressed or _edits(plan))


def step_tables(plan: SearchPlan, num_sources: int, rooms: Rooms) -> AdvanceTables:
    """Weights and masks of every step of a plan without gates, as tables of one place."""
    settings, rule = plan.settings, plan.rule
    weights = [
        [plan.acoustic_weight, *rule.weights_at(step)][:num_sources] for step in range(settings.max_new_tokens + 1)
    ]
    return AdvanceTables.make(settings, torch.tensor(weights), _edits(plan), rooms.tokens, rooms.edits)


def _edits(plan: SearchPlan) -> list[tuple[int, int]]:
    """Tokens forbidden for some steps only: (token, steps)."""
    until = dict.fromkeys(plan.first_suppressed, 1)
    for token in plan.settings.end_ids if plan.min_new_tokens else ():
        until[token] = max(plan.min_new_tokens, until.get(token, 0))
    return [(token, steps) for token, steps in until.items() if token not in plan.suppressed and steps > 0]


class DeviceStep:
    """The memory of device-driven searches, each in a place, and the calls that move all of them one token on.

    `start` starts searches in some places; then `select` (fused step, beams, ring record) and `read` of every model, in
    turn. On CUDA neither waits for the device, and neither allocates once its kernels are compiled; a CUDA graph may
    hold both. Between two steps others may start in places where nothing is searched, each under a plan of its own;
    nothing that a step has by address moves.

    Args:
        scorers: cached decoders, the acoustic one first, on one device.
        plan: one that `refusal` has nothing to say about; those that start are of the same `structure`.
        rooms: those that start need no more.
    """

    def __init__(self, scorers: Sequence[CachedScorer], plan: SearchPlan, rooms: Rooms) -> None:
        self.plan, self.rooms, self.device = plan, rooms, scorers[0].device
        settings = plan.settings
        self.on_kernels = plan.backend == "triton" or (plan.backend == "auto" and self.device.type == "cuda")
        self.tables = step_tables(plan, len(scorers), rooms).spread(rooms.places, self.device)
        self.slots = [
            SlotArrays.make(rooms.places, settings.beam_size, rooms.tokens, prompt, self.device)
            for prompt in rooms.prompts
        ]
        self.decoders = [
            FixedDecoder(scorer, own.ids, own.positions, own.writes, own.table)
            for scorer, own in zip(scorers, self.slots, strict=True)
        ]
        self.maps = tuple(None if given is None else given.to(self.device) for given in plan.maps)
        self._timestamps: DeviceTimestamps | None = None
        self._length_bonus = torch.empty(0)
        self._selecting: list[Call] = []
        self._following: list[Call] = []

    @property
    def is_ready(self) -> bool:
        """Whether searches have started once, which fixes every address."""
        return bool(self._selecting)

    @property
    def num_bytes(self) -> int:
        """Of keys and values."""
        return sum(decoder.num_bytes for decoder in self.decoders)

    @torch.inference_mode()
    def start(self, places: Sequence[int], contexts: Sequence[Context], plan: SearchPlan) -> None:
        """Read prompts and start their searches in these places; whatever runs in others is not touched.

        Args:
            places: distinct, where nothing is searched; one for each prompt of the contexts.
            plan: of the same structure, and with no need of more than `rooms`.
        """
        at = sent(torch.tensor(list(places)), self.device)
        read = [decoder.start(at, context) for decoder, context in zip(self.decoders, contexts, strict=True)]
        if not self.is_ready:
            self._prepare()
        for slots, (lengths, last_tokens) in zip(self.slots, read, strict=True):
            slots.start(at, lengths, last_tokens)
        self.tables.take(at, step_tables(plan, len(self.decoders), self.rooms), partial(sent, device=self.device))
        self._length_bonus.view(self.rooms.places, -1).index_fill_(0, at, plan.length_bonus)
        if self._timestamps is not None:
            self._timestamps.reset(at)
        early = [token for token, _ in _edits(plan)]
        words = mask_words([*plan.suppressed, *early], self.decoders[0].logits.shape[1])
        self.arrays.start(self.tables, at, sent(words, self.device))

    @torch.inference_mode()
    def stop(self, places: Sequence[int]) -> None:
        """End the searches in these places; they leave no results."""
        self.arrays.done.index_fill_(0, sent(torch.tensor(list(places)), self.device), 1)

    @torch.inference_mode()
    def clear(self) -> None:
        """End all searches; the coming step is recorded at the ring's beginning."""
        if self.is_ready:
            self.arrays.done.fill_(1)
            for counts in (self.arrays.ticks, self.arrays.clocks):
                counts.zero_()

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
        self.arrays = BeamArrays.make(self.tables, vocab, settings.num_candidates, len(sources))
        self._length_bonus = torch.full((rows,), plan.length_bonus, device=self.device)
        self._limits_end = limits_end = _end_limit(plan) is not None
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
            token_bias=None,
            allowed=self.arrays.masks if _has_mask(plan) else None,
            bonus=None,
            length_bonus=self._length_bonus,
            combine="log_linear",
            normalize=plan.normalize,
        )
        make = self._launches if self.on_kernels else self._plain_calls
        limiting, choosing, self._following = make(request)
        if plan.timestamps is not None:
            end_id = plan.end_id if limits_end else None
            arrays = (self.arrays.parents, self.arrays.tokens, self.arrays.place_masks)
            self._timestamps = DeviceTimestamps(plan.timestamps, request, *arrays, end_id)
            limiting, choosing = [*limiting, self._timestamps.limit], [*choosing, self._timestamps.follow]
        self._selecting = [*limiting, *choosing]

    def _launches(self, request: StepRequest) -> tuple[list[Call], list[Call], list[Call]]:
        """Kernel launches that reuse their memory: the end's limit, what chooses, what follows."""
        from shallowfusion.kernels.beam_advance import plan_beam_advance, plan_follow_slots, plan_limit_end
        from shallowfusion.kernels.fused_step import plan_fused_step, plan_row_statistics

        acoustic, temperature, limiting = request.sources[0], request.temperatures[0], []
        if self._limits_end:
            limiting, statistics = plan_row_statistics(acoustic, temperature)
            masks, end = (self.arrays.masks, self.arrays.place_masks), (self.plan.end_id, temperature)
            limiting = [*limiting, plan_limit_end(acoustic, statistics, *masks, *end, self.plan.end_threshold)]
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
        sources = len(request.sources)
        candidates = no_candidates(self.rooms.places, request.top_k, sources, request.num_rows, self.device)
        numbers: dict[str, Any] = {
            name: getattr(request, name)
            for name in (
                "beam_size", "top_k", "temperatures", "maps", "unmapped", "allowed", "length_bonus", "normalize",
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
        masks, threshold = (self.arrays.masks, self.arrays.place_masks), self.plan.end_threshold
        assert threshold is not None
        limit_end_reference(acoustic, statistics, *masks, request.end_id, temperature, threshold)


def _copy(found: Candidates, into: Candidates) -> None:
    for name in ("totals", "parent_rows", "token_ids", "parts", "flags"):
        getattr(into, name).copy_(getattr(found, name))
