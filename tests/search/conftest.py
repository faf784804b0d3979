"""The implementations that every test of a native class and its twin runs on."""

from __future__ import annotations

import pytest

from shallowfusion.search.beam_state import BeamState
from shallowfusion.search.beam_state_reference import ReferenceBeamState
from shallowfusion.scorers.page_pool import PagePool
from shallowfusion.scorers.page_pool_reference import ReferencePagePool


@pytest.fixture(params=[BeamState, ReferenceBeamState], ids=["native", "reference"])
def state_class(request: pytest.FixtureRequest) -> type:
    return request.param


@pytest.fixture(params=[PagePool, ReferencePagePool], ids=["native", "reference"])
def pool_class(request: pytest.FixtureRequest) -> type:
    return request.param
