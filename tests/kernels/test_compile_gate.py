"""Every kind of kernel variant compiles for the A100 and the H100/H200, without spills and with 16-byte loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

ROOT = Path(__file__).parents[2]
# registers per thread at 128 threads: 168 leave three programs on a multiprocessor, 255 two
CEILINGS = {
    "fuse_logits": 168,
    "source_statistics": 128,
    "fuse_increments": 255,
    "row_select": 128,
    "merge_rows": 96,
    "mark_bonus": 32,
    "finish_row_statistics": 40,
    "group_sums": 128,
    "row_sums": 96,
    "range_sums": 64,
    "beam_advance": 192,
    "follow_slots": 128,
    "limit_end": 32,
    "attend_slots": 255,
    "attend_frames": 255,
    "merge_splits": 64,
    "write_slots": 64,
}
ONE_HEAD_CEILING = 128  # attention in half precision, head size 64, 16 query rows: four programs
MANY_SOURCES_CEILING = 255  # three or four sources hold three or four tiles


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """What the compiler made of each variant; processes of their own, since this one may run Triton's interpreter."""
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump").exists():
        pytest.skip("this triton brings no cuobjdump")
    folder = tmp_path_factory.mktemp("gate")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    running = {
        capability: subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.kernels.compile_gate", folder / capability, capability],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        for capability in ("90", "80")
    }
    assert all(process.wait() == 0 for process in running.values())
    return {capability: json.loads((folder / capability).read_text()) for capability in running}


@pytest.fixture(params=["90", "80"], ids=["sm_90", "sm_80"])
def report(request, reports) -> list[dict[str, Any]]:
    return reports[request.param]


@pytest.mark.slow
def test_every_kernel_is_there_in_every_kind_of_variant(report):
    assert {entry["kernel"] for entry in report} == set(CEILINGS)
    fused = [entry["constants"] for entry in report if entry["kernel"] == "fuse_logits"]
    two = {(c["NORMALIZE"], c["EXTRAS"]) for c in fused if c["N"] == 2}
    assert two == {(normalize, extras) for normalize in range(3) for extras in (False, True)}
    assert {c["N"] for c in fused} == {1, 2, 3, 4}
    selected = [entry["constants"] for entry in report if entry["kernel"] == "row_select"]
    assert {c["KEYS"] for c in selected} == {0, 1, 2}


@pytest.mark.slow
def test_other_sizes_and_policies_need_no_new_variant(report):
    assert not [entry["request"] for entry in report if entry["request"].startswith("same variants")]


@pytest.mark.slow
def test_no_variant_spills_or_exceeds_its_registers(report):
    for entry in report:
        assert entry["stack"] == 0, entry
        assert entry["local"] == 0, entry
        many = entry["constants"].get("N", 1) > 2 and entry["kernel"].startswith("fuse")
        assert entry["reg"] <= (MANY_SOURCES_CEILING if many else CEILINGS[entry["kernel"]]), entry


@pytest.mark.slow
def test_padded_logits_are_loaded_sixteen_bytes_at_a_time(report):
    threads = 128
    for entry in report:
        constants, padded = entry["constants"], "unpadded" not in entry["request"]
        if entry["kernel"] in ("fuse_logits", "source_statistics") and padded:
            loads = constants["N"] * constants["BLOCK"] * entry["itemsize"] // (16 * threads)
            assert entry["wide_loads"] >= loads, entry
        if entry["kernel"] == "fuse_logits" and not padded:
            assert entry["wide_loads"] == 0, entry


@pytest.mark.slow
def test_ranges_load_what_is_contiguous_sixteen_bytes_at_a_time(report):
    tiles = [entry for entry in report if entry["kernel"] == "group_sums"]
    assert {entry["request"].split()[-1] for entry in tiles} == {"sorted", "permuted", "rows"}
    for entry in tiles:
        itemsize = 4 if "permuted" in entry["request"] or "float32" in entry["request"] else 2
        loads = entry["constants"]["BLOCK"] * itemsize // (16 * 128)
        assert entry["wide_loads"] >= (0 if "unpadded" in entry["request"] else loads), entry


@pytest.mark.slow
def test_slot_lists_are_loaded_sixteen_bytes_at_a_time(report):
    lists = [entry for entry in report if entry["kernel"] == "follow_slots" and entry["constants"]["K"] <= 8]
    assert len(lists) >= 4
    assert all(entry["wide_loads"] >= 2 for entry in lists)


@pytest.mark.slow
def test_keys_and_values_are_copied_sixteen_bytes_at_a_time(report):
    """Both tiles by asynchronous copies, twice: before the loop and in it; nothing else of size is loaded there."""
    tiles = [entry for entry in report if entry["kernel"] in ("attend_slots", "attend_frames")]
    assert {entry["constants"]["ROWS"] for entry in tiles} == {16, 32, 64, 128}
    assert {entry["constants"]["DIM"] for entry in tiles} == {64, 80, 96, 128, 256}
    for entry in tiles:
        constants, itemsize = entry["constants"], 4 if "float32" in entry["request"] else 2
        copies = 2 * constants["BLOCK"] * constants["WIDE"] * itemsize // (16 * 32 * entry["warps"])
        assert entry["wide_copies"] >= 2 * copies, entry
        if constants["ROWS"] == 16 and constants["WIDE"] == 64 and itemsize == 2:
            assert entry["reg"] <= ONE_HEAD_CEILING, entry


@pytest.mark.slow
def test_new_keys_and_values_are_moved_sixteen_bytes_at_a_time(report):
    writes = [entry for entry in report if entry["kernel"] == "write_slots"]
    large = [entry for entry in writes if entry["constants"]["HEADS"] * entry["constants"]["DIM"] >= 256]
    assert large
    for entry in large:
        assert entry["wide_loads"] >= 2, entry
        assert entry["wide_stores"] >= 2, entry
