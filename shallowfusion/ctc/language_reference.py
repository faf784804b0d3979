"""What words and labels are worth to the twin of the CTC search, one prefix at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shallowfusion.ctc.hotwords import phrase_patterns
from shallowfusion.ctc.search import known_words, label_words, word_prefixes
from shallowfusion.ctc.settings import CtcAlphabet, CtcLanguage, CtcOptions
from shallowfusion.phrases.automaton import PhraseAutomatonProtocol
from shallowfusion.phrases.automaton_reference import ReferencePhraseAutomaton

__all__ = ["Language", "Prefix"]

USUAL_WORD = 6  # characters; longer unknown words cost more


@dataclass(frozen=True)
class Prefix:
    """A text in the making: its labels, its closed words, the word being spelled, and what is said of them."""

    labels: tuple[int, ...] = ()
    words: tuple[str, ...] = ()
    word: str = ""
    fused: float = 0.0
    lm: float = 0.0
    lm_state: int = 0
    closes: bool = False  # its last label was the end of a word by itself
    extra: float = 0.0  # given by the caller, or to the prefix it comes from
    phrase: int = 0  # state of the hotwords' automaton

    @property
    def last(self) -> int:
        return self.labels[-1] if self.labels else -1

    @property
    def text(self) -> str:
        return " ".join((*self.words, self.word) if self.word else self.words)


class Language:
    """What words and labels are worth."""

    def __init__(self, alphabet: CtcAlphabet, options: CtcOptions, language: CtcLanguage | None) -> None:
        self.alphabet, self.options, self.language = alphabet, options, language
        self.label_words = label_words(alphabet, language)
        self.by_words = language is not None and language.unit == "words"
        self.words: dict[str, tuple[int, int]] = {}
        if language is not None and self.by_words:
            self.words = {word: (number, known) for word, number, known in known_words(language)}
        patterns = phrase_patterns(alphabet, options)
        self.phrases = None if patterns is None else ReferencePhraseAutomaton(patterns)
        self.start_phrase = 0 if self.phrases is None else self.phrases.start_state
        self._gains: dict[tuple[int, int], tuple[float, int]] = {}
        self.prefixes: list[tuple[set[str], float]] = []
        for bit, nats in enumerate(word_prefixes(language) if language is not None and self.by_words else ()):
            own = [word for word, (_, known) in self.words.items() if known >> bit & 1]
            self.prefixes.append(({word[:n] for word in own for n in range(len(word) + 1)}, nats))

    def extended(self, prefix: Prefix, label: int) -> Prefix:
        piece = self.alphabet.pieces[label]
        if piece.begins_word or prefix.closes:
            prefix = self.closed(prefix)
        if self.phrases is not None and piece.text:
            between = " " if prefix.words and not prefix.word else ""
            for byte in (between + piece.text).encode():
                gain, state = self._said(self.phrases, prefix.phrase, byte)
                prefix = replace(prefix, fused=prefix.fused + gain, phrase=state)
        prefix = replace(
            prefix,
            labels=(*prefix.labels, label),
            word=prefix.word + piece.text,
            closes=piece.ends_word,
            fused=prefix.fused + self.options.length_bonus,
        )
        if self.language is not None and self.language.unit == "labels":
            return self.scored(prefix, self.label_words[label])
        return prefix

    def _said(self, phrases: PhraseAutomatonProtocol, state: int, byte: int) -> tuple[float, int]:
        """What a byte gains for good, without the loans, and the state after it."""
        if (state, byte) not in self._gains:
            _, bytes_listed, values = phrases.step([state])
            listed = dict(zip(bytes_listed.tolist(), values.tolist(), strict=True))
            after = int(phrases.advance([state], [byte])[0])
            bonus = float(phrases.refunds([state])[0]) + listed.get(byte, 0.0)
            held, still_held = phrases.held([state, after]).tolist()
            self._gains[state, byte] = bonus + held - still_held, after
        return self._gains[state, byte]

    def closed(self, prefix: Prefix, even_empty: bool = False) -> Prefix:
        if not prefix.word and not even_empty:
            return prefix
        if self.language is not None and self.by_words:
            number, known = self.words.get(prefix.word, (self.language.table.model.unknown_word, False))
            prefix = self.scored(prefix, number)
            if not known:
                unknown = self.options.lm_weight * self.language.unknown_word
                prefix = replace(prefix, fused=prefix.fused + unknown)
        bonus = self.options.word_bonus
        if prefix.word in self.options.hotword_list:
            bonus += self.options.hotword_weight
        words = (*prefix.words, prefix.word) if prefix.word else prefix.words
        return replace(prefix, words=words, word="", fused=prefix.fused + bonus)

    def scored(self, prefix: Prefix, word: int) -> Prefix:
        assert self.language is not None
        log_probs, states = self.language.table.score([prefix.lm_state], [word])
        log_prob = float(log_probs[0])
        fused = prefix.fused + self.options.lm_weight * log_prob
        return replace(prefix, lm=prefix.lm + log_prob, fused=fused, lm_state=int(states[0]))

    def spelling(self, prefix: Prefix) -> float:
        """What only ranks: the word being spelled, and the phrase."""
        word = prefix.word
        held = 0.0 if self.phrases is None else float(self.phrases.held([prefix.phrase])[0])
        if not word:
            return held
        lengths = [len(hotword) for hotword in self.options.hotword_list if hotword.startswith(word)]
        if lengths:
            return held + self.options.hotword_weight * len(word) / min(lengths)
        unknown = sum(nats for beginnings, nats in self.prefixes if word not in beginnings)
        return held + unknown * max(len(word), USUAL_WORD) / USUAL_WORD

    def ended(self, prefix: Prefix) -> tuple[Prefix, int]:
        """The prefix after the end, and the state before it."""
        language = self.language
        if self.alphabet.has_words:
            prefix = self.closed(
                prefix, even_empty=self.by_words and language is not None and language.score_empty_word
            )
        if self.phrases is not None:
            closing = float(self.phrases.refunds([prefix.phrase])[0] + self.phrases.held([prefix.phrase])[0])
            prefix = replace(prefix, fused=prefix.fused + closing)
        state = prefix.lm_state
        if language is not None and language.score_boundary:
            prefix = self.scored(prefix, language.table.model.end_word)
        return prefix, state
