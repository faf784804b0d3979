"""What a CTC search gives back, and the border checks that it shares with its twin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shallowfusion.checks import integer_array
from shallowfusion.config import require
from shallowfusion.errors import AcousticScoresError, InvalidArgumentError

__all__ = ["CtcHypothesis", "CtcLive", "CtcResult", "Frames", "frames_of", "start_states_of"]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CtcHypothesis:
    """One text of an utterance.

    Where several alignments give the text, times are those of the best one that the beam held all along (Viterbi).

    Args:
        text: words with one space between, or the labels side by side.
        label_ids: int32 [labels], without blanks and repeats.
        label_frames: int32 [labels, 2], the first frame of each label and the one after its last.
        word_frames: int32 [words, 2], likewise; a text without words is one word.
        total: what hypotheses are ranked by: acoustic log-prob, weighted language log-prob and bonuses; nats.
        parts: unweighted log-probs: "asr", and "lm" if there is a language model; nats.
        lm_state: of the language model after the last word, before the end of the sentence.
        extra: what `set_extras` gave the text, in `total`; nats.
    """

    text: str
    label_ids: Int32Array
    label_frames: Int32Array
    word_frames: Int32Array
    total: float
    parts: Mapping[str, float]
    lm_state: int
    extra: float = 0.0

    @property
    def words(self) -> list[tuple[str, tuple[int, int]]]:
        """Each word with its frames."""
        words = self.text.split(" ") if len(self.word_frames) != 1 else [self.text]
        return [(word, (start, end)) for word, (start, end) in zip(words, self.word_frames.tolist(), strict=False)]


@dataclass(frozen=True)
class CtcLive:
    """A prefix in the beam.

    Args:
        text: so far, as `CtcHypothesis.text`.
        is_open: a word is being spelled.
        extra: nats that `set_extras` gave it, or the prefix it comes from.
    """

    text: str
    is_open: bool
    extra: float


@dataclass(frozen=True)
class CtcResult:
    """The hypotheses of one utterance, best first; none if it failed.

    Args:
        error: why the utterance could not be decoded, naming it; None if it was.
    """

    hypotheses: tuple[CtcHypothesis, ...]
    error: AcousticScoresError | None = None

    @property
    def best(self) -> CtcHypothesis:
        """The first hypothesis.

        Raises:
            AcousticScoresError: the utterance failed.
        """
        if self.error is not None:
            raise self.error
        return self.hypotheses[0]


@dataclass(frozen=True, eq=False)
class Frames:
    """Checked scores: float32 or float16 [utterances, frames, labels] of any strides, counts int64 [utterances]."""

    log_probs: npt.NDArray[Any]
    counts: Int64Array


def frames_of(log_probs: object, counts: object, num_utterances: int | None, num_labels: int) -> Frames:
    """Check the scores of one step.

    Args:
        log_probs: numpy array or torch tensor [utterances, frames, labels]; other floats, and whole numbers, become
            float32.
        counts: frames of each utterance, None = all.

    Raises:
        InvalidArgumentError: no array of real numbers, or another shape.
    """
    if isinstance(log_probs, torch.Tensor):
        tensor = log_probs.detach().cpu()
        log_probs = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    try:
        array = np.asarray(log_probs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidArgumentError(f"log_probs must be an array, got {type(log_probs).__name__}: {error}.") from None
    require(array.dtype.kind in "fiu", f"log_probs must hold real numbers, got dtype {array.dtype}.")
    if array.dtype not in (np.dtype("float32"), np.dtype("float16")):
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    require(
        array.ndim == 3 and num_utterances in (None, array.shape[0]),
        f"log_probs must have shape [{'any' if num_utterances is None else num_utterances}, frames, {num_labels}], "
        f"got {list(array.shape)}.",
    )
    require(
        array.shape[2] == num_labels,
        f"log_probs has {array.shape[2]} labels, the alphabet {num_labels}; "
        "give the labels of the model that made the scores.",
    )
    if counts is None:
        return Frames(array, np.full(array.shape[0], array.shape[1], dtype=np.int64))
    if isinstance(counts, torch.Tensor):
        counts = counts.cpu().numpy()
    numbers = integer_array("lengths", counts, (array.shape[0],))
    for utterance, count in enumerate(numbers.tolist()):
        require(
            0 <= count <= array.shape[1],
            f"lengths[{utterance}] must be from 0 to {array.shape[1]} frames, got {count}.",
        )
    return Frames(array, numbers)


def start_states_of(given: Sequence[int] | None, num_utterances: int, default: int) -> list[int]:
    """One language state per utterance, `default` where none is given.

    Raises:
        InvalidArgumentError: not one per utterance, or no states.
    """
    if given is None:
        return [default] * num_utterances
    states: list[int] = integer_array("start_states", given, (num_utterances,)).tolist()
    require(all(0 <= state < 2**32 for state in states), f"start_states must be states of the table, got {states}.")
    return states


def results_of(answers: Sequence[tuple[str, Sequence[CtcHypothesis]]], frame_counts: Sequence[int]) -> list[CtcResult]:
    """Results with errors that name the utterance."""
    results = []
    for utterance, ((error, hypotheses), frames) in enumerate(zip(answers, frame_counts, strict=True)):
        reason = error or ("it has no frames; give at least one." if frames == 0 else "")
        if reason:
            results.append(CtcResult((), AcousticScoresError(f"utterance {utterance} was not decoded: {reason}")))
        else:
            results.append(CtcResult(tuple(hypotheses)))
    return results


def extras_of(given: object) -> list[list[float]]:
    """Lists of finite numbers.

    Raises:
        InvalidArgumentError: anything else.
    """
    try:
        extras = [[float(value) for value in own] for own in given]  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"extras must be a list of numbers per utterance: {error}.") from None
    require(all(np.isfinite(value) for own in extras for value in own), "extras must be finite.")
    return extras
