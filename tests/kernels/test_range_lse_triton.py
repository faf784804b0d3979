"""The Triton range log-sum-exp against its reference: on the GPU where there is one, else in the interpreter."""

from __future__ import annotations

import pytest
import torch

from shallowfusion.kernels.range_lse import plan_range_log_probs, range_log_probs_triton
from shallowfusion.kernels.range_lse_reference import range_log_probs_reference
from shallowfusion.values import RangeLogProbs, TokenRanges
from tests.kernels.cases import logits, to_device
from tests.kernels.range_cases import assert_same, random_order, random_ranges, ranges_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run(source: torch.Tensor, ranges: TokenRanges, *rest: object, block: int = 128) -> RangeLogProbs:
    found = range_log_probs_triton(*(to_device(item, DEVICE) for item in (source, ranges, *rest)), block=block)
    assert found.backend == "triton"
    return to_device(found, torch.device("cpu"))


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(
    ("dtype", "vocab", "rows", "padding", "block"),
    [
        (torch.float32, 1, 2, None, 32),
        (torch.float16, 7, 1, 16, 32),
        (torch.bfloat16, 255, 3, None, 64),
        (torch.float32, 507, 3, 64, 128),
        (torch.float32, 5003, 2, 128, 1024),  # a range longer than one chunk of groups
    ],
)
def test_agrees_with_the_reference_on_odd_shapes(ordered, dtype, vocab, rows, padding, block) -> None:
    source = logits(rows, vocab, seed=vocab, dtype=dtype, padding=padding)
    order = random_order(vocab, seed=1) if ordered else None
    ranges = random_ranges(rows, vocab, 12, seed=2)
    assert_same(run(source, ranges, order, None, 1.7, block=block), source, ranges, order, None, 1.7)


def test_edges_of_groups_are_counted_once() -> None:
    source = logits(1, 200, seed=3)
    places = (0, 1, 31, 32, 33, 63, 64, 65, 96, 128, 199, 200)
    ranges = ranges_of([[(first, last) for first in places for last in places]])
    assert_same(run(source, ranges, None, None), source, ranges)


def test_given_log_sums_are_taken_off_as_they_are() -> None:
    source, ranges = logits(3, 300, seed=4), random_ranges(3, 300, 6, seed=5)
    log_sums = torch.tensor([1.0, 2.0, 3.0])
    launches, _ = plan_range_log_probs(source, ranges, None, log_sums)
    assert [launch.kernel.__name__ for launch in launches] == ["group_sums", "range_sums"]
    assert_same(run(source, ranges, None, log_sums), source, ranges, None, log_sums)


def test_impossible_tokens_and_broken_rows() -> None:
    source = logits(5, 100, seed=6)
    source[0, 20:60] = -torch.inf
    source[1] = -torch.inf
    source[2, 7] = torch.nan
    source[3, 8] = torch.inf
    source[4] -= torch.linspace(0.0, 400.0, 100)  # places of a probability that float32 cannot hold
    ranges = ranges_of([[(0, 100), (20, 60), (25, 26), (10, 30), (90, 100), (99, 100)]] * 5)
    found = run(source, ranges, None, None)
    assert_same(found, source, ranges)
    by_row = found.log_probs.view(5, -1)
    assert by_row[0, 1] == by_row[0, 2] == -torch.inf
    assert (by_row[1] == -torch.inf).all()
    assert torch.isnan(by_row[2:4]).all()
    assert by_row[4, 5] < -300


def test_no_ranges_at_all() -> None:
    found = run(logits(2, 50, seed=1), ranges_of([[], []]), None, None)
    assert found.log_probs.shape == (0,)
    assert torch.isnan(found.log_sums).all()


def test_whole_vocabulary_has_probability_one() -> None:
    source = logits(2, 333, seed=9)
    reference = range_log_probs_reference(source, ranges_of([[(0, 333)], [(0, 333)]]))
    torch.testing.assert_close(reference.log_probs, torch.zeros(2))
