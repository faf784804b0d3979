"""The binding refuses what it cannot read, whatever it is given, and says why."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion import _native
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.fusion.native_step import fused_step_cpu
from shallowfusion.values import Unmapped
from tests.step_cases import assert_same_bits, make_request, random_bonus

LOGITS = np.zeros((4, 16), dtype=np.float32)
WORDS: list[Any] = [
    *(None, 0, -1, 3, 2**31, 2**62, 1.5, "x", b"x", (), [], {}),
    *(np.zeros(4, np.float32), np.zeros((4, 1), np.float32), np.zeros(4, np.int32), np.zeros((4, 1), np.int32)),
    *(np.zeros(0, np.float32), np.zeros(16, np.float32), np.zeros((2, 2, 2)), np.zeros(8, np.float32)[::2]),
]


def good_arguments() -> dict[str, Any]:
    return {
        "sources": [(LOGITS.ctypes.data, 0, 16, 16, 1.0, None, 0, 0.0)],
        "weights": np.ones((4, 1), np.float32),
        "totals": np.zeros(4, np.float32),
        "beam_size": 2,
        "top_k": 3,
        "end_id": -1,
        "token_bias": None,
        "allowed": None,
        "bonus": None,
        "length_bonus": np.zeros(4, np.float32),
        "combine": "log_linear",
        "normalize": "none",
        "level": None,
        "threads": 1,
    }


def test_good_arguments_pass() -> None:
    found = _native.fused_step(**good_arguments())
    assert found["token_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]


@settings(max_examples=400, deadline=None)
@given(name=st.sampled_from(sorted(good_arguments())), value=st.sampled_from(WORDS))
def test_any_one_wrong_argument_is_an_error_or_a_valid_call(name: str, value: Any) -> None:
    arguments = {**good_arguments(), name: value}
    try:
        found = _native.fused_step(**arguments)
    except (ValueError, TypeError):
        return
    assert found["totals"].shape[0] * arguments["beam_size"] == 4


@settings(max_examples=400, deadline=None)
@given(place=st.integers(0, 7), value=st.sampled_from(WORDS))
def test_any_one_wrong_part_of_a_source_is_an_error(place: int, value: Any) -> None:
    source = list(good_arguments()["sources"][0])
    may_be_valid = {
        0: (2**31, 2**62),  # nothing tells a wrong address from a right one
        1: (0,),
        2: (3,),
        3: (2**31,),
        4: (3, 2**31, 2**62, 1.5),
        5: (None,),
        6: (0,),
        7: (0, -1, 3, 1.5, 2**31, 2**62),
    }
    if any(value is good or (type(value) is type(good) and value == good) for good in may_be_valid[place]):
        return
    source[place] = value
    with pytest.raises((ValueError, TypeError)):
        _native.fused_step(**{**good_arguments(), "sources": [tuple(source)]})
    with pytest.raises((ValueError, TypeError)):
        _native.row_statistics(source=tuple(source) if place != 5 else tuple(source[:5]), rows=4, level=None, threads=1)


def test_null_and_odd_addresses_are_refused() -> None:
    for address in (0, LOGITS.ctypes.data + 1, LOGITS.ctypes.data + 2):
        source = (address, 0, 16, 16, 1.0, None, 0, 0.0)
        with pytest.raises(ValueError, match="address"):
            _native.fused_step(**{**good_arguments(), "sources": [source]})


def test_row_stride_shorter_than_the_vocabulary_is_refused() -> None:
    source = (LOGITS.ctypes.data, 0, 16, 15, 1.0, None, 0, 0.0)
    with pytest.raises(ValueError, match="stride"):
        _native.fused_step(**{**good_arguments(), "sources": [source]})


def test_no_rows_give_no_candidates() -> None:
    found = fused_step_cpu(make_request(utterances=0))
    assert found.totals.shape == (0, 6)
    assert found.flags.shape == (0,)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_threads_survive_a_fork() -> None:
    request = make_request(utterances=2, vocabs=(5000, 5000))
    before = fused_step_cpu(request, threads=3)
    child = os.fork()
    if child == 0:
        try:
            after = fused_step_cpu(request, threads=3)
            os._exit(0 if torch.equal(after.totals, before.totals) else 1)
        except BaseException:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert_same_bits(before, fused_step_cpu(request, threads=3))


def test_refused_arguments_name_what_is_wrong() -> None:
    request = make_request()
    cases: list[tuple[str, dict[str, object]]] = [
        ("beam_size", {"beam_size": 4}),
        ("top_k", {"top_k": 0}),
        ("end_id", {"end_id": 255}),
        ("end_factored", {"end_id": -1, "normalize": "end_factored"}),
        ("weights", {"weights": torch.ones(6, 3)}),
        ("weights", {"weights": torch.full((6, 2), float("nan"))}),
        ("weights", {"weights": torch.full((6, 2), -1.0), "combine": "mixture"}),
        ("weights", {"weights": torch.ones(6, 2, dtype=torch.float64)}),
        ("totals", {"totals": torch.zeros(6, 1)}),
        ("temperature", {"temperatures": (1.0, 0.0)}),
        ("temperature", {"temperatures": (float("nan"), 1.0)}),
        ("map", {"maps": (None, torch.full((255,), 200, dtype=torch.int32))}),
        ("map", {"maps": (None, torch.full((255,), -2, dtype=torch.int32))}),
        ("map", {"maps": (None, torch.zeros(255, dtype=torch.int64))}),
        ("floor", {"unmapped": (Unmapped("neutral"), Unmapped("floor", float("inf")))}),
        ("token_bias", {"token_bias": torch.zeros(254)}),
        ("token_bias", {"token_bias": torch.full((255,), float("nan"))}),
        ("token_bias", {"token_bias": torch.zeros(510)[::2]}),
        ("allowed", {"allowed": torch.zeros(6, 7, dtype=torch.int32)}),
        ("length_bonus", {"length_bonus": torch.zeros(5)}),
        ("combine", {"combine": "sum"}),
        ("normalize", {"normalize": "global"}),
        ("stride", {"sources": (request.sources[0], torch.zeros(200, 6).T)}),
        ("rows", {"sources": (request.sources[0], torch.zeros(5, 200))}),
        ("float16", {"sources": (request.sources[0], torch.zeros(6, 200, dtype=torch.int32))}),
        ("sources", {"sources": request.sources[:1] * 9, "maps": (None,) * 9, "temperatures": (1.0,) * 9}),
    ]
    for word, changes in cases:
        if len(changes.get("sources", ())) == 9:  # type: ignore[arg-type]
            changes["unmapped"] = request.unmapped[:1] * 9
        with pytest.raises(InvalidArgumentError, match=word):
            fused_step_cpu(dataclasses.replace(request, **changes))
    bonus = random_bonus(6, 255, 3)
    for word, broken in [
        ("row_offsets", dataclasses.replace(bonus, row_offsets=bonus.row_offsets + 1)),
        ("row_offsets", dataclasses.replace(bonus, row_offsets=bonus.row_offsets.flip(0))),
        ("row_offsets", dataclasses.replace(bonus, row_offsets=bonus.row_offsets[:-1])),
        ("token_ids", dataclasses.replace(bonus, token_ids=bonus.token_ids + 255)),
        ("token_ids", dataclasses.replace(bonus, token_ids=torch.zeros_like(bonus.token_ids))),
        ("values", dataclasses.replace(bonus, values=bonus.values[:-1])),
        ("values", dataclasses.replace(bonus, values=bonus.values * float("nan"))),
    ]:
        with pytest.raises(InvalidArgumentError, match=word):
            fused_step_cpu(dataclasses.replace(request, bonus=broken))
    with pytest.raises(InvalidArgumentError, match="level"):
        fused_step_cpu(request, level="mmx")
    with pytest.raises(InvalidArgumentError, match="threads"):
        fused_step_cpu(request, threads=0)
