"""The rules of timestamps in a device-driven search: rows remembered and masks written where they do not move."""

from __future__ import annotations

import torch
from torch import Tensor

from shallowfusion.search.timestamps import TimestampRows, TimestampRules, allowed_words
from shallowfusion.values import StepRequest

__all__ = ["DeviceTimestamps"]


class DeviceTimestamps:
    """What a device-driven step does for timestamps: `limit` before the fused step, `follow` after the beams.

    Neither waits for the device; a CUDA graph may hold both. Price: one pass over the acoustic logits per step, and
    a copy of them in float32.

    Args:
        request: of the fused step, with memory for the mask.
        parents, tokens: int64 [utterances, beam_size], where the beams leave the live lanes.
        end_id: where the step has limited the end in the mask before; None = it has not.
    """

    def __init__(
        self,
        rules: TimestampRules,
        request: StepRequest,
        parents: Tensor,
        tokens: Tensor,
        end_id: int | None,
    ) -> None:
        self.rules, self._request, self._end_id = rules, request, end_id
        self._parents, self._tokens = parents, tokens
        device, (utterances, lanes) = parents.device, parents.shape
        self.rows = TimestampRows.fresh(utterances * lanes, device)
        self._first_rows = torch.arange(utterances, device=device)[:, None] * lanes

    def reset(self) -> None:
        """No row has said anything."""
        self._set(TimestampRows.fresh(self._request.num_rows, self.rows.kinds.device))

    def limit(self) -> None:
        """Write the mask of the coming fused step; of the end's word what was there before holds too."""
        request, mask = self._request, self._request.allowed
        assert mask is not None
        acoustic, temperature = request.sources[0], request.temperatures[0]
        words = allowed_words(self.rules, self.rows, acoustic, request.token_bias, temperature)
        if self._end_id is not None:
            words[:, self._end_id // 32] &= mask[:, self._end_id // 32]
        mask.copy_(words)

    def follow(self) -> None:
        """Remember what the lanes say now."""
        parents = (self._parents + self._first_rows).view(-1)
        self._set(self.rows.followed(self.rules, parents, self._tokens.view(-1)))

    def _set(self, rows: TimestampRows) -> None:
        self.rows.kinds.copy_(rows.kinds)
        self.rows.latest.copy_(rows.latest)
