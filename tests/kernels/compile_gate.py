"""Compiles every kind of variant that the launcher of the fused step can choose, to machine code, without a GPU.

    python -m tests.kernels.compile_gate report.json 90

Requests are planned by the launcher itself and each launch is compiled as the just-in-time compiler would on that
device, so a variant cannot be forgotten here and reached there. The options of a request are crossed for two float32
sources; number of sources, dtype, padding, rows and top_k are swept around that. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from shallowfusion.config import BeamSettings
from shallowfusion.kernels.beam_advance import plan_beam_advance, plan_follow_slots, plan_limit_end
from shallowfusion.kernels.beam_advance_arrays import AdvanceTables, BeamArrays, SlotArrays
from shallowfusion.kernels.fused_step import Launch, plan_fused_step, plan_row_statistics
from shallowfusion.kernels.range_lse import plan_range_log_probs
from shallowfusion.values import StepRequest, Unmapped, no_candidates
from tests.kernels.attention_cases import attention_launches
from tests.kernels.cases import extras, request
from tests.kernels.range_cases import ranges_of

VOCABS = (51866, 50257, 50257, 51866)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class CompileOnly:
    """A driver without a device: enough for `kernel.warmup`, which compiles and does not launch."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def source(rows: int, vocab: int, dtype: torch.dtype, padded: bool) -> torch.Tensor:
    width = -(-vocab // 128) * 128 if padded else vocab
    return torch.zeros((rows, width), dtype=dtype)[:, :vocab]


def full_size(
    rows: int = 16, count: int = 2, dtype: torch.dtype = torch.float32, padded: bool = True, **options: Any
) -> StepRequest:
    sources = [source(rows, vocab, dtype, padded) for vocab in VOCABS[:count]]
    return request(*sources, **{"end_id": 50256, "top_k": 10, **options})


def named_requests() -> Iterator[tuple[str, StepRequest]]:
    """Every combination of options, then one dimension at a time."""
    more = extras(16, VOCABS[0], 50256)
    mapping = torch.zeros(VOCABS[0], dtype=torch.int32)
    for combine, normalize, mapped, extra in itertools.product(
        ("log_linear", "mixture"), ("none", "end_factored", "local"), (False, True), (False, True)
    ):
        options = {"combine": combine, "normalize": normalize, "maps": (None, mapping if mapped else None)}
        label = f"{combine} {normalize}{' mapped' if mapped else ''}{' extras' if extra else ''}"
        yield label, full_size(**options, **(more if extra else {}))
    yield (
        "two unmapped sets",
        request(*(source(16, vocab, torch.float32, True) for vocab in (51866, 50257, 40000)), end_id=50256, top_k=10),
    )
    for count in (1, 3, 4):
        yield f"{count} sources", full_size(count=count, normalize="end_factored")
    yield "4 sources, mixture", full_size(count=4, combine="mixture")
    for dtype in (torch.float16, torch.bfloat16):
        yield str(dtype), full_size(dtype=dtype, normalize="end_factored")
    yield "unpadded", full_size(padded=False)
    yield (
        "same variants",
        request(
            *(source(32, vocab, torch.float32, True) for vocab in (51865, 50304)),
            **{"temperatures": (0.9, 1.1), "unmapped": (Unmapped("floor", -9.0),) * 2, "end_id": -1, "top_k": 10},
        ),
    )
    yield "few rows", full_size(rows=10, beam_size=5)
    yield "beam 8", full_size(beam_size=8, top_k=16)
    for top_k in (2, 32, 64):
        yield f"top {top_k}", full_size(top_k=top_k)


def launches() -> Iterator[tuple[str, Launch]]:
    for name, asked in named_requests():
        for launch in plan_fused_step(asked)[0]:
            yield name, launch
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for launch in plan_row_statistics(source(16, VOCABS[0], dtype, True))[0]:
            yield f"row statistics {dtype}", launch


def range_launches() -> Iterator[tuple[str, Launch]]:
    """Ranges of sorted and of unsorted logits; another vocabulary and row count must need no variant of their own."""
    for rows, vocab, name in ((16, 51866, "ranges"), (24, 50304, "same variants")):
        ranges = ranges_of([[(0, 9)]] * rows)
        order = torch.zeros(-(-vocab // 128) * 128, dtype=torch.int32)[:vocab]
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for permuted in (False, True):
                logits = source(rows, vocab, dtype, padded=True)
                for launch in plan_range_log_probs(logits, ranges, order if permuted else None)[0]:
                    yield f"{name} {dtype} {'permuted' if permuted else 'sorted'}", launch
    few = ranges_of([[(0, 9)]] * 4)
    for launch in plan_range_log_probs(source(4, 50257, torch.float32, padded=False), few)[0]:
        yield "ranges unpadded few rows", launch


def advance_launches() -> Iterator[tuple[str, Launch]]:
    """Device-driven steps of every rule and width; other lengths and prompts must need no variant of their own."""
    sized = [("hf", 1, 1), ("hf", 5, 1), ("hf", 32, 1), ("whisper", 5, 1), ("whisper", 8, 2), ("espnet", 5, 1)]
    asked = [(f"{rule} beam {beam} ends {ends}", rule, beam, ends, 448) for rule, beam, ends in sized]
    asked += [("same variants", rule, 5, 1, 97) for rule in ("hf", "whisper", "espnet")]
    for name, rule, beam, ends, longest in asked:
        settings = BeamSettings(beam, tuple(range(ends)), longest, rule, early_stopping="first")
        for early in ("first", "heuristic") if rule == "hf" and beam == 5 else ("heuristic",):
            tables = AdvanceTables.make(
                dataclasses.replace(settings, early_stopping=early), torch.zeros((longest + 1, 2)), [(9, 1)]
            ).spread(16)
            candidates = no_candidates(16, settings.num_candidates, 2, 16 * beam, torch.device("cpu"))
            arrays = BeamArrays.make(tables, VOCABS[0], settings.num_candidates, 2)
            yield name, plan_beam_advance(tables, arrays, candidates)
        for mapping in (None, torch.zeros(VOCABS[0], dtype=torch.int32)) if rule == "hf" else ():
            slots = SlotArrays.make(16, beam, longest, 4, "cpu")
            yield f"{name}{'' if mapping is None else ' mapped'}", plan_follow_slots(arrays, slots, mapping, VOCABS[1])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        logits = source(16, VOCABS[0], dtype, True)
        statistics = plan_row_statistics(logits)[1]
        masks = [torch.zeros((rows, -(-VOCABS[0] // 32)), dtype=torch.int32) for rows in (16, 4)]
        yield f"limit {dtype}", plan_limit_end(logits, statistics, *masks, 50256, 1.0, 1.5)


def inspect(cubin: bytes) -> dict[str, int]:
    """Registers, stack, shared memory and instruction counts of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    numbers = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/", code, re.MULTILINE))
    copies = len(re.findall(r"LDGSTS\.E\.BYPASS\S*\.128", code))
    stores = code.count("STG.E.128")
    wide = {"wide_loads": code.count("LDG.E.128"), "wide_copies": copies, "wide_stores": stores}
    return {**numbers, "instructions": instructions, **wide}


def compile_all(capability: int) -> list[dict[str, Any]]:
    driver.set_active(CompileOnly(capability))
    seen: set[str] = set()
    report = []
    for name, launch in itertools.chain(launches(), range_launches(), advance_launches(), attention_launches()):
        began = time.perf_counter()
        compiled = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.constants)
        if compiled.hash in seen:
            continue
        seen.add(compiled.hash)
        found = inspect(compiled.asm["cubin"])
        kernel = launch.kernel.__name__
        seconds = round(time.perf_counter() - began, 2)
        report.append({"capability": capability, "kernel": kernel, "request": name, **found, "seconds": seconds})
        report[-1]["constants"] = {key: value for key, value in launch.constants.items() if key.isupper()}
        report[-1]["warps"] = launch.constants["num_warps"]
        report[-1]["itemsize"] = launch.arguments[0][0].element_size() if isinstance(launch.arguments[0], tuple) else 0
        print(json.dumps(report[-1]), flush=True)
    return report


if __name__ == "__main__":
    entries = compile_all(int(sys.argv[2]))
    Path(sys.argv[1]).write_text(json.dumps(entries, indent=1))
