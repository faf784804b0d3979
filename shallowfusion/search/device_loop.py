"""The device-driven search: the device decides step after step, the host follows a step behind and checks."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shallowfusion.config import require
from shallowfusion.scorers.base import CachedScorer, Context, Scorer
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.scorers.whisper import WhisperScorer
from shallowfusion.search.beam_mirror import BeamMirror
from shallowfusion.search.candidates import CandidateScorer
from shallowfusion.search.device_step import DeviceStep
from shallowfusion.search.loop import SearchOutcome, SearchPlan, StageClock

__all__ = ["DevicePrograms", "device_search", "refusal", "slot_bytes"]

logger = logging.getLogger(__name__)

LAG = 2  # steps the host may be behind; a search then runs at most so many steps too far
BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # utterances a program has places for; beyond, multiples of the last
PROMPT_ROUNDING = 16  # tokens; so that prompts of similar length share a program
WARM_UP_STEPS = 2
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
        for step in range(settings.max_new_tokens):
            program.run(step)
            for entry in program.entries(behind=LAG):
                mirror.replay(entry)
            waiting = [u for u in waiting if not mirror.is_done(u)]
            if not waiting:
                break
        for entry in program.entries(behind=0):
            mirror.replay(entry)
    clock.counts["device steps"] = clock.counts.get("device steps", 0) + mirror.num_steps
    return [SearchOutcome(mirror.results(u, settings.beam_size), mirror.saw_nan(u)) for u in range(num_utterances)]


class DevicePrograms:
    """Programs of recent searches: one per number of places, plan and models. Their memory lives as long.

    A program serves one search at a time: `lock` is held meanwhile, and other threads wait.

    Args:
        most: programs kept; the one used longest ago goes first.
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
        self._free_bytes = free_bytes or _free_bytes
        self.lock = threading.Lock()
        self._known: OrderedDict[Hashable, Program] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def refusal(self, scorers: Sequence[Scorer], contexts: Sequence[Context], plan: SearchPlan) -> str | None:
        """Why there is no room for this batch's program, as half a sentence; older programs go to make room."""
        key, cached, rooms = self._key(scorers, contexts, plan)
        steps = plan.settings.beam_size * plan.settings.max_new_tokens
        wanted = slot_bytes(cached, [room + steps for room in rooms], bucket(len(contexts[0].prompts)))
        with self.lock:
            if key in self._known:
                return None
            while wanted > SHARE_OF_FREE * self._free_bytes(cached[0].device):
                if not self._known:
                    free = self._free_bytes(cached[0].device)
                    return f"slots for the longest search would take {wanted / 1e9:.1f} of {free / 1e9:.1f} GB free"
                self._known.popitem(last=False)
        return None

    def _key(
        self, scorers: Sequence[Scorer], contexts: Sequence[Context], plan: SearchPlan
    ) -> tuple[Hashable, list[CachedScorer], tuple[int, ...]]:
        """What a program is found by, its scorers, and the prompt slots of each."""
        cached = [scorer for scorer in scorers if isinstance(scorer, CachedScorer)]
        rooms = tuple(_room(scorer, context) for scorer, context in zip(cached, contexts, strict=True))
        places = bucket(len(contexts[0].prompts))
        return (places, rooms, tuple(id(scorer) for scorer in cached), _identity(plan)), cached, rooms

    def loaded(self, scorers: Sequence[Scorer], contexts: Sequence[Context], plan: SearchPlan) -> Program:
        """The program for this batch, its prompts read and its searches started."""
        key, cached, rooms = self._key(scorers, contexts, plan)
        places = bucket(len(contexts[0].prompts))
        program = self._known.pop(key, None)
        if program is None:
            while len(self._known) >= self.most:
                self._known.popitem(last=False)
            program = Program(DeviceStep(cached, plan, places, rooms), self.captures, self.branches)
        self._known[key] = program
        program.start(contexts)
        return program


