"""Coverage terms by hand."""

from __future__ import annotations

import math

import pytest
import torch

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.fusion.coverage import attention_centre, coverage

LOOK = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.5, 0.0]])


def test_worked_numbers() -> None:
    assert coverage(LOOK, "threshold") == 2.0  # frames 0 and 1 gathered 0.75, frame 2 exactly 0.5
    assert coverage(LOOK, "threshold", 0.4) == 3.0
    assert coverage(LOOK, "gnmt") == pytest.approx(2 * math.log(0.75) + math.log(0.5) + math.log(1e-3))
    assert coverage(LOOK, "excess") == pytest.approx(-(0.25 + 0.25) / 2)
    assert attention_centre(LOOK) == pytest.approx((0.25 * 1 / 3 + 0.5 * 2 / 3) / 1.0)


def test_unknown_kinds_and_empty_recordings_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="coverage must be one of"):
        coverage(LOOK, "all")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="must be"):
        coverage(torch.zeros(3, 0))
