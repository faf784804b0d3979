"""Which results of trusted rules stand, and which recordings are searched again without language models."""

from __future__ import annotations

from collections import deque

from shallowfusion.session.jobs import Job
from shallowfusion.trusting import given_up

__all__ = ["Verdicts"]


class Verdicts:
    """Judges fused results by the evidence they share, in the order in which they were submitted.

    Requests that end earlier than one before them wait for it; those cancelled or failed say nothing. So the outcome is
    that of `transcribe` of the same list, whatever order the searches end in. Not thread-safe, the session's lock
    guards it.
    """

    def __init__(self) -> None:
        self._lines: dict[int, deque[Job]] = {}  # by identity of the evidence, which the jobs keep alive

    def expect(self, job: Job) -> None:
        """A request that is to be judged after all that share its evidence and came before."""
        self._lines.setdefault(id(job.evidence), deque()).append(job)

    @property
    def is_ripe(self) -> bool:
        """Whether one can be judged, or left out, now."""
        return any(_is_next(line[0]) for line in self._lines.values())

    def judge(self) -> list[tuple[Job, bool]]:
        """Those whose turn has come, and whether each is given up; evidence follows."""
        found: list[tuple[Job, bool]] = []
        for key, line in list(self._lines.items()):
            while line and _is_next(line[0]):
                job = line.popleft()
                if job.fused is not None:
                    found.append((job, not job.future.done() and _is_given_up(job)))
            if not line:
                del self._lines[key]
        return found


def _is_next(job: Job) -> bool:
    return job.fused is not None or job.future.done()


def _is_given_up(job: Job) -> bool:
    assert job.fused is not None
    assert job.fused.rule is not None
    assert job.evidence is not None
    names = [name for name in job.planner.names_under(job.fused.rule)[1:] if name != "ilm"]
    return bool(given_up([job.fused.best], job.fused.rule, names, job.evidence))
