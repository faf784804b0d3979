"""Weights searched on stored n-best lists, without running a model: exact along each weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from shallowfusion.evaluation.line_search import ErrorCurve, line_search, search_weights
from shallowfusion.evaluation.nbest import ListedHypothesis, NBestList
from shallowfusion.options import DecodingOptions

__all__ = ["LENGTH", "OfflineChoice", "OfflineSearch", "pooled"]

LENGTH = "length"
ACOUSTIC, INTERNAL = "asr", "ilm"
LARGEST_WEIGHT, LARGEST_BONUS, LARGEST_ILM = 2.0, 1.0, 1.0


@dataclass(frozen=True)
class OfflineChoice:
    """Weights by the name of their part ("length" is the bonus per token), and the word errors they make offline."""

    weights: Mapping[str, float]
    errors: int


@dataclass(frozen=True)
class OfflineSearch:
    """Lists of a development set whose parts are what a weight multiplies in a hypothesis's score.

    Args:
        lists: from `pooled`, with references.
        lm_names: parts of the language models.
        normalise: as word errors are to be counted.
    """

    lists: Sequence[NBestList]
    lm_names: Sequence[str]
    normalise: Callable[[str], str] | None = None

    def curve(self, name: str, weights: Mapping[str, float] | None = None) -> ErrorCurve:
        """Word errors for every weight of one language model, the other weights held."""
        return line_search(self.lists, name, {ACOUSTIC: 1.0, **(weights or {})}, 0.0, LARGEST_WEIGHT, self.normalise)

    def search(self, starts: Sequence[Mapping[str, float]], also: Sequence[str] = ()) -> OfflineChoice:
        """The fewest errors found from any of the starts, one weight at a time.

        Args:
            starts: weights of the language models.
            also: of "length" and "ilm", what is searched with them.
        """
        ranges: dict[str, tuple[float, float]] = dict.fromkeys(self.lm_names, (0.0, LARGEST_WEIGHT))
        bounds = {LENGTH: (-LARGEST_BONUS, LARGEST_BONUS), INTERNAL: (-LARGEST_ILM, 0.0)}
        ranges |= {name: bounds[name] for name in also}
        found = []
        for start in starts:
            first = {ACOUSTIC: 1.0, **dict.fromkeys(ranges, 0.0), **start}
            weights, errors = search_weights(self.lists, first, ranges, self.normalise)
            found.append(OfflineChoice({name: weights[name] for name in ranges}, errors))
        return min(found, key=lambda choice: choice.errors)


def pooled(runs: Sequence[Mapping[str, NBestList]], options: DecodingOptions) -> list[NBestList]:
    """One list per utterance of all hypotheses of all runs, parts divided as the decoder's length rule divides totals.

    Each text is there once, with the tokens the acoustic model likes best. The part "length" is the number of tokens
    but the end, which a length bonus multiplies.
    """
    lists = []
    for id, first in runs[0].items():
        best: dict[str, ListedHypothesis] = {}
        for run in runs:
            for hypothesis in run[id].hypotheses:
                known = best.get(hypothesis.text)
                if known is None or hypothesis.parts[ACOUSTIC] > known.parts[ACOUSTIC]:
                    best[hypothesis.text] = hypothesis
        lists.append(replace(first, hypotheses=tuple(_scaled(own, options) for own in best.values())))
    return lists


def _scaled(hypothesis: ListedHypothesis, options: DecodingOptions) -> ListedHypothesis:
    tokens = max(1, hypothesis.num_tokens or 1)
    penalty = options.length_penalty
    if options.stop_rule == "whisper":
        divisor = max(1, tokens - 1) if penalty is None else ((5 + tokens - 1) / 6) ** penalty
    else:
        divisor = tokens ** (1.0 if penalty is None else penalty)
    parts = {name: value / divisor for name, value in hypothesis.parts.items()}
    if options.ctc_weight:  # attention and CTC share the acoustic weight of 1
        parts[ACOUSTIC] = (1 - options.ctc_weight) * parts[ACOUSTIC] + options.ctc_weight * parts.pop("ctc")
    return replace(hypothesis, parts={**parts, LENGTH: (tokens - 1) / divisor})
