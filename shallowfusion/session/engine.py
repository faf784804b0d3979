"""What a session's decoding thread does: start those that come, let all that run take a step, hand out what is done."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from shallowfusion.config import Driver
from shallowfusion.ctc.joint import CtcFrames
from shallowfusion.results import Timing, Transcription
from shallowfusion.scorers.footprint import bytes_together
from shallowfusion.scorers.loading import AcousticModel
from shallowfusion.search.device_running import DeviceCohort, DeviceSearches
from shallowfusion.search.late import finished
from shallowfusion.search.loop import SearchOutcome, StageClock
from shallowfusion.search.running import Cohort, RunningSearches
from shallowfusion.search.sources import Sources
from shallowfusion.session.encoding import RecordingEncoder, is_out_of_memory, received
from shallowfusion.session.jobs import Job, SessionSettings, shared_seconds
from shallowfusion.transcripts import hypotheses_of, ranked_by_listening
from shallowfusion.trusting import flagged

__all__ = ["SessionEngine"]

logger = logging.getLogger(__name__)

N = TypeVar("N", int, float)
AnyCohort = Cohort | DeviceCohort


class SessionEngine:
    """Decodes jobs; not thread-safe, its session sees to that.

    A failure while one job is read, encoded or started is that job's alone. One in a step ends all that share it: those
    that the host drives, or those in one program of the device.

    Args:
        acoustic: the acoustic model; jobs bring the planners that know the language models.
        encoder: of recordings that come without encoder output.
        settings: of the session.
    """

    def __init__(self, acoustic: AcousticModel, encoder: RecordingEncoder, settings: SessionSettings) -> None:
        self.acoustic = acoustic
        self.encoder = encoder
        self.settings = settings
        self.clock = StageClock.on(acoustic.scorer.device)
        self.held: list[Job] = []  # searched, and waiting for the verdict of a trusted rule
        self.num_finished = self.num_failed = self.num_cancelled = self.num_given_up = 0
        self._shares: dict[str, float] = defaultdict(float)  # by stage, what an utterance that always ran had cost
        self._jobs: dict[AnyCohort, list[Job | None]] = {}
        self._running = RunningSearches(self.clock)
        self._device = DeviceSearches(self.clock, settings.max_utterances, encoder.quiet)
        self._too_many: int | None = None  # with so many running, memory was short

    @property
    def jobs(self) -> list[Job]:
        """Those that run."""
        return [job for listed in self._jobs.values() for job in listed if job is not None]

    @property
    def reserved_bytes(self) -> int:
        return bytes_together(job.demands for job in self.jobs) + self.program_bytes

    @property
    def program_bytes(self) -> int:
        """Keys and values of the device programs that are kept, whoever is searched in them."""
        return self._device.num_bytes

    @property
    def num_over(self) -> int:
        """Requests that are over, so that what they held is free."""
        return self.num_finished + self.num_failed + self.num_cancelled

    @property
    def is_empty(self) -> bool:
        """Whether nothing runs and nothing is held for anything that ran."""
        return not self._jobs and self._running.is_empty and self._device.is_empty

    def has_room(self, job: Job, beside: Sequence[Job] = ()) -> bool:
        """Whether it may run together with those that do and some that are about to."""
        if not self.jobs and not beside:
            return True  # `submit` saw to it that it fits alone
        together = [*self.jobs, *self.held, *beside]
        most = self.settings.max_utterances
        if self._too_many is not None:
            most = min(most, max(1, self._too_many))
        if len(together) >= most:
            return False
        return self._fits([*together, job])

    def _fits(self, jobs: Sequence[Job]) -> bool:
        """Whether the budget bears them beside the programs that are busy; a device-driven one has its room there."""
        wanted = bytes_together(job.demands for job in jobs if not job.asks_device)
        return wanted + self._device.busy_bytes <= self._budget

    @property
    def _budget(self) -> float:
        return float("inf") if self.settings.memory_budget is None else self.settings.memory_budget

    def admit(self, jobs: Sequence[Job]) -> list[Job]:
        """Start jobs, once they are read and encoded; those with the same options share a cohort.

        Returns:
            Jobs for which memory is short as long as others run, to be tried again.
        """
        unread = [job for job in jobs if job.encoded is None]
        waiting: list[Job] = []
        for job, encoded in zip(unread, self.encoder.encode(unread) if unread else (), strict=True):
            if is_out_of_memory(encoded.error) and self.jobs:
                self._postpone(job, encoded.error)
                waiting.append(job)
                continue
            job.take(encoded)
            if job.encoded is None:
                self.dismiss(job)
        for group in _alike([job for job in jobs if job.encoded is not None]):
            waiting += self._start(group)
        return waiting

    def dismiss(self, job: Job) -> None:
        """End a job that has no result: it failed, or was cancelled."""
        is_wanted = job.future.set_running_or_notify_cancel()
        if is_wanted and job.error is not None:
            self.num_failed += 1  # before anybody sees it: whoever has an answer finds it counted
            job.future.set_exception(job.error)
        else:
            self.num_cancelled += 1

    def step(self) -> None:
        """One token for all; results go out, and cancelled jobs are dropped."""
        for cohort, listed in self._jobs.items():
            cohort.cancelled |= {i for i, job in enumerate(listed) if job is not None and job.future.cancelled()}
        before, count = dict(self.clock.seconds), self._running.num_running + self._device.num_running
        ran: list[AnyCohort] = [*self._device.step()]
        try:
            ran += self._running.step()
        except Exception as error:
            broken = [cohort for cohort in self._jobs if isinstance(cohort, Cohort)]
            logger.exception("a step failed, and with it %d cohorts that ran", len(broken))
            for cohort in broken:
                self._fail(cohort, error)
            self._running = RunningSearches(self.clock)
        for stage, seconds in shared_seconds(self.clock.seconds, before, count).items():
            self._shares[stage] += seconds
        for cohort in ran:
            for place in cohort.ended:
                self._end(cohort, place)
            for place in cohort.cancelled:
                self._drop(cohort, place)
            cohort.cancelled.clear()
            if isinstance(cohort, DeviceCohort) and cohort.error is not None:
                self._fail(cohort, cohort.error)

    def conclude(self, verdicts: Sequence[tuple[Job, bool]]) -> list[Job]:
        """Hand out the results that stand; returns the jobs that are to be searched again, given up by their rule."""
        again = []
        for job, is_given_up in verdicts:
            self.held.remove(job)
            result, second = job.fused, job.second
            assert result is not None
            assert second is not None
            job.fused, job.second, job.host_reason = None, None, None
            if is_given_up:
                job.prior, job.options, job.planner, job.demands = (
                    result.timing, second.options, second.planner, second.demands,
                )  # fmt: skip
                self.num_given_up += 1
                again.append(job)
            else:
                self._hand_out(job, result)
        return again

    def _postpone(self, job: Job, error: BaseException | None) -> None:
        logger.warning("%s waits for memory (%s)", job.source, error)
        self._too_many = len(self.jobs)

    def _start(self, jobs: Sequence[Job]) -> list[Job]:
        """A cohort of jobs with the same options; if it cannot be started, each alone."""
        first = jobs[0]
        before, counted = dict(self.clock.seconds), dict(self.clock.counts)
        try:
            encoded = torch.stack([received(job.encoded, job.done) for job in jobs if job.encoded is not None])
            heard = CtcFrames.together([job.frames for job in jobs if job.frames is not None]) if first.ctc else None
            lengths = [job.seconds for job in jobs]
            own = first.planner.sources(encoded, first.options, self.clock, lengths, heard)
            cohort, reason = self._admitted(own, jobs)
        except Exception as error:
            if len(jobs) > 1:
                return [left for job in jobs for left in self._start([job])]
            if is_out_of_memory(error) and self.jobs:
                self._postpone(first, error)
                return [first]
            first.error = error
            self.dismiss(first)
            return []
        costs = shared_seconds(self.clock.seconds, before, len(jobs))
        counts = {name: number - counted.get(name, 0) for name, number in self.clock.counts.items()}
        looks_back = first.options.coverage_weight != 0 or first.options.min_attention_centre is not None
        for place, job in enumerate(jobs):
            job.own, job.place, job.before = own, place, dict(self._shares)
            stages = _added(costs, {} if job.prior else job.costs)
            driver: Driver = "device" if isinstance(cohort, DeviceCohort) else "host"
            job.timing = Timing(stages, 0.0, {name: n for name, n in counts.items() if n}, driver, reason)
            job.demands = {} if driver == "device" else job.demands
            job.encoded = job.encoded if looks_back or job.second is not None else None
            job.frames = job.frames if job.second is not None else None
        self._jobs[cohort] = list(jobs)
        return []

    def _admitted(self, own: Sources, jobs: Sequence[Job]) -> tuple[AnyCohort, str | None]:
        """Their cohort, driven as they ask where that can be, and why the host drives it where it cannot."""
        reason = None
        others = bytes_together(job.demands for job in self.jobs)
        if jobs[0].options.driver == "device":
            search = (own.scorers, own.contexts, own.plan)
            reason = self._device.refusal(*search, own.late, self._budget - others)
            if reason is None:
                try:
                    return self._device.admit(*search), None
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    reason = f"memory was short ({error})"
            logger.warning("the host drives this search: %s", reason)
            for job in jobs:
                job.host_reason = reason
        if (self.jobs or len(jobs) > 1) and not self._fits([*self.jobs, *self.held, *jobs]):
            raise MemoryError("memory_budget bears no more searches driven by the host beside those that run")
        self._device.shrink(self._budget - others - bytes_together(job.demands for job in jobs))
        return self._running.admit(own.scorers, own.contexts, own.names, own.plan, own.late), reason

    def close(self) -> None:
        """Let go of what is kept for those to come; nobody is searched any more."""
        self._device.shrink(0)

    def _end(self, cohort: AnyCohort, place: int) -> None:
        """The result of an utterance whose search ended."""
        job = self._jobs[cohort][place]
        if job is None:
            return
        try:
            result = self._result(job, cohort, place)
        except Exception as error:
            job.error = error
            self.dismiss(job)
        else:
            if job.second is None or job.future.cancelled():
                self._hand_out(job, result)
            else:
                job.fused, job.demands = result, {}
                self.held.append(job)
        self._forget(cohort, place)

    def _hand_out(self, job: Job, result: Transcription) -> None:
        if job.future.set_running_or_notify_cancel():
            self.num_finished += 1
            job.future.set_result(result)
        else:
            self.num_cancelled += 1

    def _result(self, job: Job, cohort: AnyCohort, place: int) -> Transcription:
        own, options = job.own, job.options
        assert own is not None
        assert job.timing is not None
        most = own.plan.settings.beam_size
        outcome = SearchOutcome(cohort.beams.results(place, most), bool(cohort.saw_nan[place]))
        counts = StageClock()
        if own.rule is not None and own.rule.delay is not None:  # such a cohort is of one utterance
            (outcome,) = finished([outcome], own.late, counts)
        with self.clock("text"), counts("text"):
            listed = hypotheses_of(outcome, own.part_names, self.acoustic, own.plan.timestamps)
        if job.encoded is not None:
            window = float(self.acoustic.features.chunk_seconds)
            prefix = own.contexts[0].prompts[place]
            sound = job.seconds / window
            with self.clock("asr"), counts("asr"):
                listed = ranked_by_listening(listed, self.acoustic, job.encoded, prefix, sound, options)
        steps = {stage: seconds - job.before.get(stage, 0.0) for stage, seconds in self._shares.items()}
        stages = _added(_added(job.timing.stages, steps), counts.seconds)  # the last are this request's alone
        if isinstance(cohort, DeviceCohort):
            counts.counts["device steps"] = cohort.num_steps(place)
        timing = replace(
            job.timing, stages=stages, audio_seconds=job.seconds, counts={**job.timing.counts, **counts.counts}
        )
        best = tuple(listed[: options.n_best])
        if job.prior is not None:
            stages = _added(timing.stages, job.prior.stages)
            timing = replace(timing, stages=stages, counts=_added(timing.counts, job.prior.counts))
            best = flagged(best)
        return Transcription(job.source, best, own.languages[place], job.seconds, own.rule or own.plan.rule, timing)

    def _drop(self, cohort: AnyCohort, place: int) -> None:
        job = self._jobs.get(cohort, [])[place : place + 1]
        if job and job[0] is not None:
            self.dismiss(job[0])
            self._forget(cohort, place)

    def _forget(self, cohort: AnyCohort, place: int) -> None:
        listed = self._jobs[cohort]
        listed[place], self._too_many = None, None
        cohort.beams.release(place)
        if all(job is None for job in listed):
            del self._jobs[cohort]

    def _fail(self, cohort: AnyCohort, error: Exception) -> None:
        """End what still runs of a cohort."""
        for place, job in enumerate(self._jobs.get(cohort, [])):
            if job is not None:
                job.error = error
                self.dismiss(job)
                self._forget(cohort, place)


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


def _added(one: Mapping[str, N], other: Mapping[str, N]) -> dict[str, N]:
    """Sums by name."""
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}
