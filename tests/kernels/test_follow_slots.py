"""What lanes read and see as they fork, against histories kept in full; and the limit on unlikely ends."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from shallowfusion.config import BeamSettings
from shallowfusion.kernels.beam_advance import plan_follow_slots, plan_limit_end
from shallowfusion.kernels.beam_advance_arrays import BeamArrays, SlotArrays, mask_words
from shallowfusion.kernels.beam_advance_reference import follow_slots_reference, limit_end_reference
from shallowfusion.scorers.slot_tables import slot_table
from shallowfusion.values import RowStatistics
from tests.kernels.advance_cases import DEVICE, END, VOCAB, tables_of
from tests.kernels.cases import to_device

CPU = torch.device("cpu")


def contents(slots: SlotArrays, utterance: int, written: dict[int, int]) -> list[list[tuple[int, int]]]:
    """Per lane the (position, token) pairs it sees; `written` tells what each slot holds."""
    visible = slots.visible()[utterance, 0].cpu()
    return [sorted(written[int(slot)] for slot in row.nonzero().view(-1)) for row in visible]


def entries(table: torch.Tensor) -> list[tuple[int, list[tuple[int, int]]]]:
    """Of each utterance its place and the slots that are listed with their bits, which count up to a permutation."""
    return [(int(own[0, 0]), sorted(zip(*own[1:3, : int(own[0, 1])].tolist(), strict=True))) for own in table]


def random_step(arrays: BeamArrays, generator: np.random.Generator) -> None:
    shape = tuple(arrays.parents.shape)
    arrays.parents.copy_(torch.from_numpy(generator.integers(0, shape[1], shape)))
    arrays.tokens.copy_(torch.from_numpy(generator.integers(0, VOCAB, shape)))


@pytest.mark.parametrize("beam_size", [1, 2, 5, 32])
@pytest.mark.parametrize("mapped", [False, True])
def test_each_lane_sees_its_own_history(beam_size: int, mapped: bool) -> None:
    """Tokens the model lacks leave a lane where it was, its last token read anew."""
    generator = np.random.default_rng(beam_size)
    steps, known = (5 if beam_size > 8 else 12), 9
    mapping = torch.tensor([(3 * t) % known if t < known else -1 for t in range(VOCAB)], dtype=torch.int32)
    settings = BeamSettings(beam_size, (END,), steps)
    arrays = BeamArrays.make(tables_of(settings, utterances=3), VOCAB, settings.num_candidates, 2)
    arrays.done.zero_()
    ours, twin = (SlotArrays.make(3, beam_size, steps, 4, device) for device in (DEVICE, CPU))
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8]]
    for slots in (ours, twin):
        lengths, last = torch.tensor([3, 1, 4]), torch.tensor([3, 4, 8])
        slots.start(*(given.to(slots.slots.device) for given in (torch.arange(3), lengths, last)))
    histories = [[list(prompt)] * beam_size for prompt in prompts]
    written = [{place: (place, token) for place, token in enumerate(prompt)} for prompt in prompts]
    arrays.done[2] = 1  # it stays as it is
    launch = plan_follow_slots(arrays, ours, mapping.to(DEVICE) if mapped else None, known)
    for step in range(steps):
        random_step(arrays, generator)
        launch.run()
        follow_slots_reference(to_device(arrays, CPU), twin, mapping if mapped else None, known)
        here = to_device(ours, CPU)
        for field in dataclasses.fields(SlotArrays)[:-1]:
            mine, wanted = getattr(here, field.name), getattr(twin, field.name)
            if field.name == "table":
                mine, wanted = entries(mine), entries(wanted)
            assert mine == wanted if isinstance(mine, list) else torch.equal(mine, wanted), field.name
        seen = slot_table(here.visible()[:, 0], torch.arange(3))
        assert entries(here.table)[:2] == entries(seen)[:2]  # what any attention over slots reads
        assert entries(here.table)[2] == (2, [(0, (2**beam_size + 2**31) % 2**32 - 2**31 - 1)])  # done: one slot
        for utterance in (0, 1):
            parents, tokens = arrays.parents[utterance].tolist(), arrays.tokens[utterance].tolist()
            own = [int(mapping[t]) if mapped else t if t < known else -1 for t in tokens]
            histories[utterance] = [
                [*histories[utterance][parent], *([token] if token >= 0 else [])]
                for parent, token in zip(parents, own, strict=True)
            ]
            for lane, history in enumerate(histories[utterance]):
                assert here.ids[utterance, lane] == history[-1]
                assert here.positions[utterance, lane] == len(history) - 1
                slot = int(here.writes[utterance, lane])
                assert slot == 4 + step * beam_size + lane
                written[utterance][slot] = (len(history) - 1, history[-1])
            wanted_contents = [list(enumerate(history)) for history in histories[utterance]]
            assert contents(here, utterance, written[utterance]) == wanted_contents
        assert contents(here, 2, written[2]) == [list(enumerate(prompts[2]))] * beam_size
    assert int(ours.counts.max()) <= 4 + steps * beam_size


def test_slots_nobody_sees_leave_the_list() -> None:
    settings = BeamSettings(4, (END,), 20)
    arrays = BeamArrays.make(tables_of(settings), VOCAB, settings.num_candidates, 2)
    arrays.done.zero_()
    slots = SlotArrays.make(1, 4, 20, 2, DEVICE)
    slots.start(*(torch.tensor([given], device=DEVICE) for given in (0, 2, 1)))
    launch = plan_follow_slots(arrays, slots, None, VOCAB)
    for step in range(20):
        arrays.parents.zero_()
        launch.run()
        assert int(slots.counts[0]) == 2 + step + 4  # one history, and the lanes that just left it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("end_id", [0, 31, 40, 63])
def test_the_end_is_limited_where_it_is_unlikely(dtype: torch.dtype, end_id: int) -> None:
    """Beside what its place forbids; three rows of a place, and the last place forbids the end altogether."""
    logits = (torch.randn((9, 70), generator=torch.Generator().manual_seed(3)) * 2).to(dtype)
    logits[0, end_id], logits[7, end_id] = 9.0, 9.0
    exact = (logits.float() / 1.3).log_softmax(1)
    statistics = RowStatistics((logits.float() / 1.3).logsumexp(1), torch.zeros(9), exact.amax(1), torch.zeros(9))
    places = torch.stack([mask_words(forbidden, 70) for forbidden in ([], [1, 33], [end_id, 2, 35])])
    found, wanted = (places.repeat_interleave(3, dim=0) for _ in range(2))
    limit_end_reference(logits, statistics, wanted, places, end_id, 1.3, 1.5)
    there = (logits.to(DEVICE), to_device(statistics, DEVICE), found.to(DEVICE), places.to(DEVICE))
    for _ in range(2):  # what an earlier step took out comes back
        plan_limit_end(*there, end_id, 1.3, 1.5).run()
    assert torch.equal(there[2].cpu(), wanted)
    likely = ((wanted[:, end_id // 32] >> (end_id % 32)) & 1).bool()
    assert likely[:6].tolist() == (exact[:6, end_id] >= 1.5 * exact[:6].amax(1)).tolist()
    assert bool(likely[0])
    assert not bool(likely[:6].all())
    assert not bool(likely[6:].any())
    others = torch.ones(70, dtype=torch.bool)
    others[end_id] = False
    assert torch.equal(bits_of(wanted)[:, others], bits_of(places.repeat_interleave(3, dim=0))[:, others])


def bits_of(words: torch.Tensor) -> torch.Tensor:
    return ((words[:, :, None] >> torch.arange(32)) & 1).flatten(1)[:, :70]
