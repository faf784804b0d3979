"""The rules of timestamps in a device-driven search: rows remembered and masks written where they do not move."""

from __future__ import annotations

import torch
from torch import Tensor

from shallowfusion.search.timestamps import TimestampRows, TimestampRules, allowed_words
from shallowfusion.values import StepRequest

__all__ = ["DeviceTimestamps"]

IMPOSSIBLE = float("-inf")


class DeviceTimestamps:
    """What a device-driven step does for timestamps: `limit` before the fused step, `follow` after the beams.

    Neither waits for the device; a CUDA graph may hold both. Price: two passes over the acoustic logits per step, and
    two copies of them in float32, one of which holds what each place forbids.

    Args:
        request: of the fused step, with memory for the mask.
        parents, tokens: int64 [places, beam_size], where the beams leave the live lanes.
        place_masks: int32 [places, words], what each may say for all that timestamps mind.
        end_id: where the step has limited the end in the mask before; None = it has not.
    """

    def __init__(
        self,
        rules: TimestampRules,
        request: StepRequest,
        parents: Tensor,
        tokens: Tensor,
        place_masks: Tensor,
        end_id: int | None,
    ) -> None:
        self.rules, self._request, self._end_id = rules, request, end_id
        self._parents, self._tokens, self._place_masks = parents, tokens, place_masks
        device, (places, lanes) = parents.device, parents.shape
        self.rows = TimestampRows.fresh(places * lanes, device)
        self._first_rows = torch.arange(places, device=device)[:, None] * lanes
        self._bits = torch.arange(32, dtype=torch.int32, device=device)

    def reset(self, places: Tensor) -> None:
        """No row of these places, int64, has said anything."""
        shape = self._parents.shape
        self.rows.kinds.view(shape).index_fill_(0, places, 0)
        self.rows.latest.view(shape).index_fill_(0, places, -1)

    def limit(self) -> None:
        """Write the mask of the coming fused step; of the end's word what was there before holds too."""
        request, mask = self._request, self._request.allowed
        assert mask is not None
        acoustic, temperature = request.sources[0], request.temperatures[0]
        words = allowed_words(self.rules, self.rows, acoustic, self._bias(acoustic.shape[1]), temperature)
        words &= self._by_row(self._place_masks)
        if self._end_id is not None:
            words[:, self._end_id // 32] &= mask[:, self._end_id // 32]
        mask.copy_(words)

    def follow(self) -> None:
        """Remember what the lanes say now."""
        parents = (self._parents + self._first_rows).view(-1)
        rows = self.rows.followed(self.rules, parents, self._tokens.view(-1))
        self.rows.kinds.copy_(rows.kinds)
        self.rows.latest.copy_(rows.latest)

    def _bias(self, vocab: int) -> Tensor:
        """What is forbidden for other reasons than timestamps, as 0 or -inf, float32 [rows, vocab]."""
        bits = (self._place_masks[:, :, None] >> self._bits) & 1
        allowed = bits.flatten(1)[:, :vocab]
        return self._by_row(torch.zeros_like(allowed, dtype=torch.float32).masked_fill(allowed == 0, IMPOSSIBLE))

    def _by_row(self, by_place: Tensor) -> Tensor:
        """What holds for a place, for each of its rows."""
        places, lanes = self._parents.shape
        return by_place[:, None].expand(places, lanes, by_place.shape[1]).flatten(0, 1)
