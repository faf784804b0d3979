"""The calls that the graph bench captures: one step of our kernels, over rows padded as a search pads them."""

from __future__ import annotations

import pytest
import torch

from bench import fused_step
from bench.fused_step_graph import fused_launches, make_copies, rows_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_launches_over_a_copy_give_the_totals_of_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_step, "ACOUSTIC_VOCAB", 700)
    monkeypatch.setattr(fused_step, "LANGUAGE_VOCAB", 600)
    first, second = make_copies(2, 6, dtype, DEVICE, (700, 600))
    assert first[0].data_ptr() != second[0].data_ptr()
    assert first[0].stride(0) % 128 == 0
    step, found = fused_launches(second, 3, end_id=599)
    step()
    torch.testing.assert_close(found, fused_step.naive_torch(*first, 3)[0], atol=1e-3, rtol=0)


def test_rows_tell_the_share_of_the_floor() -> None:
    (ours, peer) = rows_of("cold", "float32", {"fused_step": [2e-6, 2e-6], "peer": [8e-6, 8e-6]}, 4_000, 4e9)
    assert ours.note == "floor 1.0 us at 4 GB/s of copying: 50% of its speed"
    assert (ours.ratio, peer.ratio) == (1.0, 4.0)
    assert peer.gigabytes_per_second == pytest.approx(0.5)
