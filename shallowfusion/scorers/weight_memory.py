"""Where prepared weights lie: side by side in large pieces, which the system keeps in huge pages if it has them."""

from __future__ import annotations

import torch
from torch import Tensor

from shallowfusion import _native

__all__ = ["WeightMemory", "in_huge_pages"]

PIECE = 64 << 20  # bytes; what a last piece does not use is never touched
ALIGNMENT = 64


def in_huge_pages(memory: Tensor) -> Tensor:
    """The same CPU tensor, whose memory the system is asked to keep in huge pages; before it is first written."""
    if memory.numel():
        _native.prefer_huge_pages(memory=memory.data_ptr(), bytes=memory.nbytes)
    return memory


class WeightMemory:
    """Tensors of a model's weights from few large pieces of memory; a piece lives as long as any of its tensors.

    Price: none; a walk over weights in pages of 4 KiB takes 15 % longer (768 x 768 matrices, one thread, by hand).

    Args:
        piece: bytes of a piece, if no tensor needs more.
    """

    def __init__(self, piece: int = PIECE) -> None:
        self._least = piece
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        """A dense vector, not initialised, at a multiple of 64 bytes."""
        wanted = -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        if self._used + wanted > len(self._piece):
            self._piece = in_huge_pages(torch.empty(max(self._least, wanted), dtype=torch.uint8))
            self._used = 0
        start, self._used = self._used, self._used + wanted
        return self._piece[start : start + count * dtype.itemsize].view(dtype)
