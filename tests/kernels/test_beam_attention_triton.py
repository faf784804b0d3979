"""Attention for beams in Triton against its float64 reference: on the GPU where there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.kernels.beam_attention import (
    frame_attention_triton,
    plan_frame_attention,
    plan_slot_attention,
    slot_attention_triton,
    write_slots_triton,
)
from shallowfusion.kernels.beam_attention_reference import write_slots_reference
from tests.kernels.attention_cases import (
    Sizes,
    assert_in_budget,
    exact_frames,
    exact_slots,
    frame_call,
    mask_of,
    noise,
    slot_call,
    table_of,
    torch_attention,
)
from tests.kernels.cases import to_device

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [
    Sizes(4, 4, 64, 5),
    Sizes(4, 2, 64, 1, slots=7),
    Sizes(3, 1, 80, 5, slots=33),
    Sizes(6, 2, 96, 4, slots=64),
    Sizes(7, 1, 16, 9, slots=65),
    Sizes(2, 1, 128, 32, slots=40),
    Sizes(1, 1, 24, 70, utterances=2, slots=70),  # three words of bits; padded head size
    Sizes(40, 1, 32, 1, utterances=2, slots=20),  # one query fills a program
    Sizes(1, 1, 8, 5, utterances=1, slots=20),
]


def out_for(query: torch.Tensor) -> torch.Tensor:
    """The interpreter cuts float32 to bfloat16 where a device rounds; what is compared there is float32."""
    cut = query.dtype == torch.bfloat16 and DEVICE.type == "cpu"
    return torch.full(query.shape, torch.nan, dtype=torch.float32 if cut else query.dtype, device=DEVICE)


def run_slots(call: tuple[torch.Tensor, ...], scale: float, splits: int | None = None) -> torch.Tensor:
    query, keys, values, table = (to_device(part, DEVICE) for part in call)
    return slot_attention_triton(query, keys, values, table, scale, splits=splits, out=out_for(query)).cpu()


def run_frames(call: tuple[torch.Tensor, ...], scale: float, splits: int | None = None) -> torch.Tensor:
    query, keys, values, lengths = (to_device(part, DEVICE) for part in call)
    return frame_attention_triton(query, keys, values, lengths, scale, splits=splits, out=out_for(query)).cpu()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_slots_agree_with_the_reference(sizes: Sizes, dtype: torch.dtype, splits: int) -> None:
    sizes = Sizes(**{**sizes.__dict__, "dtype": dtype})
    call, scale = slot_call(sizes, seed=sizes.queries), sizes.dim**-0.5
    query, keys, values, table = call
    mask = mask_of(table, sizes.queries, sizes.slots)
    places = table[:, 0, 0].long()
    torchs = torch_attention(query, keys[places], values[places], mask, scale)
    found = run_slots(call, scale, splits)
    assert_in_budget(found, exact_slots(*call, scale), torchs)
    assert (found[~mask.any(dim=3)[:, 0]] == 0).all()  # dead rows, and the utterance without entries


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_frames_agree_with_the_reference(sizes: Sizes, dtype: torch.dtype, splits: int) -> None:
    sizes = Sizes(**{**sizes.__dict__, "dtype": dtype})
    frames, scale = 2 * sizes.slots + 1, sizes.dim**-0.5
    call = frame_call(sizes, frames, seed=sizes.queries)
    query, keys, values, lengths = call
    mask = (torch.arange(frames) < lengths[:, None])[:, None, None].expand(-1, 1, sizes.queries, -1)
    found = run_frames(call, scale, splits)
    assert_in_budget(found, exact_frames(*call, scale), torch_attention(query, keys, values, mask, scale))
    assert (found[lengths == 0] == 0).all()


def test_all_frames_count_where_no_lengths_are_given() -> None:
    query, keys, values, _ = frame_call(Sizes(2, 2, 64, 5), 150)
    found = run_frames((query, keys, values, None), 0.125)
    torch.testing.assert_close(found.double(), exact_frames(query, keys, values, None, 0.125), atol=1e-5, rtol=0)


@pytest.mark.parametrize("beam_size", [1, 5, 32])
def test_each_row_sees_its_own_history_after_random_reorders(beam_size: int) -> None:
    """Rows fork and die for 20 steps; each must find what plain attention over its own keys finds."""
    generator = torch.Generator().manual_seed(beam_size)
    sizes = Sizes(4, 2, 16, beam_size, utterances=2, slots=2 + 20 * beam_size)
    keys, values = (noise(2, sizes.slots, 2, 16, seed=i, dtype=torch.float32) for i in (1, 2))
    histories = [[[0, 1]] * beam_size for _ in range(2)]  # a prompt of two tokens
    for step in range(20):
        parents = torch.randint(0, beam_size, (2, beam_size), generator=generator).tolist()
        slots = range(2 + step * beam_size, 2 + (step + 1) * beam_size)
        histories = [
            [[*own[p], slot] for p, slot in zip(chosen, slots, strict=True)]
            for own, chosen in zip(histories, parents, strict=True)
        ]
    union = [sorted({slot for row in own for slot in row}) for own in histories]
    width = max(map(len, union))
    seen = torch.zeros((2, beam_size, width), dtype=torch.bool)
    listed = torch.zeros((2, width), dtype=torch.int64)
    for i, own in enumerate(union):
        listed[i, : len(own)] = torch.tensor(own)
        for k, row in enumerate(histories[i]):
            seen[i, k, [own.index(slot) for slot in row]] = True
    assert width < 2 + 20 * beam_size or beam_size == 1  # dead branches are not walked
    table = table_of(seen, listed, torch.arange(2))
    table[:, 0, 1] = torch.tensor([len(own) for own in union], dtype=torch.int32)
    query = noise(2, beam_size, 4, 16, seed=3, dtype=torch.float32)
    found = run_slots((query, keys, values, table), 0.25)
    for i, own in enumerate(histories):
        for k, row in enumerate(own):
            heads = (part[i, row].repeat_interleave(2, dim=1).transpose(0, 1) for part in (keys, values))
            alone = torch.nn.functional.scaled_dot_product_attention(
                query[i, k][:, None], *heads, scale=0.25
            )  # [heads, 1, dim]
            torch.testing.assert_close(found[i, k], alone[:, 0], atol=2e-6, rtol=0)


@pytest.mark.parametrize("places", [None, [3, 0, 2]])
@pytest.mark.parametrize("sizes", SHAPES[:6], ids=str)
def test_writes_go_where_the_reference_writes(sizes: Sizes, places: list[int] | None) -> None:
    new = [noise(3, sizes.key_heads, sizes.queries, sizes.dim, seed=i, dtype=torch.float16) for i in (1, 2)]
    new_keys, new_values = (part.transpose(1, 2) for part in new)  # as a projection leaves them
    pools = [noise(4, sizes.slots, sizes.key_heads, sizes.dim, seed=i, dtype=torch.float16) for i in (3, 4)]
    expected = [pool.clone() for pool in pools]
    slots = torch.stack([torch.randperm(sizes.slots)[: sizes.queries] for _ in range(3)])
    slots[0, 0] = -1
    where = None if places is None else torch.tensor(places)
    slots = slots if places is None else slots[:1].expand(3, -1)  # one prompt's slots for all
    write_slots_reference(new_keys, new_values, *expected, slots, where)
    given = [to_device(part, DEVICE) for part in (new_keys, new_values, *pools, slots)]
    write_slots_triton(*given, to_device(where, DEVICE))
    assert torch.equal(given[2].cpu(), expected[0])
    assert torch.equal(given[3].cpu(), expected[1])


def test_addresses_beyond_two_to_the_31_elements() -> None:
    """Slots 2^29 elements apart: the fifth lies where an int32 product has wrapped. Memory is reserved, not touched."""
    far, dim = 2**29, 16
    flat = torch.empty(6 * far, dtype=torch.float16)  # 6 GB of addresses, a few pages of memory
    pool = flat.as_strided((1, 6, 1, dim), (6 * far, far, dim, 1))
    slots = [0, 5]
    for slot in slots:
        pool[0, slot] = noise(1, dim, seed=slot, dtype=torch.float16)
    query = noise(1, 1, 1, dim, seed=9, dtype=torch.float16)
    table = table_of(torch.ones((1, 1, 2), dtype=torch.bool), torch.tensor([slots]), torch.tensor([0]))
    expected = exact_slots(query, pool, pool, table, 1.0)
    if DEVICE.type == "cuda":
        pool = flat.cuda().as_strided(pool.shape, pool.stride())
    found = slot_attention_triton(query.to(DEVICE), pool, pool, table.to(DEVICE), 1.0)
    torch.testing.assert_close(found.cpu().double(), expected, atol=2e-3, rtol=0)


def test_few_programs_split_the_walk_and_many_do_not() -> None:
    query = torch.zeros((1, 5, 20, 64))
    frames = torch.zeros((1, 20, 1500, 64)).transpose(1, 2)
    launches, _ = plan_frame_attention(query, frames, frames, None, 1.0)
    assert [launch.kernel.__name__ for launch in launches] == ["attend_frames", "merge_splits"]
    assert launches[0].grid[0] >= 264
    many, stored = query.expand(32, -1, -1, -1), frames.expand(32, -1, -1, -1)
    launches, _ = plan_frame_attention(many, stored, stored, None, 1.0)
    assert [launch.kernel.__name__ for launch in launches] == ["attend_frames"]
    pool, table = torch.zeros((1, 448, 20, 64)), torch.zeros((1, 3, 64), dtype=torch.int32)
    assert len(plan_slot_attention(query, pool, pool, table, 1.0)[0]) == 1  # short: the merge would cost more
    table = torch.zeros((1, 3, 448), dtype=torch.int32)
    assert len(plan_slot_attention(query, pool, pool, table, 1.0)[0]) == 2


def test_same_answer_bit_for_bit_when_called_again() -> None:
    call = slot_call(Sizes(4, 2, 32, 5, slots=200))
    assert torch.equal(run_slots(call, 0.2, splits=3), run_slots(call, 0.2, splits=3))


@pytest.mark.parametrize(
    ("heads", "dim", "dtype", "message"),
    [(1, 512, torch.float16, "head sizes up to 256"), (64, 128, torch.float32, "up to 32 query heads per key head")],
)
def test_what_does_not_fit_is_refused(heads: int, dim: int, dtype: torch.dtype, message: str) -> None:
    query, pool = torch.zeros((1, 2, heads, dim), dtype=dtype), torch.zeros((1, 8, 1, dim), dtype=dtype)
    with pytest.raises(InvalidArgumentError, match=message):
        plan_slot_attention(query, pool, pool, torch.zeros((1, 3, 8), dtype=torch.int32), 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(20, 20, 64, 5, utterances=8, slots=448),
        Sizes(12, 12, 64, 32, utterances=2, slots=300),
        Sizes(32, 8, 64, 10, utterances=4, slots=448),
        Sizes(14, 2, 64, 5, utterances=1, slots=448),
        Sizes(16, 2, 128, 5, utterances=4, slots=200),
        Sizes(20, 20, 80, 5, utterances=2, slots=100),
        Sizes(32, 1, 128, 2, utterances=2, slots=100),
    ],
    ids=str,
)
def test_full_size_on_the_gpu(sizes: Sizes, dtype: torch.dtype) -> None:
    sizes = Sizes(**{**sizes.__dict__, "dtype": dtype})
    scale = sizes.dim**-0.5
    call = slot_call(sizes)
    query, keys, values, table = call
    places, mask = table[:, 0, 0].long(), mask_of(table, sizes.queries, sizes.slots)
    torchs = torch_attention(*(part.cuda() for part in (query, keys[places], values[places], mask)), scale).cpu()
    for splits in (None, 1, 5):
        assert_in_budget(run_slots(call, scale, splits), exact_slots(*call, scale), torchs)
    call = frame_call(sizes, 1500)
    query, keys, values, lengths = call
    mask = (torch.arange(1500) < lengths[:, None])[:, None, None].expand(-1, 1, sizes.queries, -1)
    torchs = torch_attention(*(part.cuda() for part in (query, keys, values, mask)), scale).cpu()
    for splits in (None, 1, 7):
        assert_in_budget(run_frames(call, scale, splits), exact_frames(*call, scale), torchs)


@pytest.mark.gpu
def test_a_captured_launch_reads_the_number_of_entries_from_the_table() -> None:
    call = slot_call(Sizes(12, 12, 64, 5, torch.float16, utterances=4, slots=448))
    query, keys, values, table = (part.cuda() for part in call)
    out = torch.zeros_like(query)
    slot_attention_triton(query, keys, values, table, 0.125, out=out)  # compiled
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slot_attention_triton(query, keys, values, table, 0.125, out=out)
    for count in (448, 100, 1, 0):
        table[:, 0, 1] = count
        graph.replay()
        again = slot_attention_triton(query, keys, values, table, 0.125)
        assert torch.equal(out, again)
    assert not out.any()
