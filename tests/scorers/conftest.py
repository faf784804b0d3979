"""The implementations that every test of the page pool runs on."""

from __future__ import annotations

import pytest

from shallowfusion.scorers.page_pool import PagePool
from shallowfusion.scorers.page_pool_reference import ReferencePagePool


@pytest.fixture(params=[PagePool, ReferencePagePool], ids=["native", "reference"])
def pool_class(request: pytest.FixtureRequest) -> type:
    return request.param
