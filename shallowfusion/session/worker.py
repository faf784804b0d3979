"""What runs a session: the line, the engine, a thread that decodes and one that encodes ahead of it."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from shallowfusion.errors import SessionError
from shallowfusion.results import Transcription
from shallowfusion.scorers.footprint import bytes_together
from shallowfusion.scorers.loading import AcousticModel
from shallowfusion.session.encoding import RecordingEncoder, is_out_of_memory
from shallowfusion.session.engine import SessionEngine
from shallowfusion.session.jobs import Encoded, Job, SessionSettings, SessionStatistics
from shallowfusion.session.line import WaitingLine
from shallowfusion.session.verdicts import Verdicts

__all__ = ["SessionWorker"]

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # an idle thread looks this often whether its session was dropped while nobody could wake it
EXIT_SECONDS = 10.0  # the interpreter waits this long for what threads are amid when it exits
DROPPED = "it was dropped without close(), or the interpreter exits; keep it, or use it in a with block"


class SessionWorker:
    """Takes jobs and ends their futures. Its threads keep it alive, but not the session that made it.

    Args:
        acoustic: the acoustic model; jobs bring their planners.
        read: samples of a recording, or an `AudioError`.
        settings: of the session.
        ahead: whether a thread of its own encodes.

    `wakes` guards everything that is not one thread's own.
    """

    def __init__(
        self, acoustic: AcousticModel, read: Callable[[Any, str], Tensor], settings: SessionSettings, ahead: bool
    ) -> None:
        self.settings = settings
        self.encoder = RecordingEncoder(acoustic, read, apart=ahead)
        self.engine = SessionEngine(acoustic, self.encoder, settings)
        self.wakes = threading.Condition()
        self.line = WaitingLine(settings.encoder_batch, ahead=ahead)
        self.is_closing = False
        self._verdicts = Verdicts()
        self._busy: list[Job] = []  # taken from the line and not over
        self._is_broken = self._is_abandoned = False
        self._joins = threading.Lock()  # before Python 3.13 two that join one thread may trip over each other
        works = {"session": self._work, **({"encoder": self._encode_ahead} if ahead else {})}
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"shallowfusion {name}", daemon=True)
            for name, work in works.items()
        ]
        for thread in self._threads:
            thread.start()
        _open.add(self)

    def add(self, job: Job) -> None:
        """Put a job in the line; its future may be cancelled from now on."""
        with self.wakes:
            if self.is_closing:
                raise SessionError(f"the session is closed, so {job.source} was not taken; open another.")
            if job.second is not None:
                self._verdicts.expect(job)
            self.line.append(job)
            self.wakes.notify_all()
        job.future.add_done_callback(_waker(self))

    def statistics(self) -> SessionStatistics:
        engine, clock = self.engine, self.encoder.clock
        with self.wakes:
            return SessionStatistics(
                queued=len(self.line),
                running=len(self._busy),
                encoded=self.line.num_ahead,
                finished=engine.num_finished,
                failed=engine.num_failed,
                cancelled=engine.num_cancelled,
                given_up=engine.num_given_up,
                reserved_bytes=bytes_together(job.demands for job in self._busy) + engine.program_bytes,
                encoded_bytes=self.line.encoded_bytes,
                counts=dict(engine.clock.counts),
                seconds={**engine.clock.seconds, **clock.seconds},
            )

    def close(self, cancel: bool = False) -> None:
        """Take no more jobs and return when all are over; from a thread of its own, at once."""
        with self.wakes:
            self.is_closing = True
            pending = [*self.line, *self._busy] if cancel else []
            self.wakes.notify_all()
        for job in pending:
            job.future.cancel()
        if threading.current_thread() not in self._threads:
            self.join()

    def abandon(self) -> None:
        """Let the threads end, and with an error all that is not over.

        Called where garbage is collected, amid anything that any thread does, so it waits for no lock; a thread that
        cannot be woken looks for itself.
        """
        self._is_abandoned = True
        if self.wakes.acquire(blocking=False):
            try:
                self.wakes.notify_all()
            finally:
                self.wakes.release()

    def join(self, seconds: float | None = None) -> None:
        """Wait for the threads to end, None = however long it takes."""
        with self._joins:
            for thread in self._threads:
                thread.join(seconds)

    def wake(self) -> None:
        with self.wakes:
            self.wakes.notify_all()

    def _guarded(self, work: Callable[[], None]) -> None:
        """Run a thread; if it breaks in a way nobody foresaw, the session is closed and no future waits for ever."""
        try:
            work()
        except BaseException as error:
            logger.exception("%s ended", threading.current_thread().name)
            self._end(repr(error))

    def _end(self, reason: str) -> None:
        """Take and do no more; whoever waits gets an error."""
        with self.wakes:
            self.is_closing = self._is_broken = True
            left = [*self.line, *self._busy]
            self.wakes.notify_all()
        for job in left:
            if not job.future.done():
                job.fail(SessionError(f"the session ended before {job.source} was decoded: {reason}."))

    def _work(self) -> None:
        """The decoding thread."""
        while not self._is_abandoned:
            with self.wakes:
                while not self._has_work():
                    self.wakes.wait(LOOK_SECONDS)
                self._wait_for_company()
                if self._is_abandoned:
                    break
                over = self.line.sweep()
                taken = self.line.take(self.engine.has_room)
                if self._is_done() and (self._is_broken or not (taken or over)):
                    self.engine.close()
                    self.wakes.notify_all()
                    return
                self._busy += taken
            for job in over:
                self.engine.dismiss(job)
            waiting = self.engine.admit(taken) if taken else []
            if not self.engine.is_empty:
                self.engine.step()
            with self.wakes:
                verdicts = self._verdicts.judge()
            waiting = [*self.engine.conclude(verdicts), *waiting]
            with self.wakes:
                self.line.put_back(waiting)
                running, self._busy = len(self._busy), [*self.engine.jobs, *self.engine.held]
                if taken or over or len(self._busy) < running:
                    self.wakes.notify_all()
        self._end(DROPPED)

    def _has_work(self) -> bool:
        if not self.engine.is_empty or self.line.is_head_ready or self.line.has_over:
            return True
        return self._verdicts.is_ripe or self._is_done()

    def _is_done(self) -> bool:
        if self._is_broken or self._is_abandoned:
            return True
        return self.is_closing and not self.line and not self._busy and self.engine.is_empty

    def _wait_for_company(self) -> None:
        """Where nothing runs, wait a little for others to be encoded in the same pass, and to start together."""
        enough = min(self.settings.encoder_batch, self.settings.max_utterances)
        while self.line and len(self.line) < enough and not self.is_closing and not self._is_abandoned:
            if self._busy or not self.engine.is_empty:
                return
            left = self.line.head.submitted + self.settings.admission_seconds - time.monotonic()
            if left <= 0:
                return
            self.wakes.wait(min(left, LOOK_SECONDS))

    def _encode_ahead(self) -> None:
        """The encoder's thread."""
        num_over: int | None = None  # how many were over when memory was short, until others are
        while True:
            with self.wakes:
                while True:
                    if self._is_done():
                        return
                    if num_over is None or num_over != self.engine.num_over or not self._busy:
                        self._wait_for_company()
                        if jobs := self.line.claim():
                            break
                    self.wakes.wait(LOOK_SECONDS)
            found = self._encoded(jobs)
            with self.wakes:
                num_over = None
                for job, encoded in zip(jobs, found, strict=True):
                    if is_out_of_memory(encoded.error) and self._busy:
                        logger.warning("%s waits for memory to be encoded (%s)", job.source, encoded.error)
                        job.is_claimed, num_over = False, self.engine.num_over
                    else:
                        job.take(encoded)
                self.wakes.notify_all()

    def _encoded(self, jobs: Sequence[Job]) -> list[Encoded]:
        """What became of each; whatever goes wrong, nobody waits for ever."""
        try:
            return self.encoder.encode(jobs)
        except Exception as error:
            logger.exception("%d recordings were not encoded", len(jobs))
            return [Encoded(error=error) for _ in jobs]


_open: weakref.WeakSet[SessionWorker] = weakref.WeakSet()


@atexit.register
def _end_open() -> None:
    """Torch in a thread of its own does not bear that the interpreter is taken down under it."""
    workers = list(_open)
    for worker in workers:
        worker.abandon()
    end = time.monotonic() + EXIT_SECONDS
    for worker in workers:
        worker.join(max(0.0, end - time.monotonic()))


def _waker(worker: SessionWorker) -> Callable[[Future[Transcription]], None]:
    """Wakes a worker; the future that is given it keeps nothing alive."""
    known = weakref.ref(worker)

    def wake(future: Future[Transcription]) -> None:
        found = known()
        if found is not None:
            found.wake()

    return wake
