"""pyctcdecode's interface on the CTC search of this library: change one import.

    from shallowfusion.compat.pyctcdecode import build_ctcdecoder

Texts, scores and word times are those of pyctcdecode 0.5, its pruning included. Language models are ARPA files (plain
or .gz); KenLM binaries are read where the module kenlm is installed, and asked through Python, as a MultiLanguageModel
is, which is slower. Differences: every word of the file is known, also one without a back-off, and those of a binary
without `unigrams` too; a batch runs on threads, so `pool` is not needed; scores that are no numbers are an error.

In a batch such an error is logged and its utterance has the text "" (there pyctcdecode stops with a ValueError that
loses the batch). Not here: `load_from_hf_hub` (download it, then `load_from_dir`), language models of one's
own (`AbstractLanguageModel`, `score` and `score_partial_token`), `verify_alphabet_coverage`, and what a store
of models of all decoders needs (`model_container`, `cleanup`). `last_lm_state` is an integer.
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
    write_decoder_folder,
)
from shallowfusion.compat.language_models import LanguageModel, MultiLanguageModel
from shallowfusion.compat.logits import batch_of
from shallowfusion.ctc.results import CtcHypothesis, CtcResult
from shallowfusion.ctc.search import CtcSearch
from shallowfusion.ctc.settings import CtcOptions

__all__ = [
    "Alphabet", "BeamSearchDecoderCTC", "LanguageModel", "MultiLanguageModel", "OutputBeam", "OutputBeamMPSafe",
    "build_ctcdecoder",
]  # fmt: skip

logger = logging.getLogger(__name__)

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


class BeamSearchDecoderCTC:
    """Beam search over the frames of a CTC model; see `build_ctcdecoder`.

    Args:
        alphabet: labels of the logits.
        language_model: None = none.
    """

    def __init__(self, alphabet: Alphabet, language_model: LanguageModel | MultiLanguageModel | None = None) -> None:
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
            ModelError: a file is missing or wrong, or it holds a KenLM binary and kenlm is not installed.
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
            language = model.to_ctc() if isinstance(model, LanguageModel) else self._base.language
            search = self._base.with_settings(options, language)
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
        kenlm_model_path: an ARPA file (.arpa or .arpa.gz) or a KenLM binary, None = no language model.
        unigrams, alpha, beta, unk_score_offset, lm_score_boundary: see `LanguageModel`.

    Raises:
        VocabularyError: labels that cannot be told apart.
        ModelError: the language model cannot be read.
    """
    model = None
    if kenlm_model_path is not None:
        model = LanguageModel(kenlm_model_path, unigrams, alpha, beta, unk_score_offset, lm_score_boundary)
    return BeamSearchDecoderCTC(Alphabet.build_alphabet(labels), model)


def _is_lost(result: CtcResult) -> bool:
    """Whether an utterance of a batch failed; logs why."""
    if result.error is not None:
        logger.error("%s", result.error)
    return result.error is not None
