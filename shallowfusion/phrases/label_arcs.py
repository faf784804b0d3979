"""Where the labels of an alphabet lead in a phrase automaton: the few arcs that tell its states apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["LabelArcs", "WalkedProtocol", "label_arcs"]

Float32Array = npt.NDArray[np.float32]

Doubles = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
Arcs = tuple[Int64Array, Int64Array, Doubles]  # keys, states, gains
SLICE = 2**18  # arcs looked at together


class WalkedProtocol(Protocol):
    """What labels can be walked through; each method as `PhraseAutomatonProtocol` has it."""

    @property
    def start_state(self) -> int: ...

    @property
    def shared_state(self) -> int: ...

    def turns(self) -> tuple[Int64Array, Int64Array, npt.NDArray[np.int32]]: ...

    def say(self, states: npt.ArrayLike, tokens: npt.ArrayLike) -> tuple[Doubles, Int64Array]: ...

    def ends_words(self, tokens: npt.ArrayLike) -> npt.NDArray[np.bool_]: ...

    def closing(self, states: npt.ArrayLike) -> Float32Array: ...

    def held(self, states: npt.ArrayLike) -> Float32Array: ...


@dataclass(frozen=True, eq=False)
class LabelArcs:
    """What a label gains from a state and where it leads.

    Where `keys` holds state * labels + label, `after` and `gains` say it; everywhere else the two rows of defaults do,
    of which a state has one. A label that ends a word gains `closing` of the state on top. A label without symbols
    stays where it is.

    Args:
        keys: int64 [arcs], ascending.
        after: int64 [arcs], states.
        gains: float64 [arcs], nats for good: loans are `held`.
        default_rows: int64 [states], 0 or 1.
        default_after, default_gains: int64 and float64 [2, labels].
        closing, held: float64 [states].
        closes, is_silent: bool [labels].
        start_state: of an empty text.
    """

    keys: Int64Array
    after: Int64Array
    gains: Doubles
    default_rows: Int64Array
    default_after: Int64Array
    default_gains: Doubles
    closing: Doubles
    held: Doubles
    closes: npt.NDArray[np.bool_]
    is_silent: npt.NDArray[np.bool_]
    start_state: int

    @property
    def num_states(self) -> int:
        return len(self.held)

    @property
    def num_labels(self) -> int:
        return len(self.closes)


@dataclass(frozen=True, eq=False)
class Spellings:
    """Label sequences as a tree, one level after the other; the children of a node lie side by side.

    Args:
        symbols: int64 [nodes], the last of each.
        levels: bounds of the levels, the root alone the first.
        first_children: int64 [nodes + 1].
        first_labels: int64 [nodes + 1]; `labels` from there are spelled by the node.
    """

    symbols: Int64Array
    levels: list[int]
    first_children: Int64Array
    first_labels: Int64Array
    labels: Int64Array


@dataclass(frozen=True, eq=False)
class Walks:
    """Texts in the making: from state `rows` the symbols of `nodes` lead to `states`; int64 and float64 [walks]."""

    rows: Int64Array
    nodes: Int64Array
    states: Int64Array
    gains: Doubles

    def kept(self, mask: npt.NDArray[Any]) -> Walks:
        return Walks(self.rows[mask], self.nodes[mask], self.states[mask], self.gains[mask])


def label_arcs(automaton: WalkedProtocol, labels: Sequence[Sequence[int]]) -> LabelArcs:
    """Walk all labels from all states, as far as they differ from the fallback's.

    Price: O(arcs * log(arcs)); from states inside of a phrase that is a handful per state.

    Args:
        labels: symbols of the automaton that each spells; none = a label that adds no text.
    """
    tree = _tree(labels)
    fallbacks, offsets, tokens = automaton.turns()
    num_states, defaults = len(fallbacks), np.array([automaton.shared_state, automaton.start_state])
    rows = (fallbacks != defaults[0]).astype(np.int64)
    known = _defaults(automaton, tree, defaults)
    first = tree.symbols[1 : tree.first_children[1]]
    found: list[Arcs] = []
    states = np.repeat(np.arange(num_states, dtype=np.int64), np.diff(offsets))
    for begin in range(0, len(tokens), SLICE):
        own, from_states = tokens[begin : begin + SLICE].astype(np.int64), states[begin : begin + SLICE]
        nodes = np.searchsorted(first, own)
        is_there = np.append(first, -1)[nodes] == own
        walks = _said(automaton, from_states[is_there], nodes[is_there] + 1, from_states[is_there], None, tree)
        found += _arcs(automaton, tree, walks, rows, known)
    keys, after, gains = (
        np.concatenate([part[n] for part in found]) if found else np.zeros(0, dtype)
        for n, dtype in enumerate((np.int64, np.int64, np.float64))
    )
    order = np.argsort(keys)
    everywhere = np.arange(num_states)
    node_of = np.zeros(len(labels), np.int64)
    node_of[tree.labels] = np.repeat(np.arange(len(tree.symbols)), np.diff(tree.first_labels))
    starts = np.array([label[0] if len(label) else -1 for label in labels], np.int64)
    return LabelArcs(
        keys=keys[order], after=after[order], gains=gains[order], default_rows=rows,
        default_after=known.states.reshape(-1, 2)[node_of].T.copy(),
        default_gains=known.gains.reshape(-1, 2)[node_of].T.copy(),
        closing=automaton.closing(everywhere).astype(np.float64), held=automaton.held(everywhere).astype(np.float64),
        closes=automaton.ends_words(starts), is_silent=starts < 0, start_state=automaton.start_state,
    )  # fmt: skip


def _tree(labels: Sequence[Sequence[int]]) -> Spellings:
    symbols = [-1]
    first_children: list[int] = []
    first_labels: list[int] = []
    ordered: list[int] = []
    levels, level = [0, 1], [list(range(len(labels)))]
    for depth in itertools.count():
        below: list[list[int]] = []
        for members in level:
            first_labels.append(len(ordered))
            ordered += [label for label in members if len(labels[label]) == depth]
            first_children.append(len(symbols))
            children: dict[int, list[int]] = {}
            for label in members:
                if len(labels[label]) > depth:
                    children.setdefault(int(labels[label][depth]), []).append(label)
            symbols += sorted(children)
            below += [children[symbol] for symbol in sorted(children)]
        if not below:
            break
        levels.append(len(symbols))
        level = below
    first_children.append(len(symbols))
    first_labels.append(len(ordered))
    whole = [np.array(part, np.int64) for part in (symbols, first_children, first_labels, ordered)]
    return Spellings(whole[0], levels, whole[1], whole[2], whole[3])


def _said(
    automaton: WalkedProtocol, rows: Int64Array, nodes: Int64Array, states: Int64Array, gains: Doubles | None,
    tree: Spellings,
) -> Walks:  # fmt: skip
    """One symbol on, to `nodes`; `gains` None = at the beginning, where what an ended word gains is not counted."""
    symbols = tree.symbols[nodes]
    more, after = automaton.say(states, symbols)
    if gains is None:
        return Walks(rows, nodes, after, more)
    return Walks(
        rows, nodes, after, gains + np.where(automaton.ends_words(symbols), automaton.closing(states), 0) + more
    )


def _children(walks: Walks, tree: Spellings) -> tuple[Int64Array, Int64Array]:
    """Numbers of walks, each as often as it has children, and those."""
    first, counts = tree.first_children[walks.nodes], np.diff(tree.first_children)[walks.nodes]
    numbers = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(counts)
    return numbers, np.arange(len(numbers)) - np.repeat(ends - counts, counts) + np.repeat(first, counts)


def _defaults(automaton: WalkedProtocol, tree: Spellings, states: Int64Array) -> Walks:
    """The walks of both fallbacks to every node, node by node."""
    level = Walks(np.arange(2), np.zeros(2, np.int64), states, np.zeros(2))
    parts = [level]
    for _ in tree.levels[2:]:
        numbers, nodes = _children(level, tree)
        gains = None if level is parts[0] else level.gains[numbers]
        level = _said(automaton, level.rows[numbers], nodes, level.states[numbers], gains, tree)
        parts.append(level)
    whole = Walks(*(np.concatenate([getattr(part, name) for part in parts]) for name in Walks.__dataclass_fields__))
    order = np.lexsort((whole.rows, whole.nodes))
    return whole.kept(order)


def _arcs(automaton: WalkedProtocol, tree: Spellings, walks: Walks, rows: Int64Array, known: Walks) -> Iterable[Arcs]:
    """Keys, states and gains of all labels whose symbols begin as the walks."""
    num_labels = len(tree.labels)
    while len(walks.rows):
        usual = walks.nodes * 2 + rows[walks.rows]
        walks = walks.kept((walks.states != known.states[usual]) | (walks.gains != known.gains[usual]))
        counts = np.diff(tree.first_labels)[walks.nodes]
        numbers, ends = np.repeat(np.arange(len(counts)), counts), np.cumsum(counts)
        places = np.arange(len(numbers)) - np.repeat(ends - counts, counts) + tree.first_labels[walks.nodes][numbers]
        keys = walks.rows[numbers] * num_labels + tree.labels[places]
        yield keys, walks.states[numbers], walks.gains[numbers]
        numbers, nodes = _children(walks, tree)
        walks = _said(automaton, walks.rows[numbers], nodes, walks.states[numbers], walks.gains[numbers], tree)
