"""Joint CTC-attention decoding: the CTC head scores what survives the fused step of the attention decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from shallowfusion.config import require
from shallowfusion.ctc.prefix_scores import END, NOTHING, PrefixScores, PrefixScoresProtocol
from shallowfusion.options import DecodingOptions
from shallowfusion.scorers.ctc_head import CtcHead
from shallowfusion.scorers.loading import AcousticModel
from shallowfusion.search.candidates import CandidateScorer
from shallowfusion.search.loop import SearchPlan
from shallowfusion.text.vocabulary import Vocabulary

__all__ = ["CTCPrefixScorer", "joint_scorers", "token_labels"]

UNSAYABLE = -3  # a token that is text, but no label of the CTC head

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]


class CTCPrefixScorer:
    """A `CandidateScorer`: log psi(text + token) - log psi(text) of each candidate, as `PrefixScoresProtocol` says.

    Under its weight w an increment is (1 - w) * attention + w * CTC + language models (METHODS 1.8); the share of the
    attention decoder is `SearchPlan.acoustic_weight`. Along a finished text the parts sum to its CTC log-prob.

    Price: as of the prefix scores; no model runs after the encoder.

    Args:
        scores: fresh, of the batch that is searched.
        labels: int64 [vocab] from `token_labels`.
        weight: of the increments.
    """

    name = "ctc"

    def __init__(self, scores: PrefixScoresProtocol, labels: Int64Array, weight: float) -> None:
        self.scores = scores
        self.labels = labels
        self.weight = weight

    def increments(self, lanes: Int64Array, tokens: Int64Array) -> Float64Array:
        labels = np.where((tokens >= 0) & (lanes >= 0), self.labels[tokens], NOTHING)
        found = self.scores.scores(lanes, np.where(labels == UNSAYABLE, NOTHING, labels))
        return np.where(labels == UNSAYABLE, -np.inf, found)

    def follow(self, parents: Int64Array, tokens: Int64Array) -> None:
        labels = self.labels[tokens]
        self.scores.follow(parents, np.where(labels == UNSAYABLE, END, labels))

    def keep(self, order: Sequence[int]) -> None:
        self.scores.keep(order)


def token_labels(
    vocabulary: Vocabulary, label_tokens: Int64Array, without_label: Literal["forbid", "neutral"] = "forbid"
) -> Int64Array:
    """The CTC label of each acoustic token, int64 [vocab]; the end token ends, special tokens are neutral.

    Args:
        label_tokens: int64 [labels], the token of each label, -1 = none.
        without_label: what CTC says of text tokens that are no label: "forbid" calls them impossible, "neutral" gives
            them 0 nats and leaves the prefix as it is.
    """
    require(
        without_label in ("forbid", "neutral"),
        f"without_label must be 'forbid' or 'neutral', got {without_label!r}.",
    )
    unknown = UNSAYABLE if without_label == "forbid" else NOTHING
    labels = np.array([NOTHING if token is None else unknown for token in vocabulary.tokens], dtype=np.int64)
    has_token = np.flatnonzero(label_tokens >= 0)
    labels[label_tokens[has_token]] = has_token
    labels[vocabulary.end_id] = END
    return labels


def joint_scorers(
    acoustic: AcousticModel,
    encoder_output: Tensor,
    options: DecodingOptions,
    plan: SearchPlan,
    seconds: Sequence[float] | None,
) -> list[CandidateScorer]:
    """The scorers of one batch that look at survivors only: the CTC head's if `options.ctc_weight` is not 0.

    Args:
        seconds: of each recording; later frames are left out. None = all frames count.

    Raises:
        InvalidArgumentError: the model has no CTC head, or the rule leaves the attention decoder no weight of its own.
    """
    if options.ctc_weight == 0:
        return []
    head = acoustic.ctc_head
    require(
        head is not None,
        f"ctc_weight={options.ctc_weight} needs a CTC head, which {acoustic.name} does not have "
        "(ctc_head.json and ctc_head.safetensors beside the model); use ctc_weight=0.",
    )
    assert head is not None
    require(
        plan.rule.mixture is None and plan.normalize == "none",
        f"ctc_weight goes with rules that add log-probs as they are, not with {plan.rule}, normalize={plan.normalize!r}"
        "; use static or piecewise weights and end_policy 'neutral', 'lm' or 'asr_only'.",
    )
    labels = token_labels(acoustic.scorer.vocabulary, head.label_tokens)
    return [CTCPrefixScorer(_prefix_scores(head, encoder_output, seconds), labels, options.ctc_weight)]


def _prefix_scores(head: CtcHead, encoder_output: Tensor, seconds: Sequence[float] | None) -> PrefixScores:
    log_probs = head.log_probs(encoder_output).cpu().numpy()
    # A recording whose encoder failed: the fused step flags it by the decoder's NaN, and has no candidates for it.
    log_probs[np.isnan(log_probs)] = -np.inf
    limit = log_probs.shape[1]
    lengths = None if seconds is None else [head.num_frames(own, limit) for own in seconds]
    return PrefixScores(log_probs, lengths, blank=head.blank)
