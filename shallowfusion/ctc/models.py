"""CTC models of transformers: recordings in, log-probabilities of labels out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shallowfusion.errors import ModelError
from shallowfusion.scorers.loading import _check_directory, _loaded
from shallowfusion.scorers.preparation import check_int8, loading_dtype, prepare_encoder

__all__ = ["CtcModel", "is_ctc_model", "load_ctc_model"]

PIECE_START = "▁"


@dataclass(frozen=True, eq=False)
class CtcModel:
    """A CTC model (wav2vec2, HuBERT, WavLM, Parakeet, ...) with all that belongs to it.

    Args:
        labels: text of each label.
        blank: index of the blank.
        delimiter: index of the label between words, None = none.
        word_start: mark of the labels that begin a word, None = none.
        silenced: labels that are never said: special tokens and ids without a token.
        frame_seconds: length of an output frame.
    """

    name: str
    model: Any
    extractor: Any
    labels: tuple[str, ...]
    blank: int
    delimiter: int | None
    word_start: str | None
    silenced: tuple[int, ...]
    sampling_rate: int
    frame_seconds: float

    @torch.inference_mode()
    def log_probs(self, samples: Sequence[Tensor]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        """Log-probs of recordings, float32 [utterances, frames, labels] where the model is, and the frames of each.

        Recordings are read together where the model masks padding. Models that were trained without a mask
        (`return_attention_mask` false, as wav2vec2-base) hear padding, so they read each recording alone.

        Args:
            samples: float [samples] each, at `sampling_rate`.
        """
        if self.extractor.return_attention_mask is False:
            found = [self._read([own]) for own in samples]
        else:
            found = [self._read(samples)]
        lengths = np.concatenate([counts for _, counts in found])
        padded = torch.zeros((len(samples), int(lengths.max(initial=0)), len(self.labels)), device=self.model.device)
        first = 0
        for log_probs, _ in found:
            frames = min(padded.shape[1], log_probs.shape[1])
            padded[first : first + len(log_probs), :frames] = log_probs[:, :frames]
            first += len(log_probs)
        return padded, lengths

    def _read(self, samples: Sequence[Tensor]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        features = self.extractor(
            [own.numpy() for own in samples], sampling_rate=self.sampling_rate, padding=True, return_tensors="pt"
        )
        dtype = next(self.model.parameters()).dtype
        inputs = {
            name: tensor.to(self.model.device, dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in features.items()
        }
        log_probs = torch.log_softmax(self.model(**inputs).logits.float(), dim=-1)
        log_probs[:, :, list(self.silenced)] = float("-inf")
        frames = log_probs.shape[1]
        mask = inputs.get("attention_mask")
        if mask is None:
            return log_probs, np.full(len(samples), frames, dtype=np.int64)
        return log_probs, np.minimum(self._output_lengths(mask), frames)

    def _output_lengths(self, mask: Tensor) -> npt.NDArray[np.int64]:
        if hasattr(self.model, "_get_feat_extract_output_lengths"):
            lengths = self.model._get_feat_extract_output_lengths(mask.sum(dim=1))
        else:
            lengths = self.model._get_output_attention_mask(mask).sum(dim=1)
        numbers: npt.NDArray[np.int64] = lengths.cpu().numpy().astype(np.int64)
        return numbers


def is_ctc_model(name: str) -> bool:
    """Whether a directory or hub id holds a CTC model.

    Raises:
        ModelError: it holds no model configuration.
    """
    from transformers import MODEL_FOR_CTC_MAPPING, AutoConfig

    _check_directory(name)
    return type(_loaded(AutoConfig.from_pretrained, name, "a model configuration")) in MODEL_FOR_CTC_MAPPING


def load_ctc_model(name: str, device: torch.device, dtype: torch.dtype) -> CtcModel:
    """A CTC model with its features and labels; the blank is the padding token, as in transformers.

    Raises:
        ModelError: no such directory or hub id, no weights, no CTC model, or a tokenizer that does not fit.
        InvalidArgumentError: torch.int8 for a model whose linear layers cannot all be rounded, such as WavLM.
    """
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer

    if not is_ctc_model(name):
        config = _loaded(AutoConfig.from_pretrained, name, "a model configuration")
        raise ModelError(f"{name} is a {config.model_type!r} model, wanted a CTC model such as wav2vec2.")
    model = _loaded(AutoModelForCTC.from_pretrained, name, "a CTC model", dtype=loading_dtype(dtype)).to(device).eval()
    extractor = _loaded(AutoFeatureExtractor.from_pretrained, name, "feature settings")
    tokenizer = _loaded(AutoTokenizer.from_pretrained, name, "a tokenizer")
    labels, silenced = _labels(name, tokenizer, model.config)
    blank = int(model.config.pad_token_id)
    delimiter = getattr(tokenizer, "word_delimiter_token_id", None)
    number = blank if delimiter is None or not 0 <= delimiter < len(labels) else int(delimiter)
    marked = any(label.startswith(PIECE_START) for label in labels)
    made = CtcModel(
        name=name,
        model=model,
        extractor=extractor,
        labels=labels,
        blank=blank,
        delimiter=None if number == blank else number,
        word_start=PIECE_START if marked and number == blank else None,
        silenced=tuple(sorted(silenced - {blank, number})),
        sampling_rate=int(extractor.sampling_rate),
        frame_seconds=_frame_samples(model.config, extractor) / extractor.sampling_rate,
    )
    if dtype == torch.int8:
        check_int8(device)
        second = torch.zeros(made.sampling_rate)
        prepare_encoder(model, getattr(model, "lm_head", None), lambda: made.log_probs([second]))
    return made


def _labels(name: str, tokenizer: Any, config: Any) -> tuple[tuple[str, ...], set[int]]:
    """Texts of the labels, and the labels that are no text."""
    texts = {number: token for token, number in tokenizer.get_vocab().items()}
    if config.pad_token_id is None or not 0 <= config.pad_token_id < config.vocab_size:
        raise ModelError(f"{name} has pad_token_id {config.pad_token_id}, wanted the blank, a label.")
    if not set(texts) & set(range(config.vocab_size)):
        raise ModelError(f"the tokenizer of {name} has no token for any of the model's {config.vocab_size} labels.")
    silenced = {number for number in range(config.vocab_size) if number not in texts}
    silenced |= {number for number in tokenizer.all_special_ids if number < config.vocab_size}
    lower = bool(getattr(tokenizer, "do_lower_case", False))
    labels = [texts.get(number, f"<{number}>") for number in range(config.vocab_size)]
    return tuple(label.lower() if lower else label for label in labels), silenced


def _frame_samples(config: Any, extractor: Any) -> int:
    """Samples of one output frame."""
    ratio = getattr(config, "inputs_to_logits_ratio", None)
    if ratio is not None:
        return int(ratio)
    factor = getattr(getattr(config, "encoder_config", config), "subsampling_factor", 1)
    return int(extractor.hop_length * factor)
