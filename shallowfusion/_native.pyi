from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

# (address, dtype code, vocabulary, row stride, temperature, map or None, policy code, floor)
Source = tuple[int, int, int, int, float, NDArray[Any] | None, int, float]

def fused_step(
    *,
    sources: Sequence[Source],
    weights: NDArray[Any],
    totals: NDArray[Any],
    beam_size: int,
    top_k: int,
    end_id: int,
    token_bias: NDArray[Any] | None,
    allowed: NDArray[Any] | None,
    bonus: tuple[NDArray[Any], NDArray[Any], NDArray[Any]] | None,
    length_bonus: NDArray[Any],
    combine: str,
    normalize: str,
    level: str | None,
    threads: int | None,
) -> dict[str, Any]: ...
def row_statistics(*, source: Source, rows: int, level: str | None, threads: int | None) -> dict[str, Any]: ...
def fused_step_levels() -> list[str]: ...
