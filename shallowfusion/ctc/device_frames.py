"""Scores on the way into the device search: checked, pruned, sorted, frames that are blank alone joined."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shallowfusion.ctc.search_reference import LARGEST_LOG_PROB, LARGEST_SUM
from shallowfusion.ctc.settings import CtcOptions

__all__ = ["FrameBlock", "FrameErrors", "blocks_of", "note_losses"]

BLOCK_VALUES = 2**25  # scores looked at together
NOT_BELOW_ZERO, IMPOSSIBLE_FRAME, BLANK_FIRST_SUM, NOTHING_LEFT = 1, 2, 3, 4  # kinds of errors
IMPOSSIBLE = -math.inf


@dataclass
class FrameErrors:
    """Why utterances fail, on the device; kind 0 = they do not.

    Args:
        kind, frame, label: int64 [utterances].
        value: float64 [utterances].
    """

    kind: Tensor
    frame: Tensor
    label: Tensor
    value: Tensor

    @classmethod
    def none(cls, num_utterances: int, device: torch.device) -> FrameErrors:
        zeros = torch.zeros(num_utterances, dtype=torch.int64, device=device)
        return cls(zeros, zeros.clone(), zeros.clone(), zeros.double())

    def messages(self) -> list[str]:
        """What is wrong with each utterance, in the words of the other searches; synchronises."""
        columns = zip(self.kind.tolist(), self.frame.tolist(), self.label.tolist(), self.value.tolist(), strict=True)
        return [_message(*column) for column in columns]


def _message(kind: int, frame: int, label: int, value: float) -> str:
    if kind == NOT_BELOW_ZERO and math.isnan(value):
        return f"frame {frame}, label {label} is NaN; the acoustic model overflowed or was given bad audio."
    if kind == NOT_BELOW_ZERO:
        cure = "but log-probabilities are at most 0; pass log_softmax(logits)."
        return f"frame {frame}, label {label} is {value:g}, {cure}"
    if kind == IMPOSSIBLE_FRAME:
        return f"frame {frame} makes every label impossible (-inf); check the acoustic model."
    if kind == BLANK_FIRST_SUM:
        return f"the probabilities of frame 0 sum to {value:g}, wanted at most 1; pass log_softmax(logits)."
    if kind == NOTHING_LEFT:
        return f"no hypothesis survived frame {frame}; prune less (token_min_log_prob, top_labels)."
    return ""


@dataclass(frozen=True, eq=False)
class FrameBlock:
    """Frames ready for the search, time first.

    Args:
        log_probs: float32 [frames, utterances, labels], -inf where pruned.
        labels: int64 [frames, utterances, looked_at], the best labels, ties to the lower one.
        values: float64 [frames, utterances, looked_at], their log-probs, -inf where pruned and for the blank.
        blank: float64 [frames, utterances], of the blank; the sum over frames that were joined.
        numbers: int64 [frames, utterances], frame of the utterance, -1 = past its end.
    """

    log_probs: Tensor
    labels: Tensor
    values: Tensor
    blank: Tensor
    numbers: Tensor

    def __len__(self) -> int:
        return len(self.numbers)


def blocks_of(
    log_probs: Tensor, lengths: Tensor, frames: Tensor, errors: FrameErrors, options: CtcOptions, blank: int,
    looked_at: int,
) -> Iterator[FrameBlock]:  # fmt: skip
    """Cut the scores of a step into blocks.

    Runs of frames that `blank_skip` makes blank alone become one frame: nothing but the blank's sum is left of them.
    That takes one synchronisation a block, to know how many frames are left of it.

    Args:
        log_probs: [utterances, frames, labels] on the device.
        lengths: int64 [utterances], on the device.
        frames: int64 [utterances], frames each utterance has seen; advanced as blocks are taken.
        errors: filled in as blocks are taken; an utterance that failed has no frames from there on.
        looked_at: labels a frame is sorted into.
    """
    num_utterances, num_frames, num_labels = log_probs.shape
    size = max(1, BLOCK_VALUES // max(1, num_utterances * num_labels))
    for first in range(0, num_frames, size):
        scores = log_probs[:, first : first + size].float()
        inside = torch.arange(first, first + scores.shape[1], device=scores.device) < lengths[:, None]
        inside &= (errors.kind == 0)[:, None]
        inside = _checked(scores, inside, frames, errors)
        numbers = torch.where(inside, frames[:, None] + inside.long().cumsum(1) - 1, -1)
        frames += inside.sum(1)
        yield _block(scores, numbers, options, blank, looked_at)


def _checked(scores: Tensor, inside: Tensor, frames: Tensor, errors: FrameErrors) -> Tensor:
    """Frames before the first bad one; writes what is bad about it."""
    too_high = ~(scores <= LARGEST_LOG_PROB)  # NaN too
    sums = torch.where(frames == 0, scores[:, 0].double().exp().sum(1), 0.0)
    kinds = torch.where(too_high.any(2), NOT_BELOW_ZERO, 0)
    kinds = torch.where((kinds == 0) & (scores.amax(2) == IMPOSSIBLE), IMPOSSIBLE_FRAME, kinds)
    kinds[:, 0] = torch.where((kinds[:, 0] == 0) & (sums > LARGEST_SUM), BLANK_FIRST_SUM, kinds[:, 0])
    kinds = torch.where(inside, kinds, 0)
    is_bad = kinds > 0
    first = is_bad.long().argmax(1, keepdim=True)
    kind = kinds.gather(1, first)[:, 0]
    row = torch.arange(len(scores), device=scores.device)
    label = too_high[row, first[:, 0]].long().argmax(1)
    value = torch.where(kind == BLANK_FIRST_SUM, sums, scores[row, first[:, 0], label].double())
    fails = kind > 0
    for kept, found in (
        (errors.kind, kind), (errors.frame, frames + first[:, 0]), (errors.label, label), (errors.value, value)
    ):  # fmt: skip
        kept.copy_(torch.where(fails, found, kept))
    return inside & (is_bad.long().cumsum(1) == 0)


def _keys(scores: Tensor) -> Tensor:
    """Integers that sort like the scores, equal scores by falling label: int64 [..., labels], all different."""
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0: -0.0 and 0.0 are one number
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    num_labels = scores.shape[-1]
    return ordered * 2**32 + (num_labels - 1 - torch.arange(num_labels, device=scores.device))


def _block(scores: Tensor, numbers: Tensor, options: CtcOptions, blank: int, looked_at: int) -> FrameBlock:
    num_labels = scores.shape[2]
    keys = _keys(scores)
    top = min(num_labels, looked_at)
    best = keys.topk(top, dim=2).values
    pruned = scores
    if options.top_labels is not None and options.top_labels < num_labels:
        lowest = best[..., options.top_labels - 1, None] if options.top_labels <= top else keys.topk(
            options.top_labels, dim=2
        ).values[..., -1, None]  # fmt: skip
        pruned = pruned.masked_fill(keys < lowest, IMPOSSIBLE)
    if options.token_min_log_prob is not None:
        is_low = (scores.double() < options.token_min_log_prob) & (keys < best[..., :1])
        pruned = pruned.masked_fill(is_low, IMPOSSIBLE)
    if options.blank_skip is not None:
        is_skipped = scores[..., blank].double() >= math.log(options.blank_skip)
        others = torch.arange(num_labels, device=scores.device) != blank
        is_out = is_skipped[..., None] & others
        pruned = torch.where(is_skipped[..., None], scores, pruned).masked_fill(is_out, IMPOSSIBLE)
    labels = num_labels - 1 - (best & 0xFFFFFFFF)
    values = pruned.gather(2, labels).double().masked_fill(labels == blank, IMPOSSIBLE)
    blanks = pruned[..., blank].double()
    if options.blank_skip is None:
        parts = (pruned, labels, values, blanks, numbers)
    else:
        parts = _joined(pruned, labels, values, blanks, numbers, is_skipped & (numbers >= 0))
    return FrameBlock(*(part.transpose(0, 1).contiguous() for part in parts))


def _joined(
    log_probs: Tensor, labels: Tensor, values: Tensor, blanks: Tensor, numbers: Tensor, is_skipped: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Each run of skipped frames as its first one, with the sum of their blanks; later frames move up."""
    num_utterances, num_frames = numbers.shape
    is_kept = numbers >= 0
    is_kept[:, 1:] &= ~(is_skipped[:, 1:] & is_skipped[:, :-1])
    places = is_kept.long().cumsum(1) - 1
    left = max(1, int(is_kept.sum(1).max())) if num_utterances > 0 else 1  # synchronises
    past = torch.full_like(places, num_frames)
    wide = torch.zeros(num_utterances, num_frames + 1, dtype=blanks.dtype, device=blanks.device)
    sums = wide.scatter_add(1, torch.where(numbers >= 0, places, past), blanks)[:, :left]
    frames = torch.arange(num_frames, device=places.device).expand_as(places)
    source = torch.zeros_like(wide, dtype=torch.int64)
    source = source.scatter(1, torch.where(is_kept, places, past), frames)[:, :left]
    inside = torch.arange(left, device=places.device) < is_kept.sum(1, keepdim=True)
    row = torch.arange(num_utterances, device=places.device)[:, None]
    own_numbers = torch.where(inside, numbers[row, source], -1)
    return log_probs[row, source], labels[row, source], values[row, source], sums, own_numbers


def note_losses(last: Tensor, numbers: Tensor, frames: Tensor, errors: FrameErrors) -> None:
    """Record utterances that lost their last prefix; whatever came later in them no longer counts.

    Args:
        last: integers [frames, utterances, beam_size], -2 = a place without a prefix.
        numbers: int64 [frames, utterances], as in `FrameBlock`.
    """
    is_lost = (last == -2).all(2) & (numbers >= 0)
    first = is_lost.long().argmax(0, keepdim=True)
    number = numbers.gather(0, first)[0]
    fails = is_lost.any(0)
    errors.kind.masked_fill_(fails, NOTHING_LEFT)
    errors.frame.copy_(torch.where(fails, number, errors.frame))
    frames.copy_(torch.where(fails, number + 1, frames))
