"""The CTC search under random arguments and spoiled batches: it works or raises, and one utterance harms no other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion import _native
from shallowfusion.ctc.device_search import DeviceCtcSearch
from shallowfusion.ctc.search import CtcSearch
from shallowfusion.ctc.search_reference import ReferenceCtcSearch
from shallowfusion.ctc.settings import CtcAlphabet, CtcOptions
from shallowfusion.errors import AcousticScoresError, ShallowFusionError
from tests.ctc.conftest import assert_same, random_log_probs, searched

WORDS = CtcAlphabet(("_", " ", *"abcd"), delimiter=1)

VALUES = st.one_of(st.integers(-3, 5), st.floats(), st.none(), st.text(max_size=2), st.integers(-(2**80), 2**80))
ARRAYS = st.sampled_from(
    [np.zeros((2, 3, 6), np.float32) - 2, np.zeros((0, 0, 6), np.float16), np.zeros((2, 3, 6)), np.zeros(6, np.float32),
     np.broadcast_to(np.float32(-2), (2, 3, 6)), np.zeros((2, 3, 0), np.float32), "text", None]
)  # fmt: skip


def drawn_automaton(draw: Any) -> Any:
    """An automaton over any bytes and boundaries, with classes of any bytes."""
    lengths = draw(st.lists(st.integers(0, 4), max_size=3))
    tokens = [draw(st.sampled_from([0, 32, 97, 98, 255, 2**31 - 1, -1])) for _ in range(sum(lengths))]
    return _native.PhraseAutomaton(
        tokens=np.array(tokens, np.int32),
        credits=np.array([draw(st.floats(-1e300, 1e300)) for _ in tokens]),
        offsets=np.cumsum([0, *lengths]),
        phrases=np.arange(len(lengths)),
        classes=np.array(draw(st.lists(st.integers(0, 255), max_size=100)), np.uint8),
    )


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_binding_never_crashes(data: st.DataObject) -> None:
    """Whatever is given, the binding works or raises; nothing else."""
    draw = data.draw
    label = st.tuples(st.text(max_size=2), st.booleans(), st.booleans(), st.integers(-1, 3))
    try:
        rules = _native.CtcRules(blank=draw(VALUES), delimiter=draw(VALUES), beam_size=draw(VALUES))
        rules.top_labels = draw(st.integers(-2, 9))
        rules.history_words = draw(st.integers(-2, 9))
        rules.beam_margin = draw(st.floats())
        rules.token_min_log_prob = draw(st.floats())
        rules.blank_skip_log_prob = draw(st.floats())
        rules.rank_paths, rules.merge_texts = draw(st.booleans()), draw(st.booleans())
        language = _native.CtcLanguage()
        language.word_bonus = draw(st.floats())
        language.weight = draw(st.floats())
        words = st.tuples(st.text(max_size=2), st.integers(-1, 3), st.booleans())
        language.set_hotwords(words=_native.CtcLexicon(words=draw(st.lists(words, max_size=3))))
        if draw(st.booleans()):
            language.set_phrases(phrases=drawn_automaton(draw))
        labels = [*draw(st.lists(label, min_size=4, max_size=6)), ("", True, False, 0)]
        search = _native.CtcSearch(labels=labels, rules=rules, language=language)
        state = search.begin(start_states=draw(st.lists(st.integers(-1, 1), max_size=2)))
        array = draw(ARRAYS)
        counts = np.array(draw(st.lists(st.integers(-1, 4), max_size=3)), np.int64)
        state.step(log_probs=array, counts=counts, threads=draw(st.integers(-1, 3)))
        state.results(n_best=draw(st.integers(-1, 4)), ended=draw(st.booleans()), threads=1)
    except (ShallowFusionError, TypeError, ValueError, UnicodeEncodeError):
        pass


SPOILS = {
    "nan": lambda own, frame, label: own.__setitem__((frame, label), math.nan),
    "infinite": lambda own, frame, label: own.__setitem__((frame, label), math.inf),
    "impossible": lambda own, frame, label: own.__setitem__(frame, -math.inf),
    "probabilities": lambda own, frame, label: np.exp(own, out=own),
    "positive": lambda own, frame, label: own.__setitem__((frame, label), 3.0),
    "nothing": lambda own, frame, label: None,
}


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([CtcSearch, ReferenceCtcSearch, DeviceCtcSearch]),
    st.lists(
        st.tuples(st.sampled_from(sorted(SPOILS)), st.integers(0, 6), st.integers(0, 5), st.integers(0, 7)),
        min_size=1, max_size=5,
    ),
    st.integers(0, 1000),
    st.sampled_from([{}, {"blank_skip": 0.3}, {"beam_size": 1, "top_labels": 1}, {"merge": "max", "beam_margin": 2.0}]),
)  # fmt: skip
def test_whatever_is_wrong_with_some_utterances_the_others_are_unharmed(
    kind: type, utterances: list[tuple[str, int, int, int]], seed: int, chosen: dict[str, Any]
) -> None:
    search = kind(WORDS, CtcOptions(**{"beam_size": 4, **chosen}))
    log_probs = random_log_probs(seed, (len(utterances), 7, 6))
    for own, (spoil, frame, label, _) in zip(log_probs, utterances, strict=True):
        SPOILS[spoil](own, frame, label)
    lengths = [length for *_, length in utterances]
    together = searched(search, log_probs, 3, lengths)
    for own, length, (spoil, frame, _, _), result in zip(log_probs, lengths, utterances, together, strict=True):
        (alone,) = searched(search, own[None, :length], 3)
        assert_same(alone, result, 1e-9)
        is_bad = length == 0 or (spoil == "probabilities") or (spoil != "nothing" and frame < length)
        assert (result.error is not None) >= is_bad
        if result.error is not None:
            assert isinstance(result.error, AcousticScoresError)
            assert result.hypotheses == ()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_binding_never_crashes_with_a_table(data: st.DataObject) -> None:
    """Any numbers for words, states and weights of a language model."""
    draw = data.draw
    number = st.floats(-1e3, 0.0, width=32)
    count = draw(st.integers(1, 4))
    orders = [(np.arange(count, dtype=np.int32)[:, None], *(np.array(
        [draw(number) for _ in range(count)], np.float32) for _ in range(2)))]  # fmt: skip
    special = [draw(st.integers(-1, 4)) for _ in range(3)]
    try:
        table = _native.NgramTable(
            num_words=count, orders=orders, begin_word=special[0], end_word=special[1], unknown_word=special[2]
        )
        arrays = table.arrays()
        assert [len(array) for array in arrays] == [count + 1, count + 2, *[count + 1] * 4]
        language = _native.CtcLanguage()
        for name in ("weight", "word_bonus", "label_bonus", "unknown_word"):
            setattr(language, name, draw(st.floats()))
        language.unknown_prefixes = draw(st.lists(st.floats(), max_size=33))
        language.score_end, language.score_empty_word = draw(st.booleans()), draw(st.booleans())
        words = st.tuples(st.text(max_size=2), st.integers(-1, 5), st.integers(-1, 2**32))
        lexicon = _native.CtcLexicon(words=draw(st.lists(words, max_size=3))) if draw(st.booleans()) else None
        if draw(st.booleans()):
            answer = draw(st.tuples(st.floats(), st.integers(-1, 2**32)))
            table = _native.AskedTable(
                score=lambda *_: answer, end=lambda _: answer[0], num_words=count, unknown_word=draw(st.integers(0, 4))
            )
        language.set_table(table=table, lexicon=lexicon)
        rules = _native.CtcRules(blank=0, delimiter=draw(st.integers(-1, 3)), beam_size=draw(st.integers(1, 9)))
        rules.last_times, rules.merge_texts = draw(st.booleans()), draw(st.booleans())
        label = st.tuples(st.text(max_size=2), st.booleans(), st.booleans(), st.integers(-1, 5))
        search = _native.CtcSearch(labels=[draw(label) for _ in range(6)], rules=rules, language=language)
        state = search.begin(start_states=[draw(st.integers(-1, 9)), 0])
        scores = np.array(draw(st.lists(st.floats(width=32), min_size=36, max_size=36)), np.float32)
        state.step(log_probs=scores.reshape(2, 3, 6), counts=np.array([3, 2]), threads=2)
        state.results(n_best=3, ended=draw(st.booleans()), threads=1)
    except (ShallowFusionError, TypeError, ValueError, UnicodeEncodeError):
        pass
