"""Joint CTC-attention decoding: whose CTC scores a search hears, those of the model's own head or of another model."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shallowfusion.config import require
from shallowfusion.ctc.label_spelling import LabelSpelling, LetterSpelling, PieceSpelling, TokenSpelling, WithoutLabel
from shallowfusion.ctc.models import CtcModel
from shallowfusion.ctc.prefix_scorer import CTCPrefixScorer, token_labels
from shallowfusion.ctc.prefix_scores import PrefixScores, prefix_bytes
from shallowfusion.ctc.settings import CtcAlphabet
from shallowfusion.ctc.spelled_scorer import SpelledPrefixScorer
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.options import DecodingOptions
from shallowfusion.scorers.ctc_head import CtcHead
from shallowfusion.scorers.footprint import Demand
from shallowfusion.scorers.loading import AcousticModel
from shallowfusion.search.candidates import WIDENING, CandidateScorer
from shallowfusion.search.loop import SearchPlan
from shallowfusion.text.vocabulary import Vocabulary

__all__ = ["CtcFrames", "JointCtc", "check_heard", "check_rate", "heard_by", "joint_demand", "joint_scorers"]

logger = logging.getLogger(__name__)

SHORTEST_SECONDS = 0.1  # models need a few frames; shorter recordings are filled up with silence


@dataclass(frozen=True, eq=False)
class CtcFrames:
    """What a CTC model heard of a batch.

    Args:
        log_probs: float [utterances, frames, labels], nats, array or tensor.
        lengths: frames of each utterance, None = all.
    """

    log_probs: Any
    lengths: Any = None

    @property
    def nbytes(self) -> int:
        return int(self.log_probs.nbytes)

    def at(self, places: Sequence[int]) -> CtcFrames:
        """Those of some of the utterances."""
        chosen = list(places)
        return CtcFrames(self.log_probs[chosen], None if self.lengths is None else np.asarray(self.lengths)[chosen])

    def each(self) -> list[CtcFrames]:
        """Those of every utterance by itself, copied to the CPU as float32, without what follows its frames."""
        values = _float_array(self.log_probs)
        counts = [values.shape[1]] * len(values) if self.lengths is None else np.asarray(self.lengths).tolist()
        return [
            CtcFrames(values[i : i + 1, :count].copy(), np.array([count], dtype=np.int64))
            for i, count in enumerate(counts)
        ]

    @staticmethod
    def together(alone: Sequence[CtcFrames]) -> CtcFrames:
        """One batch of what `each` made."""
        counts = np.concatenate([own.lengths for own in alone])
        values = np.zeros((len(alone), int(counts.max()), alone[0].log_probs.shape[2]), dtype=np.float32)
        for place, own in enumerate(alone):
            values[place, : counts[place]] = own.log_probs[0]
        return CtcFrames(values, counts)


class JointCtc:
    """A CTC model beside an attention decoder: it hears the same recordings and scores the same texts in its labels.

    Where each text token of the decoder is a label, and no label parts words, tokens are their labels. Else they are
    spelled: in characters one by one (`LetterSpelling`), or in pieces once a word is complete (`PieceSpelling`).

    Args:
        model: hears recordings at the rate of the acoustic model.
        acoustic: whose tokens the search says.
        without_label: what CTC says of letters and digits that it has no label for: "neutral" adds nothing, so that
            it misses what it heard in their place; "forbid" calls tokens that hold one impossible.

    Raises:
        InvalidArgumentError: the models hear at different rates.
        VocabularyError: the tokens cannot be spelled in the labels.
    """

    def __init__(self, model: CtcModel, acoustic: AcousticModel, without_label: WithoutLabel = "neutral") -> None:
        check_rate(model, acoustic)
        self.model = model
        self._vocabulary: Vocabulary = acoustic.scorer.vocabulary
        self.spelling = _spelling(self._vocabulary, model, without_label)
        self._window_seconds = float(acoustic.features.chunk_seconds)
        self._has_warned = False

    def frames(self, samples: Sequence[Tensor]) -> CtcFrames:
        """What the model hears in recordings, float [samples] each, at `model.sampling_rate`."""
        return heard_by(self.model, samples)

    def scorer(self, frames: CtcFrames, utterances: int, weight: float) -> CandidateScorer:
        """A scorer for one search; an utterance of which the model said NaN is impossible, and flagged.

        Raises:
            InvalidArgumentError: frames of another number of utterances, or of other labels.
        """
        self.check_frames(frames, utterances)
        values = _float_array(frames.log_probs).copy()
        is_nan: npt.NDArray[np.bool_] = np.isnan(values)
        broken = _within(is_nan, frames.lengths)
        values[is_nan] = -np.inf
        scores = PrefixScores(values, frames.lengths, blank=self.model.blank, delimiter=self.spelling.delimiter)
        return SpelledPrefixScorer(scores, self.spelling, self._vocabulary.end_id, weight, broken)

    def check_frames(self, frames: CtcFrames, utterances: int) -> None:
        """Refuse frames of another number of utterances, or of other labels."""
        shape = list(getattr(frames.log_probs, "shape", ()))
        require(
            len(shape) == 3 and shape[0] == utterances and shape[2] == len(self.model.labels),
            f"CTC frames must be log-probs [utterances, frames, labels] of {utterances} utterances and the "
            f"{len(self.model.labels)} labels of {self.model.name}, got {shape}.",
        )

    @cached_property
    def _longest_spelling(self) -> int:
        """Labels that a token may add; where words are cut in pieces, of words of no more letters than that."""
        if isinstance(self.spelling, TokenSpelling):
            return 1
        texts = (token.decode("utf-8", "ignore") for token in self._vocabulary.tokens if token)
        return 2 + max(sum(map(str.isalnum, text)) for text in texts)

    def demand(self, beam_size: int, num_candidates: int) -> Demand:
        """What the prefix scores of one utterance may come to need, if it fills the acoustic model's window.

        Args:
            num_candidates: that are looked at in a step.
        """
        frames = int(np.ceil(self._window_seconds / self.model.frame_seconds)) + 1
        rows = 2 * beam_size + num_candidates * (self._longest_spelling - 1)
        return Demand(0, 0, prefix_bytes(frames, len(self.model.labels), rows))

    def remark_unheard(self) -> None:
        """Say once that the model was loaded for nothing."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the CTC model %s is loaded but not heard, for ctc_weight is 0; give ctc_weight, for instance 0.3.",
                self.model.name,
            )


