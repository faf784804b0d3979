"""Attention over frames in C++: every level and dtype against the float64 definition, whatever the layout in memory."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from shallowfusion import _native
from shallowfusion.demo.shipped import model_directory
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.scorers.attention import ATTENTION, frame_attention
from shallowfusion.scorers.frame_attention import frame_attention_native

LEVELS = _native.fused_step_levels()
# Sums are float32 everywhere, of up to 256 products; 16-bit outputs are rounded once.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def call(
    seed: int, utterances: int, queries: int, heads: tuple[int, int], frames: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    query = torch.randn(utterances, queries, heads[0], dim).to(dtype)
    keys, values = (torch.randn(utterances, frames, heads[1], dim).to(dtype) for _ in range(2))
    return query, keys, values


def assert_right(found: Tensor, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None = None) -> None:
    exact = frame_attention(
        *(part.double().float() for part in (query, keys, values)), lengths, 0.3, backend="reference"
    )
    assert found.dtype == query.dtype
    torch.testing.assert_close(found.float(), exact, atol=TOLERANCE[query.dtype], rtol=TOLERANCE[query.dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("sizes", [(1, 5, (12, 12), 150, 64), (3, 7, (4, 2), 17, 16), (2, 3, (6, 1), 33, 80)], ids=str)
def test_every_level_is_right(
    level: str, dtype: torch.dtype, sizes: tuple[int, int, tuple[int, int], int, int]
) -> None:
    query, keys, values = call(1, *sizes, dtype)
    assert_right(frame_attention_native(query, keys, values, None, 0.3, level), query, keys, values)


@given(
    seed=st.integers(0, 2**31),
    utterances=st.integers(1, 4),
    queries=st.integers(1, 13),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 3), (8, 1)]),
    frames=st.integers(1, 70),
    dim=st.sampled_from([16, 48, 64, 128, 256]),
    level=st.sampled_from(LEVELS),
    threads=st.integers(1, 3),
)
@settings(deadline=None, max_examples=60)
def test_random_shapes_lengths_and_layouts(
    seed: int, utterances: int, queries: int, heads: tuple[int, int], frames: int, dim: int, level: str, threads: int
) -> None:
    query, keys, values = call(seed, utterances, queries, heads, frames, dim, torch.float32)
    lengths = torch.from_numpy(np.random.default_rng(seed).integers(0, frames + 1, utterances).astype(np.int32))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plain = frame_attention_native(query, keys, values, lengths, 0.3, level)
        by_head = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in (query, keys, values)]
        other = frame_attention_native(*by_head, lengths, 0.3, level)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(plain, other)
    assert_right(plain, query, keys, values, lengths)
    assert not plain[lengths == 0].any()


@given(
    seed=st.integers(0, 2**31),
    beams=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 3)]),
    level=st.sampled_from(LEVELS),
    threads=st.integers(1, 3),
    with_lengths=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_queries_laid_end_to_end_are_as_those_of_each_utterance_alone(
    seed: int, beams: list[int], heads: tuple[int, int], level: str, threads: int, with_lengths: bool
) -> None:
    _, keys, values = call(seed, len(beams), 1, heads, 37, 32, torch.float32)
    lengths = None
    if with_lengths:
        lengths = torch.from_numpy(np.random.default_rng(seed).integers(0, 38, len(beams)).astype(np.int32))
    packed = torch.randn(heads[0], sum(beams), 32).transpose(0, 1)[None]  # as a model leaves it
    starts = torch.tensor([0, *beams]).cumsum(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = frame_attention_native(packed, keys, values, lengths, 0.3, level, starts)
    finally:
        torch.set_num_threads(before)
    assert found.shape == packed.shape
    for u, (first, last) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        own = slice(u, u + 1)
        length = None if lengths is None else lengths[own]
        alone = frame_attention_native(packed[:, first:last], keys[own], values[own], length, 0.3, level)
        assert torch.equal(found[:, first:last], alone)


def test_an_utterance_does_not_depend_on_its_neighbours() -> None:
    query, keys, values = call(2, 3, 5, (4, 4), 40, 32, torch.float32)
    keys[1, 7, 2, 3] = float("nan")
    values[2, 39] = float("inf")
    together = frame_attention_native(query, keys, values, None, 0.3)
    assert together[1, :, 2].isnan().all()
    assert together[1, :, [0, 1, 3]].isfinite().all()
    assert torch.equal(together[0], frame_attention_native(query[:1], keys[:1], values[:1], None, 0.3)[0])


def test_unseen_frames_are_not_looked_at() -> None:
    query, keys, values = call(3, 2, 5, (2, 2), 50, 16, torch.float32)
    keys[:, 20:], values[:, 20:] = float("nan"), float("nan")
    found = frame_attention_native(query, keys, values, torch.tensor([20, 3], dtype=torch.int32), 0.3)
    assert found.isfinite().all()


def test_large_scores_do_not_overflow() -> None:
    query, keys, values = call(4, 1, 2, (1, 1), 30, 16, torch.float32)
    found = frame_attention_native(1e4 * query, keys, values, None, 0.3)
    best = (query[0, :, 0] @ keys[0, :, 0].T).argmax(dim=1)
    torch.testing.assert_close(found[0, :, 0], values[0, best, 0])


def test_no_frames_and_no_queries_give_zeros_and_nothing() -> None:
    query, keys, values = call(5, 2, 3, (2, 2), 4, 16, torch.float32)
    assert not frame_attention_native(query, keys[:, :0], values[:, :0], None, 0.3).any()
    assert frame_attention_native(query[:, :0], keys, values, None, 0.3).shape == (2, 0, 2, 16)


def test_the_front_refuses_what_the_core_cannot_hold() -> None:
    query, keys, values = call(6, 1, 2, (2, 2), 4, 24, torch.float32)
    with pytest.raises(InvalidArgumentError, match="multiple of 16"):
        frame_attention(query, keys, values, None, 0.3, backend="native")
    torch.testing.assert_close(
        frame_attention(query, keys, values, None, 0.3), frame_attention(query, keys, values, None, 0.3, backend="sdpa")
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": (1, 2, 3, 2, 4, 16)}, "multiple of key_heads"),
        ({"sizes": (1, 2, 2, 2, 4, 24)}, "multiple of 16"),
        ({"sizes": (1, 2, 2, 2, 4, 272)}, "up to 256"),
        ({"sizes": (0, 2, 2, 2, 4, 16)}, "from 1 to"),
        ({"dtype": 3}, "dtype code"),
        ({"threads": 0}, "threads"),
        ({"level": "sse9"}, "level must be one"),
        ({"keys": 0}, "keys must be aligned"),
        ({"query": 2}, "query must be aligned"),
        ({"starts": 4}, "starts must be aligned"),
        ({"starts": [1, 1]}, "starts must ascend"),
        ({"starts": [0, 2]}, "starts must ascend"),
        ({"starts": [0, 2, 1], "sizes": (2, 1, 2, 2, 4, 16)}, "starts must ascend"),
    ],
    ids=str,
)
def test_the_border_checks_what_it_is_given(change: dict[str, object], message: str) -> None:
    memory = torch.zeros(1024)
    if isinstance(change.get("starts"), list):
        numbers = torch.tensor(change["starts"])
        change = {**change, "starts": numbers.data_ptr()}
    arguments: dict[str, object] = {
        "query": memory.data_ptr(), "query_strides": (32, 32, 16), "keys": memory.data_ptr(),
        "key_strides": (128, 32, 16), "values": memory.data_ptr(), "value_strides": (128, 32, 16), "dtype": 0,
        "output": memory.data_ptr(), "lengths": 0, "starts": 0, "sizes": (1, 1, 2, 2, 4, 16), "scale": 0.3,
        "level": None, "threads": 1,
    }  # fmt: skip
    _native.frame_attention(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        _native.frame_attention(**{**arguments, **change})  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_attends_as_well() -> None:
    query, keys, values = call(7, 4, 5, (2, 2), 40, 32, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        wanted = frame_attention_native(query, keys, values, None, 0.3)
        child = os.fork()
        if child == 0:
            same = torch.equal(frame_attention_native(query, keys, values, None, 0.3), wanted)
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


def test_the_shipped_decoder_hears_the_same_as_with_its_own_attention() -> None:
    loaded = WhisperForConditionalGeneration.from_pretrained(model_directory("asr"), dtype=torch.float32).eval()
    config = loaded.config
    states = torch.randn(2, config.max_source_positions, config.d_model)
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    found = []
    with torch.inference_mode():
        for implementation in ("sdpa", ATTENTION):
            loaded.set_attn_implementation(implementation)
            found.append(loaded.model.decoder(input_ids=ids, encoder_hidden_states=states).last_hidden_state)
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
    assert not torch.equal(found[1], found[0])  # or ours had not been asked
