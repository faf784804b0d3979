"""Rules of the house: who may import whom, what is exported, what an import costs, what a wheel holds."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "shallowfusion"

# From the bottom up; a part may import its own level and those below.
LEVELS = [
    {"errors"},
    {"config", "checks"},
    {"values"},
    {"audio"},
    {"text"},
    {"features"},
    {"ngrams", "phrases"},
    {"scorers", "fusion", "kernels"},
    {"search"},
    {"rescoring"},
    {"options", "results"},
    {"transcripts", "planning", "ctc", "trusting"},
    {"session", "decoder", "attention_rescoring"},
    {"compat"},
    {"evaluation"},
    {"training"},
    {"demo"},
    {"cli"},
]
RANK = {part: rank for rank, level in enumerate(LEVELS) for part in level}
NATIVE_FACES = {
    "fusion/native_step.py",
    "search/beam_state.py",
    "search/beam_mirror.py",
    "scorers/page_pool.py",
    "ngrams/arpa_native.py",
    "ngrams/table.py",
    "ctc/prefix_scores.py",
    "ctc/search.py",
    "phrases/automaton.py",
    "scorers/token_ranges.py",
    "scorers/row_rounding.py",
    "scorers/tile_products.py",
    "scorers/weight_memory.py",
    "scorers/frame_attention.py",
    "ctc/lexicon.py",
}
KERNEL_FACES = {
    "fusion/step.py",
    "scorers/attention.py",
    "scorers/token_ranges.py",
    "search/beam_mirror_reference.py",
    "search/device_step.py",
}
HEAVY = ("transformers", "ray", "fastapi", "matplotlib", "jiwer", "soundfile", "tokenizers", "triton", "optuna")


def modules() -> list[Path]:
    own = sorted(path for path in PACKAGE.rglob("*.py") if "kernels" not in path.relative_to(PACKAGE).parts)
    return own + sorted((ROOT / "kernels").glob("*.py"))


def part_of(path: Path) -> str:
    if path.is_relative_to(ROOT / "kernels"):
        return "kernels"
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(path: Path) -> set[str]:
    """Names of our own modules a file imports, wherever in the file; type-only imports apart."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.split(".")[0] == "shallowfusion" and "." in name}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    assert part in RANK, f"{part} has no place in LEVELS"
    for name in imported(path):
        other = name.split(".")[1]
        if other in RANK:
            assert RANK[other] <= RANK[part], f"{path.name} ({part}) imports {name} from above"
    # Fusion knows numbers, scorers know models: neither imports the other.
    if part in ("fusion", "scorers"):
        foe = "scorers" if part == "fusion" else "fusion"
        assert not any(name.split(".")[1] == foe for name in imported(path))


def test_only_faces_import_kernels_and_the_core() -> None:
    for path in modules():
        names = imported(path)
        relative = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else f"kernels/{path.name}"
        if any(name.startswith("shallowfusion.kernels") for name in names):
            assert relative in KERNEL_FACES or relative.startswith("kernels/")
        if "shallowfusion._native" in names:
            assert relative in NATIVE_FACES


def test_exported_names() -> None:
    import shallowfusion
    from shallowfusion import fusion

    assert set(shallowfusion.__all__) == {
        "DecodingOptions", "FusionDecoder", "ShallowFusionError", "fused_step", "fusion", "row_statistics",
    }  # fmt: skip
    assert set(fusion.__all__) >= {"static", "piecewise", "article", "rescore", "Rule"}
    for name in shallowfusion.__all__:
        assert getattr(shallowfusion, name) is not None


def test_importing_the_package_pulls_in_no_heavy_package() -> None:
    code = f"import sys, shallowfusion; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_ctc_part_shows_its_front_and_imports_it_when_it_is_asked_for() -> None:
    code = "import sys, shallowfusion.ctc as c; n = [m for m in sys.modules if m.startswith('shallowfusion.ctc.')]"
    code += "; print(n, sorted(c.__all__), c.CTCDecoder.__module__, c.CtcOptions(beam_size=3).beam_size)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[] ['CTCDecoder', 'CtcLanguage', 'CtcOptions'] shallowfusion.ctc.decoder 3"


def test_transformers_still_finds_its_own_kernels_package() -> None:
    code = (
        "import shallowfusion, transformers, sys; print('kernels' in sys.modules and sys.modules['kernels'].__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert str(ROOT / "kernels") not in done.stdout


def test_modules_stay_short() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    too_long = {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > 400}
    assert not too_long


def test_functions_stay_short() -> None:
    too_long = {}
    for path in modules():
        limit = 120 if part_of(path) == "kernels" else 60
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
                docstring = ast.get_docstring(node, clean=False)
                length = node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)
                if length > limit:
                    too_long[f"{path.name}:{node.name}"] = length
    assert not too_long


@pytest.mark.slow
def test_the_wheel_has_one_top_level_name_and_its_data(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"shallowfusion"}
    assert any(name.startswith("shallowfusion/_native") for name in names)
    assert "shallowfusion/kernels/fused_step_reference.py" in names
    assert "shallowfusion/demo/models/asr/model.safetensors" in names
    assert any(name.startswith("shallowfusion/demo/clips/") and name.endswith(".flac") for name in names)
    assert "shallowfusion/py.typed" in names
