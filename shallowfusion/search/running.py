"""Searches that share model passes: utterances enter and leave between steps, each with its own plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shallowfusion.scorers.base import DEAD, Context, Scorer
from shallowfusion.scorers.slots import moves_to_front
from shallowfusion.search.beam_state import BeamState, BeamStep
from shallowfusion.search.candidates import CandidateArrays, CandidateScorer
from shallowfusion.search.rows import Rows
from shallowfusion.search.stage_clock import StageClock
from shallowfusion.search.step_calls import StepCall, run_together

if TYPE_CHECKING:
    from shallowfusion.search.loop import SearchPlan

__all__ = ["Cohort", "RunningSearches"]

Array = npt.NDArray[Any]


class ModelBatch:
    """All running utterances of one model: one pass per step serves every cohort that has a seat here.

    An utterance has a place, and as many rows of the latest logits as its beam is wide, side by side.
    """

    def __init__(self, scorer: Scorer, name: str) -> None:
        self.scorer = scorer
        self.name = name
        self.state: Any = None
        self.first_rows: Array = np.zeros(0, dtype=np.int64)  # of each place, in the latest logits
        self.seats: list[Seat] = []

    def admit(self, fresh: Any, count: int) -> Array:
        """Places of `count` utterances that join."""
        behind = len(self.state.logits) if self.size else 0
        self.state = self.scorer.admit(self.state, fresh) if self.size else fresh
        self.first_rows = np.concatenate([self.first_rows, behind + np.arange(count)])
        return np.arange(self.size - count, self.size)

    @property
    def size(self) -> int:
        """Utterances that run here."""
        return len(self.first_rows)

    @property
    def computed_rows(self) -> int:
        """Of the latest pass; more than it has logits if the model cannot do without dead rows."""
        return max(len(self.state.logits), getattr(self.state, "computed_rows", 0))

    def rows(self, places: Array, lanes: int) -> Array:
        """Numbers of the rows of utterances with that many each."""
        numbers: Array = (self.first_rows[places][:, None] + np.arange(lanes)).reshape(-1)
        return numbers

    def logits(self, rows: Array) -> Tensor:
        """[rows, vocab]; a view where they lie side by side."""
        own: Tensor = self.state.logits
        return own[int(rows[0]) : int(rows[-1]) + 1] if _is_run(rows) else own[torch.from_numpy(rows)]

    def advance(self) -> None:
        """Drop the places nobody goes on in, and let the model read the new tokens of all others."""
        self.seats = [seat for seat in self.seats if len(seat.cohort.order)]
        kept = sorted(int(place) for seat in self.seats for place in seat.places[seat.cohort.order])
        size = self.size
        self.first_rows = self.first_rows[: len(kept)]
        if not kept:  # every slot is given back before the state goes
            self.scorer.keep(self.state, [])
            self.state = None
            return
        _, order = moves_to_front(kept)
        if len(kept) < size:
            self.state = self.scorer.keep(self.state, order)
        new_place = np.full(size, -1, dtype=np.int64)
        new_place[order] = np.arange(len(order))
        width = max(seat.cohort.beam_size for seat in self.seats)
        lanes, parents = np.zeros(len(kept), dtype=np.int64), np.zeros((len(kept), width), dtype=np.int64)
        tokens = np.full((len(kept), width), DEAD, dtype=np.int64)
        for seat in self.seats:
            cohort = seat.cohort
            seat.places = new_place[seat.places[cohort.order]]
            lanes[seat.places] = cohort.beam_size
            parents[seat.places, : cohort.beam_size] = cohort.moved.parents[cohort.order]
            tokens[seat.places, : cohort.beam_size] = cohort.rows.own_ids(
                cohort.moved.tokens[cohort.order], seat.source
            )
        _, self.state = self.scorer.score(self.scorer.fork(self.state, parents), tokens)
        self.first_rows = lanes.cumsum() - lanes


@dataclass(eq=False)
class Seat:
    """Where the utterances of one cohort lie in the batch of its source number `source`."""

    cohort: Cohort
    source: int
    batch: ModelBatch
    places: Array


@dataclass(eq=False)
class Cohort:
    """Utterances that started together under one plan, and what their search remembers beside the models' states.

    Args:
        beams: all utterances that started, numbered from 0; whoever takes the results releases them.
        active: int64, those that run; `order` is where, among those of the step before, each of them was.
        cancelled: utterances that leave without a result at the next step.
        saw_nan: bool [utterances], a model returned NaN.
        ended: utterances whose search ended in the latest step.
    """

    plan: SearchPlan
    beams: BeamState
    rows: Rows
    active: Array
    saw_nan: Array
    seats: list[Seat] = field(default_factory=list)
    cancelled: set[int] = field(default_factory=set)
    ended: list[int] = field(default_factory=list)
    step: int = 0

    def __post_init__(self) -> None:
        self.order: list[int] = list(range(len(self.active)))
        self.moved: BeamStep

    @property
    def beam_size(self) -> int:
        return self.plan.settings.beam_size

    def is_beside(self, other: Cohort) -> bool:
        """Whether the other's rows follow on its own in every model, so that one view shows both."""
        return all(
            own.batch is their.batch and _is_run(np.concatenate([self.rows_of(own), other.rows_of(their)]))
            for own, their in zip(self.seats, other.seats, strict=True)
        )

    def rows_of(self, seat: Seat) -> Array:
        """Numbers of its rows in the logits of a model."""
        return seat.batch.rows(seat.places, self.rows.totals.shape[1])

    @property
    def num_live_rows(self) -> int:
        return int((self.rows.totals > -np.inf).sum())

    def call(self) -> StepCall:
        return self.rows.call([seat.batch.logits(self.rows_of(seat)) for seat in self.seats], self.step)

    def advance(self, found: CandidateArrays) -> None:
        """Let the beams take the candidates, and find out who goes on."""
        self.saw_nan[self.active] |= found.flagged
        self.moved = self.beams.advance(
            self.active, found.totals, found.lanes, found.tokens, found.parts, found.flagged
        )
        self.rows.follow(found, self.moved.tokens, self.moved.parents, self.moved.totals)
        leaving = np.array([utterance in self.cancelled for utterance in self.active.tolist()])
        self.ended = self.active[self.moved.done & ~leaving].tolist()
        for utterance in self.active[leaving & ~self.moved.done].tolist():
            self.beams.force_finish(utterance)
        _, self.order = moves_to_front(np.flatnonzero(~(self.moved.done | leaving)).tolist())
        self.active = self.active[self.order]
        self.step += 1


