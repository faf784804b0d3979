"""Memory of device-driven beam searches: plain tensors with fixed addresses, written by `beam_advance` alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from shallowfusion.config import BeamSettings
from shallowfusion.errors import InvalidArgumentError

__all__ = [
    "HEADER_WORDS",
    "RING_ENTRIES",
    "SLOT_ROUNDING",
    "AdvanceTables",
    "BeamArrays",
    "SlotArrays",
    "edit_room",
    "mask_words",
    "max_finished",
    "record_words",
    "slot_capacity",
]

RING_ENTRIES = 64
HEADER_WORDS = 8  # clock, status, hash low and high, length, and three spare
SLOT_ROUNDING = 128  # slots; attention masks and cached keys then stay aligned
LONGEST = 65_536  # tokens; tables hold a row per length
SMALLEST_SCALE, LARGEST_SCALE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
IMPOSSIBLE = float("-inf")


def record_words(num_candidates: int, num_parts: int) -> int:
    """32-bit words of one utterance's ring record: header, totals, lanes and tokens of the candidates, their parts."""
    return HEADER_WORDS + num_candidates * (3 + num_parts)


def max_finished(settings: BeamSettings) -> int:
    """Finished hypotheses that make an utterance done under Whisper's rule."""
    return int(min(round(settings.beam_size * settings.patience), 2**30))


@dataclass(frozen=True)
class AdvanceTables:
    """What a step looks up by length, for the search in each place.

    Numbers, not shapes: `take` writes those of searches that start, under a step that was captured.

    Args:
        settings: without recombination; beam size, end tokens, stop rule and whether early stopping is "first" hold for
            all places, the other numbers are in the tables.
        end_ids: int32 [ends].
        limits: int32 [places, 2], max_new_tokens and `max_finished`.
        scales: float32 [places, longest + 1], what a total is divided by for its key at each length; longest is at
            least max_new_tokens.
        stop_scales: the same for the best live hypothesis when the stop rule asks what it could still reach.
        weights: float32 [places, longest + 1, sources], weights of the fused step after so many tokens.
        edit_words, edit_until, edit_bits: int32 [places, edits]: from step number `until` of a search on, these bits of
            that mask word are set; until = 0 is padding.
    """

    settings: BeamSettings
    end_ids: Tensor
    limits: Tensor
    scales: Tensor
    stop_scales: Tensor
    weights: Tensor
    edit_words: Tensor
    edit_until: Tensor
    edit_bits: Tensor

    @classmethod
    def make(
        cls,
        settings: BeamSettings,
        weights: Tensor,
        edits: Sequence[tuple[int, int]] = (),
        longest: int = 0,
        most_edits: int = 0,
    ) -> AdvanceTables:
        """Tables of one search, on the CPU.

        Args:
            weights: float32 [max_new_tokens + 1, sources].
            edits: (token, until) of tokens that may not be said in the first `until` steps; distinct.
            longest: tokens there is room for, if more than max_new_tokens.
            most_edits: entries of edits there is room for, if more than `edit_room`.

        Raises:
            InvalidArgumentError: recombination, more than 32 lanes, or more tokens than a table holds.
        """
        for name, value, most in (
            ("beam_size", settings.beam_size, 32),
            ("max_new_tokens", settings.max_new_tokens, LONGEST),
        ):
            if value > most:
                raise InvalidArgumentError(
                    f"{name} must be at most {most} in a device-driven search, got {value}; use the host-driven one."
                )
        if settings.recombination != "none":
            raise InvalidArgumentError(
                f"a device-driven search does not recombine, got {settings.recombination!r}; use the host-driven one."
            )
        most = settings.max_new_tokens
        longest = max(longest, most)
        scales = [scale_of(settings, length) for length in range(longest + 1)]
        judged_late = settings.early_stopping == "never" and (settings.length_penalty or 0.0) > 0
        stop_scales = [scales[most]] * (longest + 1) if judged_late else scales
        words = edited_words(edits)
        padded = [*words, *[(0, 0, 0)] * (max(edit_room(edits), most_edits) - len(words))]
        places, until, bits = zip(*padded, strict=True)
        weights = torch.cat([weights, weights[-1:].expand(longest - most, -1)])
        return cls(
            settings=settings,
            end_ids=torch.tensor(settings.end_ids, dtype=torch.int32),
            limits=torch.tensor([[most, max_finished(settings)]], dtype=torch.int32),
            scales=torch.tensor([scales], dtype=torch.float32),
            stop_scales=torch.tensor([stop_scales], dtype=torch.float32),
            weights=weights.float().cpu().contiguous()[None],
            edit_words=torch.tensor([places], dtype=torch.int32),
            edit_until=torch.tensor([until], dtype=torch.int32),
            edit_bits=torch.tensor([bits], dtype=torch.int32),
        )

    @property
    def longest(self) -> int:
        return int(self.scales.shape[1]) - 1

    def spread(self, num_places: int, device: torch.device | str = "cpu") -> AdvanceTables:
        """Tables of so many places on a device, all with these numbers."""
        kept: dict[str, Any] = {own.name: getattr(self, own.name) for own in fields(self)}
        for name in BY_PLACE:
            kept[name] = kept[name].expand(num_places, *[-1] * (kept[name].dim() - 1)).contiguous().to(device)
        return AdvanceTables(**{**kept, "end_ids": self.end_ids.to(device)})

    def take(self, places: Tensor, own: AdvanceTables, send: Callable[[Tensor], Tensor]) -> None:
        """Write the numbers of one search into the tables of the places in which it starts, those of the others stay.

        Args:
            places: int64, distinct, on the device.
            own: of the same shapes, but for one place.
            send: to the device.
        """
        for name in BY_PLACE:
            mine, given = getattr(self, name), send(getattr(own, name))
            mine.index_copy_(0, places, given.expand(len(places), *mine.shape[1:]))


