"""Products with a decoder's weights on the CPU: torch's own, oneDNN's over packed weights, ours in tiles, and int8.

Also queries, keys and values as one product or as three.

Every call reads enough layers' weights that none is in the cache from the turn before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bench.timing import Measurement, measurements, take_turns
from shallowfusion.scorers.preparation import Int8Linear, PackedLinear
from shallowfusion.scorers.tile_products import has_tile_rows

__all__ = ["run"]

ROWS = (1, 5, 10, 40, 80, 1500)
SIZES = ((768, 768), (768, 3072), (3072, 768), (768, 51_864))  # inputs, outputs: whisper-small and gpt2
MANY_OUTPUTS = 10_000  # of which nobody wants a thousand rows
ENOUGH = 160 * 2**20  # bytes of float32 weights per call
Layers = list[nn.Module]


def run(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """Milliseconds per product, and bytes of float32 weights over that time."""
    torch.manual_seed(0)
    repeats = 3 if quick else 15
    with torch.inference_mode():
        for inputs, outputs in SIZES[:1] if quick else SIZES:
            layers = [nn.Linear(inputs, outputs) for _ in range(max(1, ENOUGH // (4 * inputs * outputs)))]
            kinds: dict[str, Layers] = {
                "torch": list(layers),
                "packed": [PackedLinear(own.weight, own.bias, tiles=False) for own in layers],
                **({"tiles": [PackedLinear(own.weight, own.bias) for own in layers]} if has_tile_rows() else {}),
                "int8": [Int8Linear(own.weight, own.bias) for own in layers],
            }
            for rows in ROWS[:2] if quick else ROWS if outputs < MANY_OUTPUTS else ROWS[:-1]:
                yield compare(kinds, rows, inputs, outputs, repeats)
        yield joined(768, 5, repeats)
        yield joined(768, 40, repeats)


def compare(kinds: dict[str, Layers], rows: int, inputs: int, outputs: int, repeats: int) -> list[Measurement]:
    given = torch.randn(rows, inputs)
    for kind in {"packed", "tiles"} & set(kinds):
        torch.testing.assert_close(kinds[kind][0](given), kinds["torch"][0](given), atol=1e-3, rtol=1e-4)
    calls = {name: over(layers, given) for name, layers in kinds.items()}
    return timed(calls, f"rows={rows} {inputs}x{outputs}", len(kinds["torch"]), 4 * inputs * outputs, repeats)


def joined(width: int, rows: int, repeats: int) -> list[Measurement]:
    """Three packed products side by side against one that is three times as wide."""
    count = max(1, ENOUGH // (12 * width * width))
    given = torch.randn(rows, width)
    three: Layers = [PackedLinear(torch.randn(width, width), torch.randn(width)) for _ in range(3 * count)]
    one: Layers = [PackedLinear(torch.randn(3 * width, width), torch.randn(3 * width)) for _ in range(count)]
    calls = {"packed": over(three, given), "packed, Q, K, V as one": over(one, given)}
    return timed(calls, f"Q, K, V rows={rows} {width}x{width}", count, 12 * width * width, repeats)


def over(layers: Layers, given: Tensor) -> Callable[[], object]:
    return lambda: [layer(given) for layer in layers]


def timed(calls: dict[str, Callable[[], object]], shape: str, count: int, size: int, repeats: int) -> list[Measurement]:
    seconds = {name: [one / count for one in own] for name, own in take_turns(calls, repeats).items()}
    speed = {name: size / 1e9 / sorted(own)[len(own) // 2] for name, own in seconds.items()}
    full = f"{shape} threads={torch.get_num_threads()}"
    return measurements("products", full, "float32", seconds, "packed", gigabytes_per_second=speed)
