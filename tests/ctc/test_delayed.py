"""Scores of the caller's own inside the CTC search, and a language model on another tokenizer that is asked late."""

from __future__ import annotations

import itertools
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
from shallowfusion.ctc.settings import CtcAlphabet, CtcOptions
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.rescoring import score_texts
from shallowfusion.scorers.causal_lm import CausalLMScorer
from tests.ctc.conftest import assert_same, random_log_probs, searched
from tests.delayed_world import bpe_lm

ALPHABET = CtcAlphabet(("", " ", "a", "b", "c"), delimiter=1)
LM = bpe_lm()
WEIGHT = 0.5


def from_scratch(text: str) -> float:
    return float(score_texts(LM, [text])[0].sum())


def test_live_prefixes_tell_their_texts_and_whether_a_word_is_open(search_class: type) -> None:
    marked = CtcAlphabet(("", "▁a", "b", "▁c▁"), word_start="▁")
    for alphabet in (ALPHABET, marked):
        search = search_class(alphabet, CtcOptions(beam_size=500))
        state = search.begin(1)
        search.step(state, random_log_probs(2, (1, 4, len(alphabet.labels))))
        (live,) = search.live(state)
        assert {prefix.text for prefix in live} == {h.text for h in search.results(state, 500)[0].hypotheses}
        assert len({prefix.is_open for prefix in live}) == 2
        assert not next(prefix for prefix in live if prefix.text == "").is_open
        assert all(prefix.extra == 0.0 for prefix in live)


def test_an_extra_moves_totals_and_nothing_else(search_class: type) -> None:
    log_probs = random_log_probs(5, (1, 6, 5))
    search = search_class(ALPHABET, CtcOptions(beam_size=5000))
    before = {h.text: h for h in searched(search, log_probs, 5000)[0].hypotheses}
    state = search.begin(1)
    search.step(state, log_probs)
    (live,) = search.live(state)
    extras = {prefix.text: -3.0 * len(prefix.text) + (40.0 if prefix.text == "ab" else 0.0) for prefix in live}
    search.set_extras(state, [[extras[prefix.text] for prefix in live]])
    (result,) = search.end(state, 5000)
    assert result.best.text == "ab"
    for h in result.hypotheses:
        assert h.extra == pytest.approx(extras[h.text])
        assert h.parts["asr"] == pytest.approx(before[h.text].parts["asr"], abs=1e-9)
        assert h.total == pytest.approx(before[h.text].total + extras[h.text], abs=1e-9)


@given(st.integers(0, 500), st.sampled_from([3, 10, 200]), st.sampled_from(["logsumexp", "max"]))
@settings(deadline=None, max_examples=40)
def test_extras_on_the_way_give_what_the_twin_gives(seed: int, beam_size: int, merge: Any) -> None:
    generator = np.random.default_rng(seed)
    options = CtcOptions(beam_size=beam_size, merge=merge, word_bonus=0.3)
    searches = [search_class(ALPHABET, options) for search_class in (CtcSearch, ReferenceCtcSearch)]
    states = [search.begin(2) for search in searches]
    scores: dict[str, float] = {}
    for _ in range(4):
        log_probs = random_log_probs(int(generator.integers(1 << 30)), (2, 3, 5))
        for search, state in zip(searches, states, strict=True):
            search.step(state, log_probs)
        live, twins = (search.live(state) for search, state in zip(searches, states, strict=True))
        assert [[p.text for p in own] for own in live] == [[p.text for p in own] for own in twins]
        assert [[p.is_open for p in own] for own in live] == [[p.is_open for p in own] for own in twins]
        for prefix in itertools.chain(*live):
            scores.setdefault(prefix.text, float(generator.normal() * 4))
        for search, state in zip(searches, states, strict=True):
            search.set_extras(state, [[scores[p.text] for p in own] for own in search.live(state)])
    for one, other in zip(
        *(search.end(state, 50) for search, state in zip(searches, states, strict=True)), strict=True
    ):
        assert_same(one, other, 1e-6)
        assert [h.extra for h in one.hypotheses] == pytest.approx([h.extra for h in other.hypotheses])


@pytest.mark.parametrize("merge", ["logsumexp", "max"])
def test_texts_of_different_labels_that_meet_keep_their_scores_apart_from_extras(
    search_class: type, merge: Any
) -> None:
    alphabet = CtcAlphabet(("", " ", "a", "b", "ab"), delimiter=1)
    search = search_class(alphabet, CtcOptions(beam_size=4000, merge=merge))
    log_probs = random_log_probs(8, (1, 6, 5))
    wanted = {h.text: h.parts["asr"] for h in searched(search, log_probs, 4000)[0].hypotheses}
    state = search.begin(1)
    for frame in range(6):
        search.step(state, log_probs[:, frame : frame + 1])
        (live,) = search.live(state)
        search.set_extras(state, [[-0.5 * len(prefix.text) for prefix in live]])
    (result,) = search.end(state, 4000)
    found = {h.text: h.parts["asr"] for h in result.hypotheses}
    assert found == pytest.approx(wanted, abs=1e-6)


