"""What the tests of tuning share: manifests of shipped development clips, and a set of tiny random recordings."""

from __future__ import annotations

import json
from pathlib import Path

from shallowfusion.demo.shipped import HERE

ROWS = [json.loads(line) for line in (HERE / "dev" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def manifest(path: Path, *numbers: int) -> Path:
    rows = [{"audio": str(HERE / "dev" / ROWS[i]["audio"]), "text": ROWS[i]["text"], "id": f"dev{i}"} for i in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
