"""Whisper's timestamps in one window: which tokens a row may say next, on any device; the rules are numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shallowfusion.config import require

__all__ = ["TIMESTAMP_SECONDS", "TimestampRows", "TimestampRules", "allowed_words", "timestamp_bounds"]

TIMESTAMP_SECONDS = 0.02  # between two timestamps
FRESH, TEXT, OPENED, CLOSED = range(4)  # what a row said last: nothing, text, one that opens or closes a segment
IMPOSSIBLE = float("-inf")


@dataclass(frozen=True)
class TimestampRules:
    """When a row may say which timestamp.

    The first token is a timestamp of at most `max_initial`. One that opens a segment is followed by text or the end,
    one that closes it by the next that opens or the end. Timestamps never fall, and close later than what they close
    opened. Where all timestamps together are likelier than the likeliest other token, one of them is said.

    Args:
        begin: the id of the timestamp of 0 s; every other is one id and 0.02 s on. All ids below are no timestamps.
        count: timestamps; ids past the last are never said.
        end_id: the end token; ids below are text, those from it up to `begin` may follow a closing timestamp.
        max_initial: of the first token, in steps of 0.02 s; None = any.

    Raises:
        InvalidArgumentError: ids that are not in this order.

    Source: 2212.04356, section 4.5; openai-whisper's and transformers' filters of logits.
    """

    begin: int
    count: int
    end_id: int
    max_initial: int | None = 50

    def __post_init__(self) -> None:
        require(
            0 < self.end_id < self.begin and self.count >= 1,
            f"timestamps must follow the end token, and it the text: got end_id={self.end_id}, begin={self.begin}, "
            f"count={self.count}.",
        )
        require(
            self.max_initial is None or self.max_initial >= 0,
            f"max_initial must be at least 0 or None, got {self.max_initial}.",
        )

    @property
    def stop(self) -> int:
        """One past the last timestamp's id."""
        return self.begin + self.count

    def is_timestamp(self, token: int) -> bool:
        return self.begin <= token < self.stop

    def seconds(self, token: int) -> float:
        """What a timestamp says."""
        return round((token - self.begin) * TIMESTAMP_SECONDS, 2)


@dataclass(frozen=True)
class TimestampRows:
    """What the rules must know of the past of each row.

    Args:
        kinds: int32 [rows], what was said last.
        latest: int32 [rows], the last timestamp in steps of 0.02 s, -1 before the first.
    """

    kinds: Tensor
    latest: Tensor

    @classmethod
    def fresh(cls, num_rows: int, device: torch.device | str = "cpu") -> TimestampRows:
        """Rows that have said nothing."""
        kinds = torch.zeros(num_rows, dtype=torch.int32, device=device)
        return cls(kinds, torch.full_like(kinds, -1))

    def followed(self, rules: TimestampRules, parent_rows: Tensor, tokens: Tensor) -> TimestampRows:
        """Rows of which number k continues the old row parent_rows[k] with tokens[k]; int64 [new rows] each."""
        kinds, latest = self.kinds.index_select(0, parent_rows), self.latest.index_select(0, parent_rows)
        said = (tokens >= rules.begin) & (tokens < rules.stop)
        kinds = ((kinds == TEXT).int() + OPENED).masked_fill(~said, TEXT)
        return TimestampRows(kinds, torch.where(said, (tokens - rules.begin).int(), latest))


def timestamp_bounds(
    rules: TimestampRules, rows: TimestampRows, logits: Tensor, bias: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Where each row's allowed ids lie: from `text_first` up to `rules.begin`, and from `first` up to `last`.

    Does not synchronise, and holds nothing that a CUDA graph may not, such as numbers from the host. A bias costs
    a copy of the logits in float32.

    Args:
        logits: acoustic, [rows, vocab].
        bias: 0 or -inf (forbidden for other reasons, which are not weighed), [vocab] or [rows, vocab].

    Returns:
        text_first, first, last: int64 [rows]; text_first = begin where only timestamps may be said, first >= last
        where none may.
    """
    begin, stop, kinds = rules.begin, rules.stop, rows.kinds
    text, timestamps = logits[:, :begin], logits[:, begin:stop].float()
    if bias is not None:
        text, timestamps = text + bias[..., :begin], timestamps + bias[..., begin:stop]
    special = text[:, rules.end_id :].amax(dim=1).float()
    ordinary = text[:, : rules.end_id].amax(dim=1).float()
    is_fresh, is_closed = kinds == FRESH, kinds == CLOSED
    first = (begin + rows.latest + (~is_closed).int()).masked_fill(kinds == OPENED, stop).long()
    most = stop if rules.max_initial is None else min(stop, begin + rules.max_initial + 1)
    last = torch.full_like(first, stop).masked_fill(is_fresh, most)
    places = torch.arange(begin, stop, device=logits.device)
    inside = (places >= first[:, None]) & (places < last[:, None])  # [rows, count]
    together = (timestamps / temperature).masked_fill(~inside, IMPOSSIBLE).logsumexp(dim=1)
    likeliest = torch.where(is_closed, special, torch.maximum(ordinary, special)) / temperature
    text_first = torch.zeros_like(first).masked_fill(is_closed, rules.end_id)
    return text_first.masked_fill(is_fresh | (together > likeliest), begin), first, last


def allowed_words(
    rules: TimestampRules, rows: TimestampRows, logits: Tensor, bias: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """What the rules allow each row, as `fused_step` takes it: int32 [rows, ceil(vocab / 32)]; see `timestamp_bounds`.

    Tokens that `bias` forbids may be among them.
    """
    text_first, first, last = timestamp_bounds(rules, rows, logits, bias, temperature)
    starts = torch.arange(0, logits.shape[1], 32, device=logits.device)  # of each word
    choices = torch.zeros(3, dtype=torch.int64, device=logits.device)  # all text_first there are
    choices[1:2].fill_(rules.end_id)
    choices[2:].fill_(rules.begin)
    chosen = (text_first >= rules.end_id).int() + (text_first >= rules.begin).int()
    bits = _bits(choices, torch.full_like(choices, rules.begin), starts).index_select(0, chosen)
    timed = slice(rules.begin // 32, (rules.stop + 31) // 32)  # words that hold timestamps
    bits[:, timed] |= _bits(first, last, starts[timed])
    return (bits - (bits >> 31 << 32)).int()


def _bits(first: Tensor, last: Tensor, starts: Tensor) -> Tensor:
    """Words in which the bits from `first` up to `last` are set, int64 [rows, words]."""
    low = (first[:, None] - starts).clamp(0, 32)
    high = torch.maximum((last[:, None] - starts).clamp(0, 32), low)
    one = torch.ones_like(low)
    return (one << high) - (one << low)
