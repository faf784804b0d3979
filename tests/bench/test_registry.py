"""A bench case speaks only after its tests: they are there, and where it runs on CUDA some of them need a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import run
from bench.registry import CASES, Case

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_names_tests_for_each_of_its_devices(case: Case) -> None:
    texts = [(ROOT / path).read_text() for path in case.tests]
    assert texts
    if "cuda" in case.devices:
        assert any("mark.gpu" in text or "DEVICES" in text for text in texts), "no test here is marked gpu"


def test_to_find_no_test_is_not_to_pass(tmp_path: Path) -> None:
    empty, red, green = (tmp_path / f"test_{name}.py" for name in ("empty", "red", "green"))
    empty.write_text("")
    red.write_text("def test_red():\n    assert 1 == 2\n")
    green.write_text("import pytest\n\n\n@pytest.mark.gpu\ndef test_green():\n    assert 1 == 1\n")
    found = {}
    for path in (empty, red, green):
        case = Case("case", CASES[0].run, (str(path),))
        found[path.stem] = [run.tests_pass(case, device) for device in ("cpu", "cuda")]
    assert found == {"test_empty": [False, False], "test_red": [False, False], "test_green": [True, True]}
    assert not run.tests_pass(Case("case", CASES[0].run, ("tests/nowhere.py",)), "cpu")
