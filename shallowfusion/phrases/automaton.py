"""Phrase boosting: bonuses for tokens that begin, continue or complete a phrase, taken back when a match fails."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from shallowfusion import _native
from shallowfusion.checks import integer_array
from shallowfusion.phrases.patterns import Patterns

__all__ = ["PhraseAutomaton", "PhraseAutomatonProtocol"]

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
Entries = tuple[Int32Array, Int32Array, Float32Array]


class PhraseAutomatonProtocol(Protocol):
    """What phrases add to the score of each hypothesis; a state is one integer.

    The bonus of a hypothesis is the sum over the phrases it holds, each place where one ends counted once, of the
    phrase's full credit, plus `held`: the credit of the match in progress, as far as it exceeds what the phrases that
    are beginnings of that match have earned already; never negative. `held` is a loan. A row is charged it back before
    its next token (`refunds`), and lent that of its new state; so a step with all tokens is

        bonus(row, token) = refunds[row] + (values[row, token] if listed, else 0)

    and `refunds` alone is the bonus of the end token. Summed over a hypothesis the loans cancel.

    Of `whole_words` a phrase is complete when the word ends, which the next token tells. `refunds` supposes that it
    does, so that a token that goes on with the word is listed with a value that takes the gain back.

    Every method raises `InvalidArgumentError` for states out of range and arrays of the wrong shape.

    Source: Aho and Corasick (1975); refunds as icefall's context graph has them; the rule for nested phrases is ours.
    """

    @property
    def start_state(self) -> int:
        """No phrase begun, nor anything else."""
        ...

    @property
    def shared_state(self) -> int:
        """No phrase begun, but maybe a word that is in none."""
        ...

    def step(self, states: npt.ArrayLike, shared_first: bool = False) -> Entries:
        """Bonuses of the next token, `SparseBonus` in numpy, to be added to totals that have got their refunds.

        Args:
            states: int64 [rows].
            shared_first: for many phrases: leave the bonuses of tokens that begin a phrase, which are those of
                `step([shared_state])` in every row, to the caller's `token_bias`; the values are what comes on top.

        Returns:
            int32 [rows + 1] row_offsets, int32 [entries] token_ids, ascending in a row, and float32 [entries] values:
            all tokens that begin, continue or complete a phrase, or with `shared_first` those that do not only begin;
            and where a word may have completed one, those that go on with the word.
        """
        ...

    def refunds(self, states: npt.ArrayLike) -> Float32Array:
        """float32 [rows]: minus what each row holds for a match in progress, and what it gains if its word ends."""
        ...

    def held(self, states: npt.ArrayLike) -> Float32Array:
        """float32 [rows]: what each row holds for a match in progress."""
        ...

    def closing(self, states: npt.ArrayLike) -> Float32Array:
        """float32 [rows]: what each row gains if its word ends."""
        ...

    def advance(self, states: npt.ArrayLike, tokens: npt.ArrayLike) -> Int64Array:
        """int64 [rows], the states after a token each; -1 = none."""
        ...

    def say(self, states: npt.ArrayLike, tokens: npt.ArrayLike) -> tuple[Float64Array, Int64Array]:
        """What tokens gain for good, and where they lead.

        Returns:
            float64 [rows] gains, loans left out, and `closing` of the state where the token ends a word; int64 [rows]
            states, as of `advance`.
        """
        ...

    def ends_words(self, tokens: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """bool [tokens]: whether a token ends the word before it, which then gains `closing`."""
        ...

    def turns(self) -> tuple[Int64Array, Int64Array, Int32Array]:
        """How few tokens tell states apart, for tables of all states.

        Returns:
            int64 [states] fallback, `start_state` or `shared_state`; int64 [states + 1] offsets; int32 [entries]
            tokens, of each state those that lead elsewhere than from its fallback, ascending.
        """
        ...


class PhraseAutomaton:
    """The C++ automaton; see `PhraseAutomatonProtocol`. Immutable, so threads may share it.

    Price: a step takes O(entries). Every row lists the first tokens of all phrases; with thousands of phrases use
    `shared_first`, which leaves a few entries a row. Of whole words, a row that has just said a phrase lists every
    token that goes on with its last word, and one behind a token without letters the phrases that begin there.
    `advance` O(phrase length * log). Memory: 28 bytes per distinct beginning of a phrase.
    """

    def __init__(self, patterns: Patterns) -> None:
        self.native = _native.PhraseAutomaton(
            tokens=patterns.tokens,
            credits=patterns.credits,
            offsets=patterns.offsets,
            phrases=patterns.phrases,
            classes=patterns.classes,
        )

    @property
    def start_state(self) -> int:
        return self.native.start_state

    @property
    def shared_state(self) -> int:
        return 0

    @property
    def num_states(self) -> int:
        return self.native.num_states

    def step(self, states: npt.ArrayLike, shared_first: bool = False) -> Entries:
        return self.native.step(states=integer_array("states", states, (None,)), shared_first=shared_first)

    def refunds(self, states: npt.ArrayLike) -> Float32Array:
        return self.native.refunds(states=integer_array("states", states, (None,)))

    def held(self, states: npt.ArrayLike) -> Float32Array:
        return self.native.held(states=integer_array("states", states, (None,)))

    def advance(self, states: npt.ArrayLike, tokens: npt.ArrayLike) -> Int64Array:
        rows = integer_array("states", states, (None,))
        return self.native.advance(states=rows, tokens=integer_array("tokens", tokens, rows.shape))

    def closing(self, states: npt.ArrayLike) -> Float32Array:
        return self.native.closing(states=integer_array("states", states, (None,)))

    def say(self, states: npt.ArrayLike, tokens: npt.ArrayLike) -> tuple[Float64Array, Int64Array]:
        rows = integer_array("states", states, (None,))
        return self.native.say(states=rows, tokens=integer_array("tokens", tokens, rows.shape))

    def ends_words(self, tokens: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        return self.native.ends_words(tokens=integer_array("tokens", tokens, (None,)))

    def turns(self) -> tuple[Int64Array, Int64Array, Int32Array]:
        return self.native.turns()
