"""A word-level n-gram model in the search of a model of pieces: it scores the candidates that survived a step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from shallowfusion.errors import VocabularyError
from shallowfusion.ngrams.model import NgramModel
from shallowfusion.ngrams.pieces import piece_bytes
from shallowfusion.ngrams.table import NgramTable
from shallowfusion.ngrams.words import WordNgram
from shallowfusion.text.vocabulary import Vocabulary

__all__ = ["WordLanguage", "WordNgramScorer", "is_of_words"]

logger = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
Ending = Literal["lm", "neutral", "asr_only"]

MOST_REMEMBERED = 10_000  # states


def is_of_words(model: NgramModel, acoustic: Vocabulary) -> bool:
    """Whether an n-gram model is one of words: none of its words holds a space, and some acoustic tokens do."""
    specials = {model.begin_word, model.end_word, model.unknown_word}
    words = [word for i, word in enumerate(model.words) if i not in specials]
    return any(b" " in token for token in acoustic.tokens if token) and not any(
        b" " in piece for piece in piece_bytes(words)
    )


class WordLanguage:
    """An n-gram model of words as a language model of a search over pieces; made once, shared by searches.

    Words are scored as the acoustic model writes them, case and punctuation included. Other words may be said, as
    <unk> and `unk_score_offset` more.

    Price: a search holds three numbers a row; see `WordNgramScorer`.

    Args:
        model: of words.
        acoustic: the vocabulary of the search.
        unk_score_offset: nats, at most 0.

    Raises:
        VocabularyError: less than half of the words can be spelled in the acoustic model's letters.
    """

    def __init__(self, model: NgramModel, acoustic: Vocabulary, unk_score_offset: float = -10.0) -> None:
        specials = {model.begin_word, model.end_word, model.unknown_word}
        known = [word for i, word in enumerate(model.words) if i not in specials]
        said = {byte for token in acoustic.tokens if token for byte in token}
        strange = [word for word in known if not said.issuperset(word.encode())]
        if 2 * len(strange) > len(known) or not known:
            raise VocabularyError(
                f"{len(strange)} of the {len(known)} words of {model.name}, such as {', '.join(strange[:5])}, hold "
                f"letters that {acoustic.name} has no tokens for; make the model from text as the acoustic model "
                "writes it (case, accents, digits)."
            )
        if strange:
            logger.warning(
                "%s: %d of %d words cannot be spelled and are never said", model.name, len(strange), len(known)
            )
        self.table = NgramTable(model)
        self.vocabulary = Vocabulary(tuple(word.encode() for word in model.words), model.end_word, None, model.name)
        self.words = WordNgram(self.table, acoustic.tokens, unk_score_offset=unk_score_offset)
        self._favourites: dict[int, float] = {}

    def end_changes(self, states: IntArray, ending: Ending) -> FloatArray:
        """What another policy makes of the log-prob of </s> in each state: "neutral" wants the likeliest word's."""
        if ending == "lm":
            return np.zeros(len(states), dtype=np.float32)
        own = -self.table.end(states)
        return (
            own if ending == "asr_only" else own + np.array([self._favourite(s) for s in states.tolist()], np.float32)
        )

    def _favourite(self, state: int) -> float:
        if state not in self._favourites:
            if len(self._favourites) >= MOST_REMEMBERED:
                self._favourites.clear()
            self._favourites[state] = float(self.table.dense(np.array([state], dtype=np.int64))[0].max())
        return self._favourites[state]


class WordNgramScorer:
    """Scores words where a candidate completes them, and </s> at the end token; see `WordNgram` and `CandidateScorer`.

    One object serves one batch of searches.

    Price: a few numpy calls and one table look-up per completed word for each step's candidates.

    Args:
        words: over the acoustic model's pieces.
        end_id: the acoustic end token.
        num_utterances: of the batch.
        weight: increments are multiplied by it, and by `schedule(step)` if there is one: `self.weight` is the product.
        name: of its part in the results.
        language: with `ending`, what the end token gets beside the last word: "lm": log P(</s>); "neutral": as much
            as the likeliest next word; "asr_only": 0. None = "lm".
    """

    def __init__(
        self,
        words: WordNgram,
        end_id: int,
        num_utterances: int,
        weight: float,
        name: str = "word_lm",
        language: WordLanguage | None = None,
        ending: Ending = "lm",
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        self.name, self._full_weight, self._schedule, self._step = name, weight, schedule or (lambda step: 1.0), 0
        self.weight = weight * self._schedule(0)
        self._words, self._end_id = words, end_id
        self._language, self._ending = language, ending
        self._state = words.start(num_utterances)
        self._rows = np.arange(num_utterances)[:, None]  # [utterances, rows], places in the state

    def increments(self, lanes: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """float32 [utterances, candidates], nats; 0 where there is no candidate."""
        found = np.zeros(tokens.shape, dtype=np.float32)
        is_end, goes_on = tokens == self._end_id, (tokens >= 0) & (tokens != self._end_id)
        parents = np.take_along_axis(self._rows, np.maximum(lanes, 0), axis=1)
        ended = self._state.take(parents[is_end])
        found[is_end] = self._words.end(ended)
        if self._language is not None and self._ending != "lm":
            found[is_end] += self._language.end_changes(self._words.closed_states(ended), self._ending)
        found[goes_on] = self._words.step(self._state.take(parents[goes_on]), tokens[goes_on])[0]
        return found

    def follow(self, parents: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]) -> None:
        """Row k of utterance u continues its old row parents[u, k] with tokens[u, k]."""
        old = np.take_along_axis(self._rows, parents, axis=1).reshape(-1)
        said = np.where(tokens == self._end_id, -1, tokens).reshape(-1)
        self._state = self._words.step(self._state.take(old), said)[2]
        self._rows = np.arange(tokens.size).reshape(tokens.shape)
        self._step += 1
        self.weight = self._full_weight * self._schedule(self._step)

    def keep(self, order: Sequence[int]) -> None:
        """Drop finished utterances."""
        self._rows = self._rows[list(order)]
