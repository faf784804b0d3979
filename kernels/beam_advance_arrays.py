"""Memory of device-driven beam searches: plain tensors with fixed addresses, written by `beam_advance` alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

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
    "max_finished",
    "record_words",
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
    """What a step looks up by length; the same for all utterances of a search.

    Numbers, not shapes: `take` writes those of another search in their place, under a step that was captured.

    Args:
        settings: without recombination.
        end_ids: int32 [ends].
        limits: int32 [3], max_new_tokens, `max_finished`, num_edits.
        scales: float32 [longest + 1], what a total is divided by for its key at each length; longest is at least
            max_new_tokens.
        stop_scales: the same for the best live hypothesis when the stop rule asks what it could still reach.
        weights: float32 [longest + 1, sources], weights of the fused step after so many tokens.
        edit_tokens, edit_until: int32 [edits], tokens forbidden in the first `until` steps; distinct.
        edit_values: float32 [edits], their bias from then on.
        num_edits: how many edits count; the rest is padding.
    """

    settings: BeamSettings
    end_ids: Tensor
    limits: Tensor
    scales: Tensor
    stop_scales: Tensor
    weights: Tensor
    edit_tokens: Tensor
    edit_until: Tensor
    edit_values: Tensor
    num_edits: int

    @classmethod
    def make(
        cls,
        settings: BeamSettings,
        weights: Tensor,
        edits: Sequence[tuple[int, int, float]] = (),
        device: torch.device | str = "cpu",
        longest: int = 0,
    ) -> AdvanceTables:
        """Tables of a search.

        Args:
            weights: float32 [max_new_tokens + 1, sources].
            edits: (token, until, bias afterwards) of tokens that may not be said in the first steps.
            longest: tokens there is room for, if more than max_new_tokens.

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
        padded = [*edits, *[(0, 0, 0.0)] * (edit_room(len(edits)) - len(edits))]
        tokens, until, values = zip(*padded, strict=True)
        weights = torch.cat([weights, weights[-1:].expand(longest - most, -1)])
        return cls(
            settings=settings,
            end_ids=torch.tensor(settings.end_ids, dtype=torch.int32, device=device),
            limits=torch.tensor([most, max_finished(settings), len(edits)], dtype=torch.int32, device=device),
            scales=torch.tensor(scales, dtype=torch.float32, device=device),
            stop_scales=torch.tensor(stop_scales, dtype=torch.float32, device=device),
            weights=weights.to(device, torch.float32).contiguous(),
            edit_tokens=torch.tensor(tokens, dtype=torch.int32, device=device),
            edit_until=torch.tensor(until, dtype=torch.int32, device=device),
            edit_values=torch.tensor(values, dtype=torch.float32, device=device),
            num_edits=len(edits),
        )

    @property
    def longest(self) -> int:
        return len(self.scales) - 1

    def take(self, other: AdvanceTables) -> AdvanceTables:
        """These tensors with the numbers of other tables, which have the same shapes."""
        kept = {}
        for own in fields(self):
            mine, theirs = getattr(self, own.name), getattr(other, own.name)
            kept[own.name] = mine.copy_(theirs) if isinstance(mine, Tensor) else theirs
        return AdvanceTables(**kept)


