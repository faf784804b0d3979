"""A language model on any tokenizer that is asked late: about the words of hypotheses that survived (METHODS 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shallowfusion.fusion.delays import Delay
from shallowfusion.fusion.rules import EndPolicy
from shallowfusion.scorers.token_trees import Request, TextNode, TokenTrees
from shallowfusion.search.beam_state import FinishedHypothesis
from shallowfusion.text.spelling import Said, Spelling

__all__ = ["DelayedLM", "DelayedTexts", "end_score"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Clock = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, eq=False)
class Scored:
    """A hypothesis and what the model has been asked about it.

    Args:
        said: its transcript so far.
        node: the text the model has scored, held; its `total` is what the model says of the hypothesis.
        units: how many units of the transcript that is, and `reach`, how many bytes.
    """

    said: Said
    node: TextNode
    units: int = 0
    reach: int = 0


class DelayedTexts:
    """When which texts are scored: the part of delayed fusion that knows no search.

    A hypothesis's score is log P(tokens of its first units), the text of those units tokenised as a whole, so two
    hypotheses that say the same score the same, and taking tokens back needs no care. To that comes, with tail="mean",
    an estimate for the bytes behind the units: what a byte of the utterance's scored texts cost on the average.

    Args:
        trees: fresh, of the batch.
        spelling: of the transcripts for the model.
        delay: see `Delay`.
    """

    def __init__(self, trees: TokenTrees, spelling: Spelling, delay: Delay) -> None:
        self.trees, self.spelling, self.delay = trees, spelling, delay
        num_utterances = self.num_utterances = trees.num_utterances
        self._waited = [0] * num_utterances  # steps since the last time
        self._fewest = [0] * num_utterances  # complete units of the shortest hypothesis, the last time
        self.asked: set[int] = set()  # utterances whose hypotheses the last `advance` renewed
        self.rates = [0.0] * num_utterances  # nats per byte of text that is not scored yet

    def fresh(self, place: int) -> Scored:
        """A hypothesis that has said nothing; held."""
        return Scored(Said((), b""), self.trees.grow(place, ()))

    def total(self, place: int, each: Scored) -> float:
        """What the model says of a hypothesis, in nats, with the estimate for what it was not asked."""
        return each.node.total + self.rates[place] * (len(each.said.text) - each.reach)

    def advance(
        self, live: Sequence[Sequence[Scored | None]], steps: int = 1, places: Sequence[int] | None = None
    ) -> list[list[Scored | None]]:
        """Go on by some steps, and score what is due, in one call of the model.

        Args:
            live: per utterance its live hypotheses; None = no such. What is handed in is held by the caller, and
                handed over.
            places: of these utterances in the batch; None = all.

        Returns:
            The same hypotheses, held.
        """
        found: list[list[Scored | None]] = []
        requests: list[Request] = []
        places = range(self.num_utterances) if places is None else places
        self.asked = set()
        for place, own in zip(places, live, strict=True):
            self._waited[place] += steps
            renewed = self._due(place, own)
            found.append(list(own) if renewed is None else renewed)
            if renewed is not None:
                self.asked.add(place)
            requests += [Request(place, each.node) for each in renewed or () if each is not None]
        if requests:
            self.trees.score(requests)
            self._learn_rates(found, places)
        return found

    def _due(self, place: int, own: Sequence[Scored | None]) -> list[Scored | None] | None:
        """The hypotheses with the texts to be scored now; None if it is not yet time."""
        delay = self.delay
        if delay.trigger != "shortest" and (delay.interval is None or self._waited[place] < delay.interval):
            return None
        complete = [0 if each is None else self.spelling.complete(each.said) for each in own]
        fewest = min((count for count, each in zip(complete, own, strict=True) if each is not None), default=0)
        if delay.trigger == "shortest" and fewest <= self._fewest[place]:
            return None
        spans = [fewest if delay.score_span == "common" else count for count in complete]
        renewed = [
            each if each is None else self._respelled(place, each, units)
            for each, units in zip(own, spans, strict=True)
        ]
        is_new = any(new is not None and np.isnan(new.node.total) for new in renewed)
        if delay.trigger != "hybrid" or is_new:
            self._waited[place], self._fewest[place] = 0, fewest
        return renewed

    def _respelled(self, place: int, each: Scored, units: int) -> Scored:
        if units == each.units:
            return each
        node = self.trees.grow(place, self.spelling.ids(each.said, units))
        self.trees.drop(place, each.node)
        return Scored(each.said, node, units, self.spelling.reach(each.said, units))

    def _learn_rates(self, found: Sequence[Sequence[Scored | None]], places: Sequence[int]) -> None:
        for place, own in zip(places, found, strict=True):
            reach = sum(each.reach for each in own if each is not None)
            if place in self.asked and reach > 0 and self.delay.tail == "mean":
                self.rates[place] = sum(each.node.total for each in own if each is not None) / reach


class DelayedLM:
    """Delayed fusion in a label-synchronous search: a `CandidateScorer` whose `owed` is what a trigger found out.

    A live row's total holds weight * log P(its first complete units). Candidates that end keep what they have, so that
    they compare with rows that go on and are as little known; when the search is over, `finished` scores the rest of
    their texts and the ends, and only then they are ranked.

    Price: per trigger one pass over the new tokens of the beam, each distinct text once, and a little Python per row;
    one more pass for the ends.

    Args:
        texts: the texts of the batch, fresh.
        pieces: bytes of each acoustic token.
        end_id: the acoustic end token.
        end_policy: what the model says of the end: its own log-prob ("lm"), that of its favourite ("neutral"), or
            nothing ("asr_only").
        weight, name: see `CandidateScorer`.
        clock: of the search; the model's time counts as stage `name`.
    """

    def __init__(
        self,
        texts: DelayedTexts,
        pieces: Sequence[bytes | None],
        end_id: int,
        end_policy: EndPolicy,
        weight: float,
        name: str = "lm",
        clock: Clock | None = None,
    ) -> None:
        self.name, self.weight = name, weight
        self.texts = texts
        self._pieces, self._end_id, self._end_policy = pieces, end_id, end_policy
        self._clock = clock
        self._lengths = np.array([len(piece or b"") for piece in pieces], dtype=np.int64)
        self._places = list(range(texts.num_utterances))  # of the rows in the batch as it was
        self.rows: list[list[Scored | None]] = [[texts.fresh(place)] for place in self._places]
        self._ending: list[tuple[int, TextNode]] = []  # held, so that what they have in common is not read again
        self.owed: FloatArray = np.zeros((len(self.rows), 1))

    def increments(self, lanes: IntArray, tokens: IntArray) -> FloatArray:
        """What is owed of each candidate's parent, and the estimate for its own token."""
        ending = (lanes >= 0) & (tokens == self._end_id)
        for place, candidate in np.argwhere(ending).tolist():
            row = self.rows[place][lanes[place, candidate]]
            if row is not None:
                self._ending.append((self._places[place], self.texts.trees.hold(row.node)))
        rates = np.array([self.texts.rates[place] for place in self._places])
        own = np.where(ending, 0.0, rates[:, None] * self._lengths[np.maximum(tokens, 0)])
        return np.take_along_axis(self.owed, np.maximum(lanes, 0), axis=1) + own

    def follow(self, parents: IntArray, tokens: IntArray) -> None:
        """Row k of utterance u continues its old row parents[u, k] with tokens[u, k]; the end token = a dead row."""
        old, self.rows = self.rows, []
        for place, own, chosen, said in zip(self._places, old, parents.tolist(), tokens.tolist(), strict=True):
            rows = [self._continued(own[parent], token) for parent, token in zip(chosen, said, strict=True)]
            self.rows.append(rows)
            is_over = all(row is None for row in rows)
            for each in own:
                if each is not None and is_over:
                    self._ending.append((place, each.node))
                elif each is not None:
                    self.texts.trees.drop(place, each.node)
        self.owed = np.zeros(parents.shape)

    def keep(self, order: Sequence[int]) -> None:
        """Drop finished utterances, then score what is due of the others."""
        self.rows = [self.rows[place] for place in order]
        self._places = [self._places[place] for place in order]
        before = self._totals()
        with self._timed():
            self.rows = self.texts.advance(self.rows, places=self._places)
        self.owed = self._totals() - before

    def totals_of(self, outcomes: Sequence[Sequence[FinishedHypothesis]]) -> list[FloatArray]:
        """What the model says of finished hypotheses, their last words and ends included; then all texts are let go.

        Args:
            outcomes: per utterance of the batch as it was.

        Returns:
            Per utterance float64 [hypotheses], nats.
        """
        trees, requests = self.texts.trees, []
        for place, hypotheses in enumerate(outcomes):
            for hypothesis in hypotheses:
                said = Said(
                    hypothesis.token_ids, b"".join(self._pieces[token] or b"" for token in hypothesis.token_ids)
                )
                node = trees.grow(place, self.texts.spelling.whole(said))
                requests.append(Request(place, node, hypothesis.ended and self._end_policy != "asr_only"))
        with self._timed():
            ends = end_score(trees.score(requests), self._end_policy)
        totals = np.array([request.node.total for request in requests]) + ends
        for place, node in [*((request.place, request.node) for request in requests), *self._ending]:
            trees.drop(place, node)
        self._ending = []
        starts = np.cumsum([len(hypotheses) for hypotheses in outcomes])[:-1]
        return np.split(totals, starts)

    def covered(self) -> list[list[int]]:
        """Per live row how many of its acoustic tokens the model has scored."""
        return [[0 if each is None else self._covered(each) for each in own] for own in self.rows]

    def _covered(self, each: Scored) -> int:
        ends = np.cumsum(self._lengths[list(each.said.tokens)])
        return int(np.searchsorted(ends, each.reach, side="right"))

    def _continued(self, parent: Scored | None, token: int) -> Scored | None:
        if parent is None or token == self._end_id:
            return None
        said = parent.said.and_then(token, self._pieces[token])
        return Scored(said, self.texts.trees.hold(parent.node), parent.units, parent.reach)

    def _totals(self) -> FloatArray:
        totals = [
            [0.0 if each is None else self.texts.total(place, each) for each in own]
            for place, own in zip(self._places, self.rows, strict=True)
        ]
        return np.array(totals, dtype=np.float64).reshape(len(self.rows), -1)

    def _timed(self) -> AbstractContextManager[None]:
        return nullcontext() if self._clock is None else self._clock(self.name)


def end_score(ends: FloatArray, policy: EndPolicy) -> FloatArray:
    """What the model says of the ends after some texts; [texts, 2] as `TokenTrees.score` returns, NaN = no end."""
    if policy == "asr_only":
        return np.zeros(len(ends))
    return np.nan_to_num(ends[:, 0 if policy == "lm" else 1], nan=0.0)