def test_bad_extras_are_refused_and_change_nothing(search_class: type) -> None:
    search = search_class(ALPHABET, CtcOptions(beam_size=3))
    state = search.begin(1)
    search.step(state, random_log_probs(1, (1, 3, 5)))
    before = search.end(state, 3)
    for bad in ([], [[0.0]], [[0.0, 1.0, math.nan]], [[0.0, 1.0, -math.inf]], [["x"]], None, [[0.0] * 3] * 2):
        with pytest.raises(InvalidArgumentError, match="extras"):
            search.set_extras(state, bad)
    assert_same(before[0], search.end(state, 3)[0])


@pytest.mark.parametrize("trigger", ["shortest", "interval", "hybrid"])
@pytest.mark.parametrize("score_span", ["all", "common"])
def test_totals_hold_the_text_scored_from_scratch(search_class: type, trigger: Any, score_span: Any) -> None:
    rule = fusion.delayed(WEIGHT, trigger, 3, score_span)
    search = DelayedCtcSearch(search_class(ALPHABET, CtcOptions(beam_size=8)), LM, rule)
    state = search.begin(2)
    search.step(state, random_log_probs(4, (2, 14, 5)), [14, 9])
    for result in search.end(state, 8):
        totals = [h.total for h in result.hypotheses]
        assert totals == sorted(totals, reverse=True)
        for h in result.hypotheses:
            assert h.parts["llm"] == pytest.approx(from_scratch(h.text), abs=1e-3)
            assert h.total == pytest.approx(h.parts["asr"] + WEIGHT * h.parts["llm"], abs=1e-3)
    assert state.counts["llm_calls"] > 1


def test_never_is_rescoring_of_the_final_beam() -> None:
    log_probs = random_log_probs(7, (2, 12, 5))
    plain = CtcSearch(ALPHABET, CtcOptions(beam_size=10))
    beams = searched(plain, log_probs, 10)
    late = searched(DelayedCtcSearch(plain, LM, fusion.delayed(WEIGHT, interval=None)), log_probs, 10)
    for one, two in zip(beams, late, strict=True):
        wanted = {h.text: h.total + WEIGHT * from_scratch(h.text) for h in one.hypotheses}
        assert {h.text: h.total for h in two.hypotheses} == pytest.approx(wanted, abs=1e-3)


def test_one_prefix_leaves_nothing_to_choose() -> None:
    log_probs = random_log_probs(9, (3, 12, 5))
    plain = CtcSearch(ALPHABET, CtcOptions(beam_size=1))
    late = DelayedCtcSearch(plain, LM, fusion.delayed(WEIGHT, "interval", 2))
    assert [r.best.text for r in searched(late, log_probs)] == [r.best.text for r in searched(plain, log_probs)]


@pytest.mark.parametrize("trigger", ["shortest", "interval", "hybrid"])
def test_chunks_of_any_sizes_and_a_look_at_the_end_change_nothing(trigger: Any) -> None:
    log_probs = random_log_probs(3, (2, 15, 5))
    search = DelayedCtcSearch(CtcSearch(ALPHABET, CtcOptions(beam_size=6)), LM, fusion.delayed(WEIGHT, trigger, 4))
    whole = searched(search, log_probs, 6)
    state = search.begin(2)
    for start, stop in itertools.pairwise([0, 1, 6, 7, 13, 15]):
        search.step(state, log_probs[:, start:stop])
        search.end(state, 2)
    for one, other in zip(whole, search.end(state, 6), strict=True):
        assert_same(one, other, 1e-4)


@pytest.mark.parametrize("trigger", ["shortest", "interval", "hybrid"])
@pytest.mark.parametrize("score_span", ["all", "common"])
def test_results_do_not_depend_on_the_batch(trigger: Any, score_span: Any) -> None:
    log_probs, lengths = random_log_probs(6, (6, 16, 5)), [16, 3, 11, 0, 16, 7]
    decoder = CTCDecoder(ALPHABET.labels, 0, 1, threads=1, llm=LM)
    names = {"rule": fusion.delayed(WEIGHT, trigger, 4, score_span), "beam_size": 6, "n_best": 6}
    together = decoder.decode(log_probs, lengths, **names)
    for place, count in enumerate(lengths):
        if count == 0:
            assert together[place].error is not None
            continue
        (alone,) = decoder.decode(log_probs[place, :count], **names)
        assert [h.text for h in alone.n_best] == [h.text for h in together[place].n_best]
        totals = [h.total for h in together[place].n_best]
        assert [h.total for h in alone.n_best] == pytest.approx(totals, abs=1e-4)
    assert len({h.text for result in together if not result.error for h in result.n_best}) > 15


