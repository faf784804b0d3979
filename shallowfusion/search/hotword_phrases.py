"""Hotwords as the phrase automaton of an acoustic model's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shallowfusion.phrases.automaton import PhraseAutomaton
from shallowfusion.phrases.patterns import patterns, spread, whole_words

__all__ = ["HotwordPhrases"]


class HotwordPhrases:
    """Makes automata, and keeps that of the call before: batches share their options.

    Args:
        tokenizer: of the acoustic model.
        pieces: bytes of each token, None for special ones.
    """

    def __init__(self, tokenizer: Any, pieces: Sequence[bytes | None]) -> None:
        self._tokenizer = tokenizer
        self._pieces = pieces
        self._last: tuple[tuple[dict[str, float], bool], PhraseAutomaton] | None = None

    def automaton(self, hotwords: dict[str, float], inside_words: bool) -> PhraseAutomaton | None:
        """None without hotwords.

        Raises:
            InvalidArgumentError: no tokens spell one of them.
        """
        if not hotwords:
            return None
        known = self._last  # read once: another thread may replace it
        if known is None or known[0] != (hotwords, inside_words):
            found = spread(patterns(hotwords, self._spellings))
            made = PhraseAutomaton(found if inside_words else whole_words(found, self._pieces))
            self._last = known = (hotwords, inside_words), made
        return known[1]

    def _spellings(self, text: str) -> list[list[int]]:
        """A phrase in tokens, with a space in front and without; none that spells another text."""
        wanted, pieces = text.strip(), self._pieces
        found = [self._tokenizer.encode(start + wanted, add_special_tokens=False) for start in (" ", "")]
        return [ids for ids in found if b"".join(pieces[i] or b"" for i in ids).strip() == wanted.encode()]