def edit_room(num_edits: int) -> int:
    """Edits that tables have room for: powers of two, at least 4, so that searches of all kinds fit few shapes."""
    return max(4, 1 << max(0, num_edits - 1).bit_length())


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
    """State of a batch of searches and what a step leaves behind; rows = utterances * beam_size.

    Args:
        lengths, clocks, done, finished: int32 [utterances]: tokens of the live hypotheses, steps run, 1 when done,
            finished hypotheses.
        keys: float32 [utterances, beam_size]: the keys of the pool, best first (`hf`); the best finished total
            (`espnet`, in column 0).
        ended_totals: float32 [utterances, longest + 1], best finished total of each length (`espnet`).
        hashes: int64 [utterances], of everything decided so far, in order.
        tokens, parents: int64 [utterances, beam_size], the live lanes as `BeamStep` has them.
        totals: float32 [rows].
        weights: float32 [rows, sources], of the coming fused step.
        bias: float32 [vocab], of the coming fused step.
        ring: int32 [RING_ENTRIES, utterances, record_words], what the mirror replays.
    """

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
    bias: Tensor
    ring: Tensor

    @classmethod
    def make(
        cls, tables: AdvanceTables, num_utterances: int, vocab: int, num_candidates: int, num_parts: int
    ) -> BeamArrays:
        """Memory for a batch, on the device of the tables; `reset` starts a search in it."""
        device, lanes = tables.scales.device, tables.settings.beam_size
        rows, sources = num_utterances * lanes, tables.weights.shape[1]
        longest = tables.longest

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        counts = [empty(num_utterances, dtype=torch.int32) for _ in range(4)]
        return cls(
            *counts,
            keys=empty(num_utterances, lanes, dtype=torch.float32),
            ended_totals=empty(num_utterances, longest + 1, dtype=torch.float32),
            hashes=empty(num_utterances, dtype=torch.int64),
            tokens=empty(num_utterances, lanes, dtype=torch.int64),
            parents=empty(num_utterances, lanes, dtype=torch.int64),
            totals=empty(rows, dtype=torch.float32),
            weights=empty(rows, sources, dtype=torch.float32),
            bias=empty(vocab, dtype=torch.float32),
            ring=empty(RING_ENTRIES, num_utterances, record_words(num_candidates, num_parts), dtype=torch.int32),
        )

    def reset(self, tables: AdvanceTables, bias: Tensor, num_searches: int) -> None:
        """Start a search for the first `num_searches` utterances: lane 0 lives with total 0; the others are done.

        Args:
            bias: float32 [vocab], of the first step.
        """
        for counts in (self.lengths, self.clocks, self.done, self.finished, self.hashes, self.tokens, self.parents):
            counts.zero_()
        self.done[num_searches:] = 1
        self.keys.fill_(IMPOSSIBLE)
        self.ended_totals.fill_(IMPOSSIBLE)
        self.totals.fill_(IMPOSSIBLE)
        self.totals.view(self.parents.shape)[:num_searches, 0] = 0.0
        self.weights.copy_(tables.weights[:1].expand_as(self.weights))
        self.bias.copy_(bias)
        self.ring.zero_()


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
        """Memory for prompts of up to `prompt_slots` tokens and as many steps as a search may take."""

        def empty(width: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros((num_utterances, width), dtype=dtype, device=device)

        capacity = -(-(prompt_slots + max_new_tokens * beam_size) // SLOT_ROUNDING) * SLOT_ROUNDING
        table = empty(3 * capacity).view(num_utterances, 3, capacity)
        table[:, 0, 0] = torch.arange(num_utterances, device=device)
        return cls(
            steps=empty(1).view(-1),
            seen=empty(beam_size),
            last_tokens=empty(beam_size),
            last_slots=empty(beam_size),
            table=table,
            sight=empty(capacity),
            lanes=torch.arange(beam_size, dtype=torch.int32, device=device).view(1, 1, -1, 1),
            ids=empty(beam_size, torch.int64),
            positions=empty(beam_size, torch.int64),
            writes=empty(beam_size, torch.int64),
            first_slot=prompt_slots,
        )

    def reset(self, lengths: Tensor, last_tokens: Tensor) -> None:
        """Every lane sees the prompt of its utterance, int64 [utterances] tokens long, at slots 0, 1, ...

        Args:
            last_tokens: int64 [utterances], of the prompts.
        """
        for memory in (self.steps, self.bits, self.ids):
            memory.zero_()
        self.counts.copy_(lengths)
        self.slots.copy_(torch.arange(self.capacity, device=self.slots.device).expand_as(self.slots))
        self.seen.copy_(lengths[:, None].expand_as(self.seen))
        self.positions.copy_(self.seen - 1)
        self.last_tokens.copy_(last_tokens[:, None].expand_as(self.seen))
        self.last_slots.copy_(self.seen - 1)
        self.writes.copy_(self.last_slots)
        self.ids.copy_(self.last_tokens)
        lanes = self.seen.shape[1]
        every = -1 if lanes == 32 else (1 << lanes) - 1
        self.bits.masked_fill_(self.slots < lengths[:, None], every)
        self.sight.copy_(self.bits)

    def visible(self, out: Tensor | None = None) -> Tensor:
        """The attention mask, bool [utterances, 1, beam_size, capacity], by slot; into `out` where given."""
        seen = (self.sight[:, None, None, :] >> self.lanes).bitwise_and_(1)
        return torch.ne(seen, 0, out=out)
