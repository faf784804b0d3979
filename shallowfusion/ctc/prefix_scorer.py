"""Joint CTC-attention decoding: the CTC head scores what survives the fused step of the attention decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from shallowfusion.config import require
from shallowfusion.ctc.label_spelling import UNSAYABLE
from shallowfusion.ctc.prefix_scores import END, NOTHING, PrefixScoresProtocol
from shallowfusion.text.vocabulary import Vocabulary

__all__ = ["CTCPrefixScorer", "token_labels"]

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
