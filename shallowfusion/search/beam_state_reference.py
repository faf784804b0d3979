"""`BeamState` in plain Python, written for reading: the definition of correct for the native class."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shallowfusion.checks import LARGEST_INTEGER, BeamShape, StepArrays, integer
from shallowfusion.config import BeamSettings, require
from shallowfusion.search.beam_state import BeamStep, FinishedHypothesis

__all__ = ["ReferenceBeamState"]

END_LENGTHS = 3  # lengths that must all have fallen behind before ESPnet's search stops
END_MARGIN = -10.0  # nats
END_LAG = 2  # ESPnet compares token counts with lengths that include start and end
SMALLEST_SCALE, LARGEST_SCALE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class Node:
    """One token of the tree; `parent` None is the empty prefix."""

    parent: Node | None
    token: int
    total: float
    parts: npt.NDArray[np.float32]

    def path(self) -> list[Node]:
        """The nodes from the first token to this one."""
        nodes, node = [], self
        while True:
            nodes.append(node)
            if node.parent is None:
                return nodes[::-1]
            node = node.parent


@dataclass(frozen=True)
class Candidate:
    """A possible continuation of lane `parent`."""

    total: float
    parent: int
    token: int
    parts: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Finished:
    """A finished hypothesis; `node` None is the empty one."""

    node: Node | None
    key: float
    ended: bool
    forced: bool


@dataclass
class Search:
    """The search of one utterance: lanes best first, finished hypotheses in the order they came."""

    live: list[Node | None] = field(default_factory=lambda: [None])
    finished: list[Finished] = field(default_factory=list)
    length: int = 0
    done: bool = False


def total_of(node: Node | None) -> float:
    return 0.0 if node is None else node.total


def power(base: float, exponent: float) -> float:
    """base ** exponent, held inside float32's normal range."""
    try:
        value = math.pow(base, exponent)
    except OverflowError:
        value = math.inf
    return min(max(value, SMALLEST_SCALE), LARGEST_SCALE)


class Rule(ABC):
    """What the three stop rules share: settings, keys and how candidates become nodes."""

    def __init__(self, settings: BeamSettings) -> None:
        self.settings = settings
        self.beam_size = settings.beam_size

    @abstractmethod
    def apply(self, search: Search, candidates: list[Candidate]) -> list[Candidate]:
        """Move `search` one token on; return the candidates that live on, in lane order."""

    @abstractmethod
    def finish_live(self, search: Search) -> None:
        """Finish the live hypotheses by force."""

    def key(self, total: float, length: int, ended: bool) -> float:
        assert self.settings.length_penalty is not None
        return total / power(max(1, length), self.settings.length_penalty)

    def ends(self, candidate: Candidate) -> bool:
        return candidate.token in self.settings.end_ids

    def finished(self, search: Search, candidate: Candidate, length: int) -> Finished:
        ended = self.ends(candidate)
        node = descend(search, candidate)
        return Finished(node, self.key(candidate.total, length, ended), ended, forced=not ended)

    def forced(self, node: Node | None, length: int) -> Finished:
        return Finished(node, self.key(total_of(node), length, False), ended=False, forced=True)


def descend(search: Search, candidate: Candidate) -> Node:
    return Node(search.live[candidate.parent], candidate.token, candidate.total, candidate.parts)


class HfRule(Rule):
    """transformers' `_beam_search`, per utterance."""

    def key(self, total: float, length: int, ended: bool) -> float:
        assert self.settings.length_penalty is not None
        with np.errstate(over="ignore"):
            return float(np.float32(total) / np.float32(power(max(1, length), self.settings.length_penalty)))

    def keep_best(self, search: Search, new: list[Finished]) -> None:
        search.finished = sorted(search.finished + new, key=lambda finished: -finished.key)[: self.beam_size]

    def apply(self, search: Search, candidates: list[Candidate]) -> list[Candidate]:
        length = search.length + 1
        at_limit = length >= self.settings.max_new_tokens
        new, chosen = [], []
        for rank, candidate in enumerate(candidates):
            if not (at_limit or self.ends(candidate)):
                chosen.append(candidate)
            elif rank < self.beam_size:
                new.append(self.finished(search, candidate, length))
        chosen = chosen[: self.beam_size]
        self.keep_best(search, new)
        search.live = [descend(search, candidate) for candidate in chosen]
        search.length = length
        search.done = at_limit or not chosen or self.cannot_improve(search)
        return chosen

    def cannot_improve(self, search: Search) -> bool:
        settings = self.settings
        assert settings.length_penalty is not None
        if len(search.finished) < self.beam_size:
            return False
        if settings.early_stopping == "first" or self.beam_size == 1:
            return True
        longest = settings.early_stopping == "never" and settings.length_penalty > 0
        length = settings.max_new_tokens if longest else search.length
        return self.key(total_of(search.live[0]), length, False) <= search.finished[-1].key

    def finish_live(self, search: Search) -> None:
        self.keep_best(search, [self.forced(node, search.length) for node in search.live])