def heard_by(model: CtcModel, samples: Sequence[Tensor]) -> CtcFrames:
    """What a CTC model hears in recordings, float [samples] each; very short ones are filled up with silence."""
    shortest = round(SHORTEST_SECONDS * model.sampling_rate)
    filled = [torch.nn.functional.pad(own, (0, max(0, shortest - len(own)))) for own in samples]
    return CtcFrames(*model.log_probs(filled))


def check_rate(model: CtcModel, acoustic: AcousticModel) -> None:
    """Refuse a CTC model that cannot hear what the acoustic model hears."""
    rate = acoustic.features.sampling_rate
    require(
        model.sampling_rate == rate,
        f"{model.name} hears {model.sampling_rate} samples per second and {acoustic.name} {rate}, so they cannot "
        f"hear the same recording; wanted a CTC model at {rate}.",
    )


def joint_demand(
    acoustic: AcousticModel, options: DecodingOptions, plan: SearchPlan, joint: JointCtc | None
) -> dict[Hashable, Demand]:
    """What CTC scores of one utterance may come to need beside the models' keys and values, by who heard it.

    Raises:
        InvalidArgumentError: as `joint_scorers`, whatever was heard.
    """
    if options.ctc_weight == 0:
        return {}
    _check_joint(acoustic, options, plan, joint)
    if joint is not None:
        return {joint.model: joint.demand(options.beam_size, WIDENING * plan.settings.num_candidates)}
    head, frames = acoustic.ctc_head, acoustic.scorer.model.config.max_source_positions
    assert head is not None
    return {head: Demand(0, 0, prefix_bytes(frames, len(head.labels), 2 * options.beam_size))}


