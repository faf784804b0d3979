"""The library that a front stands for."""

from __future__ import annotations

import logging
from typing import Any

import pytest


@pytest.fixture(scope="module")
def theirs() -> Any:
    pytest.importorskip("kenlm")
    module = pytest.importorskip("pyctcdecode")
    logging.getLogger("pyctcdecode").setLevel(logging.ERROR)
    return module
