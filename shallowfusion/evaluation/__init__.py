"""How good a transcript is."""

from shallowfusion.evaluation.word_errors import WordErrors, character_errors, marked_words, word_errors

__all__ = ["WordErrors", "character_errors", "marked_words", "word_errors"]
