"""What the n-gram model inside a CTC search says of whole words, to be taken back once another model has spoken."""

from __future__ import annotations

from shallowfusion.config import require
from shallowfusion.ctc.settings import CtcAlphabet, CtcLanguage

__all__ = ["StandIn"]

MOST_REMEMBERED = 65_536  # texts

Words = tuple[str, ...]


class StandIn:
    """The score of the first words of a text as the search counts it, unknown words charged; unweighted, in nats.

    Price: one look-up for each word that no text before had in its place.

    Args:
        alphabet, language: of the search; the language scores words, as CtcLanguage has them by itself.

    Raises:
        InvalidArgumentError: no n-gram model of words, or words that a text does not show.
    """

    def __init__(self, alphabet: CtcAlphabet, language: CtcLanguage | None) -> None:
        cure = 'leave proxy_weight out, or take proxy_form="add".'
        require(
            language is not None and language.unit == "words",
            f"proxy_weight is of the word n-gram model inside the search, and there is none; give lm=..., or {cure}",
        )
        assert language is not None
        require(
            not language.score_empty_word and not any(" " in piece.text for piece in alphabet.pieces),
            "a stand-in is taken back by the words that the text shows, so score_empty_word and labels with a space "
            f"inside do not go with it; {cure}",
        )
        self._language, model = language, language.table.model
        self._special = {model.begin_word, model.end_word, model.unknown_word}
        self._listed = None if language.words is None else frozenset(language.words)
        self._is_late = any(piece.ends_word for piece in alphabet.pieces)
        self._known: dict[tuple[int, Words], tuple[float, int]] = {}

    def closed(self, start: int, text: str, is_open: bool, reach: int) -> float:
        """Of the closed words of a prefix that lie within its first `reach` bytes.

        The search scores a word that its own label ends with the next label; where there are such labels, the last word
        does not count.

        Args:
            start: the model's state before the text.
            is_open: the last word is not closed.
        """
        words = _words(text)
        words = words[: len(words) - (is_open or self._is_late)]
        end = -1
        for count, word in enumerate(words):
            end += 1 + len(word.encode())
            if end > reach:
                return self._after(start, words[:count])[0]
        return self._after(start, words)[0]

    def whole(self, start: int, text: str) -> float:
        """Of a text that ends here, and of the end."""
        total, state = self._after(start, _words(text))
        return total + float(self._language.table.end([state])[0]) if self._language.score_boundary else total

    def _after(self, start: int, words: Words) -> tuple[float, int]:
        """Score of the words, and the state after them."""
        count = len(words)
        while count > 0 and (start, words[:count]) not in self._known:
            count -= 1
        total, state = self._known[start, words[:count]] if count else (0.0, start)
        for place in range(count, len(words)):
            gain, state = self._word(state, words[place])
            total += gain
            if len(self._known) >= MOST_REMEMBERED:
                self._known.clear()
            self._known[start, words[: place + 1]] = total, state
        return total, state

    def _word(self, state: int, word: str) -> tuple[float, int]:
        model = self._language.table.model
        number = model.ids.get(word, model.unknown_word)
        is_known = number not in self._special and (self._listed is None or word in self._listed)
        number = model.unknown_word if number in self._special else number
        log_probs, states = self._language.table.score([state], [number])
        return float(log_probs[0]) + (0.0 if is_known else self._language.unknown_word), int(states[0])


def _words(text: str) -> Words:
    return tuple(text.split(" ")) if text else ()
