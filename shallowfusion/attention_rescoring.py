"""Two passes: a beam search of a CTC head or model, then attention decoder and language models rank its list."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shallowfusion.audio.reading import read_audio
from shallowfusion.checks import integer
from shallowfusion.config import require
from shallowfusion.ctc.decoder import CTCDecoder
from shallowfusion.ctc.joint import CtcFrames, check_rate, heard_by
from shallowfusion.ctc.models import CtcModel
from shallowfusion.ctc.settings import CtcLanguage, CtcOptions
from shallowfusion.decoder import FusionDecoder
from shallowfusion.errors import AudioError, ShallowFusionError
from shallowfusion.features.log_mel import log_mel
from shallowfusion.fusion.catalogue import static
from shallowfusion.fusion.rescore import rescore
from shallowfusion.fusion.rules import Rule
from shallowfusion.ngrams.table import NgramTable
from shallowfusion.options import DecodingOptions
from shallowfusion.rescoring import score_continuations, score_texts
from shallowfusion.results import Transcription
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.scorers.ctc_head import CtcHead
from shallowfusion.values import Hypothesis, Token

__all__ = ["AttentionRescorer", "RescoringOptions"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RescoringOptions:
    """How the list of the CTC search is ranked.

    total = ctc_weight * CTC + (1 - ctc_weight) * attention + sum_s rule's weight_s * lm_s + length_bonus per token;
    score = total / tokens ** length_penalty.

    Args:
        ctc_weight: 0 ranks by the attention decoder alone, 1 leaves it out.
        rule: static or piecewise weights of the decoder's language models; None = they have no say.
        n_best: hypotheses returned, best first.
        list_size: hypotheses of the CTC search that are scored; at most its beam.
        batch_size: recordings decoded together.

    Raises:
        InvalidArgumentError: a value outside its range.
    """

    ctc_weight: float = 0.5
    rule: Rule | None = None
    length_bonus: float = 0.0
    length_penalty: float = 0.0
    n_best: int = 1
    list_size: int = 20
    batch_size: int = 8

    def __post_init__(self) -> None:
        require(0 <= self.ctc_weight <= 1, f"ctc_weight must be from 0 to 1, got {self.ctc_weight!r}.")
        for name in ("n_best", "list_size", "batch_size"):
            integer(name, getattr(self, name), 1, 1_000_000)
        require(
            self.n_best <= self.list_size,
            f"n_best must be at most list_size={self.list_size}, got {self.n_best}; raise list_size.",
        )


class AttentionRescorer:
    """Decodes with a CTC model, or the CTC head of a joint model, then ranks what it found with all models.

    Each model reads each text once: faster than a joint search, and a language model may have any tokenizer, but
    what is not in the list cannot win. Texts are given to the attention decoder as its tokenizer encodes " " + text;
    those of a CTC model without small letters in small letters, which all models but it read, and results hold.

    Price: one CTC search, one decoder pass over the distinct tokens of the list, one pass of each language model.

    Args:
        decoder: with the language models that rescore (no n-gram models among them).
        search: options of the CTC search.
        lm: word n-gram model inside the CTC search, a file or table; None = none.
        threads: of the CTC search, None = all cores.
        ctc: makes the lists; with its own language model and threads. None = the decoder's CTC model (ctc=... of
            `FusionDecoder.from_pretrained`) if it has one, else its CTC head.

    Raises:
        InvalidArgumentError: there is no CTC head or model, it hears at another rate, or a language model is no causal
            model.
    """

    def __init__(
        self,
        decoder: FusionDecoder,
        search: CtcOptions | None = None,
        lm: str | Path | NgramTable | CtcLanguage | None = None,
        threads: int | None = None,
        ctc: CTCDecoder | None = None,
    ) -> None:
        require(
            ctc is None or (lm is None and threads is None),
            "ctc=... brings its own language model and threads; give lm and threads to that decoder.",
        )
        for model in decoder.language_models:
            require(
                isinstance(model, CausalLMScorer),
                f"rescoring needs causal language models, got {type(model).__name__}; give n-grams as lm=...",
            )
        self.decoder = decoder
        self.options = search or CtcOptions(beam_size=20)
        self.head, self.ctc = _ctc_of(decoder, lm, threads) if ctc is None else (None, ctc)
        if self.ctc.model is not None:
            check_rate(self.ctc.model, decoder.acoustic)
        unsaid = () if self.ctc.model is None else self.ctc.model.silenced
        pieces = enumerate(self.ctc.alphabet.pieces)
        written = "".join(piece.text for label, piece in pieces if label not in unsaid)
        self._lowers = any(map(str.isupper, written)) and not any(map(str.islower, written))

    def transcribe(self, recordings: Any, options: RescoringOptions | None = None) -> list[Transcription]:
        """Transcribe one or a list of recordings, as `FusionDecoder.transcribe` takes them.

        Returns:
            One result per recording, in order; one that failed has `error` set. Parts are "ctc", "asr" (attention) and
            the language models'; CTC and language scores are shared equally by the tokens, so that
            `rerank(rule, 0.0, ctc_weight=...)` ranks the list under other weights without a model.
        """
        chosen = options or RescoringOptions()
        items = recordings if isinstance(recordings, (list, tuple)) else [recordings]
        require(len(items) > 0, "recordings must hold at least one recording, got an empty list.")
        results = []
        for start in range(0, len(items), chosen.batch_size):
            results += self._batch(items[start : start + chosen.batch_size], start, chosen)
        for result in results:
            if result.error is not None:
                logger.error("%s was not transcribed: %s", result.source, result.error)
        return results

    def decode(
        self,
        encoder_output: Tensor,
        seconds: Sequence[float] | None = None,
        options: RescoringOptions | None = None,
        ctc_frames: CtcFrames | None = None,
    ) -> list[Transcription]:
        """Decode encoder output [utterances, frames, size]; an utterance with NaN in it fails alone.

        Args:
            seconds: of each recording, None = all frames count.
            ctc_frames: what a CTC model heard of each utterance; None where it is the head that hears.

        Raises:
            InvalidArgumentError: no frames of a CTC model, or of another number of utterances.
        """
        chosen = options or RescoringOptions()
        found = self._search(encoder_output, seconds, chosen.list_size, ctc_frames)
        lists = [[("", 0.0)] if one.error else [self._said(h) for h in one.n_best] for one in found]
        encode = self.decoder.acoustic.tokenizer.encode
        ids = [[encode(" " + text, add_special_tokens=False) if text else [] for text, _ in own] for own in lists]
        prompts = self._prompts(encoder_output)
        heard = score_continuations(self.decoder.acoustic.scorer, encoder_output, prompts, ids)
        names = self.decoder.source_names[1:]
        said = [
            self._language_scores(model, [text for own in lists for text, _ in own])
            for model in self.decoder.language_models
        ]
        answers, first = [], 0
        for one, own, own_ids, scores in zip(found, lists, ids, heard, strict=True):
            hypotheses = []
            for k, ((text, ctc), tokens) in enumerate(zip(own, own_ids, strict=True)):
                totals = {"ctc": ctc, **{name: sums[first + k] for name, sums in zip(names, said, strict=True)}}
                words = one.n_best[k].words if one.n_best else ()
                hypotheses.append(replace(self._hypothesis(text, tokens, scores[k], totals), words=words))
            first += len(own)
            ranked = () if one.error else self._ranked(hypotheses, chosen)
            answers.append(replace(one, n_best=ranked, rule=chosen.rule))
        return answers

    def _search(
        self, encoder_output: Tensor, seconds: Sequence[float] | None, size: int, frames: CtcFrames | None
    ) -> list[Transcription]:
        if self.head is not None:
            log_probs = self.head.log_probs(encoder_output)
            limit = log_probs.shape[1]
            lengths = None if seconds is None else np.array([self.head.num_frames(own, limit) for own in seconds])
            return self.ctc.decode(log_probs, lengths, self.options, n_best=size, layout="UFL")
        require(
            frames is not None and len(frames.log_probs) == len(encoder_output),
            f"ctc_frames must hold what the CTC model heard of each of the {len(encoder_output)} utterances, got "
            f"{'none' if frames is None else len(frames.log_probs)}; transcribe makes them from recordings.",
        )
        assert frames is not None
        return self.ctc.decode(frames.log_probs, frames.lengths, self.options, n_best=size, layout="UFL")

    def _said(self, hypothesis: Hypothesis) -> tuple[str, float]:
        """A text of the CTC search as the other models read it, and all that the search says of it but its LM."""
        text = hypothesis.text
        return text.lower() if self._lowers else text, hypothesis.parts["asr"]

    def _prompts(self, encoder_output: Tensor) -> list[list[int]]:
        options = DecodingOptions(rule=static([0.0] * len(self.decoder.language_models)))
        return [list(prompt) for prompt in self.decoder.sources(encoder_output, options).contexts[0].prompts]

    @staticmethod
    def _language_scores(model: Any, texts: Sequence[str]) -> list[float]:
        return [float(scores.sum(dtype=np.float64)) for scores in score_texts(model, texts)]

    def _hypothesis(self, text: str, ids: Sequence[int], heard: Any, totals: dict[str, float]) -> Hypothesis:
        tokenizer, end = self.decoder.acoustic.tokenizer, self.decoder.acoustic.tokens.end
        shares = {name: total / len(heard) for name, total in totals.items()}
        texts = [*(tokenizer.decode([i]) for i in ids), ""]
        tokens = tuple(
            Token(i, piece, 0.0, {"asr": float(score), **shares})
            for i, piece, score in zip([*ids, end], texts, heard, strict=True)
        )
        parts = {"asr": float(heard.sum(dtype=np.float64)), **totals}
        return Hypothesis(text, tuple(ids), tokens, 0.0, 0.0, parts)

    def _ranked(self, hypotheses: list[Hypothesis], options: RescoringOptions) -> tuple[Hypothesis, ...]:
        rule = options.rule or static([0.0] * len(self.decoder.language_models))
        ranked = rescore(
            hypotheses,
            rule,
            length_penalty=options.length_penalty,
            length_bonus=options.length_bonus,
            ctc_weight=options.ctc_weight,
        )
        return tuple(ranked[: options.n_best])

    def _batch(self, items: Sequence[Any], first: int, options: RescoringOptions) -> list[Transcription]:
        settings = self.decoder.acoustic.features
        require(
            self.head is not None or self.ctc.model is not None,
            "the CTC decoder has no acoustic model to hear recordings with; make it with CTCDecoder.from_pretrained.",
        )
        results: list[Transcription | None] = [None] * len(items)
        sources = [str(item) if isinstance(item, (str, Path)) else f"array {first + i}" for i, item in enumerate(items)]
        samples = []
        for i, item in enumerate(items):
            try:
                own = read_audio(item, settings.sampling_rate)
                if len(own) > settings.chunk_samples:
                    raise AudioError(f"{sources[i]} is longer than {settings.chunk_seconds} s; cut it.")
                samples.append(own)
            except ShallowFusionError as error:
                results[i] = Transcription(sources[i], error=error)
        if samples:
            with torch.inference_mode():
                encoded = self.decoder.acoustic.scorer.encode(log_mel(samples, settings))
            seconds = [len(own) / settings.sampling_rate for own in samples]
            frames = None if self.ctc.model is None else heard_by(self.ctc.model, samples)
            good = [i for i, result in enumerate(results) if result is None]
            for i, length, found in zip(good, seconds, self.decode(encoded, seconds, options, frames), strict=True):
                results[i] = replace(found, source=sources[i], duration=length)
        return [result for result in results if result is not None]


def _ctc_of(
    decoder: FusionDecoder, lm: str | Path | NgramTable | CtcLanguage | None, threads: int | None
) -> tuple[CtcHead | None, CTCDecoder]:
    """The CTC search of a decoder's CTC model, or with its head."""
    if decoder.ctc is not None:
        model: CtcModel = decoder.ctc.model
        made = CTCDecoder(
            model.labels, model.blank, model.delimiter, lm, model.word_start, model.frame_seconds, threads
        )
        made.model = model
        return None, made
    head = decoder.acoustic.ctc_head
    require(
        head is not None,
        f"rescoring needs a CTC head, which {decoder.acoustic.name} does not have, or a CTC model; give ctc=... .",
    )
    assert head is not None
    return head, ctc_decoder_of(head, lm, threads)


def ctc_decoder_of(
    head: CtcHead, lm: str | Path | NgramTable | CtcLanguage | None = None, threads: int | None = None
) -> CTCDecoder:
    """The CTC decoder of a head: words are told apart by a label " " or by labels that begin with a space."""
    has_space = head.labels.count(" ") == 1
    marked = any(label.startswith(" ") for label in head.labels)
    return CTCDecoder(
        head.labels,
        head.blank,
        delimiter=" " if has_space else None,
        lm=lm,
        word_start=" " if marked and not has_space else None,
        frame_seconds=head.frame_seconds,
        threads=threads,
    )
