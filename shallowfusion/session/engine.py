"""What a session's thread does: encode those that come, let all that run take a step, hand out what is done."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shallowfusion.features.log_mel import log_mel
from shallowfusion.results import Timing, Transcription
from shallowfusion.scorers.footprint import bytes_together
from shallowfusion.scorers.loading import AcousticModel
from shallowfusion.search.late import finished
from shallowfusion.search.loop import SearchOutcome, StageClock
from shallowfusion.search.running import Cohort, RunningSearches
from shallowfusion.session.jobs import Job, SessionSettings
from shallowfusion.transcripts import hypotheses_of, ranked_by_listening

__all__ = ["SessionEngine", "is_out_of_memory"]

logger = logging.getLogger(__name__)


class SessionEngine:
    """Decodes jobs; not thread-safe, its session sees to that.

    A failure while one job is read, encoded or started is that job's alone. One in a step, which all share, ends all
    that run, and the next start afresh.

    Args:
        acoustic: the acoustic model; jobs bring the planners that know the language models.
        read: samples of a recording, or an `AudioError`.
        settings: of the session.
    """

    def __init__(self, acoustic: AcousticModel, read: Callable[[Any, str], Tensor], settings: SessionSettings) -> None:
        self.acoustic = acoustic
        self.settings = settings
        self.clock = StageClock()
        self.num_finished = self.num_failed = self.num_cancelled = 0
        self._read = read
        self._shares: dict[str, float] = defaultdict(float)  # by stage, what an utterance that always ran had cost
        self._jobs: dict[Cohort, list[Job | None]] = {}
        self._running = RunningSearches(self.clock)
        self._too_many: int | None = None  # with so many running, memory was short

    @property
    def jobs(self) -> list[Job]:
        """Those that run."""
        return [job for listed in self._jobs.values() for job in listed if job is not None]

    @property
    def reserved_bytes(self) -> int:
        return bytes_together(job.demands for job in self.jobs)

    @property
    def is_empty(self) -> bool:
        """Whether nothing runs and nothing is held for anything that ran."""
        return not self._jobs and self._running.is_empty

    def has_room(self, job: Job, beside: Sequence[Job] = ()) -> bool:
        """Whether it may run together with those that do and some that are about to."""
        together = [*self.jobs, *beside]
        most = self.settings.max_utterances
        if self._too_many is not None:
            most = min(most, max(1, self._too_many))
        if len(together) >= most:
            return False
        budget = self.settings.memory_budget
        return budget is None or bytes_together(other.demands for other in [*together, job]) <= budget

    def admit(self, jobs: Sequence[Job]) -> list[Job]:
        """Read, encode and start jobs; those with the same options share a cohort.

        Returns:
            Jobs for which memory is short as long as others run, to be tried again.
        """
        before = dict(self.clock.seconds)
        good = [job for job in jobs if self._has_sound(job)]
        self._encode([job for job in good if job.encoded is None])
        costs = _shared(self.clock.seconds, before, len(jobs))
        waiting: list[Job] = []
        for group in _alike([job for job in good if job.encoded is not None]):
            waiting += self._start(group, costs)
        return waiting

    def step(self) -> None:
        """One token for all; results go out, and cancelled jobs are dropped."""
        for cohort, listed in self._jobs.items():
            cohort.cancelled |= {i for i, job in enumerate(listed) if job is not None and job.future.cancelled()}
        count, before = self._running.num_running, dict(self.clock.seconds)
        try:
            ran = self._running.step()
        except Exception as error:
            logger.exception("a step failed, and with it the %d utterances that ran", len(self.jobs))
            self._fail_all(error)
            return
        for stage, seconds in _shared(self.clock.seconds, before, count).items():
            self._shares[stage] += seconds
        for cohort in ran:
            for place in cohort.ended:
                self._end(cohort, place)
            for place in cohort.cancelled:
                self._drop(cohort, place)
            cohort.cancelled.clear()

    def _has_sound(self, job: Job) -> bool:
        if job.encoded is not None or job.features is not None:
            return True
        try:
            with self.clock("audio"):
                samples = self._read(job.item, job.source)
            with self.clock("features"):
                job.features = log_mel([samples], self.acoustic.features)[0]
        except Exception as error:
            self.num_failed += job.fail(error)
            return False
        job.seconds = len(samples) / self.acoustic.features.sampling_rate
        return True

    def _encode(self, jobs: Sequence[Job]) -> None:
        """One encoder pass; if it fails, each alone."""
        if not jobs:
            return
        try:
            with self.clock("encoder"):
                features = torch.stack([job.features for job in jobs if job.features is not None])
                for job, encoded in zip(jobs, self.acoustic.scorer.encode(features), strict=True):
                    job.encoded, job.features = encoded, None
        except Exception as error:
            if len(jobs) == 1:
                self.num_failed += jobs[0].fail(error)
                return
            logger.warning("%d recordings could not be encoded together (%s); each is tried alone", len(jobs), error)
            for job in jobs:
                self._encode([job])

    def _start(self, jobs: Sequence[Job], costs: Mapping[str, float]) -> list[Job]:
        """A cohort of jobs with the same options; if it cannot be started, each alone."""
        first = jobs[0]
        encoded = torch.stack([job.encoded for job in jobs if job.encoded is not None])
        before, counted = dict(self.clock.seconds), dict(self.clock.counts)
        try:
            own = first.planner.sources(encoded, first.options, self.clock, [job.seconds for job in jobs])
            cohort = self._running.admit(own.scorers, own.contexts, own.names, own.plan, own.late)
        except Exception as error:
            if len(jobs) > 1:
                return [left for job in jobs for left in self._start([job], costs)]
            if is_out_of_memory(error) and self.jobs:
                logger.warning("%s waits for memory (%s)", first.source, error)
                self._too_many = len(self.jobs)
                return [first]
            self.num_failed += first.fail(error)
            return []
        stages = dict(costs)
        for stage, seconds in _shared(self.clock.seconds, before, len(jobs)).items():
            stages[stage] = stages.get(stage, 0.0) + seconds
        counts = {name: number - counted.get(name, 0) for name, number in self.clock.counts.items()}
        timing = Timing(stages, 0.0, {name: number for name, number in counts.items() if number})
        looks_back = first.options.coverage_weight != 0 or first.options.min_attention_centre is not None
        for place, job in enumerate(jobs):
            job.own, job.place, job.before = own, place, dict(self._shares)
            job.timing = timing
            job.encoded = job.encoded if looks_back else None
        self._jobs[cohort] = list(jobs)
        return []

    def _end(self, cohort: Cohort, place: int) -> None:
        """The result of an utterance whose search ended."""
        job = self._jobs[cohort][place]
        if job is None:
            return
        try:
            result = self._result(job, cohort, place)
        except Exception as error:
            self.num_failed += job.fail(error)
        else:
            if job.finish(result):
                self.num_finished += 1
            else:
                self.num_cancelled += 1
        self._forget(cohort, place)

    def _result(self, job: Job, cohort: Cohort, place: int) -> Transcription:
        own, options = job.own, job.options
        assert own is not None
        assert job.timing is not None
        most = own.plan.settings.beam_size
        outcome = SearchOutcome(cohort.beams.results(place, most), bool(cohort.saw_nan[place]))
        counts = StageClock()
        if own.rule is not None and own.rule.delay is not None:  # such a cohort is of one utterance
            (outcome,) = finished([outcome], own.late, counts)
        with self.clock("text"):
            listed = hypotheses_of(outcome, own.part_names, self.acoustic, own.plan.timestamps)
        if job.encoded is not None:
            window = float(self.acoustic.features.chunk_seconds)
            prefix = own.contexts[0].prompts[place]
            sound = job.seconds / window
            listed = ranked_by_listening(listed, self.acoustic, job.encoded, prefix, sound, options)
        stages = dict(job.timing.stages)
        for stage, seconds in self._shares.items():
            stages[stage] = stages.get(stage, 0.0) + seconds - job.before.get(stage, 0.0)
        timing = Timing(stages, job.seconds, {**job.timing.counts, **counts.counts})
        rule = own.rule or own.plan.rule
        return Transcription(
            job.source, tuple(listed[: options.n_best]), own.languages[place], job.seconds, rule, timing
        )

    def _drop(self, cohort: Cohort, place: int) -> None:
        job = self._jobs.get(cohort, [])[place : place + 1]
        if job and job[0] is not None:
            job[0].future.set_running_or_notify_cancel()
            self.num_cancelled += 1
            self._forget(cohort, place)

    def _forget(self, cohort: Cohort, place: int) -> None:
        listed = self._jobs[cohort]
        listed[place], self._too_many = None, None
        cohort.beams.release(place)
        if all(job is None for job in listed):
            del self._jobs[cohort]

    def _fail_all(self, error: BaseException) -> None:
        for job in self.jobs:
            if job.fail(error):
                self.num_failed += 1
            else:
                self.num_cancelled += 1
        self._jobs.clear()
        self._running = RunningSearches(self.clock)


def _alike(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs that may share a cohort; a delayed rule is finished per cohort, so its jobs stay alone."""
    groups: list[list[Job]] = []
    for job in jobs:
        rule = job.options.resolved_rule(len(job.planner.language_models))
        for group in groups:
            if group[0].planner is job.planner and group[0].options is job.options and rule.delay is None:
                group.append(job)
                break
        else:
            groups.append([job])
    return groups


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short; on the CPU torch says so in a RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate" in str(error) and "memory" in str(error)


def _shared(seconds: Mapping[str, float], before: Mapping[str, float], count: int) -> dict[str, float]:
    """What one of `count` has to bear, by stage, of the seconds that were added."""
    return {stage: (own - before.get(stage, 0.0)) / max(1, count) for stage, own in seconds.items()}
