"""Language models of words that live in Python and are asked a word at a time: KenLM's, and the mean of several."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from shallowfusion.checks import integer
from shallowfusion.config import require
from shallowfusion.errors import ModelError
from shallowfusion.ngrams.arpa import is_arpa, read_arpa
from shallowfusion.ngrams.model import BEGIN, END, LOG_10, UNKNOWN
from shallowfusion.ngrams.table import Float32Array, Int64Array, WordTableProtocol

__all__ = ["KenlmTable", "MeanTable", "Share", "is_kenlm_binary"]

MAGIC = b"mmap lm http://kheafield.com/code"  # how files of KenLM begin
FIRST_WORD = UNKNOWN.encode() + b"\0"  # of the spellings that end a file of KenLM
State = TypeVar("State", bound=Hashable)


@dataclass(frozen=True, eq=False)
class WordList:
    """The words of a model that has no arrays; see `NgramModel`."""

    words: tuple[str, ...]
    name: str

    @cached_property
    def ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    @property
    def begin_word(self) -> int:
        return self.ids[BEGIN]

    @property
    def end_word(self) -> int:
        return self.ids[END]

    @property
    def unknown_word(self) -> int:
        return self.ids[UNKNOWN]


class _Numbered(Generic[State]):
    """States as integers, numbered as they come; threads may share it."""

    def __init__(self) -> None:
        self._states: list[State] = []
        self._numbers: dict[State, int] = {}
        self._lock = threading.Lock()

    def number(self, state: State) -> int:
        with self._lock:
            found = self._numbers.setdefault(state, len(self._states))
            if found == len(self._states):
                self._states.append(state)
            return found

    def state(self, number: int) -> State:
        return self._states[integer("states", number, 0, len(self._states) - 1)]


def _each(
    score_word: Callable[[int, int], tuple[float, int]], states: npt.ArrayLike, words: npt.ArrayLike
) -> tuple[Float32Array, Int64Array]:
    pairs = zip(np.asarray(states).tolist(), np.asarray(words).tolist(), strict=True)
    scored = [score_word(state, word) for state, word in pairs]
    return np.array([log_prob for log_prob, _ in scored], np.float32), np.array([s for _, s in scored], np.int64)


class KenlmTable:
    """A model read by the `kenlm` module, binaries included; see `WordTableProtocol`.

    Price: a look-up is a call of Python, microseconds where `NgramTable` takes a tenth of one; every state met is kept
    as long as the table, about 300 bytes each.

    Args:
        path: a file of KenLM's build_binary with its words (as it writes them unless told otherwise), or an ARPA file.

    Raises:
        ModelError: kenlm is not installed, or cannot read the file, or a binary without its words.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            import kenlm
        except ImportError as error:
            raise ModelError(
                f"{path} is read by the module kenlm, which is not installed; pip install kenlm, or give the ARPA file."
            ) from error
        try:
            self._model: Any = kenlm.Model(str(path))
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelError(f"{path} cannot be read by kenlm ({error}); build it again from its ARPA file.") from error
        words = read_arpa(path).words if is_arpa(path) else _words_of(self.path)
        if not {BEGIN, END, UNKNOWN} <= set(words) or not all(word in self._model for word in words if word != UNKNOWN):
            raise ModelError(
                f"{path} holds no list of its words; build it again from its ARPA file, or give that file."
            )
        self.model = WordList(words, str(path))
        self._new_state = kenlm.State
        self._states: _Numbered[Any] = _Numbered()
        start, null = kenlm.State(), kenlm.State()
        self._model.NullContextWrite(null)
        self._model.BeginSentenceWrite(start)
        self.null_state = self._states.number(null)
        self.start_state = self._states.number(start)

    @property
    def order(self) -> int:
        return int(self._model.order)

    def score_word(self, state: int, word: int) -> tuple[float, int]:
        """Log-prob of a word, nats, and the state after it."""
        after = self._new_state()
        spelling = self.model.words[integer("words", word, 0, len(self.model.words) - 1)]
        log_prob = self._model.BaseScore(self._states.state(state), spelling, after) * LOG_10
        return log_prob, self._states.number(after)

    def score(self, states: npt.ArrayLike, words: npt.ArrayLike) -> tuple[Float32Array, Int64Array]:
        return _each(self.score_word, states, words)

    def end(self, states: npt.ArrayLike) -> Float32Array:
        words = np.full(np.shape(states), self.model.end_word)
        return self.score(states, words)[0]


