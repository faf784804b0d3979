"""The beam of every utterance of a batch: which hypotheses live, which are finished, when an utterance is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from shallowfusion import _native
from shallowfusion.checks import LARGEST_INTEGER, BeamShape, StepArrays, integer
from shallowfusion.config import BeamSettings

__all__ = [
    "BeamState",
    "BeamStateProtocol",
    "BeamStep",
    "FinishedHypothesis",
    "NativeBeams",
    "utterance_number",
]


@dataclass(frozen=True)
class BeamStep:
    """The live hypotheses after one `advance`, best first; row i belongs to `utterances[i]` of the call.

    Live lanes come first. A dead lane has total -inf, parent 0 and the first end token (0 without end tokens).
    All lanes of an utterance that is done are dead.

    Args:
        tokens: int64 [active, beam_size], the token each lane appends.
        parents: int64 [active, beam_size], the lane of the step before that each lane descends from.
        totals: float32 [active, beam_size], nats.
        done: bool [active]; a done utterance must not be advanced again.
    """

    tokens: npt.NDArray[np.int64]
    parents: npt.NDArray[np.int64]
    totals: npt.NDArray[np.float32]
    done: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class FinishedHypothesis:
    """One finished hypothesis with everything needed to rank it anew.

    Args:
        token_ids: without the end token.
        total: the raw total, end token included if it has one; nats.
        key: what the stop rule ranks by; higher is better. A total and a key are two things.
        token_totals: float32 [tokens], the increment of each token; the end token's is the last if `ended`.
        parts: float32 [tokens, parts], each source's own log-prob of each token, the end token included.
        ended: it finished with an end token.
        forced: it finished without one: by `max_new_tokens`, by `force_finish`, or to fill up the n-best list.
    """

    token_ids: tuple[int, ...]
    total: float
    key: float
    token_totals: npt.NDArray[np.float32]
    parts: npt.NDArray[np.float32]
    ended: bool
    forced: bool


class BeamStateProtocol(Protocol):
    """Beam search over candidates that somebody else scored, for a batch of utterances.

    Each utterance starts with lane 0 at total 0 and no other lane. Totals are taken as given and never re-weighed;
    the increment of a token is its total minus that of its parent. How hypotheses finish, rank and stop is
    `BeamSettings.stop_rule`. With length = tokens of a finished hypothesis, its end token counted:

    - `hf` (transformers' `_beam_search`): among the candidates, an end token finishes only inside the first
      `beam_size`; the pool keeps the best `beam_size` by key = total / length ** length_penalty, in float32 as there.
      Done when the pool is full and the best live total cannot beat its worst key: at the current length
      (`heuristic`, `first`), at max_new_tokens if length_penalty > 0 (`never`). `first`: done when the pool is full.
      With `beam_size` 1 the search is greedy: done at the first end token.
    - `whisper` (openai-whisper's `BeamSearchDecoder`): end tokens met before `beam_size` others finish; done at
      round(beam_size * patience) finished (half to even). Then, if fewer than `beam_size` are finished, live ones
      fill the list, their end token unscored. The key counts tokens without the end token, at least 1.
    - `espnet` (ESPnet's `BeamSearch`): only the first `beam_size` candidates count; those that end are all kept, the
      others live on, so lanes get fewer. Done without live lanes, or when, after n tokens, the best hypothesis of
      each of the lengths n - 2, n - 3 and n - 4 is more than 10 nats below the best finished one (raw totals; the
      lag of two is ESPnet's, whose sequences carry a start token). key = total / length ** length_penalty; 0 is
      ESPnet's default, 1 its `normalize_length`. Not as there: the end is looked for under any limit (there with
      maxlenratio = 0 alone); keys at the limit (there one more end token is counted); min_new_tokens forbids the end
      (there hypotheses that end below minlenratio are dropped from the beam); length_bonus leaves the end token out.

    At `max_new_tokens` every rule is done: `hf` finishes the first `beam_size` candidates, `espnet` all live ones,
    `whisper` fills up its list. An empty hypothesis (forced before the first step) counts as length 1.
    Powers of the length are held inside float32's normal range.

    Recombination merges candidates with equal tokens before the rule sees them, live and ending ones alike: `max`
    keeps the better total; `logsumexp` keeps the better one's tokens and parts with the log of the summed
    probabilities, then sorts anew (stable). Lanes are therefore always distinct, so equal tokens means equal lane
    and token; a source that offers each (lane, token) once never triggers it. Finished hypotheses cannot meet an
    equal one later: all that end in one step have the same length, no other step has it.

    Ties go to the earlier candidate, and to the earlier finished. Cost: O(candidates) per utterance and step; memory:
    one node (24 bytes + 4 * parts) per token that a live or finished hypothesis still reaches.
    """

    @property
    def num_nodes(self) -> int:
        """Tokens held in the tree; 0 after every utterance is released."""
        ...

    def advance(
        self,
        utterances: npt.ArrayLike,
        totals: npt.ArrayLike,
        parents: npt.ArrayLike,
        tokens: npt.ArrayLike,
        parts: npt.ArrayLike,
        flagged: npt.ArrayLike | None = None,
    ) -> BeamStep:
        """Take the candidates of one step, best first, and return the lanes that live on.

        A candidate is impossible if its parent is -1 or its total is not finite (NaN never wins). If an utterance
        has no possible candidate, its live hypotheses finish by force and it is done.

        Args:
            utterances: int64 [active], distinct, none of them done.
            totals: float32 [active, candidates], cumulative, nats; `BeamSettings.num_candidates` of them, fewer only
                if the vocabulary offers no more.
            parents: int64 [active, candidates], live lanes.
            tokens: int64 [active, candidates].
            parts: float32 [active, candidates, parts].
            flagged: bool [active], NaN was seen in the utterance's scores. Changes nothing by itself: an utterance
                goes on while it has a possible candidate and ends by force when it has none.

        Raises:
            InvalidArgumentError: wrong dtype or shape; an utterance unknown, repeated, done or released; a possible
                candidate whose parent is not live, whose token is negative, or that comes after a worse one.
                Nothing is changed then.
        """
        ...

    def force_finish(self, utterance: int) -> None:
        """End an utterance now: its live hypotheses become finished, flagged forced. No effect if it is done.

        `hf` keeps the best `beam_size` of old and new ones, `whisper` only fills up to `beam_size`.
        """
        ...

    def results(self, utterance: int, n_best: int) -> list[FinishedHypothesis]:
        """Return up to `n_best` finished hypotheses, best key first.

        Raises:
            InvalidArgumentError: the utterance is not done, released or unknown, or n_best is below 1.
        """
        ...

    def is_done(self, utterance: int) -> bool: ...

    def num_live(self, utterance: int) -> int: ...

    def num_finished(self, utterance: int) -> int: ...

    def release(self, utterance: int) -> None:
        """Forget an utterance and free its nodes; it cannot be used again."""
        ...


Native = TypeVar("Native", _native.BeamState, _native.BeamMirror)


class NativeBeams(Generic[Native]):
    """What the faces of the C++ beam state and of its mirror share.

    Args:
        native: makes the C++ object.
        sizes: its arguments beside the settings.
    """

    def __init__(self, native: Callable[..., Native], settings: BeamSettings, **sizes: Any) -> None:
        self._native: Native = native(
            beam_size=settings.beam_size,
            end_ids=settings.end_ids,
            max_new_tokens=settings.max_new_tokens,
            stop_rule=settings.stop_rule,
            length_penalty=settings.length_penalty,
            early_stopping=settings.early_stopping,
            patience=settings.patience,
            **sizes,
        )

    def force_finish(self, utterance: int) -> None:
        self._native.force_finish(utterance=utterance_number(utterance))

    def results(self, utterance: int, n_best: int) -> list[FinishedHypothesis]:
        count = integer("n_best", n_best, 1, LARGEST_INTEGER)
        records = self._native.results(utterance=utterance_number(utterance), n_best=count)
        return [FinishedHypothesis(**record) for record in records]

    def is_done(self, utterance: int) -> bool:
        return self._native.is_done(utterance=utterance_number(utterance))


class BeamState(NativeBeams[_native.BeamState]):
    """The C++ beam state; see `BeamStateProtocol`.

    May be shared by threads: `advance` runs without the GIL, calls on one state wait for each other.

    Args:
        settings: how hypotheses are kept, finished and ranked.
        num_utterances: utterances are numbered from 0.
        num_parts: sources whose log-probs are kept per token.

    Raises:
        InvalidArgumentError: a size is out of range, or beam_size * patience rounds to 0 (`whisper`).
    """

    def __init__(self, settings: BeamSettings, num_utterances: int, num_parts: int) -> None:
        shape = BeamShape.check(settings, num_utterances, num_parts)
        self._num_parts = shape.num_parts
        super().__init__(
            _native.BeamState,
            settings,
            recombination=settings.recombination,
            num_utterances=shape.num_utterances,
            num_parts=shape.num_parts,
        )

    @property
    def num_nodes(self) -> int:
        return self._native.num_nodes

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
        return BeamStep(
            *self._native.advance(
                utterances=arrays.utterances,
                totals=arrays.totals,
                parents=arrays.parents,
                tokens=arrays.tokens,
                parts=arrays.parts,
            )
        )

    def num_live(self, utterance: int) -> int:
        return self._native.num_live(utterance=utterance_number(utterance))

    def num_finished(self, utterance: int) -> int:
        return self._native.num_finished(utterance=utterance_number(utterance))

    def release(self, utterance: int) -> None:
        self._native.release(utterance=utterance_number(utterance))


def utterance_number(utterance: int) -> int:
    return integer("utterance", utterance, 0, LARGEST_INTEGER)
