"""Phrases that a CTC search is favoured to say, as patterns over the bytes of its text."""

from __future__ import annotations

from shallowfusion.config import require
from shallowfusion.ctc.settings import CtcAlphabet, CtcOptions
from shallowfusion.phrases.patterns import Patterns, patterns, spread, whole_words

__all__ = ["phrase_patterns"]

BYTES = tuple(bytes([byte]) for byte in range(256))


def phrase_patterns(alphabet: CtcAlphabet, options: CtcOptions) -> Patterns | None:
    """The hotwords as patterns of bytes: however labels spell a phrase, it counts; None without such hotwords.

    In an alphabet with words, white space within a phrase is one space, as in the texts of the search.

    Raises:
        InvalidArgumentError: a phrase that no labels spell.
    """
    hotwords = options.weighted_hotwords if options.hotword_form == "phrases" else {}
    if not hotwords:
        return None
    silent = (alphabet.blank, alphabet.delimiter)
    texts = {piece.text for number, piece in enumerate(alphabet.pieces) if number not in silent} - {""}

    def segment(phrase: str) -> list[bytes]:
        words = phrase.split() if alphabet.has_words else [phrase.strip()]
        for word in words:
            require(
                _is_spelled(word, texts),
                f"no labels spell {word!r} of the hotword {phrase!r}; write it in the model's letters (case, accents).",
            )
        return [" ".join(words).encode()]

    found = spread(patterns(hotwords, segment))
    return found if options.hotwords_inside_words else whole_words(found, BYTES)


def _is_spelled(word: str, texts: set[str]) -> bool:
    """Whether texts side by side make the word."""
    longest = max(map(len, texts), default=0)
    ends = [True] + [False] * len(word)
    for end in range(1, len(word) + 1):
        starts = range(max(0, end - longest), end)
        ends[end] = any(ends[start] and word[start:end] in texts for start in starts)
    return ends[-1]
