"""The code of the README and of the pages in docs runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "serving.md")]
BLOCKS = [
    (path.name, number, block)  # docs/serving.md has a test of its own
    for path in PAGES
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    )
]


def test_readme_and_pages_show_code() -> None:
    pages = [name for name, _, _ in BLOCKS]
    assert pages.count("README.md") >= 2
    assert {"ctc.md", "delayed.md"} <= set(pages)


@pytest.mark.parametrize(("page", "number", "block"), BLOCKS, ids=[f"{page}-{number}" for page, number, _ in BLOCKS])
def test_code_blocks_run(page: str, number: int, block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, page, "exec"), {})
    out = capsys.readouterr().out
    assert out
    if (page, number) == ("ctc.md", 0):
        _check_ctc(out)


def _check_ctc(out: str) -> None:
    """What the page says of its example comes out."""
    lines = out.splitlines()
    assert lines[0].endswith("also uses elicit drugs")
    assert [line.split("{")[0].strip().endswith("illicit drugs") for line in lines[1:2]] == [True]
    assert any(re.fullmatch(r" *\d+\.\d\d .. +\d+\.\d\d s  illicit", line) for line in lines)
    assert sum(line.endswith("illicit drugs") for line in lines) == 1  # the hotword's
    assert lines[-1].startswith("whole:")


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^    make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
