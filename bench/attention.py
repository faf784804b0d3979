"""Attention of one layer of a beam search's step: beams as queries over shared keys, against a copy per beam.

Self-attention: what transformers' beam search does each step (reorder keys and values by index_select, append, attend
per beam), the attention per beam alone, and ours: scaled_dot_product_attention over the union of live slots on the
CPU, the Triton kernel over a slot table on CUDA. Cross-attention: keys and values once per utterance or once per beam;
ours is the C++ core on the CPU, a Triton kernel on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.timing import Measurement, measurements, take_turns
from shallowfusion.scorers.attention import frame_attention, slot_attention, write_slots
from shallowfusion.scorers.slot_tables import slot_table

__all__ = ["Step", "make_step", "run"]

BEAMS = (1, 2, 5, 10, 16)
LENGTHS = (32, 64, 128, 256, 448)
FRAMES, HEADS, DIM = 1500, 12, 64  # whisper-small and gpt2
PROMPT = 4
SHARED = 0.2  # of a beam's length, what its fellows have of their own: beams part late
CAPTURED = 20  # calls in one CUDA graph


@dataclass(frozen=True)
class Step:
    """Inputs of one layer at one step, in both forms.

    Args:
        query: [utterances, beams, heads, dim].
        new: keys and values of the step, [utterances, beams, heads, dim] each.
        pool: keys and values [utterances, slots, heads, dim] each.
        slots: int64 [utterances, beams], where the new ones go.
        visible: bool [utterances, 1, beams, slots].
        own: keys and values per beam without the new ones, [utterances * beams, heads, length - 1, dim] each.
        parents: int64 [utterances * beams].
        frames: keys and values [utterances, heads, frames, dim] each.
    """

    query: Tensor
    new: tuple[Tensor, Tensor]
    pool: tuple[Tensor, Tensor]
    slots: Tensor
    visible: Tensor
    own: tuple[Tensor, Tensor]
    parents: Tensor
    frames: tuple[Tensor, Tensor]


def make_step(utterances: int, beams: int, length: int, dtype: torch.dtype, device: str) -> Step:
    """Beams share all but the last fifth of their history; parents are such that this stays so."""
    generator = torch.Generator().manual_seed(beams * 1000 + length)
    tail = max(1, int((length - PROMPT) * SHARED)) if beams > 1 else 1
    trunk = length - tail
    used = trunk + beams * tail

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    visible = torch.zeros((utterances, 1, beams, used), dtype=torch.bool)
    visible[..., :trunk] = True
    places = torch.arange(trunk, used).view(beams, tail)  # the last of each is the new one's
    for k in range(beams):
        visible[:, 0, k, places[k]] = True
    pool = (random(utterances, used, HEADS, DIM), random(utterances, used, HEADS, DIM))
    new = (random(utterances, beams, HEADS, DIM), random(utterances, beams, HEADS, DIM))
    slots = places[:, -1].expand(utterances, beams)
    parents = torch.arange(beams).flip(0)  # a permutation: each row of the pool form then continues its own parent
    per_beam = []
    for part in pool:
        rows = torch.cat([torch.arange(trunk).expand(beams, -1), places[:, :-1]], dim=1)[parents.argsort()]
        per_beam.append(part[:, rows.to(device)].flatten(0, 1).transpose(1, 2).contiguous())
    offsets = torch.arange(utterances)[:, None] * beams
    frames = (random(utterances, HEADS, FRAMES, DIM), random(utterances, HEADS, FRAMES, DIM))
    return Step(
        query=random(utterances, beams, HEADS, DIM),
        new=new,
        pool=pool,
        slots=slots.to(device),
        visible=visible.to(device),
        own=(per_beam[0], per_beam[1]),
        parents=(offsets + parents).flatten().to(device),
        frames=frames,
    )


def reordered(step: Step) -> Tensor:
    """transformers' way: index_select, cat, attention per beam."""
    utterances, beams = step.query.shape[:2]
    keys, values = (
        torch.cat([own.index_select(0, step.parents), new.flatten(0, 1)[:, :, None]], dim=2)
        for own, new in zip(step.own, step.new, strict=True)
    )
    found = scaled_dot_product_attention(step.query.flatten(0, 1)[:, :, None], keys, values)
    return found.view(utterances, beams, HEADS, DIM)


def per_beam(step: Step, keys: Tensor, values: Tensor) -> Tensor:
    return scaled_dot_product_attention(step.query.flatten(0, 1)[:, :, None], keys, values)


def union(step: Step) -> Tensor:
    """Ours on the CPU: write the new keys, one attention over the union with a mask."""
    lanes = torch.arange(len(step.query), device=step.query.device)
    write_slots(*step.new, *step.pool, step.slots, lanes, "sdpa")
    keys, values = (part.transpose(1, 2) for part in step.pool)
    return scaled_dot_product_attention(
        step.query.transpose(1, 2), keys, values, attn_mask=step.visible, scale=DIM**-0.5
    ).transpose(1, 2)


def from_table(step: Step, table: Tensor) -> Tensor:
    """Ours on CUDA: two launches, three where few programs split the walk."""
    lanes = torch.arange(len(step.query), device=step.query.device)
    write_slots(*step.new, *step.pool, step.slots, lanes, "triton")
    return slot_attention(step.query, *step.pool, table, DIM**-0.5, backend="triton")


