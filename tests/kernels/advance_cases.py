"""Random candidate streams for the tests of device-driven steps, and three searches that must decide alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from shallowfusion.config import BeamSettings
from shallowfusion.kernels.beam_advance import plan_beam_advance
from shallowfusion.kernels.beam_advance_arrays import AdvanceTables, BeamArrays, mask_words
from shallowfusion.kernels.beam_advance_reference import beam_advance_reference
from shallowfusion.search.beam_state import BeamState, BeamStep
from shallowfusion.values import Candidates
from tests.kernels.cases import to_device

END = 3
VOCAB, SAID = 40, 12  # tokens there are, and those that candidates say
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DECIDED = (
    "ticks",
    "lengths",
    "clocks",
    "done",
    "finished",
    "hashes",
    "tokens",
    "parents",
    "totals",
    "weights",
    "place_masks",
    "masks",
    "ring",
)


def advance_on_device(tables: AdvanceTables, arrays: BeamArrays, candidates: Candidates) -> None:
    plan_beam_advance(tables, arrays, candidates).run()


def tables_of(settings: BeamSettings, sources: int = 2, utterances: int = 1, longest: int = 0) -> AdvanceTables:
    """Weights that differ at every length, tokens forbidden early, and room for more tokens than are asked for."""
    steps = torch.arange(settings.max_new_tokens + 1, dtype=torch.float32)
    weights = torch.stack([1.0 + steps / 8, *[steps / 4] * (sources - 1)], dim=1)
    edits = [(5, 1), (END, 3), (7, 2), (35, 2), (31, 2)]
    own = AdvanceTables.make(settings, weights, edits, longest or settings.max_new_tokens + 2)
    return own.spread(utterances, DEVICE)


def first_words() -> torch.Tensor:
    """What may be said in the first step under `tables_of`, and never 9."""
    return mask_words([5, END, 7, 35, 31, 9], VOCAB).to(DEVICE)


def stream(
    generator: np.random.Generator, step: BeamStep | None, settings: BeamSettings, utterances: int, *, coarse: bool
) -> Candidates:
    """The next candidates of every utterance; some impossible, some NaN, utterances that are done full of nonsense."""
    count, beam_size = settings.num_candidates, settings.beam_size
    shape = (utterances, count)
    gained = -np.sort(generator.exponential(2.0, shape), axis=1)
    if coarse:
        gained = np.round(gained * 2) / 2
    base = np.zeros((utterances, 1)) if step is None else np.nan_to_num(step.totals[:, :1], neginf=0.0)
    totals = (base + gained).astype(np.float32)
    live = np.ones(utterances) if step is None else np.isfinite(step.totals).sum(axis=1)
    lanes = (generator.random(shape) * np.maximum(live, 1)[:, None]).astype(np.int64)
    tokens = generator.integers(0, SAID, shape)
    tokens[generator.random(shape) < 0.25] = END
    gone = generator.random(shape) < (1.0 if generator.random() < 0.03 else 0.1)
    totals[gone] = generator.choice([np.nan, -np.inf, np.inf], gone.sum())
    lost = generator.random(shape) < 0.05
    rows = np.where(lost, -1, lanes + beam_size * np.arange(utterances)[:, None])
    return Candidates(
        totals=torch.from_numpy(totals),
        parent_rows=torch.from_numpy(rows),
        token_ids=torch.from_numpy(tokens),
        parts=torch.from_numpy(generator.normal(size=(*shape, 2)).astype(np.float32)),
        flags=torch.from_numpy(generator.random(utterances * beam_size) < 0.03),
    )


def lanes_of(candidates: Candidates, beam_size: int) -> Any:
    rows = candidates.parent_rows.numpy()
    return np.where(rows >= 0, rows % beam_size, -1)


def start(arrays: BeamArrays, tables: AdvanceTables, places: Sequence[int]) -> None:
    device = arrays.parents.device
    arrays.start(tables, torch.tensor(list(places), device=device), first_words().to(device))


class Trio:
    """The kernel, its twin and, for each place, the C++ beam state over the same candidates."""

    def __init__(
        self, settings: BeamSettings, utterances: int, seed: int, coarse: bool = False, longest: int = 0
    ) -> None:
        self.settings, self.utterances, self.coarse, self.num_started = settings, utterances, coarse, 0
        self.generator = np.random.default_rng(seed)
        self.tables = tables_of(settings, utterances=utterances, longest=longest)
        self.reference_tables = to_device(self.tables, torch.device("cpu"))
        self.ours, self.reference = (
            BeamArrays.make(tables, VOCAB, settings.num_candidates, 2)
            for tables in (self.tables, self.reference_tables)
        )
        self.states: dict[int, BeamState] = {}
        self.step: BeamStep | None = None
        self.start(range(utterances), settings)

    def start(self, places: Sequence[int], settings: BeamSettings) -> None:
        """Searches of these numbers in these places."""
        own = tables_of(settings, longest=self.tables.longest)
        for arrays, tables in ((self.ours, self.tables), (self.reference, self.reference_tables)):
            device = arrays.parents.device
            tables.take(torch.tensor(list(places), device=device), own, lambda given, to=device: given.to(to))  # type: ignore[misc]
            start(arrays, tables, places)
        self.states |= {place: BeamState(settings, 1, 2) for place in places}
        self.num_started += len(places)
        if self.step is not None:
            for place in places:
                self.step.totals[place] = [0.0] + [-np.inf] * (settings.beam_size - 1)
                self.step.done[place] = False

    def stop(self, places: Sequence[int]) -> None:
        for place in places:
            self.ours.done[place] = self.reference.done[place] = 1

    def is_running(self, place: int) -> bool:
        return not bool(self.reference.done[place])

    def advance(self, run: Callable[..., None] = advance_on_device, candidates: Candidates | None = None) -> None:
        """One step of all three, on random candidates if none are given; asserts that they agree bit for bit."""
        active = (self.reference.done.numpy() == 0).nonzero()[0]
        if candidates is None:
            candidates = stream(self.generator, self.step, self.settings, self.utterances, coarse=self.coarse)
        run(self.tables, self.ours, to_device(candidates, DEVICE))
        beam_advance_reference(self.reference_tables, self.reference, candidates)
        ours = to_device(self.ours, torch.device("cpu"))
        for name in DECIDED:
            mine, wanted = (getattr(arrays, name) for arrays in (ours, self.reference))
            assert torch.equal(*(t.view(torch.int32) if t.dtype == torch.float32 else t for t in (mine, wanted))), name
        lanes = lanes_of(candidates, self.settings.beam_size)
        offered = (candidates.totals.numpy(), lanes, candidates.token_ids.numpy(), candidates.parts.numpy())
        totals = ours.totals.numpy().reshape(self.utterances, -1)
        for place in active:
            moved = self.states[place].advance(np.array([0]), *(array[place : place + 1] for array in offered))
            assert bool(ours.done[place]) == bool(moved.done[0])
            np.testing.assert_array_equal(ours.tokens.numpy()[place], moved.tokens[0])
            np.testing.assert_array_equal(ours.parents.numpy()[place], moved.parents[0])
            np.testing.assert_array_equal(totals[place].view(np.int32), moved.totals[0].view(np.int32))
        self.step = BeamStep(ours.tokens.numpy(), ours.parents.numpy(), totals.copy(), ours.done.numpy() != 0)

    def run(self, run: Callable[..., None] = advance_on_device) -> int:
        """A whole search; the number of steps it took."""
        for number in range(self.settings.max_new_tokens):
            self.advance(run)
            assert self.step is not None
            if self.step.done.all():
                return number + 1
        raise AssertionError("a search must be done after max_new_tokens")