BY_PLACE = ("limits", "scales", "stop_scales", "weights", "edit_words", "edit_until", "edit_bits")


def edited_words(edits: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(mask word, until, bits as int32) of tokens forbidden at first; at any step a word changes at most once."""
    found: dict[tuple[int, int], int] = {}
    for token, until in edits:
        key = (token // 32, until)
        found[key] = found.get(key, 0) | 1 << token % 32
    return [(word, until, bits - (bits >> 31 << 32)) for (word, until), bits in found.items()]


def mask_words(forbidden: Sequence[int], vocab: int) -> Tensor:
    """Bits of all tokens that are not forbidden, int32 [words]; bits beyond the vocabulary are set."""
    words = [-1] * ((vocab + 31) // 32)
    for token in forbidden:
        bit = token % 32
        words[token // 32] &= ~(1 << bit if bit < 31 else -(1 << 31))
    return torch.tensor(words, dtype=torch.int32)


def edit_room(edits: Sequence[tuple[int, int]]) -> int:
    """Entries that tables have for such edits: powers of two, at least 4, so that many searches fit few shapes."""
    return max(4, 1 << max(0, len(edited_words(edits)) - 1).bit_length())


def scale_of(settings: BeamSettings, length: int) -> float:
    """max(1, length) ** length_penalty, held inside float32's normal range; 1 where no key is needed."""
    if settings.stop_rule != "hf":
        return 1.0
    assert settings.length_penalty is not None
    try:
        value = math.pow(max(1, length), settings.length_penalty)
    except OverflowError:
        value = math.inf
    return min(max(value, SMALLEST_SCALE), LARGEST_SCALE)


@dataclass(frozen=True)
class BeamArrays:
    """State of the searches in some places and what a step leaves behind; rows = places * beam_size.

    Args:
        ticks: int32 [places], where in the ring the coming step is recorded, the same for all and whatever starts.
        lengths, clocks, done, finished: int32 [places]: tokens of the live hypotheses, steps of the search, 1 when it
            is done or none was started, finished hypotheses.
        keys: float32 [places, beam_size]: the keys of the pool, best first (`hf`); the best finished total
            (`espnet`, in column 0).
        ended_totals: float32 [places, longest + 1], best finished total of each length (`espnet`).
        hashes: int64 [places], of everything a search has decided so far, in order.
        tokens, parents: int64 [places, beam_size], the live lanes as `BeamStep` has them.
        totals: float32 [rows].
        weights: float32 [rows, sources], of the coming fused step.
        place_masks: int32 [places, words], tokens that each search may say in the coming step, bit by bit.
        masks: int32 [rows, words], the same by row; later calls of a step take tokens out here.
        ring: int32 [RING_ENTRIES, places, record_words], what the mirrors replay.
    """

    ticks: Tensor
    lengths: Tensor
    clocks: Tensor
    done: Tensor
    finished: Tensor
    keys: Tensor
    ended_totals: Tensor
    hashes: Tensor
    tokens: Tensor
    parents: Tensor
    totals: Tensor
    weights: Tensor
    place_masks: Tensor
    masks: Tensor
    ring: Tensor

    @classmethod
    def make(cls, tables: AdvanceTables, vocab: int, num_candidates: int, num_parts: int) -> BeamArrays:
        """Memory for as many places as the tables have, on their device; `start` starts searches in it."""
        device, lanes = tables.scales.device, tables.settings.beam_size
        places, longest, sources = tables.weights.shape
        rows, words = places * lanes, (vocab + 31) // 32

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        ticks, lengths, clocks, done, finished = (empty(places, dtype=torch.int32) for _ in range(5))
        return cls(
            ticks,
            lengths,
            clocks,
            done.fill_(1),
            finished,
            keys=empty(places, lanes, dtype=torch.float32),
            ended_totals=empty(places, longest, dtype=torch.float32),
            hashes=empty(places, dtype=torch.int64),
            tokens=empty(places, lanes, dtype=torch.int64),
            parents=empty(places, lanes, dtype=torch.int64),
            totals=empty(rows, dtype=torch.float32).fill_(IMPOSSIBLE),
            weights=empty(rows, sources, dtype=torch.float32),
            place_masks=empty(places, words, dtype=torch.int32).fill_(-1),
            masks=empty(rows, words, dtype=torch.int32).fill_(-1),
            ring=empty(RING_ENTRIES, places, record_words(num_candidates, num_parts), dtype=torch.int32),
        )

    def start(self, tables: AdvanceTables, places: Tensor, words: Tensor) -> None:
        """Start a search in each of these places: lane 0 lives with total 0. Other places stay as they are.

        Args:
            places: int64, distinct, on the device.
            words: int32 [words], what may be said in the first step, on the device.
        """
        num_places, lanes = self.parents.shape
        for memory in (self.lengths, self.clocks, self.finished, self.hashes, self.tokens, self.parents):
            memory.index_fill_(0, places, 0)
        for memory in (self.keys, self.ended_totals):
            memory.index_fill_(0, places, IMPOSSIBLE)
        totals = self.totals.view(num_places, lanes)
        totals.index_fill_(0, places, IMPOSSIBLE)
        totals[:, 0].index_fill_(0, places, 0.0)
        weights = tables.weights[:, 0].index_select(0, places)[:, None].expand(-1, lanes, -1)
        self.weights.view(num_places, lanes, -1).index_copy_(0, places, weights)
        self.place_masks.index_copy_(0, places, words.expand(len(places), -1))
        self.masks.view(num_places, lanes, -1).index_copy_(0, places, words.expand(len(places), lanes, -1))
        self.done.index_fill_(0, places, 0)


@dataclass(frozen=True)
class SlotArrays:
    """Which of its slots each lane of an utterance sees, for one model, and what the lanes read next.

    Args:
        steps: int32 [utterances], steps followed.
        seen, last_tokens, last_slots: int32 [utterances, beam_size]: tokens in a lane's history, the last of them, and
            where its keys are.
        table: int32 [utterances, 3, capacity], what an attention kernel walks (scorers/slot_tables.py): row 0 the
            number of the utterance and how many slots some lane sees, row 1 those slots in order of time, row 2 in bit
            k whether lane k sees it.
        sight: int32 [utterances, capacity], the same bits by slot, 0 where nobody sees it: what masks are made of.
        lanes: int32 [1, 1, beam_size, 1], 0, 1, ...
        ids, positions, writes: int64 [utterances, beam_size]: what the model reads, where it stands, its slot.
        first_slot: of step 0; those before hold the prompt.
    """

    steps: Tensor
    seen: Tensor
    last_tokens: Tensor
    last_slots: Tensor
    table: Tensor
    sight: Tensor
    lanes: Tensor
    ids: Tensor
    positions: Tensor
    writes: Tensor
    first_slot: int

    @property
    def capacity(self) -> int:
        return int(self.table.shape[2])

    @property
    def counts(self) -> Tensor:
        return self.table[:, 0, 1]

    @property
    def slots(self) -> Tensor:
        return self.table[:, 1]

    @property
    def bits(self) -> Tensor:
        return self.table[:, 2]

    @classmethod
    def make(
        cls, num_utterances: int, beam_size: int, max_new_tokens: int, prompt_slots: int, device: torch.device | str
    ) -> SlotArrays:
        """Memory for prompts of up to `prompt_slots` tokens and as many steps as a search may take.

        Until a search starts in a place, its lanes see the first slot, so that no attention is over nothing.
        """

        def empty(width: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros((num_utterances, width), dtype=dtype, device=device)

        capacity = slot_capacity(beam_size, max_new_tokens, prompt_slots)
        made = cls(
            steps=empty(1).view(-1),
            seen=empty(beam_size),
            last_tokens=empty(beam_size),
            last_slots=empty(beam_size),
            table=empty(3 * capacity).view(num_utterances, 3, capacity),
            sight=empty(capacity),
            lanes=torch.arange(beam_size, dtype=torch.int32, device=device).view(1, 1, -1, 1),
            ids=empty(beam_size, torch.int64),
            positions=empty(beam_size, torch.int64),
            writes=empty(beam_size, torch.int64),
            first_slot=prompt_slots,
        )
        places = torch.arange(num_utterances, device=device)
        made.start(places, torch.ones_like(places), torch.zeros_like(places))
        return made

    def start(self, places: Tensor, lengths: Tensor, last_tokens: Tensor) -> None:
        """Every lane of these places sees the prompt that was read there, at slots 0, 1, ...; other places stay.

        Args:
            places: int64, distinct; lengths: int64, tokens of their prompts; last_tokens: int64, of the prompts.
        """
        lanes = self.seen.shape[1]
        slots = torch.arange(self.capacity, dtype=torch.int32, device=self.table.device).expand(len(places), -1)
        every = -1 if lanes == 32 else (1 << lanes) - 1
        bits = (slots < lengths[:, None]).int() * every
        table = torch.stack([torch.zeros_like(slots), slots, bits], dim=1)
        table[:, 0, 0], table[:, 0, 1] = places, lengths
        self.table.index_copy_(0, places, table)
        self.sight.index_copy_(0, places, bits)
        self.steps.index_fill_(0, places, 0)
        for memory, given in (
            (self.seen, lengths), (self.positions, lengths - 1), (self.last_slots, lengths - 1),
            (self.writes, lengths - 1), (self.last_tokens, last_tokens), (self.ids, last_tokens),
        ):  # fmt: skip
            memory.index_copy_(0, places, given[:, None].expand(-1, lanes).to(memory.dtype))

    def visible(self, out: Tensor | None = None) -> Tensor:
        """The attention mask, bool [utterances, 1, beam_size, capacity], by slot; into `out` where given."""
        seen = (self.sight[:, None, None, :] >> self.lanes).bitwise_and_(1)
        return torch.ne(seen, 0, out=out)


def slot_capacity(beam_size: int, max_new_tokens: int, prompt_slots: int) -> int:
    """Slots of a place with room for so much."""
    return -(-(prompt_slots + max_new_tokens * beam_size) // SLOT_ROUNDING) * SLOT_ROUNDING
