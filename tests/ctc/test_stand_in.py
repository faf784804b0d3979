"""The word n-gram model that stands in for a delayed language model in the CTC search, and is taken back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion import fusion
from shallowfusion.ctc.decoder import CTCDecoder
from shallowfusion.ctc.delayed import DelayedCtcSearch
from shallowfusion.ctc.search import CtcSearch
from shallowfusion.ctc.search_reference import ReferenceCtcSearch
from shallowfusion.ctc.settings import CtcAlphabet, CtcLanguage, CtcOptions
from shallowfusion.ctc.stand_in import StandIn
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.rescoring import score_texts
from tests.ctc.conftest import random_log_probs, searched
from tests.ctc.test_language import random_table
from tests.delayed_world import bpe_lm

ALPHABET = CtcAlphabet(("", " ", "a", "b"), delimiter=1)
MARKED = CtcAlphabet(("", "▁a", "b", "▁ab▁"), word_start="▁")
LM = bpe_lm()
WEIGHT, PROXY = 0.5, 0.3


def language_of(seed: int, **names: Any) -> CtcLanguage:
    return CtcLanguage(random_table(seed), unknown_word=-2.5, unknown_prefix=-1.0, **names)


def said(text: str, end: bool = True) -> float:
    return float(score_texts(LM, [text], include_end=end)[0].sum())


@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([None, ("a", "ab", "bb")]), st.sampled_from([0, 1]))
@settings(deadline=None, max_examples=40)
def test_it_counts_as_the_search_does(seed: int, boundary: bool, words: Any, which: int) -> None:
    alphabet, language = (ALPHABET, MARKED)[which], language_of(seed % 50, score_boundary=boundary, words=words)
    search = (CtcSearch, ReferenceCtcSearch)[seed % 2](alphabet, CtcOptions(beam_size=60, lm_weight=1.0), language)
    start = (language.start_state, language.table.null_state)[seed // 2 % 2]
    state = search.begin(1, [start])
    search.step(state, random_log_probs(seed, (1, 7, 4)))
    stand_in = StandIn(alphabet, language)
    for hypothesis in search.end(state, 60)[0].hypotheses:
        fused = hypothesis.total - hypothesis.parts["asr"]
        assert stand_in.whole(start, hypothesis.text) == pytest.approx(fused, abs=1e-3)
    is_open = {(prefix.text, prefix.is_open) for prefix in search.live(state)[0]}
    for hypothesis in search.results(state, 60)[0].hypotheses:
        fused = hypothesis.total - hypothesis.parts["asr"]
        ways = [stand_in.closed(start, hypothesis.text, way, 10**6) for text, way in is_open if text == hypothesis.text]
        assert min(abs(way - fused) for way in ways) < 1e-3
    if alphabet is ALPHABET:
        assert {is_open for _, is_open in is_open} == {False, True}


def test_words_count_up_to_a_place_in_the_text() -> None:
    stand_in, start = StandIn(ALPHABET, language_of(1)), 0
    sums = [stand_in.closed(start, text, False, 99) for text in ("", "ab", "ab ba", "ab ba b")]
    assert sums[0] == 0.0
    assert len(set(sums)) == 4
    for reach, count in ((0, 0), (1, 0), (2, 1), (4, 1), (5, 2), (6, 2), (7, 3)):
        assert stand_in.closed(start, "ab ba b", False, reach) == sums[count]
    assert stand_in.closed(start, "ab ba b", True, 99) == sums[2]


@pytest.mark.parametrize("trigger", ["shortest", "interval", "hybrid"])
@pytest.mark.parametrize("score_span", ["all", "common"])
def test_nothing_of_it_is_left_at_the_end(search_class: type, trigger: Any, score_span: Any) -> None:
    rule = fusion.delayed(WEIGHT, trigger, 3, score_span, proxy_weight=PROXY)
    options = CtcOptions(beam_size=8, lm_weight=PROXY, word_bonus=0.2)
    search = DelayedCtcSearch(search_class(ALPHABET, options, language_of(3)), LM, rule)
    for result in searched(search, random_log_probs(4, (2, 14, 4)), 8, [14, 9]):
        totals = [h.total for h in result.hypotheses]
        assert totals == sorted(totals, reverse=True)
        for h in result.hypotheses:
            assert h.parts["llm"] == pytest.approx(said(h.text), abs=1e-3)
            bonus = 0.2 * len(h.text.split())
            assert h.total == pytest.approx(h.parts["asr"] + WEIGHT * h.parts["llm"] + bonus, abs=1e-3)


def test_on_the_way_it_speaks_for_what_was_not_scored_and_for_nothing_else(search_class: type) -> None:
    rule = fusion.delayed(WEIGHT, "interval", 4, proxy_weight=PROXY)
    inner = search_class(ALPHABET, CtcOptions(beam_size=8, lm_weight=PROXY), language_of(3))
    search, stand_in = DelayedCtcSearch(inner, LM, rule), StandIn(ALPHABET, language_of(3))
    log_probs = random_log_probs(4, (1, 16, 4))
    log_probs[0, 3:12:4] = np.log([1e-6, 1 - 3e-6, 1e-6, 1e-6])  # spaces for sure
    state = search.begin(1)
    search.step(state, log_probs)  # the language model was asked after the last frame
    seen = 0
    for prefix in inner.live(state.inner)[0]:
        words = prefix.text.split(" ")[: -1 if prefix.is_open else None]
        taken = stand_in.closed(state.starts[0], prefix.text, prefix.is_open, 99)
        wanted = WEIGHT * said(" ".join(words), end=False) if words and prefix.text else 0.0
        assert prefix.extra == pytest.approx(wanted - PROXY * taken, abs=1e-3)
        seen += len(words) > 1
    assert seen > 2


def test_added_it_stays_and_the_front_gives_it_the_weight_of_the_rule() -> None:
    log_probs, language = random_log_probs(5, (2, 12, 4)), language_of(2)
    decoder = CTCDecoder(ALPHABET.labels, 0, 1, language, threads=1, llm=LM)
    stand_in = StandIn(ALPHABET, language)
    rules = [fusion.delayed(WEIGHT, interval=4, proxy_weight=PROXY, proxy_form=form) for form in ("add", "replace")]
    for rule, share in zip(rules, (PROXY, 0.0), strict=True):
        for result in decoder.decode(log_probs, rule=rule, beam_size=8, n_best=8):
            for h in result.n_best:
                fused = WEIGHT * said(h.text) + share * stand_in.whole(language.start_state, h.text)
                assert h.total == pytest.approx(h.parts["asr"] + fused, abs=1e-3)
                assert set(h.parts) == {"asr", "lm", "llm"}
    never = fusion.delayed(0.0, interval=None, proxy_weight=PROXY, proxy_form="add")
    alone = CTCDecoder(ALPHABET.labels, 0, 1, language, threads=1).decode(log_probs, beam_size=8, lm_weight=PROXY)
    assert [r.text for r in decoder.decode(log_probs, rule=never, beam_size=8)] == [r.text for r in alone]


def test_nan_of_the_language_model_leaves_the_stand_in_where_it_was() -> None:
    class Silent(type(LM)):  # type: ignore[misc]
        def head(self, hidden: Any) -> Any:
            return super().head(hidden) * math.nan

    log_probs = random_log_probs(5, (2, 12, 4))
    language = language_of(2)
    broken = Silent(LM.model, LM.vocabulary, LM.tokenizer)
    plain = CTCDecoder(ALPHABET.labels, 0, 1, language, threads=1)
    late = CTCDecoder(ALPHABET.labels, 0, 1, language, threads=1, llm=broken)
    rule = fusion.delayed(WEIGHT, interval=4, proxy_weight=PROXY)
    found = late.decode(log_probs, rule=rule, beam_size=8, n_best=4)
    wanted = plain.decode(log_probs, lm_weight=PROXY, beam_size=8, n_best=4)
    for one, two in zip(found, wanted, strict=True):
        assert one.flags == ("nan",)
        assert [h.text for h in one.n_best] == [h.text for h in two.n_best]
        assert np.array([h.total for h in one.n_best]) == pytest.approx(np.array([h.total for h in two.n_best]))


def test_searches_without_such_a_model_are_refused() -> None:
    rule = fusion.delayed(WEIGHT, proxy_weight=PROXY)
    plain = CtcSearch(ALPHABET, CtcOptions(lm_weight=PROXY))
    with pytest.raises(InvalidArgumentError, match="there is none; give lm="):
        DelayedCtcSearch(plain, LM, rule)
    with pytest.raises(InvalidArgumentError, match="no such model"):
        DelayedCtcSearch(plain, LM, fusion.delayed(WEIGHT, proxy_weight=PROXY, proxy_form="add"))
    with pytest.raises(InvalidArgumentError, match=r"lm_weight=0\.5"):
        DelayedCtcSearch(CtcSearch(ALPHABET, None, language_of(1)), LM, rule)
    with pytest.raises(InvalidArgumentError, match="score_empty_word"):
        StandIn(ALPHABET, language_of(1, score_empty_word=True))
    with pytest.raises(InvalidArgumentError, match="with a space"):
        StandIn(CtcAlphabet(("", "a b", " "), delimiter=2), language_of(1))
