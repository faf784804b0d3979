"""`CtcSearch` in plain Python, float64 logarithms, for reading: the definition of correct for the native class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from shallowfusion.checks import LARGEST_INTEGER, integer
from shallowfusion.config import require
from shallowfusion.ctc.language_reference import Language, Prefix
from shallowfusion.ctc.results import (
    CtcHypothesis,
    CtcLive,
    CtcResult,
    extras_of,
    frames_of,
    results_of,
    start_states_of,
)
from shallowfusion.ctc.search import (
    MAX_UTTERANCES,
    check_settings,
    merges_texts,
)
from shallowfusion.ctc.settings import CtcAlphabet, CtcLanguage, CtcOptions

__all__ = ["ReferenceCtcSearch"]

LARGEST_LOG_PROB = 1e-3  # rounding of a log-softmax
LARGEST_SUM = 1.05  # of the probabilities of the first frame
IMPOSSIBLE = -math.inf

Times = tuple[tuple[int, int], ...]


def log_add(one: float, other: float) -> float:
    largest = max(one, other)
    return largest if largest == IMPOSSIBLE else largest + math.log1p(math.exp(min(one, other) - largest))


@dataclass(frozen=True)
class Path:
    """All alignments of a prefix with one ending: log of their mass, and the best one with its label times."""

    mass: float = IMPOSSIBLE
    best: float = IMPOSSIBLE
    times: Times = ()


@dataclass
class Entry:
    """A prefix in the beam; `order` settles ties."""

    prefix: Prefix
    order: tuple[int, int]
    blank: Path = field(default_factory=Path)
    label: Path = field(default_factory=Path)


@dataclass
class Utterance:
    beam: list[Entry]
    frames: int = 0
    error: str = ""


@dataclass
class State:
    utterances: list[Utterance]

    @property
    def num_frames(self) -> list[int]:
        return [utterance.frames for utterance in self.utterances]


class ReferenceCtcSearch:
    """See `CtcSearchProtocol`; every extension of every prefix is made, one at a time."""

    def __init__(
        self,
        alphabet: CtcAlphabet,
        options: CtcOptions | None = None,
        language: CtcLanguage | None = None,
        threads: int | None = None,
    ) -> None:
        self.alphabet = alphabet
        self.options = options or CtcOptions()
        self.language = language
        check_settings(alphabet, self.options, language)
        self._language = Language(alphabet, self.options, language)
        self._add: Callable[[float, float], float] = max if self.options.merge == "max" else log_add
        self._merges_texts = merges_texts(alphabet, self.options, language)
        self._last_times = self.options.times == "last"

    def begin(self, num_utterances: int, start_states: Sequence[int] | None = None) -> Any:
        count = integer("num_utterances", num_utterances, 0, MAX_UTTERANCES)
        default = 0 if self.language is None else self.language.start_state
        return State([self._fresh(state) for state in start_states_of(start_states, count, default)])

    def _fresh(self, lm_state: int) -> Utterance:
        return Utterance(
            [Entry(Prefix(lm_state=lm_state, phrase=self._language.start_phrase), (0, 0), blank=Path(0.0, 0.0))]
        )

    def step(self, state: Any, log_probs: object, lengths: object = None) -> None:
        frames = frames_of(log_probs, lengths, len(state.utterances), len(self.alphabet.labels))
        for utterance, own, count in zip(state.utterances, frames.log_probs, frames.counts.tolist(), strict=True):
            for frame in own[:count].astype(np.float64):
                utterance.error = utterance.error or self._error(frame, utterance.frames)
                if not utterance.error:
                    self._advance(utterance, frame)

    def _error(self, frame: np.ndarray, number: int) -> str:
        for label, value in enumerate(frame.tolist()):
            if math.isnan(value):
                return f"frame {number}, label {label} is NaN; the acoustic model overflowed or was given bad audio."
            if value > LARGEST_LOG_PROB:
                cure = "but log-probabilities are at most 0; pass log_softmax(logits)."
                return f"frame {number}, label {label} is {value:g}, {cure}"
        if frame.max() == IMPOSSIBLE:
            return f"frame {number} makes every label impossible (-inf); check the acoustic model."
        total = float(np.exp(frame).sum())
        if number == 0 and total > LARGEST_SUM:
            return f"the probabilities of frame 0 sum to {total:g}, wanted at most 1; pass log_softmax(logits)."
        return ""

    def _kept_labels(self, frame: np.ndarray) -> list[int]:
        options = self.options
        ranked = sorted(range(len(frame)), key=lambda label: (-frame[label], label))
        if options.blank_skip is not None and frame[self.alphabet.blank] >= math.log(options.blank_skip):
            return [self.alphabet.blank]
        lowest = IMPOSSIBLE if options.token_min_log_prob is None else options.token_min_log_prob
        return [label for label in ranked[: options.top_labels] if frame[label] >= lowest or label == ranked[0]]

    def _advance(self, utterance: Utterance, frame: np.ndarray) -> None:
        time, blank = utterance.frames, self.alphabet.blank
        delimiter = self.alphabet.delimiter
        found: dict[tuple[int, ...], Entry] = {}
        for place, entry in enumerate(utterance.beam):
            found[entry.prefix.labels] = Entry(entry.prefix, (place, -1))
        for place, entry in enumerate(utterance.beam):
            both = self._joined(entry.blank, entry.label)
            for label in self._kept_labels(frame):
                log_prob = float(frame[label])
                stays = found[entry.prefix.labels]
                if label == blank:
                    stays.blank = self._joined(stays.blank, moved(both, log_prob))
                    continue
                if label == delimiter and (entry.prefix.last == delimiter or not entry.prefix.labels):
                    repeated = moved(both, log_prob, until=time + 1)
                    stays.label = self._joined(stays.label, repeated)
                    continue
                if label == entry.prefix.last:
                    repeated = moved(entry.label, log_prob, until=time + 1)
                    stays.label = self._joined(stays.label, repeated)
                self._extend(found, entry, label, log_prob, (place, label), time)
        utterance.beam = self._best(list(found.values()))
        self._rank_times(utterance.beam)
        utterance.frames += 1

    def _extend(
        self, found: dict[tuple[int, ...], Entry], entry: Entry, label: int, log_prob: float, order: tuple[int, int],
        time: int,
    ) -> None:  # fmt: skip
        source = entry.blank if label == entry.prefix.last else self._joined(entry.blank, entry.label)
        if source.mass == IMPOSSIBLE:
            return
        labels = (*entry.prefix.labels, label)
        if labels not in found:
            found[labels] = Entry(self._language.extended(entry.prefix, label), order)
        child = found[labels]
        times = source.times if entry.prefix.labels else ()
        change = log_prob + child.prefix.fused - entry.prefix.fused + child.prefix.extra - entry.prefix.extra
        best = source.best + (log_prob if self._last_times else change)
        new = Path(source.mass + change, best, (*times, (time, time + 1)))
        child.label = self._joined(child.label, new)

    def _joined(self, one: Path, other: Path) -> Path:
        better = other if other.best > one.best else one
        return Path(self._add(one.mass, other.mass), better.best, better.times)

    def _rank_times(self, beam: list[Entry]) -> None:
        """With times="last", `best` of a path says how low it ranks."""
        for entry in beam if self._last_times else ():
            for name in ("blank", "label"):
                path = getattr(entry, name)
                best = -self._rank(entry, path) if path.mass > IMPOSSIBLE else IMPOSSIBLE
                setattr(entry, name, replace(path, best=best))

    def _rank(self, entry: Entry, path: Path | None) -> float:
        mass = self._add(entry.blank.mass, entry.label.mass) if path is None else path.mass
        return mass + self._language.spelling(entry.prefix)

    def _best(self, entries: list[Entry]) -> list[Entry]:
        """The beam after a frame: places taken by prefixes or by single paths, best first."""
        if self._merges_texts:
            self._merge_texts(entries)
        by_paths = self.options.places == "paths"
        places: list[tuple[float, tuple[int, int], int, Entry]] = []
        for entry in entries:
            for which, path in enumerate((entry.blank, entry.label) if by_paths else (None,)):
                places.append((self._rank(entry, path), entry.order, which, entry))
        margin = math.inf if self.options.beam_margin is None else self.options.beam_margin
        best = max(place[0] for place in places)
        places = [place for place in places if place[0] > IMPOSSIBLE and place[0] >= best - margin]
        places = sorted(places, key=lambda place: (-place[0], place[1], place[2]))[: self.options.beam_size]
        if self.options.history_words > 0:
            places = list(self._distinct(places, by_paths))
        beam: dict[tuple[int, ...], Entry] = {}
        for _, _, which, entry in places:
            kept = beam.setdefault(entry.prefix.labels, Entry(entry.prefix, entry.order))
            if not by_paths or which == 0:
                kept.blank = entry.blank
            if not by_paths or which == 1:
                kept.label = entry.label
        return list(beam.values())

    def _distinct(self, places: list[Any], by_paths: bool) -> Iterable[Any]:
        """Places whose last words, word being spelled and ending are new."""
        seen = set()
        for place in places:
            prefix = place[3].prefix
            ending = self.alphabet.blank if by_paths and place[2] == 0 else prefix.last
            key = (prefix.words[-self.options.history_words :], prefix.word, prefix.phrase, ending)
            if key not in seen:
                seen.add(key)
                yield place

    def _merge_texts(self, entries: list[Entry]) -> None:
        for name in ("blank", "label"):
            groups: dict[Any, list[Entry]] = {}
            for entry in entries:
                if getattr(entry, name).mass > IMPOSSIBLE:
                    ending = entry.prefix.last if name == "label" else None
                    groups.setdefault((entry.prefix.text, entry.prefix.word != "", ending), []).append(entry)
            for group in groups.values():
                first = max(group, key=lambda entry: getattr(entry, name).mass)
                mass = IMPOSSIBLE
                for entry in group:
                    apart = first.prefix.extra - entry.prefix.extra
                    mass = self._add(mass, getattr(entry, name).mass + apart)
                    if entry is not first:
                        setattr(entry, name, Path())
                setattr(first, name, replace(getattr(first, name), mass=mass))

    def live(self, state: Any) -> list[list[CtcLive]]:
        return [
            [] if utterance.error else [self._live(entry.prefix) for entry in utterance.beam]
            for utterance in state.utterances
        ]

    def _live(self, prefix: Prefix) -> CtcLive:
        return CtcLive(prefix.text, bool(prefix.word) and not prefix.closes, prefix.extra)

    def set_extras(self, state: Any, extras: Sequence[Sequence[float]]) -> None:
        given, live = extras_of(extras), self.live(state)
        require(
            [len(own) for own in given] == [len(own) for own in live],
            f"extras must have one number per live prefix, {[len(own) for own in live]}, "
            f"got {[len(own) for own in given]}.",
        )
        for utterance, own in zip(state.utterances, given, strict=True):
            for entry, extra in zip(utterance.beam, own, strict=False):
                change = extra - entry.prefix.extra
                entry.prefix = replace(entry.prefix, extra=extra)
                entry.blank, entry.label = moved(entry.blank, change), moved(entry.label, change)
            self._rank_times(utterance.beam)

    def results(self, state: Any, n_best: int = 1) -> list[CtcResult]:
        return self._results(state, n_best, ended=False)

    def end(self, state: Any, n_best: int = 1) -> list[CtcResult]:
        return self._results(state, n_best, ended=True)

    def _results(self, state: Any, n_best: int, ended: bool) -> list[CtcResult]:
        count = integer("n_best", n_best, 1, LARGEST_INTEGER)
        answers = [
            (utterance.error, [] if utterance.error else self._hypotheses(utterance, ended)[:count])
            for utterance in state.utterances
        ]
        return results_of(answers, state.num_frames)

    def _hypotheses(self, utterance: Utterance, ended: bool) -> list[CtcHypothesis]:
        groups: dict[Any, list[Entry]] = {}
        by_text = self.alphabet.delimiter is not None or self._merges_texts
        for entry in utterance.beam:
            groups.setdefault(entry.prefix.text if by_text else entry.prefix.labels, []).append(entry)
        made = []
        for group in groups.values():
            asr = IMPOSSIBLE
            for entry in group:
                said = entry.prefix.fused + entry.prefix.extra
                asr = self._add(asr, self._add(entry.blank.mass, entry.label.mass) - said)
            timed = group[0]
            if self._last_times:
                timed = max(group, key=lambda entry: max(entry.blank.best, entry.label.best))
            made.append(self._hypothesis(group[0], asr, ended, timed))
        best = max(hypothesis.total for hypothesis in made)
        margin = math.inf if self.options.beam_margin is None else self.options.beam_margin
        kept = [hypothesis for hypothesis in made if hypothesis.total >= best - margin]
        return sorted(kept, key=lambda hypothesis: -hypothesis.total)

    def _hypothesis(self, entry: Entry, asr: float, ended: bool, timed: Entry) -> CtcHypothesis:
        prefix, lm_state = entry.prefix, entry.prefix.lm_state
        if ended:
            charged = timed if self.language is not None and self.language.score_empty_word else entry
            prefix, lm_state = self._language.ended(charged.prefix)
        times, word_times = self._times(entry), self._word_times(timed.prefix, self._times(timed))
        parts = {"asr": asr} if self.language is None else {"asr": asr, "lm": prefix.lm}
        return CtcHypothesis(
            text=entry.prefix.text,
            label_ids=np.array(entry.prefix.labels, dtype=np.int32),
            label_frames=np.array(times, dtype=np.int32).reshape(-1, 2),
            word_frames=np.array(word_times, dtype=np.int32).reshape(-1, 2),
            total=asr + prefix.fused + prefix.extra,
            parts=parts,
            lm_state=lm_state,
            extra=prefix.extra,
        )

    def _times(self, entry: Entry) -> Times:
        return self._joined(entry.blank, entry.label).times if entry.prefix.labels else ()

    def _word_times(self, prefix: Prefix, times: Times) -> list[tuple[int, int]]:
        words: list[tuple[int, int]] = []
        fresh = True
        for label, (start, end) in zip(prefix.labels, times, strict=True):
            piece = self.alphabet.pieces[label]
            fresh = fresh or piece.begins_word
            if piece.text:
                words[len(words) - (not fresh) :] = [(start if fresh else words[-1][0], end)]
                fresh = False
            fresh = fresh or piece.ends_word
        return words


def moved(path: Path, log_prob: float, until: int | None = None) -> Path:
    """The path one frame on; `until` stretches its last label."""
    times = path.times
    if until is not None and times:
        times = (*times[:-1], (times[-1][0], until))
    return Path(path.mass + log_prob, path.best + log_prob, times)
