"""The device-driven search: the device decides step after step, the host follows a step behind and checks."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from shallowfusion.config import require
from shallowfusion.scorers import footprint
from shallowfusion.scorers.base import CachedScorer, Context, Scorer
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.scorers.fixed_decoder import attention_of
from shallowfusion.scorers.whisper import WhisperScorer
from shallowfusion.search.beam_mirror import BeamMirror
from shallowfusion.search.candidates import CandidateScorer
from shallowfusion.search.device_program import LAG, Program
from shallowfusion.search.device_step import DeviceStep, Rooms, structure
from shallowfusion.search.loop import SearchOutcome, SearchPlan, StageClock

__all__ = [
    "DevicePrograms",
    "bucket",
    "device_search",
    "free_on",
    "models_key",
    "program_bytes",
    "refusal",
    "slot_bytes",
    "too_large",
]

BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # utterances a program has places for; beyond, multiples of the last
SHARE_OF_FREE = 0.7  # of the device's free memory, for keys and values
LARGEST_BEAM, MOST_SOURCES = 32, 4


def refusal(
    scorers: Sequence[Scorer], contexts: Sequence[Context], plan: SearchPlan, late: Sequence[CandidateScorer] = ()
) -> str | None:
    """Why a search must be driven by the host, as half a sentence; None if the device can drive it."""
    rule, settings = plan.rule, plan.settings
    reasons = {
        "the rule has a gate": rule.gate is not None,
        "the rule is a mixture": rule.mixture is not None or bool(rule.lm_mixture),
        "the rule catches up on skipped scores": rule.catch_up,
        "the rule is delayed": rule.delay is not None,
        "weights differ by token class": bool(plan.class_sources),
        "some sources score candidates only": bool(late),
        "phrases are favoured": plan.phrases is not None,
        "repeated token groups are forbidden": plan.no_repeat_ngram_size > 0,
        "hypotheses are recombined": settings.recombination != "none",
        f"the beam is wider than {LARGEST_BEAM}": settings.beam_size > LARGEST_BEAM,
        f"there are more than {MOST_SOURCES} sources": len(scorers) > MOST_SOURCES,
    }
    for reason, holds in reasons.items():
        if holds:
            return reason
    for scorer, context in zip(scorers, contexts, strict=True):
        if not isinstance(scorer, CachedScorer) or type(scorer) not in (WhisperScorer, CausalLMScorer):
            return f"{type(scorer).__name__} has no memory that stays in place"
        longest = min(scorer.window - 1, max(len(prompt) for prompt in context.prompts))
        if longest + settings.max_new_tokens > scorer.window:
            return f"a hypothesis may outgrow the window of {scorer.window} tokens of {type(scorer).__name__}"
    return None


def slot_bytes(scorers: Sequence[Any], capacities: Sequence[int], places: int) -> int:
    """Bytes of the keys and values of a program with so many slots per utterance for each scorer."""
    total = 0
    for scorer, capacity in zip(scorers, capacities, strict=True):
        config = scorer.model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        total += 2 * scorer.num_layers * places * capacity * heads * dim * scorer.model.dtype.itemsize
    return total


def device_search(
    scorers: Sequence[Scorer],
    contexts: Sequence[Context],
    plan: SearchPlan,
    clock: StageClock,
    programs: DevicePrograms,
) -> list[SearchOutcome]:
    """`search` with the beams on the device; for plans that `refusal` has nothing to say about.

    The device never waits for the host: every step leaves a record in a ring, which a `BeamMirror` replays up to two
    steps later. On CUDA a step is one captured graph with the models as parallel branches; elsewhere it runs eagerly.

    Raises:
        DivergenceError: the device decided otherwise than the mirror does.
    """
    with programs.lock:
        return _device_search(scorers, contexts, plan, clock, programs)


def _device_search(
    scorers: Sequence[Scorer],
    contexts: Sequence[Context],
    plan: SearchPlan,
    clock: StageClock,
    programs: DevicePrograms,
) -> list[SearchOutcome]:
    num_utterances, settings = len(contexts[0].prompts), plan.settings
    with clock("prefill"):
        program = programs.loaded(scorers, contexts, plan)
    mirror = BeamMirror(settings, num_utterances, settings.num_candidates, len(scorers))
    waiting = list(range(num_utterances))
    with clock("device step"):
        for _ in range(settings.max_new_tokens):
            program.run()
            for _, entry in program.entries(behind=LAG):
                with clock("host"):
                    mirror.replay(entry)
            waiting = [u for u in waiting if not mirror.is_done(u)]
            if not waiting:
                break
        for _, entry in program.entries(behind=0):
            with clock("host"):
                mirror.replay(entry)
    clock.counts["device steps"] = clock.counts.get("device steps", 0) + mirror.num_steps
    with clock("host"):
        return [SearchOutcome(mirror.results(u, settings.beam_size), mirror.saw_nan(u)) for u in range(num_utterances)]


class DevicePrograms:
    """Programs of recent searches: one per number of places, models and `structure` of the plan, see there.

    Searches that differ in weights or other numbers share one. Its memory lives as long as it does. A program serves
    one search at a time: `lock` is held meanwhile, and other threads wait.

    Args:
        most: programs kept; the one used longest ago goes first. `resize` changes it.
        captures: whether steps on CUDA become graphs.
        branches: whether the models read on streams of their own there.
        free_bytes: of a device.
    """

    def __init__(
        self,
        most: int = 4,
        captures: bool = True,
        branches: bool = True,
        free_bytes: Callable[[torch.device], float] | None = None,
    ) -> None:
        require(most >= 1, f"most must be at least 1, got {most}.")
        self.most, self.captures, self.branches = most, captures, branches
        self._free_bytes = free_on if free_bytes is None else free_bytes
        self.lock = threading.Lock()
        self._known: OrderedDict[Hashable, Program] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def resize(self, most: int) -> None:
        """Keep that many programs from now on; those used longest ago go at once.

        Raises:
            InvalidArgumentError: fewer than one.
        """
        require(most >= 1, f"most must be at least 1, got {most}.")
        with self.lock:
            self.most = most
            while len(self._known) > most:
                self._known.popitem(last=False)

    def warm_up(self, scorers: Sequence[Scorer], contexts: Sequence[Context], plan: SearchPlan) -> None:
        """Have the program that such a batch will use, its kernels compiled and its step captured, and run it once."""
        with self.lock:
            program = self.loaded(scorers, contexts, plan)
            program.run()
            for _ in program.entries(behind=0):
                pass

    def refusal(self, scorers: Sequence[Scorer], contexts: Sequence[Context], plan: SearchPlan) -> str | None:
        """Why there is no room for this batch's program, as half a sentence; older programs go to make room."""
        key, cached, rooms = self._key(scorers, contexts, plan)
        wanted = program_bytes(cached, plan, rooms)
        with self.lock:
            if key in self._known:
                return None
            while wanted > SHARE_OF_FREE * self._free_bytes(cached[0].device):
                if not self._known:
                    return too_large(wanted, self._free_bytes(cached[0].device))
                self._known.popitem(last=False)
        return None

    def _key(
        self, scorers: Sequence[Scorer], contexts: Sequence[Context], plan: SearchPlan
    ) -> tuple[Hashable, list[CachedScorer], Rooms]:
        """What a program is found by, its scorers, and what it needs room for."""
        cached = [scorer for scorer in scorers if isinstance(scorer, CachedScorer)]
        rooms = Rooms.wanted(cached, contexts, plan, bucket(len(contexts[0].prompts)))
        return (rooms, models_key(cached), structure(plan)), cached, rooms

    def loaded(self, scorers: Sequence[Scorer], contexts: Sequence[Context], plan: SearchPlan) -> Program:
        """The program for this batch, its prompts read and its searches started."""
        key, cached, rooms = self._key(scorers, contexts, plan)
        program = self._known.pop(key, None)
        if program is None:
            while len(self._known) >= self.most:
                self._known.popitem(last=False)
            program = Program(DeviceStep(cached, plan, rooms), self.captures, self.branches)
        self._known[key] = program
        program.begin(contexts, plan)
        return program


