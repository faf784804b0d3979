"""pyctcdecode's interface on the CTC search of this library: change one import.

    from shallowfusion.compat.pyctcdecode import build_ctcdecoder

Texts, scores and word times are those of pyctcdecode 0.5, its pruning included. Differences: language models are ARPA
files (plain or .gz), not KenLM binaries, and one at a time (no MultiLanguageModel); every word of the ARPA file is
known, also one without a back-off; a batch runs on threads, so `pool` is not needed; scores that are no numbers are an
error.

In a batch such an error is logged and its utterance has the text "" (there pyctcdecode stops with a ValueError that
loses the batch). Not here: `load_from_hf_hub` (download the repository, then `load_from_dir`), language models of one's
own (`AbstractLanguageModel`, `kenlm.Model` objects, `score` and `score_partial_token`), `verify_alphabet_coverage`, and
what a class-wide store of models needs (`model_container`, `cleanup`). `last_lm_state` is an integer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from shallowfusion.compat.alphabet import Alphabet
from shallowfusion.compat.decoder_folder import (
    read_alphabet,
    read_model_folder,
    write_decoder_folder,
    write_model_folder,
)
from shallowfusion.compat.logits import batch_of
from shallowfusion.config import require
from shallowfusion.ctc.results import CtcHypothesis, CtcResult
from shallowfusion.ctc.search import CtcSearch
from shallowfusion.ctc.settings import CtcLanguage, CtcOptions
from shallowfusion.errors import InvalidArgumentError, ModelError
from shallowfusion.ngrams.arpa import is_arpa
from shallowfusion.ngrams.table import NgramTable

__all__ = [
    "Alphabet", "BeamSearchDecoderCTC", "LanguageModel", "MultiLanguageModel", "OutputBeam", "OutputBeamMPSafe",
    "build_ctcdecoder",
]  # fmt: skip

logger = logging.getLogger(__name__)

LOG_10 = math.log(10.0)
MOST_SEARCHES = 16  # settings whose search is kept

WordFrames = tuple[str, tuple[int, int]]


class OutputBeam(NamedTuple):
    """One hypothesis of `decode_beams`.

    Args:
        text: words with single spaces.
        last_lm_state: of the language model after the last word, for `lm_start_state` of the next piece; None without.
        text_frames: each word with its first frame and the one after its last.
        logit_score: acoustic log-prob.
        lm_score: acoustic and language score and hotwords together.
    """

    text: str
    last_lm_state: int | None
    text_frames: list[WordFrames]
    logit_score: float
    lm_score: float


class OutputBeamMPSafe(NamedTuple):
    """One hypothesis of `decode_beams_batch`: an `OutputBeam` without the state."""

    text: str
    text_frames: list[WordFrames]
    logit_score: float
    lm_score: float


class LanguageModel:
    """An n-gram model with its weights.

    Args:
        kenlm_model: path of an ARPA file, or a table.
        unigrams: the known words, None = those of the model.
        alpha: weight of its log-probs.
        beta: added for each word.
        unk_score_offset: of unknown words: added to their base-10 log-prob, and in nats while one is being spelled.
        score_boundary: whether <s> and </s> are scored.

    Raises:
        ModelError: the file cannot be read as ARPA.
    """

    def __init__(
        self,
        kenlm_model: str | Path | NgramTable,
        unigrams: Collection[str] | None = None,
        alpha: float = 0.5,
        beta: float = 1.5,
        unk_score_offset: float = -10.0,
        score_boundary: bool = True,
    ) -> None:
        self.table = kenlm_model if isinstance(kenlm_model, NgramTable) else _read_table(kenlm_model)
        self.unigrams = None if unigrams is None else frozenset(unigrams)
        self.alpha = alpha
        self.beta = beta
        self.unk_score_offset = unk_score_offset
        self.score_boundary = score_boundary

    @property
    def order(self) -> int:
        return self.table.model.order

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
        write_model_folder(filepath, self.table.model, self.unigrams, attributes, unigram_encoding)

    @classmethod
    def load_from_dir(cls, filepath: str | Path, unigram_encoding: str | None = None) -> LanguageModel:
        """Read what `save_to_dir` wrote, here or in pyctcdecode.

        Raises:
            ModelError: a file is missing or wrong, or the model is a KenLM binary.
        """
        stored = read_model_folder(filepath, unigram_encoding)
        return cls(stored.path, stored.unigrams, **stored.attributes)

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
    """pyctcdecode's mean of several models, which this search does not have.

    Raises:
        InvalidArgumentError: always.
    """

    def __init__(self, language_models: Sequence[LanguageModel]) -> None:
        raise InvalidArgumentError(
            "the search holds one n-gram model, got a MultiLanguageModel; interpolate the models into one ARPA file, "
            "or train one on all the texts (shallowfusion build-ngram)."
        )


class BeamSearchDecoderCTC:
    """Beam search over the frames of a CTC model; see `build_ctcdecoder`.

    Args:
        alphabet: labels of the logits.
        language_model: None = none.
    """

    def __init__(self, alphabet: Alphabet, language_model: LanguageModel | None = None) -> None:
        self._alphabet = alphabet
        self._language_model = language_model
        self._base = CtcSearch(alphabet.to_ctc(), language=None if language_model is None else language_model.to_ctc())
        self._searches: dict[CtcOptions, CtcSearch] = {}

    def reset_params(
        self,
        alpha: float | None = None,
        beta: float | None = None,
        unk_score_offset: float | None = None,
        lm_score_boundary: bool | None = None,
    ) -> None:
        """Change what is given; without a language model nothing."""
        given = {
            "alpha": alpha, "beta": beta, "unk_score_offset": unk_score_offset, "score_boundary": lm_score_boundary
        }  # fmt: skip
        if self._language_model is not None:
            self._language_model.reset_params(**{name: value for name, value in given.items() if value is not None})
            self._searches.clear()

    def decode(
        self,
        logits: Any,
        beam_width: int = 100,
        beam_prune_logp: float = -10.0,
        token_min_logp: float = -5.0,
        hotwords: Iterable[str] | None = None,
        hotword_weight: float = 10.0,
        lm_start_state: int | None = None,
    ) -> str:
        """The best text of logits [frames, labels]; see `decode_beams`, whose `prune_history` is on here."""
        options = self._options(beam_width, beam_prune_logp, token_min_logp, True, hotwords, hotword_weight)
        return self._results([logits], options, lm_start_state, 1)[0].best.text

    def decode_batch(
        self,
        pool: object,
        logits_list: Sequence[Any],
        beam_width: int = 100,
        beam_prune_logp: float = -10.0,
        token_min_logp: float = -5.0,
        hotwords: Iterable[str] | None = None,
        hotword_weight: float = 10.0,
    ) -> list[str]:
        """`decode` of each; `pool` may be None, threads do the work.

        One whose logits are no numbers has the text "" and is logged; the others are as without it.
        """
        options = self._options(beam_width, beam_prune_logp, token_min_logp, True, hotwords, hotword_weight)
        return ["" if _is_lost(result) else result.best.text for result in self._results(logits_list, options, None, 1)]

    def decode_beams(
        self,
        logits: Any,
        beam_width: int = 100,
        beam_prune_logp: float = -10.0,
        token_min_logp: float = -5.0,
        prune_history: bool = False,
        hotwords: Iterable[str] | None = None,
        hotword_weight: float = 10.0,
        lm_start_state: int | None = None,
    ) -> list[OutputBeam]:
        """Hypotheses of one utterance, best first.

        Args:
            logits: [frames, labels]: logits, log-probabilities or probabilities.
            beam_width: paths kept after each frame.
            beam_prune_logp: those that lie more below the best are dropped; nats, below 0.
            token_min_logp: labels below it are left out of a frame unless they are its best.
            prune_history: keep only the best of paths that agree in all that can still be scored.
            hotwords: words, or phrases whose words count each.
            hotword_weight: nats for each of them.
            lm_start_state: `last_lm_state` of the piece before.

        Raises:
            InvalidArgumentError: bad arguments, or logits of another shape.
            AcousticScoresError: logits that are no numbers.
        """
        options = self._options(beam_width, beam_prune_logp, token_min_logp, prune_history, hotwords, hotword_weight)
        (result,) = self._results([logits], options, lm_start_state, beam_width)
        if result.error is not None:
            raise result.error
        return [self._beam(hypothesis) for hypothesis in result.hypotheses]

    def decode_beams_batch(
        self,
        pool: object,
        logits_list: Sequence[Any],
        beam_width: int = 100,
        beam_prune_logp: float = -10.0,
        token_min_logp: float = -5.0,
        prune_history: bool = False,
        hotwords: Iterable[str] | None = None,
        hotword_weight: float = 10.0,
    ) -> list[list[OutputBeamMPSafe]]:
        """`decode_beams` of each, without states; `pool` may be None, threads do the work.

        One whose logits are no numbers has one beam, with the text "" and scores of -inf, and is logged.
        """
        options = self._options(beam_width, beam_prune_logp, token_min_logp, prune_history, hotwords, hotword_weight)
        results = self._results(logits_list, options, None, beam_width)
        lost = [OutputBeam("", None, [], -math.inf, -math.inf)]
        beams = [lost if _is_lost(result) else [self._beam(h) for h in result.hypotheses] for result in results]
        return [[OutputBeamMPSafe(beam.text, *beam[2:]) for beam in own] for own in beams]

    def save_to_dir(self, filepath: str | Path) -> None:
        """Write the decoder into a folder, for `load_from_dir` here or in pyctcdecode.

        Raises:
            ModelError: it cannot be written.
        """
        model_folder = write_decoder_folder(filepath, self._alphabet.dumps())
        if self._language_model is not None:
            self._language_model.save_to_dir(model_folder)

    @classmethod
    def load_from_dir(cls, filepath: str | Path, unigram_encoding: str | None = None) -> BeamSearchDecoderCTC:
        """Read what `save_to_dir` wrote, here or in pyctcdecode.

        Raises:
            ModelError: a file is missing or wrong, or the model is a KenLM binary.
            VocabularyError: the alphabet's file is no alphabet.
        """
        alphabet, folder = read_alphabet(filepath)
        model = None if folder is None else LanguageModel.load_from_dir(folder, unigram_encoding)
        return cls(Alphabet.loads(alphabet), model)

    def _options(
        self,
        beam_width: int,
        beam_prune_logp: float,
        token_min_logp: float,
        prune_history: bool,
        hotwords: Iterable[str] | None,
        hotword_weight: float,
    ) -> CtcOptions:
        model = self._language_model
        order = 1 if model is None else model.order
        return CtcOptions(
            beam_size=beam_width,
            lm_weight=0.0 if model is None else float(model.alpha),
            word_bonus=0.0 if model is None else float(model.beta),
            hotwords=tuple(hotwords or ()),
            hotword_weight=hotword_weight,
            hotword_form="words",
            token_min_log_prob=token_min_logp,
            beam_margin=-beam_prune_logp,
            places="paths",
            times="last",
            history_words=max(1, order - 1) if prune_history else 0,
        )

    def _search(self, options: CtcOptions) -> CtcSearch:
        search = self._searches.get(options)
        if search is None:
            if len(self._searches) >= MOST_SEARCHES:
                self._searches.clear()
            model = self._language_model
            search = self._base.with_settings(options, None if model is None else model.to_ctc())
            self._searches[options] = search
        return search

    def _results(
        self, logits_list: Sequence[Any], options: CtcOptions, lm_start_state: int | None, n_best: int
    ) -> list[CtcResult]:
        search = self._search(options)
        batch, lengths = batch_of(logits_list, len(self._alphabet.labels), self._base.alphabet.blank)
        model = self._language_model
        has_start = model is not None and lm_start_state is not None
        state = search.begin(len(batch), [int(lm_start_state or 0)] * len(batch) if has_start else None)
        search.step(state, batch, lengths)
        return search.end(state, n_best)

    def _beam(self, hypothesis: CtcHypothesis) -> OutputBeam:
        state = None if self._language_model is None else hypothesis.lm_state
        return OutputBeam(hypothesis.text, state, hypothesis.words, hypothesis.parts["asr"], hypothesis.total)


def build_ctcdecoder(
    labels: Sequence[str],
    kenlm_model_path: str | Path | None = None,
    unigrams: Collection[str] | None = None,
    alpha: float = 0.5,
    beta: float = 1.5,
    unk_score_offset: float = -10.0,
    lm_score_boundary: bool = True,
) -> BeamSearchDecoderCTC:
    """A decoder for a CTC model's labels; names and defaults are pyctcdecode's.

    Args:
        labels: text of each label in the order of the logits; see `Alphabet.build_alphabet` for blank and space.
        kenlm_model_path: an ARPA file (.arpa or .arpa.gz), None = no language model.
        unigrams, alpha, beta, unk_score_offset, lm_score_boundary: see `LanguageModel`.

    Raises:
        VocabularyError: labels that cannot be told apart.
        ModelError: the language model cannot be read.
    """
    model = None
    if kenlm_model_path is not None:
        model = LanguageModel(kenlm_model_path, unigrams, alpha, beta, unk_score_offset, lm_score_boundary)
    return BeamSearchDecoderCTC(Alphabet.build_alphabet(labels), model)


def _read_table(path: str | Path) -> NgramTable:
    if not is_arpa(path):
        raise ModelError(
            f"{path} is no .arpa or .arpa.gz file; KenLM binaries are not read, give the ARPA file they were made from."
        )
    return NgramTable.from_arpa(path)


def _is_lost(result: CtcResult) -> bool:
    """Whether an utterance of a batch failed; logs why."""
    if result.error is not None:
        logger.error("%s", result.error)
    return result.error is not None
