"""Run tests on a C++ core built with sanitizers: `python -m tests.sanitized CORE.so TESTS ...`; see `make sanitize`."""

from __future__ import annotations

import importlib.util
import sys

import pytest


def main(core: str, arguments: list[str]) -> int:
    """Put the core in the place of the package's own, then run pytest."""
    spec = importlib.util.spec_from_file_location("shallowfusion._native", core)
    if spec is None or spec.loader is None:
        print(f"{core} is no extension module, wanted what `make sanitize` builds", file=sys.stderr)
        return 2
    module = importlib.util.module_from_spec(spec)
    sys.modules["shallowfusion._native"] = module
    spec.loader.exec_module(module)
    import shallowfusion

    shallowfusion._native = module  # type: ignore[attr-defined]
    return int(pytest.main([*arguments, "-p", "no:cacheprovider"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
