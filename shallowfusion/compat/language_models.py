"""The language models of pyctcdecode's interface: one n-gram model with its weights, or the mean of several."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from shallowfusion.compat.decoder_folder import read_model_folder, write_model_folder
from shallowfusion.config import require
from shallowfusion.ctc.settings import MAX_WORD_SETS, CtcLanguage
from shallowfusion.errors import InvalidArgumentError, ModelError
from shallowfusion.ngrams.arpa import is_arpa
from shallowfusion.ngrams.asked import KenlmTable, MeanTable, Share, is_kenlm_binary
from shallowfusion.ngrams.model import LOG_10
from shallowfusion.ngrams.table import NgramTable

__all__ = ["LanguageModel", "MultiLanguageModel"]

logger = logging.getLogger(__name__)


class LanguageModel:
    """An n-gram model with its weights.

    Args:
        kenlm_model: path of an ARPA file or a KenLM binary, a `kenlm.Model`, or a table.
        unigrams: the known words, None = those of the model.
        alpha: weight of its log-probs.
        beta: added for each word.
        unk_score_offset: of unknown words: added to their base-10 log-prob, and in nats while one is being spelled.
        score_boundary: whether <s> and </s> are scored.

    Raises:
        ModelError: the file cannot be read.
    """

    def __init__(
        self,
        kenlm_model: Any,
        unigrams: Collection[str] | None = None,
        alpha: float = 0.5,
        beta: float = 1.5,
        unk_score_offset: float = -10.0,
        score_boundary: bool = True,
    ) -> None:
        self.table = _table_of(kenlm_model)
        self.unigrams = None if unigrams is None else frozenset(unigrams)
        self.alpha = alpha
        self.beta = beta
        self.unk_score_offset = unk_score_offset
        self.score_boundary = score_boundary

    @property
    def order(self) -> int:
        return self.table.order if isinstance(self.table, KenlmTable) else self.table.model.order

    def get_start_state(self) -> int:
        return self.table.start_state if self.score_boundary else self.table.null_state

    def reset_params(self, **params: float | bool) -> None:
        """Change alpha, beta, unk_score_offset or score_boundary."""
        for name, value in params.items():
            require(
                name in ("alpha", "beta", "unk_score_offset", "score_boundary"),
                f"unknown parameter {name!r}; known are alpha, beta, unk_score_offset and score_boundary.",
            )
            setattr(self, name, value)

    def save_to_dir(self, filepath: str | Path, unigram_encoding: str | None = None) -> None:
        """Write the model and its weights into a folder, for `load_from_dir` here or in pyctcdecode.

        Raises:
            ModelError: it cannot be written.
        """
        names = ("alpha", "beta", "unk_score_offset", "score_boundary")
        attributes = {name: getattr(self, name) for name in names}
        model = self.table.path if isinstance(self.table, KenlmTable) else self.table.model
        known = self.known_words if self.unigrams is None else self.unigrams
        write_model_folder(filepath, model, known, attributes, unigram_encoding)

    @classmethod
    def load_from_dir(cls, filepath: str | Path, unigram_encoding: str | None = None) -> LanguageModel:
        """Read what `save_to_dir` wrote, here or in pyctcdecode.

        Raises:
            ModelError: a file is missing or wrong, or it holds a KenLM binary and kenlm is not installed.
        """
        stored = read_model_folder(filepath, unigram_encoding)
        return cls(stored.path, stored.unigrams, **stored.attributes)

    @property
    def known_words(self) -> frozenset[str]:
        model = self.table.model
        special = {model.begin_word, model.end_word, model.unknown_word}
        words = (word for number, word in enumerate(model.words) if number not in special)
        return frozenset(word for word in words if self.unigrams is None or word in self.unigrams)

    def to_ctc(self) -> CtcLanguage:
        """The model as the search sees it."""
        return CtcLanguage(
            self.table,
            words=self.unigrams,
            unknown_word=self.unk_score_offset * LOG_10,
            unknown_prefix=self.unk_score_offset,
            score_boundary=self.score_boundary,
            score_empty_word=True,
        )


class MultiLanguageModel:
    """The mean of several models' scores, each with its own weights, known words and boundaries.

    As in pyctcdecode, `reset_params` changes nothing here: set them in the models. It is asked through Python, a word
    and history at a time, and cannot be saved.

    Raises:
        InvalidArgumentError: fewer than two models, or more than 32.
    """

    alpha = 1.0  # the models' own weights are in the mean

    def __init__(self, language_models: Sequence[LanguageModel]) -> None:
        require(
            2 <= len(language_models) <= MAX_WORD_SETS,
            f"a MultiLanguageModel holds 2 to {MAX_WORD_SETS} models, got {len(language_models)}.",
        )
        self.language_models = tuple(language_models)

    @property
    def order(self) -> int:
        return max(model.order for model in self.language_models)

    @property
    def beta(self) -> float:
        return sum(model.beta for model in self.language_models) / len(self.language_models)

    def reset_params(self, **params: float | bool) -> None:
        """Nothing, as in pyctcdecode; a warning is logged."""
        if params:
            logger.warning("%s of a MultiLanguageModel stay as they are; set them in its models.", ", ".join(params))

    def save_to_dir(self, filepath: str | Path, unigram_encoding: str | None = None) -> None:
        """Raises InvalidArgumentError, always."""
        raise InvalidArgumentError("a MultiLanguageModel cannot be saved; save its models with save_to_dir of each.")

    def to_ctc(self) -> CtcLanguage:
        """The models as the search sees them."""
        models = self.language_models
        shares = [
            Share(own.table, own.alpha, own.unigrams, own.unk_score_offset * LOG_10, own.score_boundary)
            for own in models
        ]
        return CtcLanguage(
            MeanTable(shares),
            unknown_word=0.0,
            score_empty_word=True,
            prefixes=tuple((own.known_words, own.unk_score_offset / len(models)) for own in models),
        )


def _table_of(given: Any) -> NgramTable | KenlmTable:
    """A table, that of an ARPA file or KenLM binary, or that of the file of a `kenlm.Model`."""
    if isinstance(given, (NgramTable, KenlmTable)):
        return given
    path: Any = given if isinstance(given, (str, Path)) else getattr(given, "path", None)
    require(path is not None, f"kenlm_model must be a path, a kenlm.Model or a table, got {type(given).__name__}.")
    path = path.decode() if isinstance(path, bytes) else path
    if is_arpa(path):
        return NgramTable.from_arpa(path)
    if not is_kenlm_binary(path):
        raise ModelError(f"{path} is no ARPA file (.arpa or .arpa.gz) and no KenLM binary; give one of them.")
    return KenlmTable(path)
