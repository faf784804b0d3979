"""The line of requests that wait to be searched, and which of them are encoded next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from shallowfusion.session.jobs import Job

__all__ = ["WaitingLine"]


class WaitingLine:
    """First come, first served; not thread-safe, the session's lock guards it.

    Args:
        encoder_batch: most recordings that are encoded in one pass, and most that enter between two steps.
        ahead: recordings are encoded while they stand in the line, and enter when they are; else when they enter.
    """

    def __init__(self, encoder_batch: int, ahead: bool) -> None:
        self._jobs: deque[Job] = deque()
        self._batch = encoder_batch
        self._ahead = ahead

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    @property
    def head(self) -> Job:
        return self._jobs[0]

    @property
    def is_head_ready(self) -> bool:
        """Whether the first could enter now, were there room."""
        return bool(self._jobs) and self._is_ready(self._jobs[0])

    @property
    def has_over(self) -> bool:
        return any(_is_over(job) for job in self._jobs)

    @property
    def num_ahead(self) -> int:
        """Recordings that the session encoded, or is encoding, and that have not entered."""
        return sum(job.is_claimed for job in self._jobs)

    @property
    def encoded_bytes(self) -> int:
        """Of encoder output and CTC frames that the session made for those that stand here."""
        return sum(job.encoded_bytes for job in self._jobs if job.is_claimed)

    def append(self, job: Job) -> None:
        self._jobs.append(job)

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Jobs that were let in and must wait after all; they go first."""
        self._jobs.extendleft(reversed(jobs))

    def sweep(self) -> list[Job]:
        """Takes out those that are cancelled or could not be encoded."""
        left: deque[Job] = deque()
        over: list[Job] = []
        for job in self._jobs:  # each is asked once: it may be cancelled at any time
            (over if _is_over(job) else left).append(job)
        self._jobs = left
        return over

    def take(self, has_room: Callable[[Job, Sequence[Job]], bool]) -> list[Job]:
        """The next that may enter together.

        Args:
            has_room: whether there is room for one beside some.
        """
        taken: list[Job] = []
        while self.is_head_ready and len(taken) < self._batch and has_room(self.head, taken):
            taken.append(self._jobs.popleft())
        return taken

    def claim(self) -> list[Job]:
        """The next recordings to be encoded ahead; none while more than a batch of them waits to enter.

        So at most twice `encoder_batch` of them are there at any time.
        """
        if self.num_ahead > self._batch:
            return []
        chosen = [job for job in self._jobs if _is_unclaimed(job)][: self._batch]
        for job in chosen:
            job.is_claimed = True
        return chosen

    def _is_ready(self, job: Job) -> bool:
        return job.encoded is not None or not self._ahead


def _is_over(job: Job) -> bool:
    return job.error is not None or job.future.cancelled()


def _is_unclaimed(job: Job) -> bool:
    return not job.is_claimed and job.encoded is None and not _is_over(job)