def joint_scorers(
    acoustic: AcousticModel,
    encoder_output: Tensor,
    options: DecodingOptions,
    plan: SearchPlan,
    seconds: Sequence[float] | None,
    joint: JointCtc | None = None,
    frames: CtcFrames | None = None,
) -> list[CandidateScorer]:
    """The CTC scorer of one batch, which looks at survivors only; none if `options.ctc_weight` is 0.

    Args:
        seconds: of each recording; later frames of the model's own head are left out. None = all frames count.
        joint: the CTC model to hear in place of the acoustic model's own head.
        frames: what it heard.

    Raises:
        InvalidArgumentError: there is no CTC head or model, it heard nothing, or the rule leaves the attention decoder
            no weight of its own.
    """
    if options.ctc_weight == 0:
        if joint is not None:
            joint.remark_unheard()
        return []
    _check_joint(acoustic, options, plan, joint)
    if joint is not None:
        check_heard(joint, options, frames)
        assert frames is not None
        return [joint.scorer(frames, len(encoder_output), options.ctc_weight)]
    head = acoustic.ctc_head
    assert head is not None
    labels = token_labels(acoustic.scorer.vocabulary, head.label_tokens)
    return [CTCPrefixScorer(_prefix_scores(head, encoder_output, seconds), labels, options.ctc_weight)]


def check_heard(joint: JointCtc | None, options: DecodingOptions, frames: CtcFrames | None) -> None:
    """Refuse a search that wants a CTC model's word on what it has not heard."""
    if joint is not None and options.ctc_weight and frames is None:
        raise InvalidArgumentError(
            f"ctc_weight={options.ctc_weight} asks the CTC model {joint.model.name}, which hears recordings, and got "
            "features or encoder output; give the recording (transcribe, or submit of a session), or what the model "
            "heard of it beside them: ctc_frames=decoder.ctc.frames([samples])."
        )


def _check_joint(acoustic: AcousticModel, options: DecodingOptions, plan: SearchPlan, joint: JointCtc | None) -> None:
    require(
        joint is not None or acoustic.ctc_head is not None,
        f"ctc_weight={options.ctc_weight} needs a CTC head, which {acoustic.name} does not have "
        "(ctc_head.json and ctc_head.safetensors beside the model), or a CTC model; load one with ctc=..., or use "
        "ctc_weight=0.",
    )
    require(
        plan.rule.mixture is None and plan.normalize == "none",
        f"ctc_weight goes with rules that add log-probs as they are, not with {plan.rule}, normalize={plan.normalize!r}"
        "; use static or piecewise weights and end_policy 'neutral', 'lm' or 'asr_only'.",
    )


def _prefix_scores(head: CtcHead, encoder_output: Tensor, seconds: Sequence[float] | None) -> PrefixScores:
    log_probs = head.log_probs(encoder_output).cpu().numpy()
    # A recording whose encoder failed: the fused step flags it by the decoder's NaN, and has no candidates for it.
    log_probs[np.isnan(log_probs)] = -np.inf
    limit = log_probs.shape[1]
    lengths = None if seconds is None else [head.num_frames(own, limit) for own in seconds]
    return PrefixScores(log_probs, lengths, blank=head.blank)


def _float_array(values: Any) -> npt.NDArray[np.float32]:
    array = values.float().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    return array.astype(np.float32, copy=False)


def _within(values: npt.NDArray[np.bool_], lengths: Any) -> npt.NDArray[np.bool_]:
    """Whether something holds anywhere in the frames that count, bool [utterances]."""
    counts = np.full(len(values), values.shape[1]) if lengths is None else np.asarray(lengths)
    return np.array([bool(own[:count].any()) for own, count in zip(values, counts.tolist(), strict=True)])


def _same_labels(vocabulary: Vocabulary, model: CtcModel) -> npt.NDArray[np.int64] | None:
    """The token of each label, where every text token is the text of a label; None where one is not."""
    if model.delimiter is not None or model.word_start is not None:
        return None
    unsaid = {model.blank, *model.silenced}
    texts = {text.encode(): label for label, text in enumerate(model.labels) if label not in unsaid}
    tokens = np.full(len(model.labels), -1, dtype=np.int64)
    for number, token in enumerate(vocabulary.tokens):
        if token and number != vocabulary.end_id:
            if token not in texts or tokens[texts[token]] >= 0:
                return None
            tokens[texts[token]] = number
    return tokens


def _spelling(vocabulary: Vocabulary, model: CtcModel, without_label: WithoutLabel) -> LabelSpelling:
    same = _same_labels(vocabulary, model)
    if same is not None:
        return TokenSpelling(token_labels(vocabulary, same).tolist())
    alphabet = CtcAlphabet(model.labels, model.blank, model.delimiter, model.word_start)
    if model.word_start is not None:
        return PieceSpelling(vocabulary, alphabet, model.tokenizer, model.silenced, without_label)
    return LetterSpelling(vocabulary, alphabet, model.silenced, without_label)
