"""The front of CTC decoding: log-probabilities in, transcripts with every model's scores out."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shallowfusion.audio.reading import read_audio
from shallowfusion.checks import integer
from shallowfusion.config import require
from shallowfusion.ctc.backends import SearchChooser
from shallowfusion.ctc.delayed import DelayedCtcSearch
from shallowfusion.ctc.layouts import batch_of
from shallowfusion.ctc.models import CtcModel, load_ctc_model
from shallowfusion.ctc.results import CtcHypothesis, CtcResult
from shallowfusion.ctc.search import CtcSearch
from shallowfusion.ctc.settings import CtcAlphabet, CtcLanguage, CtcOptions
from shallowfusion.errors import AudioError, InvalidArgumentError, ShallowFusionError
from shallowfusion.fusion.rules import Rule
from shallowfusion.ngrams.table import NgramTable
from shallowfusion.results import Timing, Transcription
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.scorers.loading import choose_device, choose_dtype, load_causal_lm
from shallowfusion.values import Hypothesis, Token, Word

__all__ = ["CTCDecoder"]

logger = logging.getLogger(__name__)

SHORTEST_SECONDS = 0.1  # models need a few frames


class CTCDecoder:
    """Decodes the log-probabilities of a CTC model, alone or with an n-gram model in the search.

    Args:
        labels: text of each label.
        blank: the blank, as index or as label.
        delimiter: the label between words, as index or as label; None = none.
        lm: path of an ARPA file of words, a table of words, or a `CtcLanguage`; None = none.
        word_start: how labels that begin a word are marked, for instance "▁"; None = they are not.
        frame_seconds: length of a frame, for durations and the times of labels and words; 0 = unknown, and then there
            are no times. 1.0 tells them in frames.
        threads: utterances decoded at a time, None = all cores.
        llm: a causal language model on any tokenizer, asked late under a rule of fusion.delayed.

    Raises:
        InvalidArgumentError: an index or label outside the labels.
        ModelError: the language model cannot be read.
        VocabularyError: the language model and the labels do not go together.
    """

    def __init__(
        self,
        labels: Sequence[str],
        blank: int | str = 0,
        delimiter: int | str | None = None,
        lm: str | Path | NgramTable | CtcLanguage | None = None,
        word_start: str | None = None,
        frame_seconds: float = 0.0,
        threads: int | None = None,
        llm: CausalLMScorer | None = None,
    ) -> None:
        names = tuple(labels)
        mark = None if delimiter is None else _index("delimiter", delimiter, names)
        self.alphabet = CtcAlphabet(names, _index("blank", blank, names), mark, word_start)
        self.language = _language(lm)
        self.frame_seconds = frame_seconds
        self._search = CtcSearch(self.alphabet, CtcOptions(), self.language, threads)
        self.model: CtcModel | None = None
        self.llm = llm
        self._chooser = SearchChooser()

    @classmethod
    def from_pretrained(
        cls,
        asr: str | Path,
        lm: str | Path | NgramTable | CtcLanguage | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        threads: int | None = None,
        llm: str | Path | None = None,
    ) -> CTCDecoder:
        """Load a CTC model of transformers (wav2vec2, HuBERT, WavLM, Parakeet, ...) by hub id or local directory.

        Labels, blank and word delimiter come from its tokenizer. Spell the words of an `lm` as the labels do. `llm` is
        a causal language model by hub id or local directory, for rules of fusion.delayed. dtype="int8", on the CPU,
        rounds the weights of linear layers, of which WavLM's cannot be; see docs/ctc.md.

        Raises:
            ModelError: the model cannot be loaded.
            InvalidArgumentError: a device or dtype that the model cannot have.
        """
        where = choose_device(device)
        model = load_ctc_model(str(asr), where, choose_dtype(dtype, where))
        late = None if llm is None else load_causal_lm(str(llm), where, choose_dtype(dtype, where))
        made = cls(model.labels, model.blank, model.delimiter, lm, model.word_start, model.frame_seconds, threads, late)
        made.model = model
        return made

    def transcribe(
        self,
        recordings: Any,
        options: CtcOptions | None = None,
        n_best: int = 1,
        batch_size: int = 8,
        rule: Rule | None = None,
        **names: Any,
    ) -> list[Transcription]:
        """Transcribe recordings with the loaded model.

        Args:
            recordings: one or a list of: path; float array or tensor [samples] or [channels, samples] at the model's
                rate; {"array": samples, "sampling_rate": rate}.
            options: or option names as keywords.
            n_best: hypotheses per recording.
            batch_size: recordings decoded together.
            rule: see `decode`.

        Returns:
            One result per recording, in order; one that failed has `error` set, the others go on.

        Raises:
            InvalidArgumentError: bad options, no recordings, or a decoder without a model.
        """
        require(self.model is not None, "this decoder has no acoustic model; make it with CTCDecoder.from_pretrained.")
        items = recordings if isinstance(recordings, (list, tuple)) else [recordings]
        require(len(items) > 0, "recordings must hold at least one recording, got an empty list.")
        integer("batch_size", batch_size, 1, 1_000_000)
        self.search(options, **names)
        results = []
        for first in range(0, len(items), batch_size):
            results += self._batch(items[first : first + batch_size], first, options, n_best, {"rule": rule, **names})
        return results

    def _batch(
        self, items: Sequence[Any], first: int, options: CtcOptions | None, n_best: int, names: dict[str, Any]
    ) -> list[Transcription]:
        assert self.model is not None
        sources = [str(item) if isinstance(item, (str, Path)) else f"array {first + i}" for i, item in enumerate(items)]
        failed: dict[int, Transcription] = {}
        samples = []
        for i, item in enumerate(items):
            try:
                own = read_audio(item, self.model.sampling_rate)
                if len(own) < SHORTEST_SECONDS * self.model.sampling_rate:
                    raise AudioError(
                        f"{sources[i]} is too short: {len(own)} samples; give {SHORTEST_SECONDS} s or more."
                    )
                samples.append(own)
            except ShallowFusionError as error:
                failed[i] = Transcription(sources[i], error=error)
                logger.error("%s was not transcribed: %s", sources[i], error)
        names = {"layout": "UFL", **names}
        decoded = iter(self.decode(*self.model.log_probs(samples), options, n_best, **names) if samples else [])
        seconds = iter(len(own) / self.model.sampling_rate for own in samples)
        return [
            failed.get(i) or dataclasses.replace(next(decoded), source=source, duration=next(seconds))
            for i, source in enumerate(sources)
        ]

    def search(self, options: CtcOptions | None = None, **names: Any) -> CtcSearch:
        """The search with these options, for decoding chunk by chunk and for times in frames."""
        chosen = _options(options, names)
        search = self._search
        if chosen != search.options:
            self._search = search = search.with_settings(chosen)
        return search

    def decode(
        self,
        log_probs: Any,
        lengths: Any = None,
        options: CtcOptions | None = None,
        n_best: int = 1,
        rule: Rule | None = None,
        layout: str | None = None,
        **names: Any,
    ) -> list[Transcription]:
        """Decode a batch.

        Args:
            log_probs: float32 or float16 [utterances, frames, labels], array or tensor of any strides, nats; also
                [frames, labels] of one utterance, or a list of such arrays, of different lengths.
            lengths: frames of each utterance, None = all.
            layout: the axes of an array, by their letters U(tterances), F(rames) and L(abels): "FUL" is time first.
            options: or option names as keywords.
            n_best: hypotheses per utterance.
            rule: of fusion.delayed, for the `llm`; its interval counts frames, and its `proxy_weight` takes the place
                of `lm_weight` (with `proxy_form="replace"` parts["lm"] is told, and in no total). An utterance of
                which the `llm` says NaN keeps the scores it had and has the flag "nan".

        Returns:
            One result per utterance, in order; one that failed has `error` set, which its `text` raises. The scores of
            a hypothesis are sums over alignments and belong to no label: each token bears an equal share. Times of
            tokens and words are those of the alignment that `CtcOptions.times` names.

        Raises:
            InvalidArgumentError: bad options, or scores of another shape or layout.
        """
        if rule is not None and len(rule.lm_weights) > 1:
            names["lm_weight"] = rule.lm_weights[1]
        search: Any = self.search(options, **names)
        log_probs, lengths = batch_of(log_probs, lengths, len(self.alphabet.labels), layout)
        if rule is not None:
            require(self.llm is not None, "a rule needs a language model; make the decoder with llm=...")
            search = self._chooser.choose(search, log_probs, is_late=True)
            search = DelayedCtcSearch(search, self.llm, rule)  # type: ignore[arg-type]
            search.spelling.check(self._sayable())
        else:
            search = self._chooser.choose(search, log_probs)
        start = time.perf_counter()
        state = search.begin(len(log_probs))
        search.step(state, log_probs, lengths)
        results = search.end(state, n_best)
        made = [self._transcription(*pair) for pair in zip(range(len(results)), results, state.num_frames, strict=True)]
        if rule is not None:
            seconds = {"search": time.perf_counter() - start}
            timing = Timing(seconds, sum(state.num_frames) * self.frame_seconds, state.counts)
            made = [dataclasses.replace(transcription, rule=rule, timing=timing) for transcription in made]
            for place in state.saw_nan:
                flagged = tuple(dataclasses.replace(own, flags=("nan",)) for own in made[place].n_best)
                made[place] = dataclasses.replace(made[place], n_best=flagged)
        for transcription in made:
            if transcription.error is not None:
                logger.error("%s", transcription.error)
        return made

    def _sayable(self) -> str:
        """Every character that a text may hold: those of the labels but the ones the model never says."""
        silenced = set() if self.model is None else set(self.model.silenced)
        return "".join(piece.text for label, piece in enumerate(self.alphabet.pieces) if label not in silenced)

    def _transcription(self, number: int, result: CtcResult, frames: int) -> Transcription:
        return Transcription(
            source=f"utterance {number}",
            n_best=tuple(self._hypothesis(hypothesis) for hypothesis in result.hypotheses),
            duration=frames * self.frame_seconds,
            error=result.error,
        )

    def _hypothesis(self, found: CtcHypothesis) -> Hypothesis:
        ids = tuple(found.label_ids.tolist())
        shown = ids or (self.alphabet.blank,)  # an empty text keeps its scores in an end token
        parts = {name: value / len(shown) for name, value in found.parts.items()}
        texts = [" " if label == self.alphabet.delimiter else self.alphabet.pieces[label].text for label in shown]
        length, words = self.frame_seconds, found.words if self.frame_seconds > 0 else []
        is_timed = bool(ids) and length > 0
        times: list[Any] = (found.label_frames * length).tolist() if is_timed else [(None, None)] * len(shown)
        timed = tuple(Word(word, start * length, end * length) for word, (start, end) in words)
        tokens = tuple(
            Token(label, text, found.total / len(shown), parts, start, end)
            for label, text, (start, end) in zip(shown, texts, times, strict=True)
        )
        return Hypothesis(found.text, ids, tokens, found.total, found.total, dict(found.parts), words=timed)


def _index(name: str, given: int | str, labels: tuple[str, ...]) -> int:
    if not isinstance(given, str):
        return given
    require(
        labels.count(given) == 1,
        f"{name} must be one of the labels, got {given!r}, which is there {labels.count(given)} times; give its index.",
    )
    return labels.index(given)


def _language(lm: str | Path | NgramTable | CtcLanguage | None) -> CtcLanguage | None:
    if lm is None or isinstance(lm, CtcLanguage):
        return lm
    return CtcLanguage(lm if isinstance(lm, NgramTable) else NgramTable.from_arpa(lm))


def _options(options: CtcOptions | None, names: dict[str, Any]) -> CtcOptions:
    known = {entry.name for entry in dataclasses.fields(CtcOptions)}
    unknown = sorted(set(names) - known)
    if unknown:
        raise InvalidArgumentError(f"unknown option {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
    return dataclasses.replace(options or CtcOptions(), **names)
