from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion.errors import CapacityError, InvalidArgumentError
from shallowfusion.scorers.page_pool import PagePool
from shallowfusion.scorers.page_pool_reference import ReferencePagePool


def test_append_fills_pages_in_order_lowest_first(pool_class: type) -> None:
    pool = pool_class(4, page_size=2)
    sequence = pool.create()
    result = pool.append(sequence, 3)
    assert result.slots.tolist() == [0, 1, 2]
    assert result.slots.dtype == np.int32
    assert result.copies.shape == (0, 2)
    assert result.copies.dtype == np.int32
    assert pool.pages(sequence).tolist() == [0, 1]
    assert pool.append(sequence).slots.tolist() == [3]
    assert (pool.length(sequence), pool.num_used, pool.num_free, pool.high_water) == (4, 2, 2, 4)


def test_fork_shares_pages_until_first_write(pool_class: type) -> None:
    pool = pool_class(8, page_size=4)
    first = pool.create()
    pool.append(first, 6)
    second = pool.fork(first)
    assert pool.num_used == 2
    result = pool.append(second, 1)
    assert result.slots.tolist() == [10]
    assert result.copies.tolist() == [[4, 8], [5, 9]]
    assert pool.pages(first).tolist() == [0, 1]
    assert pool.pages(second).tolist() == [0, 2]
    alone = pool.append(first, 1)  # nobody else ends in its last page any more
    assert alone.copies.shape == (0, 2)
    assert alone.slots.tolist() == [6]


def test_full_shared_page_is_never_copied(pool_class: type) -> None:
    pool = pool_class(8, page_size=4)
    first = pool.create()
    pool.append(first, 4)
    second = pool.fork(first)
    assert pool.append(second, 1).copies.shape == (0, 2)
    assert pool.append(first, 1).copies.shape == (0, 2)
    assert pool.slots(first).tolist() == [0, 1, 2, 3, 8]
    assert pool.slots(second).tolist() == [0, 1, 2, 3, 4]


def test_pages_of_one_slot_never_copy(pool_class: type) -> None:
    pool = pool_class(16, page_size=1)
    first = pool.create()
    pool.append(first, 3)
    forks = [pool.fork(first) for _ in range(3)]
    for fork in forks:
        assert pool.append(fork).copies.shape == (0, 2)
    assert pool.append_each([first, *forks]).tolist() == [6, 7, 8, 9]
    assert pool.slots(forks[1]).tolist() == [0, 1, 2, 4, 8]


def test_freed_pages_are_handed_out_lowest_first(pool_class: type) -> None:
    pool = pool_class(6, page_size=1)
    sequences = [pool.create() for _ in range(5)]
    pool.append_each(sequences)
    for sequence in (sequences[3], sequences[1]):
        pool.release(sequence)
    last = pool.create()
    assert pool.append(last, 3).slots.tolist() == [1, 3, 5]
    assert pool.high_water == 6


def test_high_water_falls_only_when_the_pool_is_empty(pool_class: type) -> None:
    pool = pool_class(6, page_size=2)
    first, second = pool.create(), pool.create()
    pool.append(first, 1)
    pool.append(second, 3)
    assert pool.high_water == 5
    pool.release(second)
    assert pool.high_water == 5
    pool.release(first)
    assert (pool.high_water, pool.num_used, pool.num_sequences) == (0, 0, 0)


def test_reorder_forks_parents_and_releases_the_old(pool_class: type) -> None:
    pool = pool_class(16, page_size=1)
    old = [pool.create() for _ in range(3)]
    for sequence in old:
        pool.append(sequence, 2)
    new = pool.reorder(old, [1, 1, 0])
    assert new.dtype == np.int64
    assert [pool.slots(int(sequence)).tolist() for sequence in new] == [[2, 3], [2, 3], [0, 1]]
    assert (pool.num_sequences, pool.num_used) == (3, 4)
    for sequence in old:
        with pytest.raises(InvalidArgumentError, match="unknown"):
            pool.length(sequence)


def test_visibility_marks_the_slots_of_each_sequence(pool_class: type) -> None:
    pool = pool_class(8, page_size=2)
    first = pool.create()
    pool.append(first, 3)
    second = pool.fork(first)
    pool.append(second, 2)
    empty = pool.create()
    visible = pool.visibility([first, second, empty])
    assert visible.dtype == np.bool_
    assert visible.shape == (3, pool.high_water)
    for row, sequence in zip(visible, (first, second, empty), strict=True):
        assert np.flatnonzero(row).tolist() == sorted(pool.slots(sequence).tolist())