@dataclass(frozen=True, eq=False)
class Share:
    """One model of a `MeanTable`.

    Args:
        table: the model.
        weight: of its log-probs.
        words: its known words, None = all.
        unknown_word: nats, added to the log-prob of a word that is not known, weighted like it.
        score_boundary: whether it starts after <s> and scores </s>.
    """

    table: WordTableProtocol
    weight: float
    words: Collection[str] | None = None
    unknown_word: float = 0.0
    score_boundary: bool = True


class MeanTable:
    """The mean of several models' weighted log-probs, words of any of them; see `WordTableProtocol`.

        score(w) = sum_i weight_i * (log P_i(w) + unknown_word_i * (w is not known to i)) / models

    A model without boundaries adds nothing for </s>. It is no distribution. Price: the look-ups of all models, through
    Python; states are kept as `KenlmTable` does.

    Args:
        shares: at least one.
    """

    def __init__(self, shares: Sequence[Share]) -> None:
        require(len(shares) > 0, "shares must hold at least one model, got none.")
        self.shares = tuple(shares)
        words = dict.fromkeys((BEGIN, END, UNKNOWN))
        for share in shares:
            model = share.table.model
            special = {model.begin_word, model.end_word, model.unknown_word}
            words |= dict.fromkeys(word for number, word in enumerate(model.words) if number not in special)
        self.model = WordList(tuple(words), " + ".join(share.table.model.name for share in shares))
        self._columns = [self._column(share) for share in shares]
        self._states: _Numbered[tuple[int, ...]] = _Numbered()
        self.null_state = self._states.number(tuple(share.table.null_state for share in shares))
        self.start_state = self._states.number(
            tuple(own.table.start_state if own.score_boundary else own.table.null_state for own in shares)
        )

    def _column(self, share: Share) -> list[tuple[int, float]]:
        """The id in one model of each word, and what is added to its log-prob."""
        model = share.table.model
        known = set(model.ids if share.words is None else share.words) - {BEGIN, END, UNKNOWN}
        found = []
        for word in self.model.words:
            number = model.ids.get(word, model.unknown_word)
            found.append((number, 0.0 if word in known and word in model.ids else share.unknown_word))
        found[self.model.end_word] = (model.end_word, 0.0)
        return found

    def score_word(self, state: int, word: int) -> tuple[float, int]:
        """Mean of the weighted log-probs of a word, and the state after it."""
        integer("words", word, 0, len(self.model.words) - 1)
        total, after = 0.0, []
        for share, own, column in zip(self.shares, self._states.state(state), self._columns, strict=True):
            number, extra = column[word]
            log_probs, states = share.table.score([own], [number])
            if word != self.model.end_word or share.score_boundary:
                total += share.weight * (float(log_probs[0]) + extra)
            after.append(int(states[0]))
        return total / len(self.shares), self._states.number(tuple(after))

    def score(self, states: npt.ArrayLike, words: npt.ArrayLike) -> tuple[Float32Array, Int64Array]:
        return _each(self.score_word, states, words)

    def end(self, states: npt.ArrayLike) -> Float32Array:
        words = np.full(np.shape(states), self.model.end_word)
        return self.score(states, words)[0]


def is_kenlm_binary(path: str | Path) -> bool:
    """Whether a file begins as those of KenLM's build_binary do."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _words_of(path: Path) -> tuple[str, ...]:
    """The spellings at the end of a binary, the unknown word first; () where there are none."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.rfind(FIRST_WORD)
        tail = data[start:] if start >= 0 else b""
    try:
        return tuple(word.decode() for word in tail.split(b"\0") if word)
    except UnicodeDecodeError:
        return ()