def shared_frames(step: Step, backend: str) -> Tensor:
    keys, values = (part.transpose(1, 2) for part in step.frames)
    return frame_attention(step.query, keys, values, None, DIM**-0.5, backend=backend)  # type: ignore[arg-type]


def copy_speed(device: str) -> float:
    """Bytes per second read and written by a copy of 1 GB: the ceiling that fractions are of."""
    source = torch.zeros(2**28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = take_turns({"copy": lambda: target.copy_(source)}, 10, device=device)["copy"]
    return 2 * source.numel() * 4 / sorted(seconds)[len(seconds) // 2]


def run(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """Every beam size at one length, every length at beam 5, cross-attention at every beam size; results compared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.float16, torch.float32)
    ceiling = copy_speed(device) if device == "cuda" else float("nan")
    shapes = [(8, beams, 128) for beams in BEAMS] + [(8, 5, length) for length in LENGTHS if length != 128]
    shapes += [(1, 5, 128), (32, 5, 128)] if device == "cuda" else [(1, 5, 128)]
    with torch.inference_mode():
        for dtype in dtypes:
            for utterances, beams, length in shapes[:2] if quick else shapes:
                step = make_step(utterances, beams, length, dtype, device)
                if dtype == dtypes[0] or device == "cuda":
                    yield self_rows(step, length, dtype, device, ceiling, quick)
                if length == 128:
                    yield cross_rows(step, dtype, device, ceiling, quick)
    torch.set_num_threads(threads)


def self_rows(
    step: Step, length: int, dtype: torch.dtype, device: str, ceiling: float, quick: bool
) -> list[Measurement]:
    grown = [torch.cat([own, new.flatten(0, 1)[:, :, None]], 2) for own, new in zip(step.own, step.new, strict=True)]
    providers: dict[str, Callable[[], Tensor]] = {"union": lambda: union(step)}
    if device == "cuda":
        table = slot_table(step.visible[:, 0])
        providers = {"slot table, triton": lambda: from_table(step, table), **providers}
    ours = next(iter(providers))
    providers |= {"index_select+cat+sdpa": lambda: reordered(step), "sdpa per beam": lambda: per_beam(step, *grown)}
    check(providers[ours](), reordered(step), dtype)
    size = 2 * step.visible[:, 0].any(dim=1).sum().item() * HEADS * DIM * step.query.element_size()
    shape = f"self utterances={step.query.shape[0]} beams={step.query.shape[1]} length={length} heads={HEADS}x{DIM}"
    return rows(providers, ours, shape, dtype, device, size, ceiling, quick)


def cross_rows(step: Step, dtype: torch.dtype, device: str, ceiling: float, quick: bool) -> list[Measurement]:
    backend = "triton" if device == "cuda" else "native"
    beams = step.query.shape[1]
    copies = [part.repeat_interleave(beams, dim=0) for part in step.frames]
    providers: dict[str, Callable[[], Tensor]] = {f"shared, {backend}": lambda: shared_frames(step, backend)}
    ours = next(iter(providers))
    providers["shared, sdpa"] = lambda: shared_frames(step, "sdpa")
    providers["index_select+sdpa"] = lambda: per_beam(step, *(part.index_select(0, step.parents) for part in copies))
    providers["sdpa per beam"] = lambda: per_beam(step, *copies)
    check(providers[ours](), providers["sdpa per beam"]().view_as(step.query), dtype)
    size = sum(part.numel() * part.element_size() for part in step.frames)
    shape = f"cross utterances={step.query.shape[0]} beams={beams} frames={FRAMES} heads={HEADS}x{DIM}"
    return rows(providers, ours, shape, dtype, device, size, ceiling, quick)


def check(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found, expected.view_as(found), atol=tolerance, rtol=0)


def rows(
    providers: dict[str, Callable[[], Tensor]],
    ours: str,
    shape: str,
    dtype: torch.dtype,
    device: str,
    size: float,
    ceiling: float,
    quick: bool,
) -> list[Measurement]:
    """`gigabytes_per_second` is of the bytes that have to be read: the live keys and values of each utterance, once."""
    if device == "cuda":
        providers = {name: captured(call) for name, call in providers.items()}
    seconds = take_turns(providers, 5 if quick else 60, warm_up=5, device=device)
    if device == "cuda":
        seconds = {name: [one / CAPTURED for one in own] for name, own in seconds.items()}
    middle = {name: sorted(own)[len(own) // 2] for name, own in seconds.items()}
    speed = {name: size / 1e9 / own for name, own in middle.items()}
    note = (
        {} if device == "cpu" else {name: f"{size / own / ceiling:.2f} of copy speed" for name, own in middle.items()}
    )
    full = f"{shape} threads={torch.get_num_threads()}"
    return measurements("attention", full, str(dtype)[6:], seconds, ours, gigabytes_per_second=speed, note=note)


def captured(call: Callable[[], Tensor]) -> Callable[[], object]:
    """The call many times over in one CUDA graph, timed as a whole: launches from Python would be what is measured."""
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CAPTURED):
            call()
    return graph.replay