def test_exhaustion_changes_nothing(pool_class: type) -> None:
    pool = pool_class(3, page_size=2)
    first = pool.create()
    pool.append(first, 3)
    second = pool.fork(first)
    third = pool.create()
    before = (pool.num_used, pool.slots(first).tolist(), pool.slots(second).tolist(), pool.high_water)
    for call in (
        lambda: pool.append(first, 4),
        lambda: pool.append(third, 3),
        lambda: pool.append(third, 2**62),
    ):
        with pytest.raises(CapacityError, match="free"):
            call()
    fourth = pool.create()
    with pytest.raises(CapacityError):
        pool.append_each([third, fourth])
    assert before == (pool.num_used, pool.slots(first).tolist(), pool.slots(second).tolist(), pool.high_water)
    assert pool.append(third, 2).slots.tolist() == [4, 5]


def test_append_each_refuses_what_would_need_a_copy(pool_class: type) -> None:
    pool = pool_class(8, page_size=2)
    first = pool.create()
    pool.append(first, 1)
    second = pool.fork(first)
    with pytest.raises(InvalidArgumentError, match="shares"):
        pool.append_each([first, second])
    pool.release(second)
    assert pool.append_each([first]).tolist() == [1]


def test_empty_calls_are_allowed(pool_class: type) -> None:
    pool = pool_class(2, page_size=2)
    sequence = pool.create()
    assert pool.append(sequence, 0).slots.shape == (0,)
    assert pool.append_each([]).shape == (0,)
    assert pool.reorder([], []).shape == (0,)
    assert pool.visibility([]).shape == (0, 0)
    assert pool.slots(sequence).shape == pool.pages(sequence).shape == (0,)


BAD_IDS = [-1, 99, 2**40, 2**63, 2**80, 1.5, "0", None]


@pytest.mark.parametrize("bad", BAD_IDS)
def test_unknown_sequences_are_refused(pool_class: type, bad: Any) -> None:
    pool = pool_class(4, page_size=2)
    good = pool.create()
    for method in (pool.fork, pool.release, pool.append, pool.length, pool.slots, pool.pages):
        with pytest.raises(InvalidArgumentError):
            method(bad)
    for call in (pool.append_each, pool.visibility, lambda ids: pool.reorder(ids, [0, 0])):
        with pytest.raises(InvalidArgumentError):
            call([good, bad])
    assert pool.length(good) == 0


def test_bad_arguments_are_refused(pool_class: type) -> None:
    for sizes in ((0, 1), (1, 0), (-1, 1), (2**31, 1), (2**20, 2**20), (2**70, 1), (1.5, 1), ("4", 1), (None, 1)):
        with pytest.raises(InvalidArgumentError):
            pool_class(*sizes)
    pool = pool_class(2**31 - 1, page_size=1)  # costs nothing until pages are used
    ids = [pool.create(), pool.create()]
    for count in (-1, 2**80, 0.5, "1"):
        with pytest.raises(InvalidArgumentError):
            pool.append(ids[0], count)
    for bad in ([ids[0], ids[0]], [ids], 3, [0.0, 1.0], ["a", "b"], [[0], [0, 1]], object()):
        with pytest.raises(InvalidArgumentError):
            pool.append_each(bad)
    for parents in ([2], [0, 2], [-1, 0], [0, 0, 2], [0.0, 1.0], None):
        with pytest.raises(InvalidArgumentError):
            pool.reorder(ids, parents)
    assert pool.num_sequences == 2
    assert pool.num_used == 0


def test_released_sequence_stays_unknown_after_its_place_is_taken(pool_class: type) -> None:
    pool = pool_class(4)
    old = pool.create()
    pool.release(old)
    new = pool.create()
    assert new != old
    with pytest.raises(InvalidArgumentError):
        pool.append(old)


