"""CTC prefix beam search over a batch of utterances, offline or chunk by chunk, with n-gram models inside."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from typing import Any, Protocol

from shallowfusion import _native
from shallowfusion.checks import LARGEST_INTEGER, integer
from shallowfusion.config import require
from shallowfusion.ctc.hotwords import phrase_patterns
from shallowfusion.ctc.results import (
    CtcHypothesis,
    CtcLive,
    CtcResult,
    extras_of,
    frames_of,
    results_of,
    start_states_of,
)
from shallowfusion.ctc.settings import CtcAlphabet, CtcLanguage, CtcOptions
from shallowfusion.errors import VocabularyError
from shallowfusion.phrases.automaton import PhraseAutomaton

__all__ = ["CtcSearch", "CtcSearchProtocol", "CtcState"]

MAX_UTTERANCES = 1_000_000


class CtcState(Protocol):
    """A batch in progress; made by `begin`, of no use to another search."""

    @property
    def num_frames(self) -> list[int]:
        """Frames each utterance has seen."""
        ...


class CtcSearchProtocol(Protocol):
    """Finds the texts that score best under a CTC model, language models and bonuses.

    For a prefix l of labels, frame by frame, with p_b and p_n the probability of all its alignments that end in blank
    and in the last label (METHODS 1.8):

        p_b'(l)   = P_t(blank) * (p_b(l) + p_n(l))
        p_n'(l)   = P_t(last(l)) * p_n(l)
        p_n'(l+c) = P_t(c) * (p_b(l) if c == last(l) else p_b(l) + p_n(l))
        total(l)  = log(p_b(l) + p_n(l)) + lm_weight * lm(l) + word_bonus * words(l) + length_bonus * labels(l)
                    + lm_weight * unknown_word * unknown(l) + hotwords(l)

    hotwords(l) is the weights of the phrases that l holds, each place counted; a phrase at the end of l, whose word may
    go on, counts once the next word begins, or at the end. The match in progress ranks prefixes as
    `PhraseAutomatonProtocol` lends it, and is in no total.

    With merge="max" sums become maxima. After each frame the `beam_size` best stay. A delimiter after a delimiter, or
    before the first word, adds nothing to a prefix. Where different labels may spell the same text
    (`CtcAlphabet.is_ambiguous`) and no label is scored by itself, paths of equal text and equal ending are one after
    each frame; in an alphabet with words, equal texts are always one at the end.

    A word-level language model speaks when a word is closed, by a delimiter, by a label that begins a word, or by the
    end. Labels and prefixes are pruned as `CtcOptions` says; ties go to the better parent, then to the lower label.

    An utterance whose scores are not log-probabilities fails by itself: its result has an error, the others go on.

    Price per frame and utterance: O(beam_size * log(beam_size) + labels) and one language look-up per new word. Memory:
    about 200 bytes per prefix of the beam and 100 per prefix it descends from.
    """

    alphabet: CtcAlphabet
    options: CtcOptions
    language: CtcLanguage | None

    def begin(self, num_utterances: int, start_states: Sequence[int] | None = None) -> Any:
        """Start a batch.

        Args:
            start_states: of the language model, one per utterance; None = as `CtcLanguage.score_boundary` says.

        Raises:
            InvalidArgumentError: a number out of range.
        """
        ...

    def step(self, state: Any, log_probs: object, lengths: object = None) -> None:
        """Go on by a chunk; chunks of any sizes give what one call gives.

        Args:
            log_probs: float32 or float16 [utterances, frames, labels], array or tensor of any strides, nats.
            lengths: frames of each utterance in this chunk, None = all.

        Raises:
            InvalidArgumentError: not such an array. Nothing is changed then.
        """
        ...

    def live(self, state: Any) -> list[list[CtcLive]]:
        """The prefixes in the beam of every utterance, best of the last step first; none of one that failed."""
        ...

    def set_extras(self, state: Any, extras: Sequence[Sequence[float]]) -> None:
        """Give every live prefix a score of the caller's own, for instance of a language model that is asked late.

        It is part of the totals from now on, in place of what was given before, and prefixes inherit it. The order of
        the beam is found again at the next frame, or at the end.

        Args:
            extras: nats, finite, for each utterance in the order of `live`.

        Raises:
            InvalidArgumentError: not one finite number per live prefix. Nothing is changed then.
        """
        ...

    def results(self, state: Any, n_best: int = 1) -> list[CtcResult]:
        """What the batch looks like so far: the last word is not closed, the end not scored."""
        ...

    def end(self, state: Any, n_best: int = 1) -> list[CtcResult]:
        """The final hypotheses, up to `n_best` per utterance; the state may still go on afterwards."""
        ...


class CtcSearch:
    """The C++ search; see `CtcSearchProtocol`. Immutable, so threads may share it; a state serves one call at a time.

    Args:
        alphabet: the labels of the scores.
        options: see `CtcOptions`.
        language: an n-gram model, None = none.
        threads: utterances searched at a time, None = all cores.

    Raises:
        InvalidArgumentError: an option that needs words in an alphabet without.
        VocabularyError: a label that a label-level model does not know.
    """

    def __init__(
        self,
        alphabet: CtcAlphabet,
        options: CtcOptions | None = None,
        language: CtcLanguage | None = None,
        threads: int | None = None,
    ) -> None:
        self._set(alphabet, options or CtcOptions(), language, threads, _lexicon(language))

    def with_settings(self, options: CtcOptions, language: CtcLanguage | None = None) -> CtcSearch:
        """A search with other options, and other settings of the same language model, that shares its words."""
        language = self.language if language is None else language
        own = self.language
        require(
            (own is None) == (language is None)
            and (own is None or language is None or (own.table is language.table and own.words is language.words))
            and (own is None or language is None or own.prefixes is language.prefixes),
            "with_settings keeps the language model and its words; make a new CtcSearch for others.",
        )
        other = object.__new__(CtcSearch)
        other._set(self.alphabet, options, language, self._threads, self._lexicon)
        return other

    def _set(
        self,
        alphabet: CtcAlphabet,
        options: CtcOptions,
        language: CtcLanguage | None,
        threads: int | None,
        lexicon: _native.CtcLexicon | None,
    ) -> None:
        self.alphabet, self.options, self.language, self._lexicon = alphabet, options, language, lexicon
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._threads = available if threads is None else integer("threads", threads, 1, 1024)
        check_settings(alphabet, options, language)
        words = label_words(alphabet, language)
        patterns = phrase_patterns(alphabet, options)
        self.phrases = None if patterns is None else PhraseAutomaton(patterns)
        labels = [(*piece, word) for piece, word in zip(alphabet.pieces, words, strict=True)]
        self._native = _native.CtcSearch(
            labels=labels,
            rules=_rules(alphabet, options, language),
            language=_language(options, language, lexicon, self.phrases),
        )

    def begin(self, num_utterances: int, start_states: Sequence[int] | None = None) -> Any:
        count = integer("num_utterances", num_utterances, 0, MAX_UTTERANCES)
        default = 0 if self.language is None else self.language.start_state
        return self._native.begin(start_states=start_states_of(start_states, count, default))

    def step(self, state: Any, log_probs: object, lengths: object = None) -> None:
        frames = frames_of(log_probs, lengths, len(state.num_frames), len(self.alphabet.labels))
        state.step(log_probs=frames.log_probs, counts=frames.counts, threads=self._threads)

    def live(self, state: Any) -> list[list[CtcLive]]:
        return [[CtcLive(*prefix) for prefix in own] for own in state.live()]

    def set_extras(self, state: Any, extras: Sequence[Sequence[float]]) -> None:
        state.set_extras(extras=extras_of(extras))

    def results(self, state: Any, n_best: int = 1) -> list[CtcResult]:
        return self._results(state, n_best, ended=False)

    def end(self, state: Any, n_best: int = 1) -> list[CtcResult]:
        return self._results(state, n_best, ended=True)

    def _results(self, state: Any, n_best: int, ended: bool) -> list[CtcResult]:
        count = integer("n_best", n_best, 1, LARGEST_INTEGER)
        answers = state.results(n_best=count, ended=ended, threads=self._threads)
        has_lm = self.language is not None
        hypotheses = [(error, [_hypothesis(record, has_lm) for record in records]) for error, records in answers]
        return results_of(hypotheses, state.num_frames)


def check_settings(alphabet: CtcAlphabet, options: CtcOptions, language: CtcLanguage | None) -> None:
    """Refuse options that need words where the alphabet has none."""
    cure = "give CtcAlphabet a delimiter or word_start."
    word_level = language is not None and language.unit == "words"
    require(alphabet.has_words or not word_level, f"a word-level language model needs words; {cure}")
    require(alphabet.has_words or not options.hotword_list, f'hotword_form="words" needs words; {cure}')
    require(alphabet.has_words or options.word_bonus == 0, f"word_bonus={options.word_bonus} needs words; {cure}")


def label_words(alphabet: CtcAlphabet, language: CtcLanguage | None) -> list[int]:
    """The word of each label in a label-level table; zeros without one.

    Raises:
        VocabularyError: the table does not know a label.
    """
    if language is None or language.unit == "words":
        return [0] * len(alphabet.labels)
    ids = language.table.model.ids
    words = []
    for number, label in enumerate(alphabet.labels):
        word = language.delimiter_word if number == alphabet.delimiter else label
        if word not in ids and number != alphabet.blank:
            raise VocabularyError(
                f"label {number} ({word!r}) is no word of {language.table.model.name}; train it on the labels."
            )
        words.append(ids.get(word, 0))
    return words


def merges_texts(alphabet: CtcAlphabet, options: CtcOptions, language: CtcLanguage | None) -> bool:
    """Whether equal texts are one during the search."""
    label_level = language is not None and language.unit == "labels"
    return options.merge_texts and alphabet.is_ambiguous and not label_level and options.length_bonus == 0


def known_words(language: CtcLanguage) -> list[tuple[str, int, int]]:
    """Every word of a word-level table: spelling, id, the sets of known words it is in, a bit each."""
    model = language.table.model
    special = {model.begin_word, model.end_word, model.unknown_word}
    entries = [(word, number) for word, number in model.ids.items() if word and number not in special]
    known: dict[str, int] = {}
    for bit, words in enumerate(word_sets(language)):
        for word in (word for word, _ in entries) if words is None else words:
            known[word] = known.get(word, 0) | 1 << bit
    return [(word, number, known.get(word, 0)) for word, number in entries]


def word_sets(language: CtcLanguage) -> list[Collection[str] | None]:
    """The sets of known words; None = all of the table."""
    return [set(words) for words, _ in language.prefixes] or [None if language.words is None else set(language.words)]


def word_prefixes(language: CtcLanguage) -> list[float]:
    """`unknown_prefix` of each set."""
    return [nats for _, nats in language.prefixes] or [language.unknown_prefix]


def _rules(alphabet: CtcAlphabet, options: CtcOptions, language: CtcLanguage | None) -> Any:
    rules = _native.CtcRules(
        blank=alphabet.blank,
        delimiter=-1 if alphabet.delimiter is None else alphabet.delimiter,
        beam_size=options.beam_size,
    )
    rules.use_max = options.merge == "max"
    rules.token_min_log_prob = -math.inf if options.token_min_log_prob is None else options.token_min_log_prob
    rules.top_labels = options.top_labels or 0
    rules.beam_margin = math.inf if options.beam_margin is None else options.beam_margin
    rules.blank_skip_log_prob = math.inf if options.blank_skip is None else math.log(options.blank_skip)
    rules.rank_paths = options.places == "paths"
    rules.history_words = options.history_words
    rules.merge_texts = merges_texts(alphabet, options, language)
    rules.last_times = options.times == "last"
    return rules


def _lexicon(language: CtcLanguage | None) -> _native.CtcLexicon | None:
    if language is None or language.unit == "labels":
        return None
    return _native.CtcLexicon(words=known_words(language))


def _language(
    options: CtcOptions,
    language: CtcLanguage | None,
    lexicon: _native.CtcLexicon | None,
    phrases: PhraseAutomaton | None,
) -> Any:
    native = _native.CtcLanguage()
    native.word_bonus = options.word_bonus
    native.label_bonus = options.length_bonus
    if options.hotword_list:
        native.hotword_weight = options.hotword_weight
        words = _native.CtcLexicon(words=[(word, 0, True) for word in options.hotword_list])
        native.set_hotwords(words=words)
    if phrases is not None:
        native.set_phrases(phrases=phrases.native)
    if language is not None:
        native.weight = options.lm_weight
        native.unknown_word = options.lm_weight * language.unknown_word
        native.unknown_prefixes = word_prefixes(language)
        native.score_end = language.score_boundary
        native.score_empty_word = language.score_empty_word
        native.set_table(table=_table(language), lexicon=lexicon)
    return native


def _table(language: CtcLanguage) -> Any:
    """The C++ table, or one that asks Python."""
    table, model = language.table, language.table.model
    own = getattr(table, "native", None)
    if own is not None:
        return own

    def score(state: int, word: int) -> tuple[float, int]:
        log_probs, states = table.score([state], [word])
        return float(log_probs[0]), int(states[0])

    return _native.AskedTable(
        score=getattr(table, "score_word", score),
        end=lambda state: float(table.end([state])[0]),
        num_words=len(model.words),
        unknown_word=model.unknown_word,
    )


def _hypothesis(record: tuple[Any, ...], has_lm: bool) -> CtcHypothesis:
    text, labels, label_frames, word_frames, total, asr, lm, lm_state, extra = record
    parts = {"asr": asr, "lm": lm} if has_lm else {"asr": asr}
    return CtcHypothesis(text, labels, label_frames, word_frames, total, parts, lm_state, extra)
