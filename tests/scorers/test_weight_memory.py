"""Memory of prepared weights: where tensors lie, and that they do not meet."""

from __future__ import annotations

import pytest
import torch

from shallowfusion import _native
from shallowfusion.scorers.weight_memory import PIECE, WeightMemory, in_huge_pages


def test_tensors_lie_side_by_side_at_aligned_addresses() -> None:
    memory = WeightMemory()
    first = memory.empty(10, torch.float32).fill_(1.0)
    second = memory.empty(3, torch.uint8).fill_(2)
    third = memory.empty(100, torch.float32).fill_(3.0)
    assert [second.data_ptr() - first.data_ptr(), third.data_ptr() - second.data_ptr()] == [64, 64]
    assert first.data_ptr() % 64 == 0
    assert (first.tolist(), second.tolist(), third.tolist()) == ([1.0] * 10, [2] * 3, [3.0] * 100)


def test_what_does_not_fit_gets_a_piece_of_its_own() -> None:
    memory = WeightMemory()
    small = memory.empty(16, torch.float32).fill_(5.0)
    large = memory.empty(PIECE // 4 + 1, torch.float32)
    large[-1] = 7.0
    assert small.untyped_storage().data_ptr() != large.untyped_storage().data_ptr()
    del memory  # tensors keep their pieces
    assert (small.sum().item(), large[-1].item()) == (80.0, 7.0)


def test_asking_for_huge_pages_leaves_contents_alone() -> None:
    for count in (0, 1, 1 << 22):
        memory = torch.arange(count)
        assert in_huge_pages(memory) is memory
        assert torch.equal(memory, torch.arange(count))
    with pytest.raises(ValueError, match="bytes must not be negative"):
        _native.prefer_huge_pages(memory=1, bytes=-1)
    with pytest.raises(ValueError, match="memory must be"):
        _native.prefer_huge_pages(memory=0, bytes=1)