class Twins:
    """Runs the same calls on both pools and on a plain model of who wrote what into which slot."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.pools = [PagePool(num_pages, page_size), ReferencePagePool(num_pages, page_size)]
        self.ids: list[list[int]] = []  # per sequence, its id in each pool
        self.texts: list[list[int]] = []  # per sequence, the tokens it should see
        self.memory = np.full(num_pages * page_size, -1)
        self.next_token = 0

    def write(self, sequence: int, slots: np.ndarray, copies: np.ndarray) -> None:
        for source, target in copies:
            self.memory[target] = self.memory[source]
        for slot in slots:
            self.memory[slot] = self.next_token
            self.texts[sequence].append(self.next_token)
            self.next_token += 1

    def both(self, call: Any) -> list[Any]:
        """What `call` gives on each pool; None for those that raised CapacityError."""
        answers = []
        for place, pool in enumerate(self.pools):
            try:
                answers.append(call(pool, [ids[place] for ids in self.ids]))
            except (CapacityError, InvalidArgumentError) as error:
                answers.append(type(error))
        assert (type(answers[0]) is type) == (type(answers[1]) is type)
        if type(answers[0]) is type:
            assert answers[0] is answers[1]
            return []
        return answers

    def check(self) -> None:
        native, reference = self.pools
        for name in ("num_free", "num_used", "high_water", "num_sequences"):
            assert getattr(native, name) == getattr(reference, name), name
        for (one, other), text in zip(self.ids, self.texts, strict=True):
            assert native.slots(one).tolist() == reference.slots(other).tolist()
            assert native.pages(one).tolist() == reference.pages(other).tolist()
            assert self.memory[native.slots(one)].tolist() == text
        rows = [native.visibility([ids[0] for ids in self.ids]), reference.visibility([ids[1] for ids in self.ids])]
        np.testing.assert_array_equal(*rows)

    def step(self, draw: Any) -> None:
        kind = draw(st.sampled_from(["create", "fork", "release", "append", "append_each", "reorder"]))
        count = len(self.ids)
        if kind == "create" or count == 0:
            self.ids.append(self.both(lambda pool, _: pool.create()))
            self.texts.append([])
            return
        which = draw(st.integers(0, count - 1))
        if kind == "fork":
            self.ids.append(self.both(lambda pool, ids: pool.fork(ids[which])))
            self.texts.append(list(self.texts[which]))
        elif kind == "release":
            self.both(lambda pool, ids: pool.release(ids[which]))
            del self.ids[which], self.texts[which]
        elif kind == "append":
            tokens = draw(st.integers(0, 7))
            answers = self.both(lambda pool, ids: pool.append(ids[which], tokens))
            if answers:
                np.testing.assert_array_equal(answers[0].slots, answers[1].slots)
                np.testing.assert_array_equal(answers[0].copies, answers[1].copies)
                self.write(which, answers[0].slots, answers[0].copies)
        elif kind == "append_each":
            answers = self.both(lambda pool, ids: pool.append_each(ids))
            if answers:
                np.testing.assert_array_equal(*answers)
                for sequence, slot in enumerate(answers[0]):
                    self.write(sequence, np.array([slot]), np.zeros((0, 2), dtype=np.int64))
        else:
            parents = draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count))
            answers = self.both(lambda pool, ids: pool.reorder(ids, parents))
            self.ids = [[int(one), int(other)] for one, other in zip(*answers, strict=True)]
            self.texts = [list(self.texts[parent]) for parent in parents]


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 40), st.sampled_from([1, 2, 3, 16]), st.integers(1, 40))
def test_twins_agree_and_every_sequence_sees_its_own_tokens(
    data: st.DataObject, num_pages: int, page_size: int, num_steps: int
) -> None:
    twins = Twins(num_pages, page_size)
    for _ in range(num_steps):
        twins.step(data.draw)
        twins.check()
    for one, other in twins.ids:
        twins.pools[0].release(one)
        twins.pools[1].release(other)
    for pool in twins.pools:
        assert (pool.num_used, pool.num_free, pool.num_sequences, pool.high_water) == (0, num_pages, 0, 0)


def test_native_reorder_and_append_take_microseconds() -> None:
    """64 utterances of 10 beams, 100 tokens deep; the bound is generous for a busy machine."""
    pool = PagePool(70_000, page_size=1)
    sequences = np.array([pool.create() for _ in range(640)])
    parents = np.arange(640) // 10 * 10 + np.tile([0, 0, 1, 1, 2, 3, 4, 5, 6, 7], 64)
    seconds = []
    for _ in range(100):
        start = time.perf_counter()
        sequences = pool.reorder(sequences, parents)
        pool.append_each(sequences)
        seconds.append(time.perf_counter() - start)
    assert np.median(seconds) < 1e-3


def test_reorder_may_change_the_number_of_rows(pool_class: type) -> None:
    pool = pool_class(64, page_size=1)
    prompt = pool.create()
    pool.append(prompt, 3)
    rows = pool.reorder([prompt], [0, 0, 0])
    assert len(rows) == 3
    pool.append_each(rows)
    assert pool.num_used == 3 + 3
    kept = pool.reorder(rows, [1])
    assert len(kept) == 1
    assert pool.num_used == 3 + 1
    pool.release(int(kept[0]))
    assert pool.num_used == 0
    assert pool.num_sequences == 0
