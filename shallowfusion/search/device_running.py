"""Device-driven searches that share steps: utterances enter and leave between two steps, each with its plan."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from shallowfusion.scorers.base import CachedScorer, Context, Scorer
from shallowfusion.search.beam_mirror import BeamMirror
from shallowfusion.search.beam_state import FinishedHypothesis
from shallowfusion.search.candidates import CandidateScorer
from shallowfusion.search.device_loop import (
    SHARE_OF_FREE,
    bucket,
    free_on,
    models_key,
    program_bytes,
    refusal,
    too_large,
)
from shallowfusion.search.device_program import LAG, Program
from shallowfusion.search.device_step import DeviceStep, Rooms, structure
from shallowfusion.search.loop import SearchPlan, StageClock

__all__ = ["DeviceCohort", "DeviceSearches"]

logger = logging.getLogger(__name__)


class MirroredBeams:
    """What `BeamState` is to a cohort that the host drives: here a mirror for each utterance, fed from its place."""

    def __init__(self, mirrors: Sequence[BeamMirror]) -> None:
        self._mirrors: list[BeamMirror | None] = list(mirrors)

    def __getitem__(self, utterance: int) -> BeamMirror:
        mirror = self._mirrors[utterance]
        assert mirror is not None, "the utterance was released"
        return mirror

    def results(self, utterance: int, n_best: int) -> list[FinishedHypothesis]:
        return self[utterance].results(0, n_best)

    def release(self, utterance: int) -> None:
        self._mirrors[utterance] = None


@dataclass(eq=False)
class DeviceCohort:
    """Utterances that started together under one plan; what a session asks of a `Cohort` it may ask of this.

    Args:
        places: of each utterance in the program.
        first: number of the step of the program that is the first of theirs.
        beams: all utterances that started, numbered from 0; whoever takes the results releases them.
        active: those whose search goes on, as far as the host knows.
        saw_nan: bool [utterances], a model returned NaN; known when the search ended.
        cancelled: utterances that leave without a result at the next step.
        ended: utterances of which the latest step told that their search ended.
        error: why the program failed, and with it those that were active; None = it has not.
    """

    plan: SearchPlan
    places: Sequence[int]
    first: int
    beams: MirroredBeams
    active: list[int]
    saw_nan: npt.NDArray[np.bool_]
    cancelled: set[int] = field(default_factory=set)
    ended: list[int] = field(default_factory=list)
    error: Exception | None = None

    def num_steps(self, utterance: int) -> int:
        return self.beams[utterance].num_steps

    def leave(self) -> list[int]:
        """Drop the cancelled; returns the places they held."""
        left = [utterance for utterance in self.active if utterance in self.cancelled]
        self.active = [utterance for utterance in self.active if utterance not in self.cancelled]
        return [self.places[utterance] for utterance in left]

    def replay(self, number: int, entry: npt.NDArray[np.int32]) -> list[int]:
        """Take the ring entry of a step of the program; returns the places of those whose search it ended.

        Entries from before the first step are of those that had the places then.

        Raises:
            DivergenceError: the device decided otherwise than a mirror does.
        """
        if number < self.first:
            return []
        ended = []
        for utterance in self.active:
            place, mirror = self.places[utterance], self.beams[utterance]
            mirror.replay(entry[place : place + 1])
            if mirror.is_done(0):
                self.saw_nan[utterance] = mirror.saw_nan(0)
                ended.append(utterance)
        self.ended += ended
        self.active = [utterance for utterance in self.active if utterance not in ended]
        return [self.places[utterance] for utterance in ended]


class PlacedSearches:
    """The searches in the places of one program.

    A place is free again when its mirror has seen the end, up to `LAG` steps after the device, or when its search was
    stopped. What the ring still holds of it then is not for whoever comes next.
    """

    def __init__(self, program: Program, key: Hashable, clock: StageClock) -> None:
        self.program, self.key = program, key
        self.free = list(range(self.rooms.places))
        self.cohorts: list[DeviceCohort] = []
        self._clock = clock

    @property
    def rooms(self) -> Rooms:
        return self.program.step.rooms

    @property
    def num_running(self) -> int:
        return sum(len(cohort.active) for cohort in self.cohorts)

    def admit(self, contexts: Sequence[Context], plan: SearchPlan) -> DeviceCohort:
        """Read the prompts of utterances that enter; nothing changes for those that run, whether it fails or not."""
        count = len(contexts[0].prompts)
        places = self.free[:count]
        with self._clock("prefill"):
            self.program.start(places, contexts, plan)
        del self.free[:count]
        settings = plan.settings
        mirrors = [BeamMirror(settings, 1, settings.num_candidates, len(contexts)) for _ in places]
        saw_nan = np.zeros(count, dtype=bool)
        cohort = DeviceCohort(plan, places, self.program.num_run, MirroredBeams(mirrors), list(range(count)), saw_nan)
        self.cohorts.append(cohort)
        return cohort

    def step(self) -> None:
        """One step of the program if somebody needs it, and what has arrived of those before."""
        left = [place for cohort in self.cohorts for place in cohort.leave()]
        if left:
            self.program.stop(left)
            self.free += left
        steps = self.program.num_run
        goes_on = any(c.active and steps - c.first < c.plan.settings.max_new_tokens for c in self.cohorts)
        if goes_on:
            running, lanes = self.num_running, self.program.step.plan.settings.beam_size
            with self._clock("device step"):
                self.program.run()
            self._clock.counts["device steps"] += 1
            self._clock.counts["row_steps"] += self.rooms.places * lanes
            self._clock.counts["live_rows"] += running * lanes
        for number, entry in self.program.entries(behind=LAG if goes_on else 0):
            with self._clock("host"):
                for cohort in self.cohorts:
                    self.free += cohort.replay(number, entry)


class DeviceSearches:
    """Device-driven searches with any plans that a device can drive, in programs of as many places as are ever wanted.

    A search enters a program of its models and `structure` that has room for its prompts and length, the busiest there
    is; if there is none, one is made. On CUDA a step of a program is one captured graph, whoever has entered or left.
    A failure in a step ends the searches of its program alone. Programs are kept until others need the room.

    Args:
        clock: stages "prefill", "device step", "host", and counts: "device steps", "row_steps" of all places and
            "live_rows" of those where a search ran, as far as the host knew.
        max_utterances: that are ever searched together.
        quiet: is entered while a program is made, which on CUDA bears no other work beside it.
        most: programs kept.
        captures, branches: as `Program` takes them.
        free: bytes that a device has free.
    """

    def __init__(
        self,
        clock: StageClock,
        max_utterances: int,
        quiet: AbstractContextManager[object] | None = None,
        most: int = 4,
        captures: bool = True,
        branches: bool = True,
        free: Callable[[torch.device], float] = free_on,
    ) -> None:
        self.clock, self.most = clock, most
        self._places = bucket(max_utterances)
        self._quiet = nullcontext() if quiet is None else quiet
        self._captures, self._branches, self._free = captures, branches, free
        self._programs: list[PlacedSearches] = []  # the one that was entered longest ago first

    @property
    def num_running(self) -> int:
        return sum(own.num_running for own in self._programs)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is searched."""
        return not any(own.cohorts for own in self._programs)

    @property
    def num_bytes(self) -> int:
        """Keys and values of all programs."""
        return sum(own.program.step.num_bytes for own in self._programs)

    @property
    def busy_bytes(self) -> int:
        """Keys and values of programs in which something is searched."""
        return sum(own.program.step.num_bytes for own in self._programs if own.cohorts)

    def refusal(
        self,
        scorers: Sequence[Scorer],
        contexts: Sequence[Context],
        plan: SearchPlan,
        late: Sequence[CandidateScorer] = (),
        most_bytes: float = float("inf"),
    ) -> str | None:
        """Why the host must drive these searches, as half a sentence; idle programs go to make room for a new one.

        Args:
            most_bytes: of keys and values that all programs may have.
        """
        reason = refusal(scorers, contexts, plan, late)
        if reason is not None:
            return reason
        cached = [scorer for scorer in scorers if isinstance(scorer, CachedScorer)]
        if self._entered(cached, contexts, plan) is not None:
            return None
        wanted = program_bytes(cached, plan, Rooms.wanted(cached, contexts, plan, self._places))
        while len(self._programs) >= self.most:
            if not self._drop_idle():
                return f"searches run in {self.most} programs, and this one fits none of them"
        while self.num_bytes + wanted > most_bytes:
            if not self._drop_idle():
                left = max(0, most_bytes - self.num_bytes)
                return f"its program would take {wanted:,} bytes, and memory_budget leaves {left:,.0f}"
        while wanted > SHARE_OF_FREE * self._free(cached[0].device):
            if not self._drop_idle():
                return too_large(wanted, self._free(cached[0].device))
        return None

    def admit(self, scorers: Sequence[Scorer], contexts: Sequence[Context], plan: SearchPlan) -> DeviceCohort:
        """Let utterances enter, about which `refusal` has nothing to say; they run from the next step on.

        Nothing changes for those that run if a model fails here.
        """
        cached = [scorer for scorer in scorers if isinstance(scorer, CachedScorer)]
        own = self._entered(cached, contexts, plan)
        if own is not None:
            cohort = own.admit(contexts, plan)
            self._programs.remove(own)
        else:
            step = DeviceStep(cached, plan, Rooms.wanted(cached, contexts, plan, self._places))
            program = Program(step, self._captures, self._branches)
            own = PlacedSearches(program, (models_key(cached), structure(plan)), self.clock)
            with self._quiet:
                cohort = own.admit(contexts, plan)
        self._programs.append(own)
        return cohort

    def step(self) -> list[DeviceCohort]:
        """One token for every hypothesis that lives, on the device; returns the cohorts that ran.

        Who `ended` is known up to `LAG` steps later. A program that fails is dropped, and its cohorts say why.
        """
        ran = []
        for own in list(self._programs):
            cohorts = own.cohorts
            for cohort in cohorts:
                cohort.ended = []
            try:
                if cohorts:
                    own.step()
            except Exception as error:
                logger.exception("a device-driven step failed, and with it %d searches", own.num_running)
                self._programs.remove(own)
                for cohort in cohorts:
                    cohort.error = error
            own.cohorts = [cohort for cohort in cohorts if cohort.active]
            ran += cohorts
        return ran

    def shrink(self, most_bytes: float) -> None:
        """Drop idle programs until the others have no more than so many bytes, or all are busy."""
        while self.num_bytes > most_bytes and self._drop_idle():
            pass

    def _entered(
        self, scorers: Sequence[CachedScorer], contexts: Sequence[Context], plan: SearchPlan
    ) -> PlacedSearches | None:
        """The program that these utterances enter."""
        count, key = len(contexts[0].prompts), (models_key(scorers), structure(plan))
        rooms = Rooms.wanted(scorers, contexts, plan, count)
        fitting = [
            own for own in self._programs if own.key == key and own.rooms.holds(rooms) and len(own.free) >= count
        ]
        return max(fitting, key=lambda own: own.num_running, default=None)

    def _drop_idle(self) -> bool:
        for own in self._programs:
            if not own.cohorts:
                self._programs.remove(own)
                return True
        return False