class Program:
    """A device-driven step that can be repeated, and the ring's way to the host."""

    def __init__(self, step: DeviceStep, captures: bool, branches: bool) -> None:
        self.step = step
        self._branches = branches and step.device.type == "cuda"
        self._captures = captures and step.device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._host_ring = torch.empty(0)
        self._streams: list[Any] = []
        self._events: list[Any] = []
        self._ran = self._sent = 0

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def start(self, contexts: Sequence[Context]) -> None:
        """Begin the searches of a batch; the first batch on CUDA captures the graph."""
        first = not self.step.is_ready
        if self._streams:  # a search that failed may have left copies under way
            torch.cuda.current_stream(self.step.device).wait_stream(self._streams[0])
        self.step.load(contexts)
        self._ran = self._sent = 0
        if not first:
            return
        ring = self.step.arrays.ring
        on_cuda = self.step.device.type == "cuda"
        self._host_ring = torch.empty(ring.shape, dtype=ring.dtype, pin_memory=on_cuda) if on_cuda else ring
        if on_cuda:
            self._streams = [_stream(self.step.device) for _ in self.step.decoders]
            self._events = [torch.cuda.Event() for _ in range(len(ring))]  # type: ignore[no-untyped-call]
        if self._captures:
            self._capture()
            self.step.load(contexts)

    def run(self, step: int) -> None:
        """Set step number `step` going and send its ring entry after it."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._once()
        self._ran = step + 1
        if self.step.device.type != "cuda":
            return
        place, copying = step % len(self._events), self._streams[0]
        copying.wait_stream(torch.cuda.current_stream(self.step.device))
        with torch.cuda.stream(copying):
            self._host_ring[place].copy_(self.step.arrays.ring[place], non_blocking=True)
            self._events[place].record(copying)

    def entries(self, behind: int) -> Iterator[npt.NDArray[np.int32]]:
        """Ring entries that have arrived, in order; waits for those more than `behind` steps old."""
        while self._sent < self._ran:
            place = self._sent % len(self._host_ring)
            if self._events and not self._events[place].query():
                if self._ran - self._sent <= behind:
                    return
                self._events[place].synchronize()
            self._sent += 1
            yield self._host_ring[place].numpy()

    def _once(self) -> None:
        """One step; with branches the models read on streams of their own, between a fork and a join."""
        step = self.step
        step.select()
        if not self._branches:
            for source in range(len(step.decoders)):
                step.read(source)
            return
        current = torch.cuda.current_stream(step.device)
        for source, stream in enumerate(self._streams[1:], start=1):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                step.read(source)
        step.read(0)
        for stream in self._streams[1:]:
            current.wait_stream(stream)

    def _capture(self) -> None:
        """Record a step as a CUDA graph; a step over searches that are all done warms it up and changes nothing."""
        device = self.step.device
        self.step.restart(0)
        stream = _stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self._once()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._once()
        except RuntimeError as error:
            logger.warning("the step could not be captured as a CUDA graph and runs eagerly: %s", error)
            torch.cuda.synchronize(device)
            return
        self._graph = graph


def _free_bytes(device: torch.device) -> float:
    """What the driver and torch's own reserve have left on a CUDA device; elsewhere memory is not watched."""
    if device.type != "cuda":
        return float("inf")
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + reserve)


def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def bucket(num_utterances: int) -> int:
    """Places of the smallest program that holds so many utterances."""
    fitting = [size for size in BUCKETS if size >= num_utterances]
    return fitting[0] if fitting else -(-num_utterances // BUCKETS[-1]) * BUCKETS[-1]


def _room(scorer: CachedScorer, context: Context) -> int:
    """Prompt slots of a program for these prompts."""
    longest = min(scorer.window - 1, max(len(prompt) for prompt in context.prompts))
    return -(-longest // PROMPT_ROUNDING) * PROMPT_ROUNDING


def _identity(plan: SearchPlan) -> Hashable:
    """Everything of a plan that a program has fixed."""
    maps = tuple(None if given is None else given.cpu().numpy().tobytes() for given in plan.maps)
    limits_end = plan.rule.fuses or plan.fuses_late
    return (
        plan.settings, plan.rule, maps, plan.unmapped, plan.normalize, plan.temperatures, plan.suppressed,
        plan.first_suppressed, plan.min_new_tokens, plan.end_threshold if limits_end else None, plan.acoustic_weight,
        plan.length_bonus, plan.timestamps, plan.backend,
    )  # fmt: skip
