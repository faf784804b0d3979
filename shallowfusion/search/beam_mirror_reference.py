"""`BeamMirror` in plain Python, written for reading: the definition of correct for the native class."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shallowfusion.checks import integer
from shallowfusion.config import BeamSettings, require
from shallowfusion.errors import DivergenceError
from shallowfusion.kernels.beam_advance_arrays import HEADER_WORDS, record_words
from shallowfusion.kernels.beam_advance_reference import ACTIVE, DONE, FLAGGED, hash_of_step
from shallowfusion.search.beam_mirror import MirrorShape, checked_entry
from shallowfusion.search.beam_state import BeamStep, FinishedHypothesis
from shallowfusion.search.beam_state_reference import ReferenceBeamState

__all__ = ["ReferenceBeamMirror"]

Record = npt.NDArray[np.int32]


class ReferenceBeamMirror:
    """Replays the ring of a device-driven search; see `BeamMirrorProtocol`."""

    def __init__(self, settings: BeamSettings, num_utterances: int, num_candidates: int, num_parts: int) -> None:
        self._shape = MirrorShape.check(settings, num_utterances, num_candidates, num_parts)
        self._beams = ReferenceBeamState(settings, num_utterances, num_parts)
        self._hashes = [0] * num_utterances
        self._saw_nan = [False] * num_utterances
        self._cut_short = [False] * num_utterances
        self.num_steps = 0

    def replay(self, entry: npt.NDArray[np.int32]) -> None:
        records = checked_entry(entry)
        words = record_words(self._shape.num_candidates, self._shape.num_parts)
        require(
            records.shape[0] >= self._shape.num_utterances and records.shape[1] == words,
            f"a ring entry must hold at least {self._shape.num_utterances} records of {words} words, "
            f"got {records.shape[0]} of {records.shape[1]}.",
        )
        active = [u for u, record in enumerate(records) if self._goes_on(u, record)]
        moved = self._beams.advance(active, *self._candidates(records[active]))
        self.num_steps += 1
        for row, utterance in enumerate(active):
            self._verify(utterance, records[utterance], moved, row)

    def _goes_on(self, utterance: int, record: Record) -> bool:
        """Whether the record holds a step of a search that counts."""
        is_active = bool(record[1] & ACTIVE)
        if record[0] != self.num_steps:
            raise self._diverged(utterance, f"the ring holds step {record[0]} in its place")
        if utterance >= self._shape.num_utterances:
            if is_active:
                raise self._diverged(utterance, "an utterance that is none was searched")
            return False
        if self._cut_short[utterance]:
            return False
        if is_active and self._beams.is_done(utterance):
            raise self._diverged(utterance, "the device goes on with a search that is done")
        if not is_active and not self._beams.is_done(utterance):
            raise self._diverged(utterance, "the device stopped a search that is not done")
        return is_active

    def _candidates(self, records: Record) -> tuple[npt.NDArray[np.float32], Record, Record, npt.NDArray[np.float32]]:
        count, body = self._shape.num_candidates, records[:, HEADER_WORDS:]
        totals, lanes, tokens, parts = np.split(body, [count, 2 * count, 3 * count], axis=1)
        scores, own = (np.ascontiguousarray(words).view(np.float32) for words in (totals, parts))
        return scores, lanes, tokens, own.reshape(len(records), count, self._shape.num_parts)

    def _verify(self, utterance: int, record: Record, moved: BeamStep, row: int) -> None:
        status = int(record[1])
        self._saw_nan[utterance] |= bool(status & FLAGGED)
        if bool(status & DONE) != bool(moved.done[row]):
            how = "the device goes on where its stop rule ends" if moved.done[row] else "the device stopped early"
            raise self._diverged(utterance, how, self.num_steps - 1)
        tokens, parents = moved.tokens[row].tolist(), moved.parents[row].tolist()
        own = hash_of_step(self._hashes[utterance], tokens, parents, moved.totals[row], int(record[4]), status)
        self._hashes[utterance] = own
        low, high = (int(word) % 2**32 for word in record[2:4])
        if own != high << 32 | low:
            raise self._diverged(utterance, "the device chose other lanes", self.num_steps - 1)

    def _diverged(self, utterance: int, how: str, step: int | None = None) -> DivergenceError:
        at = self.num_steps if step is None else step
        return DivergenceError(f"utterance {utterance}, step {at}: {how}; decode with driver='host' and report this.")

    def force_finish(self, utterance: int) -> None:
        self._cut_short[self._known(utterance)] |= not self._beams.is_done(utterance)
        self._beams.force_finish(utterance)

    def results(self, utterance: int, n_best: int) -> list[FinishedHypothesis]:
        return self._beams.results(utterance, n_best)

    def is_done(self, utterance: int) -> bool:
        return self._beams.is_done(utterance)

    def saw_nan(self, utterance: int) -> bool:
        return self._saw_nan[self._known(utterance)]

    def hash(self, utterance: int) -> int:
        return self._hashes[self._known(utterance)]

    def _known(self, utterance: int) -> int:
        return integer("utterance", utterance, 0, self._shape.num_utterances - 1)
