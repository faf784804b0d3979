"""`PhraseAutomaton` in plain Python, written for reading: the definition of correct for the native class."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from shallowfusion.checks import integer, integer_array
from shallowfusion.config import require
from shallowfusion.phrases.automaton import Entries, Float32Array, Float64Array, Int32Array, Int64Array
from shallowfusion.phrases.patterns import BEGINS_INSIDE, ENDS_INSIDE, WORD_BOUNDARY, Patterns

__all__ = ["ReferencePhraseAutomaton"]

Match = tuple[int, ...]


class ReferencePhraseAutomaton:
    """Looks through all patterns at every call; see `PhraseAutomatonProtocol`. A state numbers a beginning of some."""

    def __init__(self, patterns: Patterns) -> None:
        self._patterns: list[tuple[Match, list[float], int]] = []
        for i, phrase in enumerate(patterns.phrases.tolist()):
            span = slice(int(patterns.offsets[i]), int(patterns.offsets[i + 1]))
            tokens, credits = tuple(patterns.tokens[span].tolist()), patterns.credits[span].tolist()
            require(len(tokens) > 0, f"pattern {i} has no tokens.")
            require(min(tokens) >= 0, f"pattern {i} holds the token {min(tokens)}; tokens must be at least 0.")
            require(all(map(math.isfinite, credits)), f"pattern {i} has a credit that is not finite.")
            self._patterns.append((tokens, credits, phrase))
        beginnings = {tokens[:size]: None for tokens, _, _ in self._patterns for size in range(1, len(tokens) + 1)}
        self._matches: list[Match] = [(), *beginnings]
        self._states = {match: state for state, match in enumerate(self._matches)}
        self._classes = patterns.classes.tolist()

    @property
    def start_state(self) -> int:
        return self._states[self._bounded(())]

    @property
    def shared_state(self) -> int:
        return 0

    def step(self, states: npt.ArrayLike, shared_first: bool = False) -> Entries:
        matches = [self._match(state) for state in integer_array("states", states, (None,))]
        alphabet = {token for tokens, _, _ in self._patterns for token in tokens if token != WORD_BOUNDARY}
        alphabet |= {token for token in range(len(self._classes)) if self._begins_inside(token)}
        row_offsets, token_ids, values = [0], [], []
        for match in matches:
            closing = self._closing(match)
            for token in sorted(alphabet):
                if self._is_listed(match, token, closing, shared_first):
                    value = self._arrived(match, token)[1] - (closing if self._begins_inside(token) else 0.0)
                    token_ids.append(token)
                    values.append(value - (self._arrived((), token)[1] if shared_first else 0.0))
            row_offsets.append(len(token_ids))
        return np.array(row_offsets, np.int32), np.array(token_ids, np.int32), np.array(values, np.float32)

    def refunds(self, states: npt.ArrayLike) -> Float32Array:
        matches = [self._match(state) for state in integer_array("states", states, (None,))]
        return np.array([self._closing(match) - self._held(match) for match in matches], dtype=np.float32)

    def held(self, states: npt.ArrayLike) -> Float32Array:
        matches = [self._match(state) for state in integer_array("states", states, (None,))]
        return np.array([self._held(match) for match in matches], dtype=np.float32)

    def closing(self, states: npt.ArrayLike) -> Float32Array:
        matches = [self._match(state) for state in integer_array("states", states, (None,))]
        return np.array([self._closing(match) for match in matches], dtype=np.float32)

    def say(self, states: npt.ArrayLike, tokens: npt.ArrayLike) -> tuple[Float64Array, Int64Array]:
        rows = integer_array("states", states, (None,))
        given = integer_array("tokens", tokens, rows.shape).tolist()
        after = self.advance(rows, given)
        gains = np.zeros(len(rows))
        for row, (state, token) in enumerate(zip(rows, given, strict=True)):
            if token >= 0:
                arrived, value = self._arrived(self._match(state), token)
                gains[row] = value - self._held(arrived)
        return gains, after

    def ends_words(self, tokens: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        given = integer_array("tokens", tokens, (None,)).tolist()
        return np.array([token >= 0 and not self._begins_inside(token) for token in given], dtype=np.bool_)

    def turns(self) -> tuple[Int64Array, Int64Array, Int32Array]:
        alphabet = sorted({token for tokens, _, _ in self._patterns for token in tokens if token != WORD_BOUNDARY})
        fallbacks, offsets, found = [], [0], []
        for match in self._matches:
            fallback = self._bounded(()) if match[-1:] == (WORD_BOUNDARY,) else ()
            found += [token for token in alphabet if self._turned(match, token) != self._turned(fallback, token)]
            fallbacks.append(self._states[fallback])
            offsets.append(len(found))
        return np.array(fallbacks, np.int64), np.array(offsets, np.int64), np.array(found, np.int32)

    def _turned(self, match: Match, token: int) -> Match:
        return self._next(match if self._begins_inside(token) else self._bounded(match), token)

    def advance(self, states: npt.ArrayLike, tokens: npt.ArrayLike) -> Int64Array:
        rows = integer_array("states", states, (None,))
        given = integer_array("tokens", tokens, rows.shape)
        matches = [self._match(state) for state in rows]
        after = [
            match if token < 0 else self._arrived(match, token)[0]
            for match, token in zip(matches, given.tolist(), strict=True)
        ]
        return np.array([self._states[match] for match in after], dtype=np.int64)

    def _is_listed(self, match: Match, token: int, closing: float, shared_first: bool) -> bool:
        """A token that goes on with a match, or takes back what the end of the word would gain."""
        if self._begins_inside(token):
            return closing != 0 or len(self._next(match, token)) > shared_first
        after = self._next(self._bounded(match), token)
        return len(after) > shared_first * (1 + (after[:1] == (WORD_BOUNDARY,)))

    def _begins_inside(self, token: int) -> bool:
        return token < len(self._classes) and bool(self._classes[token] & BEGINS_INSIDE)

    def _ends_inside(self, token: int) -> bool:
        return token < len(self._classes) and bool(self._classes[token] & ENDS_INSIDE)

    def _bounded(self, match: Match) -> Match:
        """With the boundary behind it, if texts have any and it is not there yet."""
        has_one = not self._classes or match[-1:] == (WORD_BOUNDARY,)
        return match if has_one else self._next(match, WORD_BOUNDARY)

    def _closing(self, match: Match) -> float:
        """What phrases gain that are complete if the word ends here."""
        bounded = self._bounded(match)
        return 0.0 if bounded == match else self._gain(bounded)

    def _arrived(self, match: Match, token: int) -> tuple[Match, float]:
        """The match after a token and the boundaries beside it, and what arriving there is worth."""
        after = self._turned(match, token)
        value = self._gain(after)
        if not self._ends_inside(token):
            value += self._closing(after)
            after = self._bounded(after)
        return after, value + self._held(after)

    def _next(self, match: Match, token: int) -> Match:
        """The longest suffix of the tokens that is a beginning of a pattern."""
        tokens = (*match, token)
        return next(tokens[start:] for start in range(len(tokens) + 1) if tokens[start:] in self._states)

    def _gain(self, match: Match) -> float:
        """Credit of the phrases that end here; of several spellings of one phrase the best."""
        best: dict[int, float] = {}
        for tokens, credits, phrase in self._patterns:
            if match[-len(tokens) :] == tokens:
                best[phrase] = max(credits[-1], best.get(phrase, -math.inf))
        return sum(best.values())

    def _held(self, match: Match) -> float:
        """Credit of the best pattern that may go on from here, less that of phrases said since it began."""
        going_on = [
            credits[len(match) - 1]
            for tokens, credits, _ in self._patterns
            if 0 < len(match) < len(tokens) and tokens[: len(match)] == match
        ]
        earned: dict[tuple[Match, int], float] = {}
        for tokens, credits, phrase in self._patterns:
            if match[: len(tokens)] == tokens:
                earned[tokens, phrase] = max(0.0, credits[-1], earned.get((tokens, phrase), 0.0))
        return max(0.0, max(going_on, default=0.0) - sum(earned.values()))

    def _match(self, state: int) -> Match:
        return self._matches[integer("states", state, 0, len(self._matches) - 1)]
