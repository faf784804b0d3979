"""Row rounding in C++ against its twin in torch, bit for bit, and its border."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shallowfusion import _native
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.scorers.row_rounding import (
    int8_rows,
    int8_rows_reference,
    packed_int8,
    round_rows,
    round_rows_reference,
    scale_rows,
    scale_rows_reference,
    unpacked_int8,
)

DTYPES = [torch.float32, torch.bfloat16]


@given(rows=st.integers(1, 40), columns=st.integers(1, 200), seed=st.integers(0, 2**16), dtype=st.sampled_from(DTYPES))
def test_rounding_equals_its_twin(rows: int, columns: int, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-20, 20, rows)[:, None]
    values = (torch.randn((rows, columns), generator=generator) * spread).to(dtype)
    values[torch.rand((rows, columns), generator=generator) < 0.1] = 0.0
    whole, scales = round_rows(values)
    wanted, wanted_scales = round_rows_reference(values)
    assert torch.equal(whole, wanted)
    assert torch.equal(scales, wanted_scales)
    assert whole.abs().max() <= 127


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 200),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
)
def test_scaling_equals_its_twin(rows: int, columns: int, seed: int, dtype: torch.dtype, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    product = torch.randn((rows, columns), generator=generator) * 1e4
    scales = torch.rand((rows, 1), generator=generator)
    bias = torch.randn(columns, generator=generator) if with_bias else None
    wanted = scale_rows_reference(product, scales, bias, dtype)
    assert torch.equal(scale_rows(product, scales, bias, dtype), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_go_to_the_even_number_and_nan_marks_its_row(dtype: torch.dtype) -> None:
    values = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0], [1.0, float("nan"), 2.0, 3.0]], dtype=dtype)
    whole, scales = round_rows(values)
    assert whole[0].tolist() == [127, 0, 2, -2]
    assert whole[1].tolist() == [0, 0, 0, 0]
    assert scales[1] > 0
    assert scales[2].isnan()
    spoiled = scale_rows(torch.ones(3, 2), scales, None, dtype)
    assert spoiled[2].isnan().all()
    assert spoiled[:2].isfinite().all()


def test_large_matrices_are_cut_into_blocks_of_rows() -> None:
    values = torch.randn(700, 333)
    torch.set_num_threads(2)
    try:
        whole, scales = round_rows(values)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(whole, round_rows_reference(values)[0])
    assert scale_rows(whole.float(), scales, None, torch.float32).sub(values).abs().max() < 0.03
    empty, none = round_rows(torch.empty(0, 4))
    assert empty.shape == (0, 4)
    assert scale_rows(empty.float(), none, None, torch.bfloat16).shape == (0, 4)


def test_wrong_tensors_are_refused() -> None:
    for values in (torch.ones(2), torch.ones(2, 2, dtype=torch.float16), torch.ones(2, 2, dtype=torch.int8)):
        with pytest.raises(InvalidArgumentError, match="float32 or bfloat16 matrix"):
            round_rows(values)
    product, scales = torch.ones(2, 3), torch.ones(2, 1)
    with pytest.raises(InvalidArgumentError, match="dense float32"):
        scale_rows(product, torch.ones(3, 1), None, torch.float32)
    with pytest.raises(InvalidArgumentError, match="dense float32"):
        scale_rows(product.t(), torch.ones(3, 1), None, torch.float32)
    with pytest.raises(InvalidArgumentError, match="dense float32"):
        scale_rows(product, scales, torch.ones(2), torch.float32)
    with pytest.raises(InvalidArgumentError, match="dtype must be"):
        scale_rows(product, scales, None, torch.float16)


@pytest.mark.parametrize("wrong", [{"values": 0}, {"values": 2}, {"dtype": 1}, {"rows": 0}, {"threads": 0}])
def test_the_binding_refuses_what_it_cannot_read(wrong: dict[str, int]) -> None:
    values, whole, scales = torch.ones(2, 4), torch.empty(2, 4, dtype=torch.int8), torch.empty(2)
    good = {
        "values": values.data_ptr(), "dtype": 0, "rows": 2, "columns": 4, "whole": whole.data_ptr(),
        "scales": scales.data_ptr(), "threads": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"must be"):
        _native.round_rows(**{**good, **wrong})


needs_vnni = pytest.mark.skipif(not _native.has_int8_product(), reason="needs AVX-512 VNNI")


def int8_case(
    seed: int, rows: int, inputs: int, outputs: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    values = (torch.randn(rows, inputs) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
    weights = torch.randint(-128, 128, (outputs, inputs)).to(torch.int8)
    return values, weights, torch.rand(outputs) * 0.02, torch.randn(outputs)


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("made", [torch.float32, torch.bfloat16])
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 20),
    inputs=st.integers(1, 80),
    outputs=st.integers(1, 150),
    with_bias=st.booleans(),
    threads=st.integers(1, 3),
)
@settings(deadline=None, max_examples=40)
def test_products_of_rounded_rows_are_exact(
    dtype: torch.dtype,
    made: torch.dtype,
    seed: int,
    rows: int,
    inputs: int,
    outputs: int,
    with_bias: bool,
    threads: int,
) -> None:
    values, weights, scales, bias = int8_case(seed, rows, 4 * inputs, outputs, dtype)
    packed, shift = packed_int8(weights), bias if with_bias else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = int8_rows(values, packed, scales, shift, made)
    finally:
        torch.set_num_threads(before)
    assert found.dtype == made
    assert torch.equal(found, int8_rows_reference(values, weights, scales, shift, made))
    assert torch.equal(unpacked_int8(packed, outputs, 4 * inputs), weights)


@needs_vnni
@pytest.mark.parametrize("made", DTYPES)
@pytest.mark.parametrize("rows", [1, 6, 7, 16, 17, 48, 49, 64, 80, 96, 97, 193, 200])
def test_matrix_units_sum_the_same(rows: int, made: torch.dtype) -> None:
    for inputs, outputs in ((64, 16), (128, 33), (192, 100), (768, 7)):
        values, weights, scales, bias = int8_case(rows, rows, inputs, outputs, torch.float32)
        wanted = int8_rows_reference(values, weights, scales, bias, made)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            try:
                found = int8_rows(values, packed_int8(weights), scales, bias, made)
            finally:
                torch.set_num_threads(1)
            assert torch.equal(found, wanted), (inputs, outputs, threads)


@needs_vnni
def test_not_a_number_spoils_only_its_row() -> None:
    values, weights, scales, bias = int8_case(1, 3, 32, 20, torch.float32)
    values[1, 5] = float("nan")
    for made in (torch.float32, torch.bfloat16):
        found = int8_rows(values, packed_int8(weights), scales, bias, made)
        assert found[1].isnan().all()
        assert found[[0, 2]].isfinite().all()
    assert int8_rows(values[:0], packed_int8(weights), scales, bias).shape == (0, 20)


@needs_vnni
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": 6}, "multiple of 4"), ({"inputs": 1 << 17}, "multiple of 4"), ({"outputs": 0}, "outputs must be"),
        ({"rows": 0}, "rows"), ({"dtype": 1}, "dtype code"), ({"output_dtype": 7}, "dtype code"),
        ({"threads": 0}, "threads"), ({"packed": 0}, "packed must be"), ({"bias": 2}, "bias must be"),
    ],
    ids=str,
)  # fmt: skip
def test_the_border_of_products_checks_what_it_is_given(change: dict[str, int], message: str) -> None:
    memory = torch.zeros(1024)
    arguments = dict.fromkeys(("values", "packed", "scales", "bias", "output"), memory.data_ptr())
    arguments |= {"dtype": 0, "output_dtype": 0, "rows": 1, "inputs": 4, "outputs": 16, "threads": 1}
    _native.int8_product(**arguments)
    with pytest.raises(ValueError, match=message):
        _native.int8_product(**{**arguments, **change})
    with pytest.raises(ValueError, match="multiple of 4"):
        _native.pack_int8(weights=memory.data_ptr(), outputs=1, inputs=3, packed=memory.data_ptr())
