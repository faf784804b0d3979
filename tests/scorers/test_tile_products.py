"""Products on matrix units against their twin, exact products, and their border."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shallowfusion import _native
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.scorers.tile_products import (
    cut,
    has_tile_rows,
    packed_tiles,
    tile_rows,
    tile_rows_reference,
    unpacked_tiles,
)

needs_tiles = pytest.mark.skipif(not has_tile_rows(), reason="needs AMX with bfloat16")
CLOSE = 2.0**-20  # of the sum of a result's terms' sizes: float32 sums of a few hundred terms


def case(seed: int, rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-6, 6, rows)[:, None]
    values = torch.randn((rows, inputs), generator=generator) * spread
    weights = torch.randn((outputs, inputs), generator=generator)
    weights[torch.rand((outputs, inputs), generator=generator) < 0.1] = 0.0
    return values, weights, torch.randn(outputs, generator=generator)


def test_a_float_is_the_sum_of_three_halves() -> None:
    values = torch.cat([torch.randn(1000) * torch.logspace(-30, 30, 1000), torch.tensor([0.0, -0.0, 1.0, 3e38])])
    parts = cut(values)
    assert torch.equal(sum(part.double() for part in parts), values.double())
    for part in parts:
        assert torch.equal(part.to(torch.bfloat16).float(), part)


def test_the_twin_is_a_float32_product() -> None:
    values, weights, bias = case(3, 9, 300, 40)
    wanted = values.double() @ weights.double().T + bias
    size = values.double().abs() @ weights.double().abs().T + bias.abs()
    assert bool(((tile_rows_reference(values, weights, bias) - wanted).abs() <= 2.0**-21 * size).all())


@given(outputs=st.integers(1, 70), inputs=st.integers(1, 70))
def test_packing_can_be_undone(outputs: int, inputs: int) -> None:
    weights = torch.arange(1.0, outputs * inputs + 1).view(outputs, inputs)
    packed = packed_tiles(weights)
    assert torch.equal(unpacked_tiles(packed, outputs, inputs), weights)
    assert packed.numel() == -(-outputs // 32) * 32 * (-(-inputs // 32) * 32)
    assert packed.sum(dtype=torch.float64) == weights.sum(dtype=torch.float64)  # what was added is 0


@needs_tiles
@given(
    seed=st.integers(0, 2**31),
    rows=st.sampled_from([1, 2, 5, 15, 16, 17, 31, 32, 33, 47, 48, 49, 70, 97, 191, 192, 193, 400]),
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 150),
    with_bias=st.booleans(),
    threads=st.integers(1, 3),
)
@settings(deadline=None, max_examples=80)
def test_products_agree_with_their_twin(
    seed: int, rows: int, inputs: int, outputs: int, with_bias: bool, threads: int
) -> None:
    values, weights, bias = case(seed, rows, inputs, outputs)
    shift = bias if with_bias else None
    packed = packed_tiles(weights)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = tile_rows(values, packed, outputs, shift)
    finally:
        torch.set_num_threads(before)
    size = values.double().abs() @ weights.double().abs().T + bias.abs()
    assert bool(((found - tile_rows_reference(values, weights, shift)).abs() <= CLOSE * size).all())
    last = rows - 1
    assert torch.equal(tile_rows(values[last:], packed, outputs, shift), found[last:])  # alone as among others


@needs_tiles
@pytest.mark.parametrize("inputs", [768, 3072])
def test_errors_are_those_of_float32(inputs: int) -> None:
    torch.manual_seed(0)
    values, weights = torch.randn(40, inputs), torch.randn(256, inputs)
    exact = values.double() @ weights.double().T
    ours = (tile_rows(values, packed_tiles(weights), 256, None) - exact).abs().max()
    theirs = (values @ weights.T - exact).abs().max()
    assert ours <= 4 * theirs


@needs_tiles
def test_values_that_are_no_numbers_spoil_only_their_row() -> None:
    values, weights, bias = case(1, 5, 40, 33)
    values[1, 5], values[3, 39] = float("nan"), float("inf")
    found = tile_rows(values, packed_tiles(weights), 33, bias)
    assert found[[1, 3]].isnan().all()
    assert found[[0, 2, 4]].isfinite().all()
    assert tile_rows(values[:0], packed_tiles(weights), 33, bias).shape == (0, 33)
    spread = values[[0, 2, 4]].repeat_interleave(2, dim=1)[:, ::2]
    assert torch.equal(tile_rows(spread, packed_tiles(weights), 33, bias), found[[0, 2, 4]])


def test_wrong_tensors_are_refused() -> None:
    for weights in (torch.ones(3), torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(0, 4)):
        with pytest.raises(InvalidArgumentError, match="float32 matrix on the CPU"):
            packed_tiles(weights)
    packed = packed_tiles(torch.ones(8, 40))
    for values in (torch.ones(2, 65), torch.ones(40), torch.ones(2, 40, dtype=torch.bfloat16)):
        with pytest.raises(InvalidArgumentError, match=r"float32 \[rows, inputs\]"):
            tile_rows(values, packed, 8, None)


@needs_tiles
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": 0}, "inputs must be"), ({"outputs": 0}, "outputs and"), ({"outputs": 1 << 32}, "outputs and"),
        ({"rows": 0}, "rows"), ({"threads": 0}, "threads"), ({"packed": 0}, "packed must be"),
        ({"bias": 2}, "bias must be"), ({"values": 0}, "values must be"), ({"output": 1}, "output must be"),
    ],
    ids=str,
)  # fmt: skip
def test_the_border_checks_what_it_is_given(change: dict[str, int], message: str) -> None:
    memory = torch.zeros(2048)
    arguments = dict.fromkeys(("values", "packed", "bias", "output"), memory.data_ptr())
    arguments |= {"rows": 1, "inputs": 4, "outputs": 16, "threads": 1}
    _native.tile_product(**arguments)
    with pytest.raises(ValueError, match=message):
        _native.tile_product(**{**arguments, **change})
    with pytest.raises(ValueError, match="outputs and inputs"):
        _native.pack_tiles(weights=memory.data_ptr(), outputs=0, inputs=3, packed=memory.data_ptr())
    with pytest.raises(ValueError, match="outputs and inputs"):
        _native.packed_tiles_size(outputs=1, inputs=-1)
