"""Types of the C++ extension; only the faces of native classes import it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# Beam state ---------------------------------------------------------------------------------------------------------

class BeamState:
    def __init__(
        self,
        *,
        beam_size: int,
        end_ids: Sequence[int],
        max_new_tokens: int,
        stop_rule: str,
        length_penalty: float | None,
        early_stopping: str,
        patience: float,
        recombination: str,
        num_utterances: int,
        num_parts: int,
    ) -> None: ...
    @property
    def num_nodes(self) -> int: ...
    def advance(
        self,
        *,
        utterances: npt.NDArray[np.int64],
        totals: npt.NDArray[np.float32],
        parents: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.int64],
        parts: npt.NDArray[np.float32],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.bool_]]: ...
    def results(self, *, utterance: int, n_best: int) -> list[dict[str, Any]]: ...
    def force_finish(self, *, utterance: int) -> None: ...
    def release(self, *, utterance: int) -> None: ...
    def is_done(self, *, utterance: int) -> bool: ...
    def num_live(self, *, utterance: int) -> int: ...
    def num_finished(self, *, utterance: int) -> int: ...