class WhisperRule(Rule):
    """openai-whisper's `BeamSearchDecoder` and `MaximumLikelihoodRanker`."""

    def __init__(self, settings: BeamSettings) -> None:
        super().__init__(settings)
        self.max_candidates = round(settings.beam_size * settings.patience)
        require(
            self.max_candidates >= 1,
            f"beam_size * patience must round to at least 1, got {settings.beam_size} * {settings.patience}.",
        )

    def key(self, total: float, length: int, ended: bool) -> float:
        words = length - 1 if ended else length
        penalty = self.settings.length_penalty
        return total / (max(1, words) if penalty is None else power((5 + words) / 6, penalty))

    def apply(self, search: Search, candidates: list[Candidate]) -> list[Candidate]:
        length = search.length + 1
        new, chosen = [], []
        for candidate in candidates:
            if self.ends(candidate):
                new.append(self.finished(search, candidate, length))
            else:
                chosen.append(candidate)
            if len(chosen) == self.beam_size:
                break
        search.finished += new[: self.max_candidates - len(search.finished)]
        search.live = [descend(search, candidate) for candidate in chosen]
        search.length = length
        full = len(search.finished) >= self.max_candidates
        if full or not chosen or length >= self.settings.max_new_tokens:
            self.finish_live(search)
            search.done = True
        return chosen

    def finish_live(self, search: Search) -> None:
        missing = max(0, self.beam_size - len(search.finished))
        search.finished += [self.forced(node, search.length) for node in search.live[:missing]]


class EspnetRule(Rule):
    """ESPnet's `BeamSearch` with its end detection."""

    def apply(self, search: Search, candidates: list[Candidate]) -> list[Candidate]:
        length = search.length + 1
        first = candidates[: self.beam_size]
        chosen = [candidate for candidate in first if not self.ends(candidate)]
        search.finished += [self.finished(search, candidate, length) for candidate in first if self.ends(candidate)]
        search.live = [descend(search, candidate) for candidate in chosen]
        search.length = length
        if length >= self.settings.max_new_tokens:
            self.finish_live(search)
            search.done = True
        else:
            search.done = not chosen or self.end_detected(search)
        return chosen

    def end_detected(self, search: Search) -> bool:
        best: dict[int, float] = {}  # raw total by length
        for finished in search.finished:
            length = 0 if finished.node is None else len(finished.node.path())
            best[length] = max(best.get(length, -math.inf), total_of(finished.node))
        last = search.length - END_LAG
        return bool(best) and all(
            length in best and best[length] - max(best.values()) < END_MARGIN
            for length in range(last, last - END_LENGTHS, -1)
        )

    def finish_live(self, search: Search) -> None:
        search.finished += [self.forced(node, search.length) for node in search.live]


RULES: dict[str, type[Rule]] = {"hf": HfRule, "whisper": WhisperRule, "espnet": EspnetRule}


def recombine(candidates: list[Candidate], logsumexp: bool) -> list[Candidate]:
    """Merge candidates with equal lane and token; lanes are distinct, so no others have equal tokens."""
    merged: dict[tuple[int, int], Candidate] = {}
    for candidate in candidates:
        place = (candidate.parent, candidate.token)
        better = merged.setdefault(place, candidate)
        if logsumexp and better is not candidate:
            total = better.total + math.log1p(math.exp(candidate.total - better.total))
            merged[place] = Candidate(float(np.float32(total)), better.parent, better.token, better.parts)
    return sorted(merged.values(), key=lambda candidate: -candidate.total)