class RunningSearches:
    """Beam searches in lockstep: each step is one pass per model over all rows, and few fused steps.

    Fusion and stop rules are each cohort's own, so that utterances with any options share the passes. Cohorts whose
    fused steps differ in weights and totals only share one where their rows lie side by side; nothing is copied for it.
    Synchronises with the device once per fused step.

    Args:
        clock: stages of the work, and counts: "row_steps" that models computed for utterances that run, "live_rows"
            among them, both of the first source.
    """

    def __init__(self, clock: StageClock) -> None:
        self.clock = clock
        self.cohorts: list[Cohort] = []
        self._batches: dict[Scorer, ModelBatch] = {}

    @property
    def num_running(self) -> int:
        return sum(len(cohort.active) for cohort in self.cohorts)

    def admit(
        self,
        scorers: Sequence[Scorer],
        contexts: Sequence[Context],
        names: Sequence[str],
        plan: SearchPlan,
        late: Sequence[CandidateScorer] = (),
    ) -> Cohort:
        """Read the prompts of utterances that enter, and let them run from the next step on.

        Nothing changes for those that run if a model fails here.

        Args:
            scorers: the acoustic scorer first; `contexts` and `names` (stages of the clock) likewise.
            late: fresh sources that score only what survives the fused step; their parts come last.
        """
        prompts = contexts[0].prompts
        fresh = []
        for scorer, context, name in zip(scorers, contexts, names, strict=True):
            with self.clock(name):
                fresh.append(scorer.start(context))
        count = len(prompts)
        cohort = Cohort(
            plan=plan,
            beams=BeamState(plan.settings, count, len(scorers) + len(late)),
            rows=Rows(plan, len(scorers), prompts, late),
            active=np.arange(count),
            saw_nan=np.zeros(count, dtype=bool),
        )
        try:
            self._seat(cohort, scorers, fresh, names)
        except BaseException:
            cohort.order = []  # models it sat down at already drop it in the next step
            raise
        self.cohorts.append(cohort)
        return cohort

    def _seat(self, cohort: Cohort, scorers: Sequence[Scorer], fresh: Sequence[Any], names: Sequence[str]) -> None:
        for i, (scorer, state, name) in enumerate(zip(scorers, fresh, names, strict=True)):
            batch = self._batches.get(scorer) or ModelBatch(scorer, name)
            with self.clock(name):
                seat = Seat(cohort, i, batch, batch.admit(state, len(cohort.active)))
            self._batches[scorer] = batch
            batch.seats.append(seat)
            cohort.seats.append(seat)

    def step(self) -> list[Cohort]:
        """One token for every hypothesis that lives; returns the cohorts that ran, with who `ended`."""
        ran = self.cohorts
        with self.clock("fusion"):
            found = self._candidates()
        with self.clock("search"):
            for cohort, candidates in zip(ran, found, strict=True):
                cohort.advance(candidates)
        for batch in self._batches.values():
            with self.clock(batch.name):
                batch.advance()
        self._batches = {scorer: batch for scorer, batch in self._batches.items() if batch.size}
        self.cohorts = [cohort for cohort in ran if len(cohort.active)]
        for cohort in self.cohorts:
            cohort.rows.keep(cohort.order)
            self.clock.counts["live_rows"] += cohort.num_live_rows
        for batch in {cohort.seats[0].batch for cohort in self.cohorts}:
            self.clock.counts["row_steps"] += batch.computed_rows
        return ran

    def _candidates(self) -> list[CandidateArrays]:
        """One fused step for all cohorts whose calls are alike and whose rows lie side by side in every model."""
        order = sorted(range(len(self.cohorts)), key=lambda i: int(self.cohorts[i].seats[0].places[0]))
        calls = {i: self.cohorts[i].call() for i in order}
        groups: list[list[int]] = []
        for i in order:
            last = groups[-1][-1] if groups else None
            if (
                last is not None
                and calls[i].key is not None
                and calls[last].key == calls[i].key
                and self.cohorts[last].is_beside(self.cohorts[i])
            ):
                groups[-1].append(i)
            else:
                groups.append([i])
        found: dict[int, CandidateArrays] = {}
        for group in groups:
            together = [calls[i] for i in group]
            sources = None if len(group) == 1 else _logits_of([self.cohorts[i] for i in group])
            found.update(zip(group, run_together(together, sources), strict=True))
        self.clock.counts["fused_steps"] += len(groups)
        return [cohort.rows.survivors(found[i]) for i, cohort in enumerate(self.cohorts)]

    @property
    def is_empty(self) -> bool:
        """Whether no model holds anything of any utterance."""
        return not self._batches and not self.cohorts


def _is_run(rows: Array) -> bool:
    return int(rows[-1]) - int(rows[0]) == len(rows) - 1 and bool((np.diff(rows) == 1).all())


def _logits_of(cohorts: Sequence[Cohort]) -> list[Tensor]:
    """Views of the logits of cohorts that lie side by side, per source."""
    columns = zip(*(cohort.seats for cohort in cohorts), strict=True)
    return [seats[0].batch.logits(np.concatenate([seat.cohort.rows_of(seat) for seat in seats])) for seats in columns]
