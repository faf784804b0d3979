"""One frame of the CTC search for a whole batch: torch operations of fixed shapes, no synchronisation, any device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from shallowfusion.ctc.device_merging import candidates_of, joined
from shallowfusion.ctc.device_texts import SpellingTracker, TextTracker, WordTracker
from shallowfusion.ctc.settings import CtcAlphabet, CtcOptions
from shallowfusion.ngrams.device_table import DeviceNgramTable

__all__ = ["Beam", "DeviceRules", "Frame", "Trail", "advance", "fresh_beam"]

HASH_FACTOR = 6364136223846793005  # of a linear congruence modulo 2^64
DEAD_HASH = -0x61C8864680B583EB  # of places without a prefix
IMPOSSIBLE = -math.inf


@dataclass
class Beam:
    """The prefixes of every utterance, best first: tensors [utterances, beam_size].

    A prefix is known by the rolling hash of its labels, 64 bits: two different prefixes of one utterance are taken for
    one with a probability of about (prefixes looked at)^2 / 2^65, below 1e-8 for 100,000 of them.

    Args:
        blank, label: float64, log of the mass of alignments that end in a blank, in the last label; with `fused`.
        blank_best, label_best: float64, of the best alignment alone.
        fused: float64, weighted language log-prob and bonuses.
        lm: float64, language log-prob.
        lm_state: int64.
        hash, parent_hash: int64, of the labels, of all but the last.
        last: int64, the last label, -1 = no label.
        sites: int64, where texts stand, for each of the trackers.
    """

    blank: Tensor
    label: Tensor
    blank_best: Tensor
    label_best: Tensor
    fused: Tensor
    lm: Tensor
    lm_state: Tensor
    hash: Tensor
    parent_hash: Tensor
    last: Tensor
    sites: tuple[Tensor, ...] = ()

    def tensors(self) -> list[Tensor]:
        return [*(getattr(self, entry.name) for entry in fields(self)[:-1]), *self.sites]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Beam:
        """The beam of these `tensors`."""
        count = len(fields(cls)) - 1
        names = (entry.name for entry in fields(cls))
        return cls(**dict(zip(names, tensors[:count], strict=False)), sites=tuple(tensors[count:]))


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame of a `FrameBlock`, tensors without the first axis."""

    log_probs: Tensor
    labels: Tensor
    values: Tensor
    blank: Tensor
    numbers: Tensor


@dataclass(frozen=True, eq=False)
class Trail:
    """Where the best alignments of a frame's prefixes come from.

    Args:
        codes: int32 [utterances, beam_size, 2], for endings in blank and label: ((place in the beam before) * 2 +
            ending there) * 2 + whether a label begins.
        last: int32 [utterances, beam_size], the last label, -1 = none, -2 = a place without a prefix.
    """

    codes: Tensor
    last: Tensor


