"""Estimation of n-gram models: interpolated modified Kneser-Ney smoothing (Chen and Goodman, 1998)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shallowfusion.config import require
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.ngrams.arpa import BEGIN_LOG10_PROB
from shallowfusion.ngrams.model import BEGIN, END, LOG_10, UNKNOWN, NgramModel, NgramOrder

__all__ = ["Estimate", "EstimateSettings", "estimate"]

logger = logging.getLogger(__name__)

UNKNOWN_ID, BEGIN_ID, END_ID = 0, 1, 2
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Discounts = tuple[float, float, float]


@dataclass(frozen=True)
class EstimateSettings:
    """How a model is estimated.

    Args:
        order: words of the longest n-grams, at least 1.
        prune: per order from 1 on, n-grams seen at most that often are left out; the last number holds for all higher
            orders. Never falling and 0 for unigrams, so that a kept n-gram's parts are kept.
        vocab_limit: that many words, the most frequent, are kept; the others count as <unk>. None = all.
    """

    order: int = 3
    prune: tuple[int, ...] = ()
    vocab_limit: int | None = None

    def __post_init__(self) -> None:
        require(self.order >= 1, f"order must be at least 1, got {self.order}; 3 is a common choice.")
        thresholds = self.thresholds
        require(
            len(self.prune) <= self.order and thresholds[0] == 0 and thresholds == sorted(thresholds),
            f"prune must be up to {self.order} numbers that never fall, the first of them 0, got {list(self.prune)}; "
            "to leave out rare words limit the vocabulary.",
        )
        require(
            self.vocab_limit is None or self.vocab_limit >= 1,
            f"vocab_limit must be at least 1, got {self.vocab_limit}.",
        )

    @property
    def thresholds(self) -> list[int]:
        """The threshold of each order."""
        given = list(self.prune) or [0]
        return (given + [given[-1]] * self.order)[: self.order]


@dataclass(frozen=True, eq=False)
class Estimate:
    """An estimated model and how it came about.

    Args:
        model: words <unk>, <s>, </s>, then the others, the most frequent first.
        discounts: per order what is taken off counts of 1, 2 and 3 or more.
        notes: orders whose discounts are not from the text, and why.
        num_sentences, num_words: of the text, without <s> and </s>.
        num_unknown: words of the text that count as <unk>.
    """

    model: NgramModel
    discounts: tuple[Discounts, ...]
    notes: tuple[str, ...]
    num_sentences: int
    num_words: int
    num_unknown: int


@dataclass(frozen=True)
class _Counted:
    """The distinct n-grams of one order, sorted by (context, word).

    Args:
        context: the n-gram of the order below without the last word; suffix: without the first.
        word: the last one.
        raw: how often it is said.
        begins: whether it starts with <s>.
    """

    context: IntArray
    suffix: IntArray
    word: IntArray
    raw: IntArray
    begins: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Smoothed:
    """Probabilities of the n-grams of one order, the weight each context leaves to shorter ones, which n-grams stay."""

    probs: FloatArray
    left: FloatArray
    kept: npt.NDArray[np.bool_]


def estimate(
    sentences: Iterable[Sequence[str]],
    settings: EstimateSettings | None = None,
    vocabulary: Sequence[str] | None = None,
    report: Callable[[str], None] = logger.info,
) -> Estimate:
    """Estimate p(w | h) = (a(hw) - D(a(hw))) / sum_v a(hv) + left(h) * p(w | h'), h' being h without its first word.

    a is the count for n-grams of the highest order and those that start with <s>, else the number of different words
    seen before the n-gram. D is taken from the counts of counts of each order, for a of 1, 2, and 3 or more. The last
    p is uniform over all words but <s>, so unseen words and <unk> get their share.

    Price: all in memory, about 60 bytes per word of text and order; numpy sorts dominate.

    Args:
        sentences: words of each; empty ones are skipped.
        vocabulary: words the model must know, seen or not; all others count as <unk>. None: the words of the text.
        report: told what is being done.

    Raises:
        InvalidArgumentError: no words at all, or <s> or </s> among them.
    """
    settings = settings or EstimateSettings()
    words, tokens, num_sentences, num_words = _encode(sentences, settings.vocab_limit, vocabulary)
    num_unknown = int((tokens == UNKNOWN_ID).sum())
    counted = _count(tokens, len(words), settings.order, report)
    adjusted = _adjusted(counted)
    discounts, notes = [], []
    smoothed: list[_Smoothed] = []
    for order, ngrams in enumerate(counted, start=1):
        found, note = _discounts(adjusted[order - 1], order)
        discounts.append(found)
        notes += [note] if note else []
        below = smoothed[-1].probs if smoothed else np.full(1, 1.0 / (len(words) - 1))
        threshold = settings.thresholds[order - 1]
        smoothed.append(_smooth(ngrams, adjusted[order - 1], found, below, threshold))
    model = _model(words, counted, smoothed)
    return Estimate(model, tuple(discounts), tuple(notes), num_sentences, num_words, num_unknown)


def _encode(
    sentences: Iterable[Sequence[str]], limit: int | None, vocabulary: Sequence[str] | None
) -> tuple[tuple[str, ...], IntArray, int, int]:
    """Spellings, the text as ids with <s> and </s> around each sentence, and the numbers of sentences and words."""
    ids: dict[str, int] = {UNKNOWN: UNKNOWN_ID, BEGIN: BEGIN_ID, END: END_ID}
    text: list[int] = []
    num_sentences = 0
    for number, sentence in enumerate(sentences, start=1):
        if not sentence:
            continue
        if BEGIN in sentence or END in sentence:
            raise InvalidArgumentError(
                f"sentence {number} holds {BEGIN} or {END} as a word; they mark where sentences begin and end, so give "
                "the text without them."
            )
        num_sentences += 1
        text.append(BEGIN_ID)
        text += [ids.setdefault(word, len(ids)) for word in sentence]
        text.append(END_ID)
    if num_sentences == 0:
        raise InvalidArgumentError("the text holds no words, got only empty lines; give at least one sentence.")
    tokens = np.array(text, dtype=np.int64)
    counts = Counter(dict(enumerate(np.bincount(tokens, minlength=len(ids)).tolist())))
    known = set(ids) if vocabulary is None else set(vocabulary)
    ranked = sorted((word for word in ids if ids[word] > END_ID and word in known), key=lambda w: (-counts[ids[w]], w))
    ranked = ranked if limit is None else ranked[:limit]
    unseen = [] if vocabulary is None else [word for word in dict.fromkeys(vocabulary) if word not in ids]
    words = (UNKNOWN, BEGIN, END, *ranked, *unseen)
    new_ids = np.zeros(len(ids), dtype=np.int64)
    new_ids[[ids[word] for word in (UNKNOWN, BEGIN, END, *ranked)]] = np.arange(3 + len(ranked))
    return words, new_ids[tokens], num_sentences, len(text) - 2 * num_sentences


def _count(tokens: IntArray, num_words: int, order: int, report: Callable[[str], None]) -> list[_Counted]:
    """The distinct n-grams of every order, each told by the number of its context and its last word."""
    starts = np.flatnonzero(tokens == BEGIN_ID)
    place = np.arange(len(tokens)) - np.repeat(starts, np.diff(np.append(starts, len(tokens))))
    nothing = np.zeros(num_words, dtype=np.int64)
    raw = np.bincount(tokens, minlength=num_words)
    counted = [_Counted(nothing, nothing, np.arange(num_words), raw, np.arange(num_words) == BEGIN_ID)]
    ngram_at = tokens  # the n-gram of the order before that ends at each token
    for size in range(2, order + 1):
        ends = np.flatnonzero(place >= size - 1)
        if len(ends) == 0:
            report(f"no sentence is long enough for {size}-grams; the model stops at order {size - 1}")
            break
        keys = ngram_at[ends - 1] * num_words + tokens[ends]
        found, first, which, raw = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        context = found // num_words
        counted.append(_Counted(context, ngram_at[ends[first]], found % num_words, raw, counted[-1].begins[context]))
        report(f"{len(found)} different {size}-grams")
        ngram_at = np.full(len(tokens), -1)
        ngram_at[ends] = which
    return counted


def _adjusted(counted: Sequence[_Counted]) -> list[IntArray]:
    """What the formula calls a, for every n-gram; 0 for <s> alone, which is never predicted."""
    adjusted = []
    for order, ngrams in enumerate(counted):
        if order + 1 < len(counted):
            before = np.bincount(counted[order + 1].suffix, minlength=len(ngrams.raw))
            values = np.where(ngrams.begins, ngrams.raw, before)
        else:
            values = ngrams.raw.copy()
        if order == 0:
            values[BEGIN_ID] = 0
        adjusted.append(values)
    return adjusted


def _discounts(adjusted: IntArray, order: int) -> tuple[Discounts, str | None]:
    """Discounts of counts 1, 2 and 3 or more, and why they are not from the counts of counts if so."""
    of_counts = np.bincount(np.minimum(adjusted, 5), minlength=6).astype(float)
    n1, n2, n3, n4 = of_counts[1:5]
    if min(n1, n2, n3, n4) > 0:
        ratio = n1 / (n1 + 2 * n2)
        found = (1 - 2 * ratio * n2 / n1, 2 - 3 * ratio * n3 / n2, 3 - 4 * ratio * n4 / n3)
        if all(0 < discount <= k for k, discount in enumerate(found, start=1)):
            return found, None
        reason = f"discounts {', '.join(f'{discount:.3f}' for discount in found)} are out of range"
    else:
        reason = (
            f"{', '.join(f'{int(n)}' for n in (n1, n2, n3, n4))} {order}-grams have counts 1, 2, 3, 4; none may be 0"
        )
    return FALLBACK_DISCOUNTS, f"order {order}: discounts {FALLBACK_DISCOUNTS} instead of estimated ones, as {reason}"


def _smooth(ngrams: _Counted, adjusted: IntArray, discounts: Discounts, below: FloatArray, threshold: int) -> _Smoothed:
    """Interpolate with the order below; the mass of pruned n-grams goes to it as well."""
    kept = (ngrams.raw > threshold) | (threshold == 0)
    taken = np.array([0.0, *discounts])[np.minimum(adjusted, 3)]
    taken = np.where(kept, np.minimum(taken, adjusted), adjusted)
    totals = np.bincount(ngrams.context, adjusted, minlength=len(below))
    with np.errstate(invalid="ignore"):
        left = np.where(totals > 0, np.bincount(ngrams.context, taken, minlength=len(below)) / totals, 1.0)
    probs = (adjusted - taken) / totals[ngrams.context] + left[ngrams.context] * below[ngrams.suffix]
    return _Smoothed(probs, left, kept)


def _model(words: tuple[str, ...], counted: Sequence[_Counted], smoothed: Sequence[_Smoothed]) -> NgramModel:
    orders = []
    ngram_words = counted[0].word[:, None]
    for order, (ngrams, own) in enumerate(zip(counted, smoothed, strict=True)):
        if order > 0:
            ngram_words = np.concatenate([ngram_words[ngrams.context], ngrams.word[:, None]], axis=1)
        log_probs = np.log(own.probs)
        if order == 0:
            log_probs[BEGIN_ID] = BEGIN_LOG10_PROB * LOG_10
        longer = smoothed[order + 1].left if order + 1 < len(smoothed) else np.ones(len(own.probs))
        back_offs = np.log(longer)
        kept = own.kept
        orders.append(
            NgramOrder(
                np.ascontiguousarray(ngram_words[kept], dtype=np.int32),
                log_probs[kept].astype(np.float32),
                back_offs[kept].astype(np.float32),
            )
        )
    while len(orders) > 1 and len(orders[-1]) == 0:
        orders.pop()
    return NgramModel(words, tuple(orders), BEGIN_ID, END_ID, UNKNOWN_ID, name="estimated n-gram model")
