"""N-gram models over the acoustic model's own pieces as a dense source of the fused step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shallowfusion.config import require
from shallowfusion.errors import VocabularyError
from shallowfusion.ngrams.model import NgramModel, NgramOrder
from shallowfusion.ngrams.pieces import piece_bytes
from shallowfusion.ngrams.table import NgramTable
from shallowfusion.scorers.base import DEAD, Context
from shallowfusion.text.vocabulary import Vocabulary

__all__ = ["Lookups", "NgramScorer", "NgramState"]

logger = logging.getLogger(__name__)

Lookups = Literal["auto", "rows", "candidates"]
MOST_REMEMBERED = 10_000  # states
MOST_STRANGERS = 0.1  # of a model's words may be no pieces before it is taken for a model of other units


@dataclass
class NgramState:
    """One integer per row; see `NgramTable`.

    Args:
        logits: float32 [rows, vocab], log-probs of the latest states.
        states: int64 [utterances, rows].
    """

    logits: Tensor
    states: npt.NDArray[np.int64]


class NgramScorer:
    """Log-probs of the next piece after the last few, from an n-gram model whose words are pieces.

    The vocabulary is the acoustic model's up to its last text token, so ids agree. Words are spelled as `piece_bytes`
    reads them. </s> is the end token; pieces the model lacks are scored as its <unk>; prompts follow <s>.

    Price: per step rows x (vocab + n-grams that extend the row's last pieces) on one CPU thread, and where `device` is
    a GPU a copy of rows x vocab float32 to it. Forking moves integers. Memory per row: 8 bytes and its logits.

    Args:
        model: of pieces.
        acoustic: the acoustic model's vocabulary.
        device: where the logits go.
        lookups: what a search asks for: "rows": log-probs of every token, in the fused step; "candidates": of those
            that survive it (see `NgramLookups`); "auto": of candidates where `device` is a GPU and the rule allows it.

    Raises:
        InvalidArgumentError: other lookups.
        VocabularyError: more than a tenth of the model's words are no pieces of the acoustic model, or none is.
    """

    def __init__(
        self,
        model: NgramModel,
        acoustic: Vocabulary,
        device: torch.device | str = "cpu",
        lookups: Lookups = "auto",
    ) -> None:
        require(
            lookups in ("auto", "rows", "candidates"),
            f"ngram_lookups must be 'auto', 'rows' or 'candidates', got {lookups!r}.",
        )
        self.lookups = lookups
        self._favourites: dict[int, float] = {}
        size = max((i + 1 for i, token in enumerate(acoustic.tokens) if token is not None or i == acoustic.end_id))
        self.vocabulary = Vocabulary(acoustic.tokens[:size], acoustic.end_id, None, model.name)
        self.device = torch.device(device)
        words = _words_of_tokens(model, self.vocabulary, acoustic.name)
        own, places = np.unique(words, return_index=True)
        own_columns = np.full(size, -1, dtype=np.int64)
        own_columns[places[own >= 0]] = own[own >= 0]
        ordered, new_ids = _with_tokens_first(model, own_columns)
        self.table = NgramTable(ordered)
        self._word_of_token = np.where(words >= 0, new_ids[words], np.arange(size))
        self._copied = np.flatnonzero((words >= 0) & (own_columns < 0))

    def prompt(self, text_ids: Sequence[int] = ()) -> list[int]:
        """Whatever text is to be read, not scored; <s> goes before it of its own accord."""
        return list(text_ids)

    def start(self, context: Context) -> NgramState:
        """Read the prompts; one row per utterance."""
        states = self.start_states(context.prompts)
        return NgramState(self._logits(states), states)

    @property
    def on_candidates(self) -> bool:
        """Whether a search should look up candidates alone where it can."""
        return self.lookups == "candidates" or (self.lookups == "auto" and self.device.type == "cuda")

    def start_states(self, prompts: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
        """int64 [prompts, 1], the states after <s> and each prompt."""
        states = np.full((len(prompts), 1), self.table.start_state, dtype=np.int64)
        for row, prompt in enumerate(prompts):
            for token in prompt:
                states[row] = self.table.score(states[row], self._word_of_token[[token]])[1]
        return states

    def look_up(
        self, states: npt.NDArray[np.int64], token_ids: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Log-probs of a token after each state, and the states after them; all [rows]."""
        return self.table.score(states, self._word_of_token[token_ids])

    def favourites(self, states: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Log-prob of the likeliest token after each state, float32 [rows]; a state costs a row once."""
        known = {state: self._favourites.get(state) for state in states.tolist()}
        fresh = [state for state, value in known.items() if value is None]
        if fresh:
            best = self._log_probs(np.array(fresh, dtype=np.int64)).max(axis=1)
            known.update(zip(fresh, best.tolist(), strict=True))
            if len(self._favourites) >= MOST_REMEMBERED:
                self._favourites.clear()
            self._favourites.update({state: known[state] for state in fresh})
        return np.array([known[state] for state in states.tolist()], dtype=np.float32)

    def fork(self, state: NgramState, parents: npt.NDArray[np.int64]) -> NgramState:
        """Row k of utterance u continues from its old row parents[u, k]; `logits` stay those of the old rows."""
        state.states = np.take_along_axis(state.states, parents, axis=1)
        return state

    def score(self, state: NgramState, token_ids: npt.NDArray[np.int64]) -> tuple[Tensor, NgramState]:
        """Append a token to each row, -1 = none; the logits are those of all rows that are not DEAD."""
        advancing = token_ids >= 0
        words = self._word_of_token[token_ids[advancing]]
        state.states = state.states.copy()
        state.states[advancing] = self.table.score(state.states[advancing], words)[1]
        state.logits = self._logits(state.states[token_ids != DEAD])
        return state.logits, state

    def keep(self, state: NgramState, order: Sequence[int]) -> NgramState:
        """Drop finished utterances."""
        state.states = state.states[list(order)]
        return state

    def admit(self, state: NgramState, fresh: NgramState) -> NgramState:
        """Put the utterances of a fresh state behind those of one that runs."""
        rows = state.states.shape[1]
        state.states = np.concatenate([state.states, np.repeat(fresh.states, rows, axis=1)])
        state.logits = torch.cat([state.logits, fresh.logits])
        return state

    def end_scores(self, state: NgramState) -> Tensor:
        """Log-prob of the end token in the latest logits, float32 [rows], after a softmax over the pieces."""
        return torch.log_softmax(state.logits, dim=1)[:, self.vocabulary.end_id]

    def _logits(self, states: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(self._log_probs(states)).to(self.device)

    def _log_probs(self, states: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        log_probs = self.table.dense(states.reshape(-1))
        if len(self._copied):
            log_probs[:, self._copied] = log_probs[:, self._word_of_token[self._copied]]
        return log_probs[:, : len(self.vocabulary)]


def _words_of_tokens(model: NgramModel, vocabulary: Vocabulary, acoustic_name: str) -> npt.NDArray[np.int64]:
    """The model's word for each token, <unk> for pieces it lacks, -1 for special tokens.

    Raises:
        VocabularyError: too many words are no pieces.
    """
    specials = {model.begin_word, model.end_word, model.unknown_word}
    ids = [i for i in range(len(model.words)) if i not in specials]
    by_bytes: dict[bytes, int] = {}
    for i, piece in zip(ids, piece_bytes([model.words[i] for i in ids]), strict=True):
        by_bytes.setdefault(piece, i)
    pieces = {token for token in vocabulary.tokens if token is not None}
    strangers = [model.words[i] for piece, i in by_bytes.items() if piece not in pieces]
    if len(strangers) > MOST_STRANGERS * len(ids) or len(strangers) == len(ids):
        raise VocabularyError(
            f"{model.name} is no n-gram model of {acoustic_name}'s pieces: {len(strangers)} of its {len(ids)} words, "
            f"such as {', '.join(map(repr, strangers[:5]))}, are none; wanted a model made with "
            f"shallowfusion build-ngram --units tokens {acoustic_name}."
        )
    missing = sorted(pieces - set(by_bytes))
    if strangers or missing:
        logger.warning(
            "%s: %d words are no pieces of %s and are never said; %d of its %d pieces are scored as <unk>",
            model.name, len(strangers), acoustic_name, len(missing), len(pieces),
        )  # fmt: skip
    words = [-1 if token is None else by_bytes.get(token, model.unknown_word) for token in vocabulary.tokens]
    words[vocabulary.end_id] = model.end_word
    return np.array(words, dtype=np.int64)


def _with_tokens_first(
    model: NgramModel, own_columns: npt.NDArray[np.int64]
) -> tuple[NgramModel, npt.NDArray[np.int64]]:
    """The same model with ids changed so that word t is that of token t, and the new id of each old word.

    Args:
        own_columns: int64 [tokens], the old word of each token; -1 gets a word that is never said.
    """
    others = np.setdiff1d(np.arange(len(model.words)), own_columns)
    old_ids = np.concatenate([own_columns, others])
    new_ids = np.empty(len(model.words), dtype=np.int64)
    new_ids[old_ids[old_ids >= 0]] = np.flatnonzero(old_ids >= 0)
    unigrams = model.orders[0]
    by_word = np.empty(len(model.words), dtype=np.int64)
    by_word[unigrams.words[:, 0]] = np.arange(len(unigrams))
    first = NgramOrder(
        np.arange(len(old_ids), dtype=np.int32)[:, None],
        np.where(old_ids >= 0, unigrams.log_probs[by_word[old_ids]], -np.inf).astype(np.float32),
        np.where(old_ids >= 0, unigrams.back_offs[by_word[old_ids]], 0.0).astype(np.float32),
    )
    longer = [
        NgramOrder(new_ids[ngrams.words].astype(np.int32), ngrams.log_probs, ngrams.back_offs)
        for ngrams in model.orders[1:]
    ]
    words = tuple(model.words[i] if i >= 0 else f"<token {place}>" for place, i in enumerate(old_ids.tolist()))
    begin, end, unknown = (int(new_ids[i]) for i in (model.begin_word, model.end_word, model.unknown_word))
    return NgramModel(words, (first, *longer), begin, end, unknown, model.name), new_ids
