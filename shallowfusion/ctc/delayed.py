"""A language model on any tokenizer inside the CTC search, asked late (METHODS 4); see `search.delayed`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shallowfusion.config import require
from shallowfusion.ctc.results import CtcHypothesis, CtcLive, CtcResult, frames_of, start_states_of
from shallowfusion.ctc.search import CtcSearchProtocol
from shallowfusion.ctc.stand_in import StandIn
from shallowfusion.fusion.rules import Rule
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.scorers.token_trees import Request, TextNode, TokenTrees
from shallowfusion.search.delayed import DelayedTexts, Scored
from shallowfusion.text.spelling import Retokenised, Said

__all__ = ["DelayedCtcSearch", "DelayedCtcState"]


@dataclass
class DelayedCtcState:
    """A batch in progress.

    Args:
        inner: the state of the search.
        texts: what the language model has read.
        starts: state of the n-gram model in the search before each utterance.
        num_steps: frames since the language model's clock began.
        saw_nan: utterances of which the language model said NaN; they keep the scores they had.
        held: the texts that were scored last, by utterance.
    """

    inner: Any
    texts: DelayedTexts
    starts: list[int]
    num_steps: int = 0
    saw_nan: set[int] = field(default_factory=set)
    held: dict[int, list[TextNode]] = field(default_factory=dict)

    @property
    def num_frames(self) -> list[int]:
        """Frames each utterance has seen."""
        frames: list[int] = self.inner.num_frames
        return frames

    @property
    def counts(self) -> dict[str, int]:
        """Calls of the language model, and tokens it read in them."""
        return {"llm_calls": self.texts.trees.num_calls, "llm_tokens": self.texts.trees.num_tokens}


class DelayedCtcSearch:
    """A CTC search whose prefixes carry weight * log P(their first complete words) of a causal language model.

    Between frames, when the rule's trigger fires, the texts of the beam are scored and become the prefixes' extras; at
    the end the last words and the ends are. `delay.interval` counts frames of the longest utterance, so chunks of any
    sizes give what one call gives. The estimate for text that is not scored yet (tail="mean") is renewed with the rest,
    not with every label.

    With a second weight, of the word n-gram model in the search (`CtcOptions.lm_weight`), that model stands in for the
    language model. proxy_form="add": its scores stay. "replace": they are taken back with the words that the language
    model has scored, so that in the end nothing of it is left (METHODS 4.6):

        total(l) = ... + weight * llm(first words of l) + proxy_weight * lm(the closed words behind them)

    Price: beside the search's own, per trigger one pass over what is new in the beam, and a look at every prefix; per
    frame a look at every prefix unless the trigger is "interval".

    Args:
        search: of labels; an n-gram model in it adds to the scores.
        llm: with its tokenizer.
        rule: of fusion.delayed; its unit is words, or characters.

    Raises:
        InvalidArgumentError: another rule, or a second weight that is not the search's lm_weight.
        VocabularyError: the language model has no tokenizer.
    """

    def __init__(self, search: CtcSearchProtocol, llm: CausalLMScorer, rule: Rule) -> None:
        require(
            rule.delay is not None and rule.delay.unit != "tokens",
            f"a CTC search takes fusion.delayed(weight) with unit words or characters, got {rule}.",
        )
        assert rule.delay is not None
        self._proxy_weight, self._stand_in = 0.0, None
        if len(rule.lm_weights) > 1 and rule.delay.proxy_form == "replace":
            self._proxy_weight = rule.lm_weights[1]
            self._stand_in = StandIn(search.alphabet, search.language)
        require(
            len(rule.lm_weights) == 1
            or (search.language is not None and search.options.lm_weight == rule.lm_weights[1]),
            f"proxy_weight weighs the n-gram model inside the search, got {rule} and "
            + ("no such model." if search.language is None else f"lm_weight={search.options.lm_weight}."),
        )
        self._search, self._llm, self._weight, self._delay = search, llm, rule.lm_weights[0], rule.delay
        unit = "characters" if rule.delay.unit == "characters" else "words"
        self.spelling = Retokenised(llm.tokenizer, llm.vocabulary, unit, lower=rule.delay.lower)  # type: ignore[arg-type]

    def begin(self, num_utterances: int, start_states: Sequence[int] | None = None) -> DelayedCtcState:
        """Start a batch."""
        inner = self._search.begin(num_utterances, start_states)
        texts = DelayedTexts(TokenTrees(self._llm, num_utterances), self.spelling, self._delay)
        language = self._search.language
        default = 0 if language is None else language.start_state
        return DelayedCtcState(inner, texts, start_states_of(start_states, num_utterances, default))

    def step(self, state: DelayedCtcState, log_probs: Any, lengths: Any = None) -> None:
        """Go on by a chunk; see `CtcSearchProtocol.step`."""
        num_labels = log_probs.shape[2] if getattr(log_probs, "ndim", 0) == 3 else -1
        frames = frames_of(log_probs, lengths, len(state.num_frames), num_labels)
        stride = (self._delay.interval or frames.log_probs.shape[1] or 1) if self._delay.trigger == "interval" else 1
        longest, start = int(frames.counts.max(initial=0)), 0
        while start < longest:
            count = min(stride - state.num_steps % stride, longest - start)
            part = (frames.counts - start).clip(0, count)
            self._search.step(state.inner, frames.log_probs[:, start : start + count], part)
            state.num_steps += count
            start += count
            self._advance(state, count)

    def results(self, state: DelayedCtcState, n_best: int = 1) -> list[CtcResult]:
        """What the batch looks like so far, with what the language model was asked so far."""
        return self._search.results(state.inner, n_best)

    def end(self, state: DelayedCtcState, n_best: int = 1) -> list[CtcResult]:
        """The final hypotheses, each scored whole and with its end; part "llm". The state may go on afterwards."""
        live = self._search.live(state.inner)
        trees, requests = state.texts.trees, []
        for place, own in enumerate(live):
            for prefix in own:
                node = trees.grow(place, self.spelling.whole(Said((), prefix.text.encode())))
                requests.append(Request(place, node, with_end=True))
        ends = trees.score(requests)
        scores = [request.node.total + float(end[0]) for request, end in zip(requests, ends, strict=True)]
        for request in requests:
            trees.drop(request.place, request.node)
        rest = iter(scores)
        known = [{p.text: self._final(state, place, p, next(rest)) for p in own} for place, own in enumerate(live)]
        extras = [[texts[prefix.text][1] for prefix in own] for own, texts in zip(live, known, strict=True)]
        self._search.set_extras(state.inner, extras)
        found = self._search.end(state.inner, n_best)
        self._search.set_extras(state.inner, [[prefix.extra for prefix in own] for own in live])
        return [
            dataclasses.replace(result, hypotheses=tuple(_with_part(h, texts[h.text][0]) for h in result.hypotheses))
            for result, texts in zip(found, known, strict=True)
        ]

    def _advance(self, state: DelayedCtcState, steps: int) -> None:
        live = self._search.live(state.inner)
        fresh = [[self._said(state, place, prefix) for prefix in own] for place, own in enumerate(live)]
        scored = state.texts.advance(fresh, steps)
        extras = []
        for place, (own, rows) in enumerate(zip(live, scored, strict=True)):
            is_asked = place in state.texts.asked
            extras.append(
                [
                    self._extra(state, place, prefix, row) if is_asked and row is not None else prefix.extra
                    for prefix, row in zip(own, rows, strict=True)
                ]
            )
            idle = [row.node for row in rows if row is not None]
            if is_asked:  # what was read last stays, or it would be read again
                idle, state.held[place] = state.held.get(place, []), idle
            for node in idle:
                state.texts.trees.drop(place, node)
        if state.texts.asked:
            self._search.set_extras(state.inner, extras)

    def _extra(self, state: DelayedCtcState, place: int, prefix: CtcLive, row: Scored) -> float:
        """What the models say of a prefix, beyond what the search says itself."""
        score = self._weight * state.texts.total(place, row)
        if self._stand_in is not None:
            words = self._stand_in.closed(state.starts[place], prefix.text, prefix.is_open, row.reach)
            score -= self._proxy_weight * words
        return _kept(state, place, score, prefix.extra)

    def _final(self, state: DelayedCtcState, place: int, prefix: CtcLive, score: float) -> tuple[float, float]:
        """What the language model says of a prefix that ends here, and its extra."""
        stand_in = self._stand_in
        taken = 0.0 if stand_in is None else self._proxy_weight * stand_in.whole(state.starts[place], prefix.text)
        score = _kept(state, place, score, (prefix.extra + taken) / (self._weight or 1.0))
        return score, self._weight * score - taken

    def _said(self, state: DelayedCtcState, place: int, prefix: CtcLive) -> Scored:
        text = prefix.text.encode() + (b"" if prefix.is_open or not prefix.text else b" ")
        return dataclasses.replace(state.texts.fresh(place), said=Said((), text))


def _kept(state: DelayedCtcState, place: int, score: float, old: float) -> float:
    """The score, or the old one if it is no number."""
    if math.isfinite(score):
        return score
    state.saw_nan.add(place)
    return old


def _with_part(found: CtcHypothesis, score: float) -> CtcHypothesis:
    return dataclasses.replace(found, parts={**found.parts, "llm": score})
