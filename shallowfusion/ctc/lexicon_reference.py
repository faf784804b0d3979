"""`LexiconSearch` in plain Python, for reading: the definition of correct for the native class."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shallowfusion.ctc.lexicon import (
    LexiconOptions,
    LexiconResult,
    LexiconWords,
    checked_emissions,
    checked_transitions,
    scored_spellings,
    search_rules,
)
from shallowfusion.ngrams.table import NgramTableProtocol

__all__ = ["ReferenceLexiconSearch"]

IMPOSSIBLE = -math.inf


def log_add(one: float, other: float) -> float:
    high = max(one, other)
    return high if high == IMPOSSIBLE else high + math.log1p(math.exp(min(one, other) - high))


@dataclass(eq=False)
class Node:
    """A place in the lexicon; `best` is the largest score of a word at or below it."""

    number: int = 0
    children: dict[int, Node] = field(default_factory=dict)
    words: list[int] = field(default_factory=list)
    best: float = IMPOSSIBLE


class Path(NamedTuple):
    score: float
    history: tuple[int, ...]
    node: Node
    label: int
    ends_in_blank: bool
    labels: tuple[int, ...]
    words: tuple[int, ...]

    @property
    def key(self) -> tuple[tuple[int, ...], int, int, bool]:
        return self.history, self.node.number, self.label, self.ends_in_blank


class ReferenceLexiconSearch:
    """See `LexiconSearchProtocol`; a list of paths per frame, merged in a dictionary."""

    def __init__(
        self,
        num_labels: int,
        blank: int | None,
        silence: int,
        words: LexiconWords,
        options: LexiconOptions | None = None,
        table: NgramTableProtocol | None = None,
        transitions: npt.ArrayLike | None = None,
    ) -> None:
        self.options = options or LexiconOptions()
        self._transitions = checked_transitions(transitions, num_labels, blank)
        self._rules = search_rules(num_labels, blank, silence, self.options)
        self._num_labels, self._blank, self._silence = num_labels, blank, silence
        self._words, self._table = words, table
        self._states: dict[tuple[int, ...], int] = {(): 0 if table is None else table.start_state}
        self._root = Node()
        if words.spellings is not None:
            self._build(scored_spellings(words, table, self.options.lm_scale))
        self._beam = [Path(0.0, (), self._root, silence, False, (silence,), ())]

    def step(self, emissions: npt.ArrayLike) -> None:
        for frame in checked_emissions(emissions, self._num_labels).astype(np.float64):
            ranked = sorted(range(len(frame)), key=lambda label: (-frame[label], label))[: self._rules["top_labels"]]
            extend = self._free if self._words.spellings is None else self._spelled
            self._beam = self._best(new for path in self._beam for new in extend(path, frame.tolist(), ranked))

    def end(self) -> None:
        closed = [path for path in self._beam if path.node is self._root]
        weight, table = self.options.lm_weight * self.options.lm_scale, self._table
        self._beam = self._best(
            path._replace(
                score=path.score + (weight * float(table.end([self._states[path.history]])[0]) if table else 0.0),
                label=self._silence,
                ends_in_blank=False,
                labels=(*path.labels, self._silence),
            )
            for path in closed or self._beam
        )

    def results(self) -> list[LexiconResult]:
        return [
            LexiconResult(path.score, np.array(path.labels, dtype=np.int32), np.array(path.words, dtype=np.int32))
            for path in self._beam
        ]

    def _build(self, spellings: Iterable[tuple[int, list[int], float]]) -> None:
        count = 0
        for word, labels, score in spellings:
            node = self._root
            for label in labels:
                if label not in node.children:
                    count += 1
                    node.children[label] = Node(count)
                node = node.children[label]
            node.words.append(word)
            node.best = log_add(node.best, score)
        self._smear(self._root)

    def _smear(self, node: Node) -> float:
        """Hand scores up the lexicon."""
        node.best = max([node.best, *map(self._smear, node.children.values())])
        return node.best

    def _said(self, history: tuple[int, ...], word: int) -> float:
        """Log-prob of a word after a history; the state after it is remembered."""
        if self._table is None:
            return 0.0
        log_probs, states = self._table.score([self._states[history]], [self._words.ids[word]])
        self._states[(*history, word)] = int(states[0])
        return float(log_probs[0]) * self.options.lm_scale

    def _silent(self, label: int) -> float:
        return self.options.silence_score if label == self._silence else 0.0

    def _heard(self, path: Path, frame: list[float], label: int) -> float:
        """What a label says of its frame, the transition to it included; silence before the first frame has none."""
        if self._transitions is None or len(path.labels) == 1:
            return frame[label]
        return frame[label] + float(self._transitions[label, path.label])

    def _moved(self, path: Path, score: float, label: int, node: Node | None = None, blank: bool = False) -> Path:
        return path._replace(
            score=score,
            label=label,
            node=path.node if node is None else node,
            ends_in_blank=blank,
            labels=(*path.labels, label),
        )

    def _spelled(self, path: Path, frame: list[float], ranked: list[int]) -> Iterable[Path]:
        options, root = self.options, self._root
        promised = 0.0 if path.node is root else path.node.best
        for label in ranked:
            child = path.node.children.get(label)
            if child is None:
                continue
            score = path.score + self._heard(path, frame, label) + self._silent(label)
            if child.children and (path.ends_in_blank or label != path.label or self._blank is None):
                yield self._moved(path, score + options.lm_weight * (child.best - promised), label, child)
            spoken = [] if path.node is root and path.label == label else [(w, options.word_score) for w in child.words]
            if not child.words and options.unknown_score > IMPOSSIBLE:
                spoken = [(self._words.unknown, options.unknown_score)]
            for word, bonus in spoken:
                change = options.lm_weight * (self._said(path.history, word) - promised) + bonus
                yield self._moved(path, score + change, label, root)._replace(
                    history=(*path.history, word), words=(*path.words, word)
                )
        if not path.ends_in_blank or path.node is root:
            label = self._silence if path.node is root else path.label
            yield self._moved(path, path.score + self._heard(path, frame, label) + self._silent(label), label)
        if self._blank is not None:
            yield self._moved(path, path.score + frame[self._blank], self._blank, blank=True)

    def _free(self, path: Path, frame: list[float], ranked: list[int]) -> Iterable[Path]:
        for label in ranked:
            score = path.score + self._heard(path, frame, label) + self._silent(label)
            moved = self._moved(path, score, label, blank=label == self._blank)
            if label != self._blank and (label != path.label or path.ends_in_blank):
                said = self.options.lm_weight * self._said(path.history, label)
                moved = moved._replace(score=score + said, history=(*path.history, label))
            yield moved

    def _best(self, paths: Iterable[Path]) -> list[Path]:
        found = [path for path in paths if path.score > IMPOSSIBLE]
        least = max((path.score for path in found), default=0.0) - self.options.beam_margin
        merged: dict[object, Path] = {}
        for path in sorted(found, key=lambda path: -path.score):
            if path.score < least:
                continue
            kept = merged.get(path.key)
            if kept is None:
                merged[path.key] = path
            elif self.options.log_add:
                merged[path.key] = kept._replace(score=log_add(kept.score, path.score))
        return sorted(merged.values(), key=lambda path: -path.score)[: self.options.beam_size]