class DeviceRules:
    """What a search maximises and which pairs of prefix and label it looks at, as tensors.

    Without a language model the increments of a label are those of all prefixes alike. Then prefix i (from 0, best
    first) with the j-th best label is behind (i + 1) * (j + 1) - 1 other pairs, save up to `exceptions` of each prefix:
    its last label, the blank, a delimiter at a boundary. Pairs with beam_size such pairs before them are left out:
    about beam_size * (4 + log(beam_size)) of beam_size * labels remain, and no result changes; some twice as many where
    equal texts are joined. With a language model, phrases or words all pairs are looked at.

    Args:
        device: where the tensors are.
        table: an n-gram model, None = none; of labels, if there are `label_words`, its word for each label.
        trackers: what follows the texts; with an n-gram model of words the last one follows words.
    """

    def __init__(
        self,
        alphabet: CtcAlphabet,
        options: CtcOptions,
        device: torch.device,
        table: DeviceNgramTable | None = None,
        label_words: list[int] | None = None,
        trackers: Sequence[TextTracker] = (),
    ) -> None:
        num_labels, beam_size, top_labels = len(alphabet.labels), options.beam_size, options.top_labels
        self.beam_size = beam_size
        self.delimiter = -1 if alphabet.delimiter is None else alphabet.delimiter
        self.margin = math.inf if options.beam_margin is None else float(options.beam_margin)
        self.length_bonus, self.lm_weight, self.table = options.length_bonus, options.lm_weight, table
        self.device, self.use_max = device, options.merge == "max"
        self.add: Callable[[Tensor, Tensor], Tensor] = torch.maximum if self.use_max else torch.logaddexp
        exceptions = 2 if self.delimiter < 0 else 3
        top = num_labels if top_labels is None else min(top_labels, num_labels)
        self.spelling = next((tracker for tracker in trackers if isinstance(tracker, SpellingTracker)), None)
        looks_at_all = table is not None or any(tracker is not self.spelling for tracker in trackers)
        wanted = beam_size if self.spelling is None else candidates_of(beam_size)
        self.looked_at = top if looks_at_all else min(top, wanted + exceptions)
        pairs = [(i, -1) for i in range(beam_size)]
        numbers = list(range(beam_size))  # of stays; pairs are numbered behind them
        for i in range(beam_size):
            for j in range(self.looked_at):
                if not looks_at_all and (i + 1) * (j + 1 - exceptions) > wanted:
                    break
                numbers.append(len(numbers))
                pairs.append((i, j))
        order = sorted(numbers, key=lambda number: pairs[number])
        self.order = torch.tensor(order, device=device)
        self.prefixes = torch.tensor([i for i, j in pairs if j >= 0], dtype=torch.int64, device=device)
        self.ranks = torch.tensor([j for _, j in pairs if j >= 0], dtype=torch.int64, device=device)
        self.trackers, self.label_words, self.words = tuple(trackers), None, None
        if label_words is not None:
            self.label_words = torch.tensor(label_words, dtype=torch.int64, device=device)
        elif table is not None:
            assert isinstance(trackers[-1], WordTracker)
            self.words = trackers[-1]

    def held(self, sites: Sequence[Tensor]) -> Tensor | float:
        """What ranks texts and is in no total."""
        return sum((tracker.held(own) for tracker, own in zip(self.trackers, sites, strict=True)), start=0.0)

    def said(self, beam: Beam, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What the language model says of `prefixes` with labels: float64 nats and int64 states."""
        assert self.table is not None
        states = beam.lm_state.index_select(1, self.prefixes)
        if self.label_words is not None:
            scored, after = self.table.score(states.reshape(-1), self.label_words[labels].reshape(-1))
            return scored.double().view_as(states), after.view_as(states)
        assert self.words is not None
        closes, words = self.words.closed(beam.sites[-1].index_select(1, self.prefixes), labels)
        scored, after = self.table.score(states.reshape(-1), words.reshape(-1))
        log_probs = scored.double().view_as(states).masked_fill(~closes, 0.0)
        return log_probs, torch.where(closes, after.view_as(states), states)

    def ended(self, beam: Beam, scores_end: bool) -> tuple[Tensor, Tensor, Tensor]:
        """`fused`, `lm` and `lm_state` after the last word and with `scores_end` the end of the sentence."""
        fused, lm, states = beam.fused, beam.lm, beam.lm_state
        for tracker, own in zip(self.trackers, beam.sites, strict=True):
            fused = fused + tracker.ending(own)
        if self.table is None:
            return fused, lm, states
        log_probs = torch.zeros_like(lm)
        if self.words is not None:
            is_open, words = self.words.is_open(beam.sites[-1]), self.words.open_words(beam.sites[-1])
            scored, after = self.table.score(states.reshape(-1), words.reshape(-1))
            log_probs = scored.double().view_as(lm).masked_fill(~is_open, 0.0)
            states = torch.where(is_open, after.view_as(states), states)
        if scores_end:
            log_probs = log_probs + self.table.end(states.reshape(-1)).double().view_as(lm)
        return fused + self.lm_weight * log_probs, lm + log_probs, states


def fresh_beam(lm_states: Tensor, beam_size: int, trackers: Sequence[TextTracker] = ()) -> Beam:
    """The empty prefix in every first place, nothing in the others; `lm_states` int64 [utterances]."""
    shape = (len(lm_states), beam_size)
    doubles = torch.zeros(shape, dtype=torch.float64, device=lm_states.device)
    integers = torch.zeros(shape, dtype=torch.int64, device=lm_states.device)
    impossible = torch.full_like(doubles, IMPOSSIBLE)
    blank = impossible.clone()
    blank[:, 0] = 0.0
    hashes = torch.full_like(integers, DEAD_HASH)
    hashes[:, 0] = 0
    return Beam(
        blank=blank, label=impossible, blank_best=blank.clone(), label_best=impossible.clone(),
        fused=doubles, lm=doubles.clone(), lm_state=lm_states[:, None].repeat(1, beam_size),
        hash=hashes, parent_hash=torch.full_like(integers, DEAD_HASH), last=torch.full_like(integers, -1),
        sites=tuple(torch.full_like(integers, tracker.start) for tracker in trackers),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Stays:
    """The prefixes of the beam one frame on; `codes` as in `Trail`."""

    blank: Tensor
    label: Tensor
    blank_best: Tensor
    label_best: Tensor
    codes: Tensor


@dataclass(frozen=True, eq=False)
class Extensions:
    """Pairs of prefix and label; tensors [utterances, pairs]. `rank` and `mass` are -inf for those that are none."""

    rank: Tensor
    mass: Tensor
    best: Tensor
    label: Tensor
    hash: Tensor
    fused: Tensor
    lm: Tensor | None
    lm_state: Tensor | None
    sites: list[Tensor]
    codes: Tensor


def advance(beam: Beam, frame: Frame, rules: DeviceRules) -> tuple[Beam, Trail]:
    """The beam after one more frame; utterances whose frame number is -1 keep theirs.

    Reads per utterance the beam, the frame's sorted labels and one log-prob per prefix.
    """
    both = rules.add(beam.blank, beam.label)
    ordered, places = beam.hash.sort(dim=1)
    stays = _stays(beam, both, frame, rules, ordered, places)
    extensions = _extensions(beam, both, frame, rules, ordered)
    stay_rank = rules.add(stays.blank, stays.label) + rules.held(beam.sites)
    ranks = torch.cat([stay_rank, extensions.rank], 1).index_select(1, rules.order)
    ranks, chosen = ranks.sort(dim=1, descending=True, stable=True)
    masses = None
    if rules.spelling is None:
        ranks, chosen = ranks[:, : rules.beam_size], rules.order[chosen[:, : rules.beam_size]]
    else:
        chosen = rules.order[chosen[:, : candidates_of(rules.beam_size)]]
        ranks, chosen, masses = _joined_texts(beam, rules, stays, extensions, chosen)
    is_live = (ranks > IMPOSSIBLE) & (ranks >= ranks[:, :1] - rules.margin)
    return _chosen(beam, frame, rules, stays, extensions, chosen, is_live, masses)


def _joined_texts(
    beam: Beam, rules: DeviceRules, stays: Stays, extensions: Extensions, chosen: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Ranks and numbers of the best candidates once equal texts are one, and their masses in blank and label."""
    is_stay = chosen < rules.beam_size
    parent, pair = chosen.clamp(max=rules.beam_size - 1), (chosen - rules.beam_size).clamp_(min=0)

    def either(stay: Tensor, extension: Tensor) -> Tensor:
        return torch.where(is_stay, stay.gather(1, parent), extension.gather(1, pair))

    sites = [either(own, other) for own, other in zip(beam.sites, extensions.sites, strict=True)]
    assert rules.spelling is not None
    texts = rules.spelling.open_texts(sites[rules.trackers.index(rules.spelling)])
    blank = stays.blank.gather(1, parent).masked_fill(~is_stay, IMPOSSIBLE)
    blank, label = joined(
        texts, either(beam.last, extensions.label), blank, either(stays.label, extensions.mass), rules.add
    )
    ranks, places = (rules.add(blank, label) + rules.held(sites)).sort(dim=1, descending=True, stable=True)
    places = places[:, : rules.beam_size]
    masses = blank.gather(1, places), label.gather(1, places)
    return ranks[:, : rules.beam_size], chosen.gather(1, places), masses


def _found(ordered: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where hashes lie among sorted ones, and whether they do."""
    place = torch.searchsorted(ordered, wanted).clamp_(max=ordered.shape[1] - 1)
    return place, ordered.gather(1, place) == wanted


def _stays(beam: Beam, both: Tensor, frame: Frame, rules: DeviceRules, ordered: Tensor, places: Tensor) -> Stays:
    """A blank, the last label again, or the parent's extension by it."""
    is_root = beam.last < 0
    again = frame.log_probs.gather(1, beam.last.masked_fill(is_root, max(rules.delimiter, 0))).double()
    is_boundary = torch.zeros_like(is_root)
    if rules.delimiter >= 0:
        is_boundary = is_root | (beam.last == rules.delimiter)
    else:
        again = again.masked_fill(is_root, IMPOSSIBLE)
    own = torch.arange(beam.last.shape[1], device=beam.last.device).expand_as(beam.last)
    label_wins = beam.label_best > beam.blank_best
    blank = both + frame.blank[:, None]
    blank_best = torch.where(label_wins, beam.label_best, beam.blank_best) + frame.blank[:, None]
    blank_code = (own * 2 + label_wins) * 2
    from_blank = is_boundary & ~label_wins & (beam.blank_best > beam.label_best)
    label = torch.where(is_boundary, both, beam.label) + again
    label_best = torch.where(from_blank, beam.blank_best, beam.label_best) + again
    label_code = (own * 2 + ~from_blank) * 2
    place, is_there = _found(ordered, beam.parent_hash)
    is_there = is_there & ~is_root
    parent = places.gather(1, place)
    repeats = beam.last.gather(1, parent) == beam.last
    factor = again + beam.fused - beam.fused.gather(1, parent)
    above_label, above_blank = beam.label_best.gather(1, parent), beam.blank_best.gather(1, parent)
    above_wins = ~repeats & (above_label > above_blank)
    mass = torch.where(repeats, beam.blank.gather(1, parent), both.gather(1, parent)) + factor
    best = torch.where(above_wins, above_label, above_blank) + factor
    label = rules.add(label, mass.masked_fill(~is_there, IMPOSSIBLE))
    begins = is_there & (best > label_best)
    label_best = torch.where(begins, best, label_best)
    label_code = torch.where(begins, (parent * 2 + above_wins) * 2 + 1, label_code)
    return Stays(blank, label, blank_best, label_best, torch.stack([blank_code, label_code], 2))


def _extensions(beam: Beam, both: Tensor, frame: Frame, rules: DeviceRules, ordered: Tensor) -> Extensions:
    prefixes = rules.prefixes
    label, value = frame.labels.index_select(1, rules.ranks), frame.values.index_select(1, rules.ranks)
    last = beam.last.index_select(1, prefixes)
    repeats = label == last
    hashes = beam.hash.index_select(1, prefixes) * HASH_FACTOR + 1 + label
    mass = torch.where(repeats, beam.blank.index_select(1, prefixes), both.index_select(1, prefixes)) + value
    label_best, blank_best = beam.label_best.index_select(1, prefixes), beam.blank_best.index_select(1, prefixes)
    label_wins = ~repeats & (label_best > blank_best)
    best = torch.where(label_wins, label_best, blank_best) + value
    is_none = _found(ordered, hashes)[1]  # in the beam already: its parent's part is in its stay
    if rules.delimiter >= 0:
        is_none = is_none | ((label == rules.delimiter) & ((last < 0) | (last == rules.delimiter)))
    increment: Tensor | float = rules.length_bonus
    lm, lm_state = None, None
    if rules.table is not None:
        lm, lm_state = rules.said(beam, label)
        increment = rules.lm_weight * lm + rules.length_bonus
    sites = []
    for tracker, own in zip(rules.trackers, beam.sites, strict=True):
        gains, after = tracker.extended(own.index_select(1, prefixes), label)
        increment = increment + gains
        sites.append(after)
    fused = beam.fused.index_select(1, prefixes) + increment
    mass = (mass + increment).masked_fill(is_none, IMPOSSIBLE)
    codes = (prefixes * 2 + label_wins) * 2 + 1
    return Extensions(
        mass + rules.held(sites), mass, best + increment, label, hashes, fused, lm, lm_state, sites, codes
    )


def _chosen(
    beam: Beam, frame: Frame, rules: DeviceRules, stays: Stays, extensions: Extensions, chosen: Tensor, is_live: Tensor,
    masses: tuple[Tensor, Tensor] | None,
) -> tuple[Beam, Trail]:  # fmt: skip
    """The beam of the chosen candidates; `masses` in place of their own, where equal texts were joined."""
    size = rules.beam_size
    is_stay = chosen < size
    pair = (chosen - size).clamp_(min=0)
    parent = torch.where(is_stay, chosen, rules.prefixes[pair])
    is_dead = ~is_live

    def either(stay: Tensor, extension: Tensor) -> Tensor:
        return torch.where(is_stay, stay.gather(1, parent), extension.gather(1, pair))

    def mass(stay: Tensor, extension: Tensor | None) -> Tensor:
        value = stay.gather(1, parent)
        other = value.masked_fill(~is_stay, IMPOSSIBLE) if extension is None else either(stay, extension)
        return other.masked_fill(is_dead, IMPOSSIBLE)

    lm, lm_state = beam.lm.gather(1, parent), beam.lm_state.gather(1, parent)
    if extensions.lm is not None and extensions.lm_state is not None:
        lm = lm + extensions.lm.gather(1, pair).masked_fill(is_stay, 0.0)
        lm_state = either(beam.lm_state, extensions.lm_state)
    parent_hash = torch.where(is_stay, beam.parent_hash.gather(1, parent), beam.hash.gather(1, parent))
    new = Beam(
        blank=mass(stays.blank, None),
        label=mass(stays.label, extensions.mass),
        blank_best=mass(stays.blank_best, None),
        label_best=mass(stays.label_best, extensions.best),
        fused=either(beam.fused, extensions.fused),
        lm=lm,
        lm_state=lm_state,
        hash=either(beam.hash, extensions.hash).masked_fill(is_dead, DEAD_HASH),
        parent_hash=parent_hash.masked_fill(is_dead, DEAD_HASH),
        last=either(beam.last, extensions.label),
        sites=tuple(either(own, other) for own, other in zip(beam.sites, extensions.sites, strict=True)),
    )
    if masses is not None:
        blank, label = (own.masked_fill(is_dead, IMPOSSIBLE) for own in masses)
        new.blank, new.blank_best = blank, new.blank_best.masked_fill(blank == IMPOSSIBLE, IMPOSSIBLE)
        new.label, new.label_best = label, new.label_best.masked_fill(label == IMPOSSIBLE, IMPOSSIBLE)
    is_active = (frame.numbers >= 0)[:, None]
    kept = [torch.where(is_active, one, other) for one, other in zip(new.tensors(), beam.tensors(), strict=True)]
    blank_code = stays.codes[..., 0].gather(1, parent)
    label_code = either(stays.codes[..., 1], extensions.codes)
    after = Beam.of(kept)
    last = after.last.masked_fill(is_dead & is_active, -2)
    return after, Trail(torch.stack([blank_code, label_code], 2).int(), last.int())
