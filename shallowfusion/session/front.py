"""The session: requests in from any thread, futures out, a thread that decodes and one that encodes ahead of it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from shallowfusion.config import require
from shallowfusion.errors import CapacityError, InvalidArgumentError, SessionError
from shallowfusion.options import DecodingOptions
from shallowfusion.planning import SearchPlanner
from shallowfusion.results import Transcription
from shallowfusion.scorers.footprint import bytes_together
from shallowfusion.session.encoding import RecordingEncoder, is_out_of_memory, overlaps
from shallowfusion.session.engine import SessionEngine
from shallowfusion.session.jobs import Encoded, Job, Second, SessionSettings, SessionStatistics
from shallowfusion.session.line import WaitingLine
from shallowfusion.session.verdicts import Verdicts
from shallowfusion.trusting import Evidence, alone_options

__all__ = ["DecoderSession"]

logger = logging.getLogger(__name__)


class DecoderSession:
    """Continuous batching: utterances enter and leave between the steps of one running search.

    Every request has its own options and language models. Its future returns when its own search ends, to within 1e-4
    in totals as `FusionDecoder.transcribe` would; `cancel` works at any time before that and frees everything at the
    next step. All methods may be called from any thread. Made by `FusionDecoder.session`.

    Price: a thread that owns the passes of the search, and one for the encoder if it runs ahead; see `docs/serving.md`.

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
        self._alone: dict[int, tuple[DecodingOptions, DecodingOptions]] = {}  # keyed by identity of the first
        self.overlaps_encoder = overlaps(settings.overlap_encoder, planner.acoustic.scorer.device)
        self._encoder = RecordingEncoder(planner.acoustic, read, apart=self.overlaps_encoder)
        self._engine = SessionEngine(planner.acoustic, self._encoder, settings)
        self._wakes = threading.Condition()
        self._line = WaitingLine(settings.encoder_batch, ahead=self.overlaps_encoder)
        self._verdicts = Verdicts()
        self._busy: list[Job] = []  # taken from the line and not over
        self._num_submitted = 0
        self._is_closing = self._is_broken = False
        self._joins = threading.Lock()  # before Python 3.13 two that join one thread may trip over each other
        works = {"session": self._work, **({"encoder": self._encode_ahead} if self.overlaps_encoder else {})}
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"shallowfusion {name}", daemon=True)
            for name, work in works.items()
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        recording: Any,
        options: DecodingOptions | None = None,
        *,
        language_models: Sequence[str] | None = None,
        evidence: Evidence | None = None,
        **names: Any,
    ) -> Future[Transcription]:
        """Queue one recording.

        Args:
            recording: as `FusionDecoder.transcribe` takes them; or features [mels, frames] or encoder output
                [frames, size] of one.
            options: or option names as keywords.
            language_models: names of those to fuse, of the decoder's `source_names`; () = none, None = all.
            evidence: shared by the requests of one domain, for `fusion.trusted` with a memory: they are judged in the
                order they were submitted, as in one call of `transcribe`; None = this one by itself.

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
            require(chosen.driver == "host", "a session is driven by the host; leave driver='device' out.")
            planner.check(rule)
            source = str(recording) if isinstance(recording, (str, Path)) else f"array {number}"
            future: Future[Transcription] = Future()
            job = Job(future, source, recording, chosen, planner, planner.demands(chosen), time.monotonic())
            self._place_tensor(job)
            self._check_budget(job)
            if self._is_closing:
                raise SessionError(f"the session is closed, so {source} was not taken; open another.")
            if rule.trust is not None and planner.language_models:
                job.second, job.evidence = self._second(chosen), evidence or Evidence()
                self._verdicts.expect(job)
            self._line.append(job)
            self._wakes.notify_all()
        future.add_done_callback(self._wake)
        return future

    async def transcribe(
        self,
        recording: Any,
        options: DecodingOptions | None = None,
        *,
        language_models: Sequence[str] | None = None,
        evidence: Evidence | None = None,
        **names: Any,
    ) -> Transcription:
        """`submit` for asyncio: waits without blocking the loop; cancelling the task cancels the request."""
        future = self.submit(recording, options, language_models=language_models, evidence=evidence, **names)
        return await asyncio.wrap_future(future)

    def statistics(self) -> SessionStatistics:
        """What waits, runs and is over, and what it cost."""
        engine, clock = self._engine, self._encoder.clock
        with self._wakes:
            return SessionStatistics(
                queued=len(self._line),
                running=len(self._busy),
                encoded=self._line.num_ahead,
                finished=engine.num_finished,
                failed=engine.num_failed,
                cancelled=engine.num_cancelled,
                given_up=engine.num_given_up,
                reserved_bytes=bytes_together(job.demands for job in self._busy),
                encoded_bytes=self._line.encoded_bytes,
                counts=dict(engine.clock.counts),
                seconds={**engine.clock.seconds, **clock.seconds},
            )

    def close(self, cancel: bool = False) -> None:
        """Take no more requests and return when all are over.

        Args:
            cancel: cancel those that wait or run; else they are decoded to their ends.
        """
        with self._wakes:
            self._is_closing = True
            pending = [*self._line, *self._busy] if cancel else []
            self._wakes.notify_all()
        for job in pending:
            job.future.cancel()
        if threading.current_thread() not in self._threads:
            with self._joins:
                for thread in self._threads:
                    thread.join()

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

    def _second(self, options: DecodingOptions) -> Second:
        """The search of those whose trusted rule gives up; one record for equal options, so that they may share it."""
        known = self._alone.get(id(options))
        if known is None:
            if len(self._alone) >= 256:
                self._alone.clear()
            known = self._alone[id(options)] = options, alone_options(options)
        planner = self._planner_of(())
        return Second(known[1], planner, planner.demands(known[1]))

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
        if item.is_cuda:
            job.given = torch.cuda.current_stream(item.device).record_event()
        job.seconds = float(settings.chunk_seconds)
        if is_features:
            job.features = item
        else:
            job.encoded = item.to(acoustic.scorer.device, acoustic.scorer.model.dtype)
            if job.encoded.is_cuda:
                job.done = torch.cuda.current_stream(job.encoded.device).record_event()

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

    def _guarded(self, work: Callable[[], None]) -> None:
        """Run a thread; if it breaks in a way nobody foresaw, the session is closed and no future waits for ever."""
        try:
            work()
        except BaseException as error:
            logger.exception("%s ended", threading.current_thread().name)
            with self._wakes:
                self._is_closing = self._is_broken = True
                left = [*self._line, *self._busy]
                self._wakes.notify_all()
            for job in left:
                if not job.future.done():
                    job.fail(SessionError(f"the session ended before {job.source} was decoded: {error!r}."))

    def _work(self) -> None:
        """The decoding thread."""
        while True:
            with self._wakes:
                while not self._has_work():
                    self._wakes.wait()
                self._wait_for_company()
                over = self._line.sweep()
                taken = self._line.take(self._engine.has_room)
                if self._is_done() and (self._is_broken or not (taken or over)):
                    self._wakes.notify_all()
                    return
                self._busy += taken
            for job in over:
                self._engine.dismiss(job)
            waiting = self._engine.admit(taken) if taken else []
            if not self._engine.is_empty:
                self._engine.step()
            with self._wakes:
                verdicts = self._verdicts.judge()
            waiting = [*self._engine.conclude(verdicts), *waiting]
            with self._wakes:
                self._line.put_back(waiting)
                running, self._busy = len(self._busy), [*self._engine.jobs, *self._engine.held]
                if taken or over or len(self._busy) < running:
                    self._wakes.notify_all()

    def _has_work(self) -> bool:
        if not self._engine.is_empty or self._line.is_head_ready or self._line.has_over:
            return True
        return self._verdicts.is_ripe or self._is_done()

    def _is_done(self) -> bool:
        if self._is_broken:
            return True
        return self._is_closing and not self._line and not self._busy and self._engine.is_empty

    def _wait_for_company(self) -> None:
        """Where nothing runs, wait a little for others to be encoded in the same pass, and to start together."""
        enough = min(self.settings.encoder_batch, self.settings.max_utterances)
        while self._line and len(self._line) < enough and not self._is_closing:
            if self._busy or not self._engine.is_empty:
                return
            left = self._line.head.submitted + self.settings.admission_seconds - time.monotonic()
            if left <= 0:
                return
            self._wakes.wait(left)

    def _encode_ahead(self) -> None:
        """The encoder's thread."""
        num_over: int | None = None  # how many were over when memory was short, until others are
        while True:
            with self._wakes:
                while True:
                    if self._is_done():
                        return
                    if num_over is None or num_over != self._engine.num_over or not self._busy:
                        self._wait_for_company()
                        if jobs := self._line.claim():
                            break
                    self._wakes.wait()
            found = self._encoded(jobs)
            with self._wakes:
                num_over = None
                for job, encoded in zip(jobs, found, strict=True):
                    if is_out_of_memory(encoded.error) and self._busy:
                        logger.warning("%s waits for memory to be encoded (%s)", job.source, encoded.error)
                        job.is_claimed, num_over = False, self._engine.num_over
                    else:
                        job.take(encoded)
                self._wakes.notify_all()

    def _encoded(self, jobs: Sequence[Job]) -> list[Encoded]:
        """What became of each; whatever goes wrong, nobody waits for ever."""
        try:
            return self._encoder.encode(jobs)
        except Exception as error:
            logger.exception("%d recordings were not encoded", len(jobs))
            return [Encoded(error=error) for _ in jobs]


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