def models_key(scorers: Sequence[CachedScorer]) -> Hashable:
    """Which models a program reads, and how they attend."""
    return tuple((id(scorer), attention_of(scorer)) for scorer in scorers)


def program_bytes(scorers: Sequence[Any], plan: SearchPlan, rooms: Rooms) -> int:
    """Bytes of the keys and values of a program, cross-attention included."""
    total = slot_bytes(scorers, rooms.capacities(plan.settings.beam_size), rooms.places)
    for scorer in scorers:
        if scorer.has_cross_attention:
            frames = scorer.model.config.max_source_positions
            total += rooms.places * frames * footprint.slot_bytes(scorer.model)
    return total


def too_large(wanted: float, free: float) -> str:
    """Half a sentence: memory is short."""
    return f"slots for the longest search would take {wanted / 1e9:.1f} of {free / 1e9:.1f} GB free"


def free_on(device: torch.device) -> float:
    """What the driver and torch's own reserve have left on a CUDA device; elsewhere memory is not watched."""
    if device.type != "cuda":
        return float("inf")
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + reserve)


def bucket(num_utterances: int) -> int:
    """Places of the smallest program that holds so many utterances."""
    fitting = [size for size in BUCKETS if size >= num_utterances]
    return fitting[0] if fitting else -(-num_utterances // BUCKETS[-1]) * BUCKETS[-1]
