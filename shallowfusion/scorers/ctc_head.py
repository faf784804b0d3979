"""The CTC output of an acoustic model that also has an attention decoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shallowfusion.errors import ModelError

__all__ = ["CtcHead", "load_ctc_head"]

DESCRIPTION, WEIGHTS = "ctc_head.json", "ctc_head.safetensors"


@dataclass(frozen=True, eq=False)
class CtcHead:
    """A linear layer on the encoder's output whose labels are tokens of the attention decoder.

    Args:
        weight: [labels, size]; `bias`: [labels].
        labels: text of each label.
        blank: index of the blank.
        label_tokens: int64 [labels], the acoustic token of each label, -1 = none.
        frame_seconds: length of a frame of the encoder's output.
    """

    weight: Tensor
    bias: Tensor
    labels: tuple[str, ...]
    blank: int
    label_tokens: npt.NDArray[np.int64]
    frame_seconds: float

    @torch.inference_mode()
    def log_probs(self, encoder_output: Tensor) -> Tensor:
        """float32 [utterances, frames, labels] of the encoder's output [utterances, frames, size]."""
        logits = encoder_output.to(self.weight) @ self.weight.T + self.bias
        return torch.log_softmax(logits.float(), dim=-1)

    def num_frames(self, seconds: float, limit: int) -> int:
        """Frames that a recording fills, at most `limit`."""
        return min(limit, int(np.ceil(seconds / self.frame_seconds - 1e-6)))


def load_ctc_head(name: str, encoder_size: int, num_tokens: int, device: torch.device) -> CtcHead | None:
    """The head beside a model in a local directory, in float32; None where there is none.

    `ctc_head.json` names the labels, the index of the blank, the seconds of a frame and the token of each label
    (null = none; the blank may be left out if it is last); `ctc_head.safetensors` holds `weight` and `bias`.

    Raises:
        ModelError: only one of the files is there, or they fit neither each other nor the model.
    """
    directory = Path(name)
    described, stored = (directory / DESCRIPTION).is_file(), (directory / WEIGHTS).is_file()
    if not described and not stored:
        return None
    if not (described and stored):
        raise ModelError(f"{name} holds only one of {DESCRIPTION} and {WEIGHTS}; a CTC head needs both.")
    from safetensors.torch import load_file

    weights = load_file(str(directory / WEIGHTS))
    try:
        description = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
        return _head(name, description, weights, (encoder_size, num_tokens), device)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"{directory / DESCRIPTION} describes no CTC head of this model ({reason}).") from error


def _head(
    name: str,
    description: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    sizes: tuple[int, int],
    device: torch.device,
) -> CtcHead:
    encoder_size, num_tokens = sizes
    labels, blank = tuple(map(str, description["labels"])), int(description["blank_id"])
    tokens = [-1 if token is None else int(token) for token in description["label_token_ids"]]
    if len(tokens) == len(labels) - 1 and blank == len(labels) - 1:
        tokens.append(-1)
    named = [token for token in tokens if token >= 0]
    seconds = float(description["frame_seconds"])
    fits = (
        tuple(weights["weight"].shape) == (len(labels), encoder_size)
        and tuple(weights["bias"].shape) == (len(labels),)
        and 0 <= blank < len(labels) == len(tokens)
        and len(set(named)) == len(named)
        and all(token < num_tokens for token in tokens)
        and seconds > 0
    )
    if not fits:
        raise ModelError(
            f"the CTC head of {name} does not fit: weight {list(weights['weight'].shape)}, {len(labels)} labels, blank "
            f"{blank}, {len(named)} tokens, frames of {seconds} s; wanted weight [labels, {encoder_size}], a token "
            f"below {num_tokens} or null for each label, none twice."
        )
    tokens[blank] = -1
    weight, bias = (weights[key].to(device, torch.float32) for key in ("weight", "bias"))
    return CtcHead(weight, bias, labels, blank, np.array(tokens, dtype=np.int64), seconds)
