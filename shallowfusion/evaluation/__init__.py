"""How good a transcript is."""

from shallowfusion.evaluation.word_errors import WordErrors, marked_words, word_errors

__all__ = ["WordErrors", "marked_words", "word_errors"]
