"""The implementations that every test of a native class and its twin runs on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from shallowfusion.search.beam_state import BeamState
from shallowfusion.search.beam_state_reference import ReferenceBeamState


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: threads only wait for each other, for minutes on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[BeamState, ReferenceBeamState], ids=["native", "reference"])
def state_class(request: pytest.FixtureRequest) -> type:
    return request.param
