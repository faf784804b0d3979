"""Many random searches in one session leak nothing and do not grow; `python -m tests.session.soak 10000` for more."""

from __future__ import annotations

import sys

import pytest

from tests.session.soak import soak


def test_random_searches_are_those_of_one_by_one_and_leave_nothing() -> None:
    found = soak(80, seed=1)
    assert found["finished"] > 60
    assert found["compared"] >= 3


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_searches() -> None:
    assert soak(400, seed=2)["growth_mb"] < 20