@pytest.mark.parametrize("delimiter", [None, 5])
def test_scripts_without_spaces_are_scored_by_characters(search_class: type, delimiter: int | None) -> None:
    """No space is said, and still the language model has its say before the end, on text alone or beside letters."""
    alphabet = CtcAlphabet(("", "你", "好", "世", "界", " "), delimiter=delimiter)
    inner = search_class(alphabet, CtcOptions(beam_size=8))
    search = DelayedCtcSearch(inner, LM, fusion.delayed(WEIGHT, "interval", 3, tail="free"))
    log_probs = random_log_probs(4, (2, 12, 6))
    log_probs[:, :, 5] = -30.0
    state = search.begin(2)
    search.step(state, log_probs, [12, 9])
    for own in inner.live(state.inner):
        for prefix in own:  # every character is complete as soon as it is said
            wanted = float(score_texts(LM, [prefix.text], include_end=False)[0].sum()) if prefix.text else 0.0
            assert " " not in prefix.text
            assert prefix.extra == pytest.approx(WEIGHT * wanted, abs=1e-3)
    before = state.counts["llm_calls"]
    assert before > 2
    for result in search.end(state, 8):
        for h in result.hypotheses:
            assert h.parts["llm"] == pytest.approx(from_scratch(h.text), abs=1e-3)
            assert h.total == pytest.approx(h.parts["asr"] + WEIGHT * h.parts["llm"], abs=1e-3)


def test_no_slot_leaks_and_a_failed_utterance_fails_alone() -> None:
    log_probs = random_log_probs(3, (2, 15, 5))
    log_probs[1, 4, 0] = math.nan
    search = DelayedCtcSearch(CtcSearch(ALPHABET, CtcOptions(beam_size=6)), LM, fusion.delayed(WEIGHT, "interval", 4))
    state = search.begin(2)
    search.step(state, log_probs)
    good, bad = search.end(state)
    assert good.best.text == searched(search, log_probs[:1])[0].best.text
    assert bad.error is not None
    trees = state.texts.trees
    for place, nodes in state.held.items():
        for node in nodes:
            trees.drop(place, node)
    assert trees.num_used == 2  # the begin tokens


def test_other_rules_are_refused() -> None:
    plain = CtcSearch(ALPHABET, CtcOptions(beam_size=6))
    for rule in (fusion.static(0.3), fusion.delayed(0.3, unit="tokens")):
        with pytest.raises(InvalidArgumentError, match=r"fusion\.delayed\(weight\)"):
            DelayedCtcSearch(plain, LM, rule)


def test_the_front_takes_a_rule_and_tells_the_calls() -> None:
    log_probs = random_log_probs(4, (2, 14, 5))
    decoder = CTCDecoder(ALPHABET.labels, 0, 1, frame_seconds=0.02, llm=LM)
    rule = fusion.delayed(WEIGHT, interval=4)
    first, _ = decoder.decode(log_probs, beam_size=8, n_best=3, rule=rule)
    search = DelayedCtcSearch(CtcSearch(ALPHABET, CtcOptions(beam_size=8)), LM, rule)
    assert first.text == searched(search, log_probs)[0].best.text
    for h in first.n_best:
        assert h.parts["llm"] == pytest.approx(from_scratch(h.text), abs=1e-3)
    assert first.rule == rule
    assert first.timing is not None
    assert first.timing.counts["llm_calls"] > 0
    with pytest.raises(InvalidArgumentError, match=r"llm=\.\.\."):
        CTCDecoder(ALPHABET.labels, 0, 1).decode(log_probs, rule=rule)


class BreakingLM(CausalLMScorer):
    """Says NaN of the second of three utterances from its second pass on."""

    passes = 0

    def _hidden(self, cache: Any, token_ids: Any, positions: Any, plan: Any) -> Any:
        hidden = super()._hidden(cache, token_ids, positions, plan).clone()
        self.passes += 1
        if self.passes > 1 and len(hidden) == 3:
            hidden[1] = math.nan
        return hidden


@pytest.mark.parametrize("interval", [3, None])
def test_nan_of_the_language_model_flags_its_utterance_alone(interval: int | None) -> None:
    log_probs = random_log_probs(3, (3, 12, 5))
    rule = fusion.delayed(WEIGHT, interval=interval)
    broken = BreakingLM(LM.model, LM.vocabulary, LM.tokenizer)
    broken.passes = 1 if interval is None else 0
    names = (ALPHABET.labels, 0, 1)
    found, wanted = (
        CTCDecoder(*names, threads=1, llm=llm).decode(log_probs, rule=rule, beam_size=5, n_best=3)
        for llm in (broken, LM)
    )
    assert [result.flags for result in found] == [(), ("nan",), ()]
    assert all(math.isfinite(hypothesis.total) for hypothesis in found[1].n_best)
    for place in (0, 2):
        assert [h.text for h in found[place].n_best] == [h.text for h in wanted[place].n_best]
