"""The range log-sum-exp on the CPU and its face: every SIMD level against the reference, and the border."""

from __future__ import annotations

import random

import pytest
import torch

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.fusion.native_step import available_levels
from shallowfusion.scorers.token_ranges import range_log_probs, range_log_probs_cpu
from shallowfusion.values import TokenRanges
from tests.kernels.cases import logits, to_device
from tests.kernels.range_cases import assert_same, random_order, random_ranges, ranges_of


@pytest.mark.parametrize("level", available_levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "padding"), [(1, None), (7, 16), (255, None), (507, 64), (5003, None)])
def test_every_level_agrees_with_the_reference(level, dtype, vocab, padding) -> None:
    source = logits(4, vocab, seed=vocab, dtype=dtype, padding=padding)
    for count, order, temperature in ((3, None, 1.0), (40, random_order(vocab, 1), 0.7)):
        ranges = random_ranges(4, vocab, count, seed=count)
        found = range_log_probs_cpu(source, ranges, order, None, temperature, level=level)
        assert found.backend == f"cpu ({level})"
        assert_same(found, source, ranges, order, None, temperature)
        given = torch.arange(4.0)
        found = range_log_probs_cpu(source, ranges, order, given, temperature, level=level)
        assert_same(found, source, ranges, order, given, temperature)


@pytest.mark.parametrize("level", available_levels())
def test_improbable_ranges_are_as_exact_as_probable_ones(level) -> None:
    source = logits(1, 6000, seed=1) - torch.linspace(0.0, 500.0, 6000)
    many = [(first, min(6000, first + span)) for first in range(0, 6000, 97) for span in (1, 70, 2500)]
    for own in (many, [(5990, 6000)]):
        ranges = ranges_of([own])
        assert_same(range_log_probs_cpu(source, ranges, level=level), source, ranges)


@pytest.mark.parametrize("level", available_levels())
@pytest.mark.parametrize("spans", [(30, 1), (300, 90)])
def test_impossible_tokens_and_broken_rows(level, spans) -> None:
    source = logits(4, 600, seed=6)
    source[0, 100:300] = -torch.inf
    source[1] = -torch.inf
    source[2, 599] = torch.nan
    source[3, 0] = torch.inf
    own = [(0, 600), (100, 300), (299, 301), (250, 250 + spans[0])] * spans[1]
    ranges = ranges_of([own] * 4)
    found = range_log_probs_cpu(source, ranges, level=level)
    assert_same(found, source, ranges)
    assert torch.isnan(found.log_probs.view(4, -1)[2:]).all()


def test_number_of_threads_changes_no_bit() -> None:
    source, ranges = logits(9, 3000, seed=2), random_ranges(9, 3000, 50, seed=3)
    order = random_order(3000, 4)
    one, four = (range_log_probs_cpu(source, ranges, order, threads=threads) for threads in (1, 4))
    assert torch.equal(one.log_probs, four.log_probs)
    torch.testing.assert_close(one.log_sums, four.log_sums, rtol=0, atol=0, equal_nan=True)


def test_face_takes_the_backend_of_the_tensors_and_says_so() -> None:
    source, ranges = logits(2, 50, seed=1), ranges_of([[(0, 3)], [(4, 50)]])
    assert range_log_probs(source, ranges).backend == "cpu: cpu tensors"
    by_reference = range_log_probs(source, ranges, backend="reference")
    assert by_reference.backend == "reference: as asked"
    by_triton = range_log_probs(source, ranges, backend="triton") if not torch.cuda.is_available() else by_reference
    torch.testing.assert_close(by_triton.log_probs, by_reference.log_probs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_a_gpu_the_face_agrees_with_the_reference(dtype) -> None:
    source, ranges = logits(4, 5003, seed=1, dtype=dtype, padding=64), random_ranges(4, 5003, 40, seed=2)
    found = range_log_probs(source.cuda(), to_device(ranges, torch.device("cuda")))
    assert "triton" in found.backend
    assert_same(found, source, ranges)


def test_strided_rows_are_read_where_they_lie() -> None:
    wide = logits(3, 900, seed=8)
    ranges = random_ranges(3, 500, 9, seed=1)
    assert_same(range_log_probs(wide[:, 100:600], ranges), wide[:, 100:600], ranges)


def test_bad_calls_are_refused() -> None:
    source, ranges = logits(2, 50, seed=1), ranges_of([[(0, 3)], [(4, 50)]])
    outside = ranges_of([[(0, 51)], []])
    falling = TokenRanges(torch.tensor([0, 2, 1]), ranges.first, ranges.last)
    for backend in ("cpu", "reference"):
        with pytest.raises(InvalidArgumentError, match="outside the vocabulary"):
            range_log_probs(source, outside, backend=backend)
    for wrong, message in (
        (lambda: range_log_probs(source, falling), "row_offsets must rise"),
        (lambda: range_log_probs(source.long(), ranges), "float32, float16 or bfloat16"),
        (lambda: range_log_probs(source.T, ranges), "unit stride"),
        (lambda: range_log_probs(source, ranges, temperature=0.0), "temperature"),
        (lambda: range_log_probs(source, ranges, backend="gpu"), "backend must be one of"),
        (lambda: range_log_probs(source, ranges, order=torch.arange(49)), "order must be an int32 tensor"),
        (lambda: range_log_probs(source, ranges, order=torch.full((50,), 50)), "ids of the vocabulary"),
        (lambda: range_log_probs(source, ranges, log_sums=torch.zeros(3)), "log_sums must have shape"),
        (lambda: range_log_probs(source, TokenRanges(ranges.row_offsets, ranges.first, ranges.last[:1])), "shape"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            wrong()


def test_random_numbers_never_crash_the_core() -> None:
    rng = random.Random(0)
    source = logits(3, 40, seed=5)
    outcomes = set()
    for _ in range(300):
        count = rng.randint(0, 6)
        offsets = [0, *sorted(rng.randint(0, count) for _ in range(2)), rng.choice([count, count, count + 1])]
        places = [
            [rng.randint(-2, 45) if rng.random() < 0.1 else rng.randint(0, 40) for _ in range(count)] for _ in "ab"
        ]
        ranges = TokenRanges(torch.tensor(offsets), *(torch.tensor(own, dtype=torch.int64) for own in places))
        try:
            assert_same(range_log_probs(source, ranges), source, ranges)
            outcomes.add("fine")
        except InvalidArgumentError:
            outcomes.add("refused")
    assert outcomes == {"fine", "refused"}
