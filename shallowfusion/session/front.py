"""The session: requests in from any thread, futures out."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from shallowfusion.config import require
from shallowfusion.ctc.joint import CtcFrames, check_heard
from shallowfusion.errors import CapacityError, InvalidArgumentError
from shallowfusion.options import DecodingOptions
from shallowfusion.planning import SearchPlanner
from shallowfusion.results import Transcription
from shallowfusion.scorers.footprint import bytes_together
from shallowfusion.session.encoding import overlaps
from shallowfusion.session.jobs import Job, Second, SessionSettings, SessionStatistics
from shallowfusion.session.worker import SessionWorker
from shallowfusion.trusting import Evidence, alone_options

__all__ = ["DecoderSession"]


class DecoderSession:
    """Continuous batching: utterances enter and leave between the steps of one running search.

    Every request has its own options and language models. Its future returns when its own search ends, to within 1e-4
    in totals as `FusionDecoder.transcribe` would; `cancel` works at any time before that and frees everything at the
    next step. All methods may be called from any thread. Made by `FusionDecoder.session`.

    A session that nobody holds any more ends by itself, and what is not over fails; so it does when the interpreter
    exits. Use it in a `with` block, or `close` it, to have everything decoded.

    Requests with driver="device" share captured steps where their rule allows it, beside those that the host drives.

    Price: a thread that owns the passes of the search, and one for the encoder if it runs ahead; keys and values of
    every place of the device's programs; see `docs/serving.md`.

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
        self._num_submitted = 0
        self._worker = SessionWorker(planner.acoustic, read, settings, self.overlaps_encoder)
        self._ends = weakref.finalize(self, self._worker.abandon)
        self._ends.atexit = False  # the worker has its own end there

    def submit(
        self,
        recording: Any,
        options: DecodingOptions | None = None,
        *,
        language_models: Sequence[str] | None = None,
        evidence: Evidence | None = None,
        ctc_frames: CtcFrames | None = None,
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
            ctc_frames: what the CTC model heard of it, for `ctc_weight`: `decoder.ctc.frames([samples])`; None = it
                hears the recording itself. Wanted with features and encoder output.

        Returns:
            A future of the result. A recording that cannot be decoded raises its own error there.

        Raises:
            InvalidArgumentError: bad options, no such language model, or nothing that the CTC model can hear.
            CapacityError: more memory than the session's budget could be needed.
            SessionError: the session is closed.
        """
        require(options is None or not names, "give either options or option names as keywords, got both.")
        require(
            options is None or isinstance(options, DecodingOptions),
            f"options must be DecodingOptions, got {type(options).__name__}.",
        )
        with self._worker.wakes:
            self._num_submitted += 1
            number = self._num_submitted - 1
            chosen = self._option_record(names) if options is None else options
            planner = self._planner_of(language_models)
            rule = chosen.resolved_rule(len(planner.language_models))
            planner.check(rule)
            source = str(recording) if isinstance(recording, (str, Path)) else f"array {number}"
            future: Future[Transcription] = Future()
            job = Job(future, source, recording, chosen, planner, planner.demands(chosen), time.monotonic())
            self._place_tensor(job)
            self._place_ctc(job, ctc_frames)
            self._check_budget(job)
            if rule.trust is not None and planner.language_models:
                job.second, job.evidence = self._second(chosen), evidence or Evidence()
            self._worker.add(job)
        return future

    async def transcribe(
        self,
        recording: Any,
        options: DecodingOptions | None = None,
        *,
        language_models: Sequence[str] | None = None,
        evidence: Evidence | None = None,
        ctc_frames: CtcFrames | None = None,
        **names: Any,
    ) -> Transcription:
        """`submit` for asyncio: waits without blocking the loop; cancelling the task cancels the request."""
        future = self.submit(
            recording, options, language_models=language_models, evidence=evidence, ctc_frames=ctc_frames, **names
        )
        return await asyncio.wrap_future(future)

    def statistics(self) -> SessionStatistics:
        """What waits, runs and is over, and what it cost."""
        return self._worker.statistics()

    def close(self, cancel: bool = False) -> None:
        """Take no more requests and return when all are over.

        Args:
            cancel: cancel those that wait or run; else they are decoded to their ends.
        """
        self._worker.close(cancel)

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

    def _place_ctc(self, job: Job, frames: CtcFrames | None) -> None:
        """Who hears it for `ctc_weight`, and what was heard already."""
        joint = job.planner.joint if job.options.ctc_weight else None
        if joint is None:
            return
        job.ctc = joint
        if frames is not None:
            joint.check_frames(frames, 1)
            (job.frames,) = frames.each()
        elif job.features is not None or job.encoded is not None:
            check_heard(joint, job.options, None)

    def _check_budget(self, job: Job) -> None:
        budget, wanted = self.settings.memory_budget, bytes_together([job.demands])
        if budget is not None and wanted > budget:
            raise CapacityError(
                f"{job.source} may need {wanted:,} bytes of keys and values and CTC scores, and the session's "
                f"memory_budget is {budget:,}; lower max_new_tokens or beam_size, or raise the budget."
            )


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