class ReferenceBeamState:
    """Beam search over candidates that somebody else scored; see `BeamStateProtocol`."""

    def __init__(self, settings: BeamSettings, num_utterances: int, num_parts: int) -> None:
        shape = BeamShape.check(settings, num_utterances, num_parts)
        self._settings = settings
        self._num_parts = shape.num_parts
        self._rule = RULES[settings.stop_rule](settings)
        self._searches: list[Search | None] = [Search() for _ in range(shape.num_utterances)]

    @property
    def num_nodes(self) -> int:
        reached: set[int] = set()
        for node in self._leaves():
            while node is not None and id(node) not in reached:
                reached.add(id(node))
                node = node.parent
        return len(reached)

    def _leaves(self) -> Iterator[Node | None]:
        for search in self._searches:
            if search is not None:
                yield from search.live
                yield from (finished.node for finished in search.finished)

    def advance(
        self,
        utterances: npt.ArrayLike,
        totals: npt.ArrayLike,
        parents: npt.ArrayLike,
        tokens: npt.ArrayLike,
        parts: npt.ArrayLike,
        flagged: npt.ArrayLike | None = None,
    ) -> BeamStep:
        arrays = StepArrays.check(utterances, totals, parents, tokens, parts, flagged, num_parts=self._num_parts)
        searches = [self._active(int(utterance)) for utterance in arrays.utterances]
        require(len({id(search) for search in searches}) == len(searches), "utterances must be distinct.")
        offered = [self._candidates(search, arrays, row) for row, search in enumerate(searches)]
        chosen = [self._advance_one(search, mine) for search, mine in zip(searches, offered, strict=True)]
        return self._step(searches, chosen)

    def _candidates(self, search: Search, arrays: StepArrays, row: int) -> list[Candidate]:
        """The possible candidates of one utterance, checked."""
        candidates: list[Candidate] = []
        rows = zip(arrays.totals[row], arrays.parents[row], arrays.tokens[row], arrays.parts[row], strict=True)
        for total, parent, token, parts in rows:
            if not np.isfinite(total) or parent == -1:
                continue
            require(
                0 <= parent < len(search.live), f"parents must be live lanes below {len(search.live)}, got {parent}."
            )
            require(token >= 0, f"tokens must be at least 0, got {token}; mark an impossible one by total -inf.")
            require(
                not candidates or total <= candidates[-1].total, f"candidates must come best first, got {total} late."
            )
            candidates.append(Candidate(float(total), int(parent), int(token), parts.copy()))
        if self._settings.recombination != "none":
            return recombine(candidates, self._settings.recombination == "logsumexp")
        return candidates

    def _advance_one(self, search: Search, candidates: list[Candidate]) -> list[Candidate]:
        if candidates:
            chosen = self._rule.apply(search, candidates)
        else:
            chosen = []
            self._rule.finish_live(search)
            search.done = True
        if search.done:
            search.live = []
        return chosen

    def _step(self, searches: list[Search], chosen: list[list[Candidate]]) -> BeamStep:
        shape = (len(searches), self._settings.beam_size)
        first_end = self._settings.end_ids[0] if self._settings.end_ids else 0
        step = BeamStep(
            tokens=np.full(shape, first_end, dtype=np.int64),
            parents=np.zeros(shape, dtype=np.int64),
            totals=np.full(shape, -np.inf, dtype=np.float32),
            done=np.array([search.done for search in searches], dtype=np.bool_),
        )
        for row, search in enumerate(searches):
            for lane, candidate in enumerate(chosen[row] if not search.done else ()):
                step.tokens[row, lane] = candidate.token
                step.parents[row, lane] = candidate.parent
                step.totals[row, lane] = candidate.total
        return step

    def force_finish(self, utterance: int) -> None:
        search = self._search(utterance)
        if not search.done:
            self._rule.finish_live(search)
            search.live, search.done = [], True

    def results(self, utterance: int, n_best: int) -> list[FinishedHypothesis]:
        search = self._search(utterance)
        count = integer("n_best", n_best, 1, LARGEST_INTEGER)
        require(search.done, f"utterance {utterance} is not done; call force_finish first.")
        ranked = sorted(search.finished, key=lambda finished: -finished.key)
        return [self._result(finished) for finished in ranked[:count]]

    def _result(self, finished: Finished) -> FinishedHypothesis:
        path = [] if finished.node is None else finished.node.path()
        totals = np.array([node.total for node in path], dtype=np.float32)
        tokens = tuple(node.token for node in path)
        return FinishedHypothesis(
            token_ids=tokens[:-1] if finished.ended else tokens,
            total=total_of(finished.node),
            key=finished.key,
            token_totals=np.diff(totals, prepend=np.float32(0)),
            parts=np.array([node.parts for node in path], dtype=np.float32).reshape(len(path), self._num_parts),
            ended=finished.ended,
            forced=finished.forced,
        )

    def is_done(self, utterance: int) -> bool:
        return self._search(utterance).done

    def num_live(self, utterance: int) -> int:
        return len(self._search(utterance).live)

    def num_finished(self, utterance: int) -> int:
        return len(self._search(utterance).finished)

    def release(self, utterance: int) -> None:
        self._search(utterance)
        self._searches[utterance] = None

    def _search(self, utterance: int) -> Search:
        number = integer("utterance", utterance, 0, len(self._searches) - 1)
        search = self._searches[number]
        require(search is not None, f"utterance {number} was released.")
        assert search is not None
        return search

    def _active(self, utterance: int) -> Search:
        search = self._search(utterance)
        require(not search.done, f"utterance {utterance} is done; leave it out of the step.")
        return search
