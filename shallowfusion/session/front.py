"""The session: requests in from any thread, futures out, one thread that decodes."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from shallowfusion.config import require
from shallowfusion.errors import CapacityError, InvalidArgumentError, SessionError
from shallowfusion.options import DecodingOptions
from shallowfusion.planning import SearchPlanner
from shallowfusion.results import Transcription
from shallowfusion.scorers.footprint import bytes_together
from shallowfusion.session.engine import SessionEngine
from shallowfusion.session.jobs import Job, SessionSettings, SessionStatistics

__all__ = ["DecoderSession"]

logger = logging.getLogger(__name__)


class DecoderSession:
    """Continuous batching: utterances enter and leave between the steps of one running search.

    Every request has its own options and language models. Its future returns when its own search ends, to within 1e-4
    in totals as `FusionDecoder.transcribe` would; `cancel` works at any time before that and frees everything at the
    next step. All methods may be called from any thread. Made by `FusionDecoder.session`.

    Price: one thread, which owns the passes; see `docs/serving.md`.

    Args:
        planner: of the decoder.
        read: samples of a recording, or an `AudioError`.
        settings: how much is done at once.
    """

    def __init__(self, planner: SearchPlanner, read: Callable[[Any, str], Tensor], settings: SessionSettings) -> None:
        self.settings = settings
        self._planner = planner
        self._planners: dict[tuple[str, ...], SearchPlanner] = {planner.source_names[1:]: planner}
        self._options: dict[str, DecodingOptions] = {}
        self._engine = SessionEngine(planner.acoustic, read, settings)
        self._wakes = threading.Condition()
        self._queue: deque[Job] = deque()
        self._busy: list[Job] = []  # taken from the queue and not over
        self._num_cancelled = self._num_submitted = 0
        self._is_closing = False
        self._joins = threading.Lock()  # before Python 3.13 two that join one thread may trip over each other
        self._thread = threading.Thread(target=self._work, name="shallowfusion session", daemon=True)
        self._thread.start()

    def submit(
        self,
        recording: Any,
        options: DecodingOptions | None = None,
        *,
        language_models: Sequence[str] | None = None,
        **names: Any,
    ) -> Future[Transcription]:
        """Queue one recording.

        Args:
            recording: as `FusionDecoder.transcribe` takes them; or features [mels, frames] or encoder output
                [frames, size] of one.
            options: or option names as keywords.
            language_models: names of those to fuse, of the decoder's `source_names`; () = none, None = all.

        Returns:
            A future of the result. A recording that cannot be decoded raises its own error there.

        Raises:
            InvalidArgumentError: bad options, or no such language model.
            CapacityError: more memory than the session's budget could be needed.
            SessionError: the session is closed.
        """
        require(options is None or not names, "give either options or option names as keywords, got both.")
        require(
            options is None or isinstance(options, DecodingOptions),
            f"options must be DecodingOptions, got {type(options).__name__}.",
        )
        with self._wakes:
            self._num_submitted += 1
            number = self._num_submitted - 1
            chosen = self._option_record(names) if options is None else options
            planner = self._planner_of(language_models)
            rule = chosen.resolved_rule(len(planner.language_models))
            require(
                rule.trust is None,
                "recordings that fusion.trusted gives up are decoded twice, which a session does not do; use "
                "transcribe, or the rule within.",
            )
            require(chosen.driver == "host", "a session is driven by the host; leave driver='device' out.")
            planner.check(rule)
            source = str(recording) if isinstance(recording, (str, Path)) else f"array {number}"
            future: Future[Transcription] = Future()
            job = Job(future, source, recording, chosen, planner, planner.demands(chosen), time.monotonic())
            self._place_tensor(job)
            self._check_budget(job)
            if self._is_closing:
                raise SessionError(f"the session is closed, so {source} was not taken; open another.")
            self._queue.append(job)
            self._wakes.notify_all()
        future.add_done_callback(self._wake)
        return future

    async def transcribe(
        self,
        recording: Any,
        options: DecodingOptions | None = None,
        *,
        language_models: Sequence[str] | None = None,
        **names: Any,
    ) -> Transcription:
        """`submit` for asyncio: waits without blocking the loop; cancelling the task cancels the request."""
        future = self.submit(recording, options, language_models=language_models, **names)
        return await asyncio.wrap_future(future)

    def statistics(self) -> SessionStatistics:
        """What waits, runs and is over, and what it cost."""
        engine = self._engine
        with self._wakes:
            queued = len(self._queue)
            return SessionStatistics(
                queued=queued,
                running=len(self._busy),
                finished=engine.num_finished,
                failed=engine.num_failed,
                cancelled=engine.num_cancelled + self._num_cancelled,
                reserved_bytes=bytes_together(job.demands for job in self._busy),
                counts=dict(engine.clock.counts),
                seconds=dict(engine.clock.seconds),
            )

    def close(self, cancel: bool = False) -> None:
        """Take no more requests and return when all are over.

        Args:
            cancel: cancel those that wait or run; else they are decoded to their ends.
        """
        with self._wakes:
            self._is_closing = True
            pending = [*self._queue, *self._busy] if cancel else []
            self._wakes.notify_all()
        for job in pending:
            job.future.cancel()
        if threading.current_thread() is not self._thread:
            with self._joins:
                self._thread.join()

    def __enter__(self) -> DecoderSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(cancel=error is not None)

    def _option_record(self, names: dict[str, Any]) -> DecodingOptions:
        """One record for equal keywords, so that such requests may start together."""
        key = repr(sorted(names.items())) if all(_is_plain(value) for value in names.values()) else ""
        if not key:
            return DecodingOptions.of(**names)
        if key not in self._options:
            if len(self._options) >= 256:
                self._options.clear()
            self._options[key] = DecodingOptions.of(**names)
        return self._options[key]

    def _planner_of(self, language_models: Sequence[str] | None) -> SearchPlanner:
        if language_models is None:
            return self._planner
        require(
            not isinstance(language_models, str),
            f"language_models must be a list of names, got {language_models!r}.",
        )
        chosen = tuple(name for name in self._planner.source_names[1:] if name in language_models)
        if chosen not in self._planners or len(chosen) != len(language_models):
            self._planners[chosen] = self._planner.among(language_models)
        return self._planners[chosen]

    def _place_tensor(self, job: Job) -> None:
        """Features and encoder output are told from samples by their shape."""
        acoustic, item = self._planner.acoustic, job.item
        if not isinstance(item, Tensor) or item.dim() != 2:
            return
        config, settings, shape = acoustic.scorer.model.config, acoustic.features, tuple(item.shape)
        is_features = shape == (settings.feature_size, settings.chunk_frames)
        if not is_features and shape != (config.max_source_positions, config.d_model):
            return
        if not item.is_floating_point():
            raise InvalidArgumentError(f"features and encoder output must be floats, got {item.dtype}.")
        job.seconds = float(settings.chunk_seconds)
        if is_features:
            job.features = item
        else:
            job.encoded = item.to(acoustic.scorer.device, acoustic.scorer.model.dtype)

    def _check_budget(self, job: Job) -> None:
        budget, wanted = self.settings.memory_budget, bytes_together([job.demands])
        if budget is not None and wanted > budget:
            raise CapacityError(
                f"{job.source} may need {wanted:,} bytes of keys and values, and the session's memory_budget is "
                f"{budget:,}; lower max_new_tokens or beam_size, or raise the budget."
            )

    def _wake(self, future: Future[Transcription]) -> None:
        with self._wakes:
            self._wakes.notify_all()

    def _work(self) -> None:
        """The session's thread. Failures that the engine does not take in end the session, and nobody waits in vain."""
        try:
            self._serve()
        except BaseException as error:
            logger.exception("the session ends with a failure of its own")
            with self._wakes:
                self._is_closing = True
                pending, self._queue, self._busy = [*self._queue, *self._busy], deque(), []
            for job in pending:
                with suppress(RuntimeError):  # it is over already
                    job.fail(SessionError(f"the session ended before {job.source} did: {error!r}; open another."))

    def _serve(self) -> None:
        while True:
            with self._wakes:
                while not self._queue and self._engine.is_empty and not self._is_closing:
                    self._wakes.wait()
                self._wait_for_company()
                taken = self._take()
                if not taken and self._engine.is_empty:
                    if self._is_closing and not self._queue:
                        return
                    continue
                self._busy += taken
            waiting = self._engine.admit(taken) if taken else []
            if not self._engine.is_empty:
                self._engine.step()
            with self._wakes:
                self._queue.extendleft(reversed(waiting))
                self._busy = self._engine.jobs

    def _wait_for_company(self) -> None:
        """Where nothing runs, wait a little for others to be encoded in the same pass."""
        if not self._engine.is_empty or not self._queue or self._is_closing:
            return
        until = self._queue[0].submitted + self.settings.admission_seconds
        enough = min(self.settings.encoder_batch, self.settings.max_utterances)
        while len(self._queue) < enough and not self._is_closing and (left := until - time.monotonic()) > 0:
            self._wakes.wait(left)

    def _take(self) -> list[Job]:
        """The next requests that fit, first come first served; cancelled ones go."""
        taken: list[Job] = []
        live: deque[Job] = deque()
        for job in self._queue:
            if job.future.cancelled():  # asked once: other threads cancel at any time
                job.future.set_running_or_notify_cancel()
                self._num_cancelled += 1
            else:
                live.append(job)
        self._queue = live
        while self._queue and len(taken) < self.settings.encoder_batch:
            if not self._engine.has_room(self._queue[0], taken):
                break
            taken.append(self._queue.popleft())
        return taken


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
