"""A word-level n-gram model over the pieces of an acoustic model: words are scored where a space completes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shallowfusion.checks import integer_array
from shallowfusion.config import require
from shallowfusion.ngrams.table import NgramTableProtocol
from shallowfusion.ngrams.trie import NO_BYTE, OUTSIDE, ROOT, ByteTrie, padded

__all__ = ["WordNgram", "WordState"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

SPACE = ord(" ")


@dataclass(frozen=True, eq=False)
class WordState:
    """What a search remembers of each row.

    Args:
        states: int64 [rows], of the n-gram table, after the last complete word.
        nodes: int64 [rows], the partial word's place among the known words; `ROOT` between words, `OUTSIDE` if no
            known word begins so.
        charged: float32 [rows], what the partial word has been charged for being no beginning of a known word.
    """

    states: IntArray
    nodes: IntArray
    charged: FloatArray

    def take(self, parents: npt.ArrayLike) -> WordState:
        """Row i continues from old row parents[i]."""
        rows = np.asarray(parents, dtype=np.int64)
        return WordState(self.states[rows], self.nodes[rows], self.charged[rows])

    @property
    def is_known(self) -> npt.NDArray[np.bool_]:
        """bool [rows]: the partial word, if any, is the beginning of a known one."""
        known: npt.NDArray[np.bool_] = self.nodes != OUTSIDE
        return known


class WordNgram:
    """Scores log P(word | words before) when a space or the end completes a word, in nats.

    A word outside the vocabulary is scored as <unk> plus `unk_score_offset`. The offset is charged as soon as the
    partial word is no beginning of any known one, and given back if need be when the word is complete, so that the
    increments of a hypothesis sum to the score of its words, whatever its pieces are. With a closed vocabulary such
    hypotheses get -inf instead.

    Price: a few numpy calls per byte of the longest piece and one table look-up per completed word.

    Args:
        table: of words.
        pieces: bytes of each token; None for special ones, which change nothing.
        vocabulary: the words allowed or known; None: those of the table.
        unk_score_offset: nats, at most 0.
        open_vocabulary: whether other words may be said at all.
    """

    def __init__(
        self,
        table: NgramTableProtocol,
        pieces: Sequence[bytes | None],
        vocabulary: Sequence[str] | None = None,
        unk_score_offset: float = -10.0,
        open_vocabulary: bool = True,
    ) -> None:
        require(unk_score_offset <= 0, f"unk_score_offset must be at most 0 (nats), got {unk_score_offset}.")
        model = table.model
        specials = {model.begin_word, model.end_word, model.unknown_word}
        known = [word for i, word in enumerate(model.words) if i not in specials] if vocabulary is None else vocabulary
        self.table = table
        self.unk_score_offset = unk_score_offset if open_vocabulary else -np.inf
        self._trie = ByteTrie(known)
        self._ids = np.array([*(model.id_of(word) for word in known), model.unknown_word], dtype=np.int64)
        self._bytes = padded([piece or b"" for piece in pieces])

    def start(self, rows: int = 1) -> WordState:
        """Rows that begin a sentence."""
        states = np.full(rows, self.table.start_state, dtype=np.int64)
        return WordState(states, np.full(rows, ROOT, dtype=np.int64), np.zeros(rows, dtype=np.float32))

    def step(self, state: WordState, tokens: npt.ArrayLike) -> tuple[FloatArray, IntArray, WordState]:
        """Append a token to each row, -1 = none.

        Args:
            tokens: int64 [rows].

        Returns:
            float32 [rows] increments, int64 [rows] how many words each completed, and the new state.
        """
        ids = integer_array("tokens", tokens, state.states.shape)
        require(
            len(ids) == 0 or -1 <= ids.min() <= ids.max() < len(self._bytes),
            f"tokens must be from -1 to {len(self._bytes) - 1}, got {ids.tolist()}.",
        )
        totals, completed = np.zeros(len(ids), dtype=np.float32), np.zeros(len(ids), dtype=np.int64)
        letters = np.where(ids[:, None] >= 0, self._bytes[ids], NO_BYTE)
        states, nodes = state.states, state.nodes
        for column in letters[:, : int((letters != NO_BYTE).sum(axis=1).max(initial=0))].T:
            scores, states, closed = self._completed(states, nodes, column == SPACE)
            totals += scores
            completed += closed
            nodes = np.where(column == SPACE, ROOT, nodes)
            inside = (column != SPACE) & (column != NO_BYTE)
            nodes = np.where(inside, self._trie.descend(nodes, column), nodes)
        charged = np.where(nodes == OUTSIDE, np.float32(self.unk_score_offset), np.float32(0.0))
        return totals + _change(charged, state.charged), completed, WordState(states, nodes, charged)

    def end(self, state: WordState) -> FloatArray:
        """float32 [rows], the increment of the last word, if one is open, and of </s>."""
        scores, states, _ = self._completed(state.states, state.nodes, np.ones(len(state.nodes), dtype=np.bool_))
        return scores + self.table.end(states) + _change(np.zeros_like(state.charged), state.charged)

    def closed_states(self, state: WordState) -> IntArray:
        """int64 [rows], the states of the table once the last word, if one is open, is complete."""
        return self._completed(state.states, state.nodes, np.ones(len(state.nodes), dtype=np.bool_))[1]

    def _completed(
        self, states: IntArray, nodes: IntArray, closing: npt.NDArray[np.bool_]
    ) -> tuple[FloatArray, IntArray, npt.NDArray[np.bool_]]:
        """Scores of the words that end here, the states after them, and which rows have one."""
        closed = closing & (nodes != ROOT)
        scores = np.zeros(len(states), dtype=np.float32)
        if closed.any():
            words = self._trie.word(nodes[closed])
            found, after = self.table.score(states[closed], self._ids[words])
            scores[closed] = np.where(words >= 0, found, found + np.float32(self.unk_score_offset))
            states = states.copy()
            states[closed] = after
        return scores, states, closed


def _change(new: FloatArray, old: FloatArray) -> FloatArray:
    """new - old; a row that is impossible once stays so, without NaN."""
    return np.where(np.isneginf(old), np.float32(-np.inf), new - np.where(np.isneginf(old), 0.0, old)).astype(
        np.float32
    )
