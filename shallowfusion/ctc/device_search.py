"""CTC prefix beam search where the scores are: one batch of utterances on a GPU (or in torch on the CPU)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from shallowfusion.checks import LARGEST_INTEGER, integer
from shallowfusion.config import require
from shallowfusion.ctc.device_frames import FrameBlock, FrameErrors, blocks_of, note_losses
from shallowfusion.ctc.device_results import hypotheses_of
from shallowfusion.ctc.device_step import Beam, DeviceRules, Frame, Trail, advance, fresh_beam
from shallowfusion.ctc.device_texts import trackers_of
from shallowfusion.ctc.results import CtcLive, CtcResult, frames_of, results_of, start_states_of
from shallowfusion.ctc.search import MAX_UTTERANCES, check_settings, label_words
from shallowfusion.ctc.settings import CtcAlphabet, CtcLanguage, CtcOptions
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.ngrams.device_table import DeviceNgramTable
from shallowfusion.ngrams.table import NgramTableProtocol
from shallowfusion.phrases.automaton import PhraseAutomatonProtocol

__all__ = ["DeviceCtcSearch", "DeviceCtcState", "device_obstacle"]

LARGEST_BEAM = 1000
FRAME_FIELDS = ("log_probs", "labels", "values", "blank", "numbers")


@dataclass(eq=False)
class DeviceCtcState:
    """A batch in progress, on the device.

    Args:
        beam: the prefixes.
        frames: int64 [utterances], frames seen.
        trails: of all frames so far, in blocks: codes and last labels [frames, utterances, beam_size, ...] and the
            numbers of the frames [frames, utterances].
    """

    beam: Beam
    frames: Tensor
    errors: FrameErrors
    trails: list[tuple[Trail, Tensor]] = field(default_factory=list)

    @property
    def num_frames(self) -> list[int]:
        """Frames each utterance has seen; synchronises."""
        counts: list[int] = self.frames.tolist()
        return counts


def device_obstacle(alphabet: CtcAlphabet, options: CtcOptions, language: CtcLanguage | None) -> str | None:
    """Why these settings cannot be searched on a device, with the cure; None = they can."""
    native = 'or let the native search decode (backend="native").'
    if language is not None and not hasattr(language.table, "dense"):
        return f"a language model that is asked in Python; give an NgramTable {native}"
    if language is not None and language.score_empty_word:
        return f"score_empty_word is not known there; leave it False {native}"
    if options.places != "prefixes":
        return f"places={options.places!r} is not searched there; use places='prefixes' {native}"
    if options.times != "best":
        return f"times={options.times!r} is not kept there; use times='best' {native}"
    if options.history_words > 0:
        return f"history_words={options.history_words} needs words; use 0 {native}"
    if options.beam_size > LARGEST_BEAM:
        return f"beam_size must be at most {LARGEST_BEAM}, got {options.beam_size}; take a smaller one {native}"
    return None


class DeviceCtcSearch:
    """`CtcSearchProtocol` in torch, for scores on a GPU; the same code runs on CPU tensors.

    What it maximises and how it prunes is what `CtcSearch` does; masses are float64 logs and prefixes are known by a
    64-bit hash (see `Beam`). An n-gram model is looked up where the scores are, for all prefixes and the `top_labels`
    of a frame; phrases and words are followed there (`TextTracker`), equal texts of different labels joined
    (`device_merging`). Single paths and scores of the caller's own are refused (`device_obstacle`). Of labels that tie
    at -inf any may be looked at; they make no hypothesis.

    Nothing synchronises within a frame; on CUDA a frame is one replayed graph. A `step` synchronises once per block of
    2^25 scores with `blank_skip`, which joins a run of frames that are blank alone, and where lengths are given on the
    device. `results` and `end` synchronise.

    Price per frame: some 170 small launches in one graph, whatever the batch, 200 with phrases, 350 with a word 3-gram
    too, and 140 more to join equal texts; per utterance O(beam_size * (4 + log(beam_size))) pairs, O(beam_size *
    top_labels) with a language model, phrases or words. Memory: 8 bytes per frame and place of the beam (frames joined
    by `blank_skip` count once), kept until the state goes; tables of phrases and words as `DevicePhraseTable` says.

    Args:
        alphabet: the labels of the scores.
        options: beams to 1,000.
        language: an n-gram model of labels or words, None = none.
        device: where the search runs; scores that are elsewhere are copied.
        table, phrases: the language model on the device, and the automaton of the hotwords, if they were made before.

    Raises:
        InvalidArgumentError: settings that the device search does not know; the message names the cure.
        VocabularyError: a label that the model does not know.
    """

    def __init__(
        self,
        alphabet: CtcAlphabet,
        options: CtcOptions | None = None,
        language: CtcLanguage | None = None,
        device: str | torch.device = "cpu",
        table: DeviceNgramTable | None = None,
        phrases: PhraseAutomatonProtocol | None = None,
    ) -> None:
        self.alphabet, self.options, self.language = alphabet, options or CtcOptions(), language
        self.device = torch.device(device)
        check_settings(alphabet, self.options, language)
        obstacle = device_obstacle(alphabet, self.options, language)
        require(obstacle is None, f"the device search cannot do this: {obstacle}")
        if language is not None and table is None:
            table = DeviceNgramTable(cast(NgramTableProtocol, language.table), self.device)
        self.table = table
        is_of_labels = language is not None and language.unit == "labels"
        words = label_words(alphabet, language) if is_of_labels else None
        trackers = trackers_of(alphabet, self.options, language, self.device, phrases)
        self.rules = DeviceRules(alphabet, self.options, self.device, table, words, trackers)
        self._graphs: dict[int, CapturedFrame] = {}

    def begin(self, num_utterances: int, start_states: Sequence[int] | None = None) -> DeviceCtcState:
        count = integer("num_utterances", num_utterances, 0, MAX_UTTERANCES)
        default = 0 if self.language is None else self.language.start_state
        states = torch.tensor(start_states_of(start_states, count, default), dtype=torch.int64, device=self.device)
        return DeviceCtcState(
            fresh_beam(states, self.options.beam_size, self.rules.trackers),
            torch.zeros_like(states),
            FrameErrors.none(count, self.device),
        )

    @torch.no_grad()
    def step(self, state: Any, log_probs: object, lengths: object = None) -> None:
        scores, counts = self._checked(log_probs, lengths, len(state.frames))
        if scores.numel() == 0:
            return
        blocks = blocks_of(
            scores, counts, state.frames, state.errors, self.options, self.alphabet.blank, self.rules.looked_at
        )
        for block in blocks:
            state.beam, trail = self._advanced(state.beam, block)
            note_losses(trail.last, block.numbers, state.frames, state.errors)
            state.trails.append((trail, block.numbers))

    def _checked(self, log_probs: object, lengths: object, num_utterances: int) -> tuple[Tensor, Tensor]:
        """Scores and lengths on the device, of the right shapes."""
        num_labels = len(self.alphabet.labels)
        if not isinstance(log_probs, Tensor):
            frames = frames_of(log_probs, lengths, num_utterances, num_labels)
            given = torch.from_numpy(np.array(frames.log_probs, order="C"))
            return given.to(self.device), torch.from_numpy(frames.counts).to(self.device)
        # Only the shape goes through the checks: the scores stay where they are.
        if not log_probs.is_floating_point():
            is_whole = not log_probs.is_complex() and log_probs.dtype != torch.bool
            require(is_whole, f"log_probs must hold real numbers, got dtype {log_probs.dtype}.")
            log_probs = log_probs.float()
        shape_only = np.broadcast_to(np.float32(0), tuple(log_probs.shape))
        counts = frames_of(shape_only, lengths, num_utterances, num_labels).counts
        return log_probs.detach().to(self.device), torch.from_numpy(counts).to(self.device)

    def _advanced(self, beam: Beam, block: FrameBlock) -> tuple[Beam, Trail]:
        """The beam after a block, and the trail of its frames."""
        shape = (len(block), *beam.last.shape)
        small = torch.int16 if 4 * self.options.beam_size < 2**15 else torch.int32
        trail = Trail(
            torch.empty((*shape, 2), dtype=small, device=self.device),
            torch.empty(shape, dtype=torch.int32, device=self.device),
        )
        captured = self._captured(beam, block) if self.device.type == "cuda" else None
        for number in range(len(block)):
            frame = Frame(*(getattr(block, name)[number] for name in FRAME_FIELDS))
            if captured is None:
                beam, own = advance(beam, frame, self.rules)
            else:
                own = captured.replay(frame)
            trail.codes[number].copy_(own.codes)
            trail.last[number].copy_(own.last)
        return beam if captured is None else captured.beam_copy(), trail

    def _captured(self, beam: Beam, block: FrameBlock) -> CapturedFrame:
        """The graph for batches of this size, with `beam` in it."""
        captured = self._graphs.get(len(beam.last))
        if captured is None:
            first = Frame(*(getattr(block, name)[0] for name in FRAME_FIELDS))
            with torch.cuda.device(self.device):
                captured = self._graphs[len(beam.last)] = CapturedFrame(beam, first, self.rules)
        captured.load(beam)
        return captured

    def live(self, state: Any) -> list[list[CtcLive]]:
        """Refused: scores that are given late need the native search."""
        raise InvalidArgumentError('the device search shows no live prefixes; use the native one (backend="native").')

    def set_extras(self, state: Any, extras: Sequence[Sequence[float]]) -> None:
        """Refused, as `live`."""
        raise InvalidArgumentError('the device search takes no extras; use the native one (backend="native").')

    def results(self, state: Any, n_best: int = 1) -> list[CtcResult]:
        return self._results(state, n_best, ended=False)

    def end(self, state: Any, n_best: int = 1) -> list[CtcResult]:
        return self._results(state, n_best, ended=True)

    @torch.no_grad()
    def _results(self, state: DeviceCtcState, n_best: int, ended: bool) -> list[CtcResult]:
        count = integer("n_best", n_best, 1, LARGEST_INTEGER)
        scores_end = self.language is not None and self.language.score_boundary
        found = hypotheses_of(state.beam, state.trails, self.rules, self.alphabet, count, ended, scores_end)
        messages = state.errors.messages()
        answers = [(message, [] if message else own) for message, own in zip(messages, found, strict=True)]
        return results_of(answers, state.num_frames)


class CapturedFrame:
    """`advance` as a CUDA graph on tensors of its own: what comes in is copied there, what comes out lies there.

    Args:
        beam, frame: of the shapes to come.
    """

    def __init__(self, beam: Beam, frame: Frame, rules: DeviceRules) -> None:
        self._beam = Beam.of([tensor.clone() for tensor in beam.tensors()])
        self._frame = Frame(*(getattr(frame, name).clone() for name in FRAME_FIELDS))
        aside = torch.cuda.Stream(rules.device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(rules.device))
        with torch.cuda.stream(aside):  # what is set up on first use must not be captured
            for _ in range(2):
                self._trail = advance(self._beam, self._frame, rules)[1]
        torch.cuda.current_stream(rules.device).wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            after, self._trail = advance(self._beam, self._frame, rules)
            for kept, new in zip(self._beam.tensors(), after.tensors(), strict=True):
                kept.copy_(new)

    def load(self, beam: Beam) -> None:
        for kept, new in zip(self._beam.tensors(), beam.tensors(), strict=True):
            kept.copy_(new)

    def beam_copy(self) -> Beam:
        return Beam.of([tensor.clone() for tensor in self._beam.tensors()])

    def replay(self, frame: Frame) -> Trail:
        """One frame on; the trail is overwritten by the next."""
        for name in FRAME_FIELDS:
            getattr(self._frame, name).copy_(getattr(frame, name))
        self._graph.replay()
        return self._trail
