"""Models from a hub id or a local directory as scorers, with errors that say what is missing."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from shallowfusion.config import require
from shallowfusion.errors import InvalidArgumentError, ModelError
from shallowfusion.features.log_mel import FeatureSettings
from shallowfusion.ngrams.arpa import is_arpa, read_arpa
from shallowfusion.scorers.attention import set_slot_attention
from shallowfusion.scorers.base import CachedScorer
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.scorers.ctc_head import CtcHead, load_ctc_head
from shallowfusion.scorers.fingerprints import fingerprint
from shallowfusion.scorers.ngram import Lookups, NgramScorer
from shallowfusion.scorers.preparation import check_int8, loading_dtype, prepare
from shallowfusion.scorers.whisper import WhisperScorer
from shallowfusion.scorers.word_ngram import WordLanguage, is_of_words
from shallowfusion.text.vocabulary import Vocabulary, vocabulary_of

__all__ = [
    "AcousticModel",
    "Attention",
    "LanguageModel",
    "WhisperTokens",
    "choose_attention",
    "choose_device",
    "choose_dtype",
    "load_causal_lm",
    "load_language_model",
    "load_models",
    "load_whisper",
    "set_attention",
]

logger = logging.getLogger(__name__)

Attention = Literal["auto", "triton", "sdpa"]
LanguageModel = CausalLMScorer | NgramScorer | WordLanguage
ModelScorer = TypeVar("ModelScorer", WhisperScorer, CausalLMScorer)

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class WhisperTokens:
    """The special tokens of a Whisper model and its suppression lists; None where the model has none.

    Args:
        num_timestamps: tokens for times in steps of 0.02 s, from the one after `no_timestamps` on.
    """

    start: int
    end: int
    no_timestamps: int | None
    previous: int | None
    languages: dict[str, int]
    tasks: dict[str, int]
    suppressed: tuple[int, ...]
    first_suppressed: tuple[int, ...]
    num_timestamps: int = 0

    @property
    def is_multilingual(self) -> bool:
        return bool(self.languages)


@dataclass(frozen=True)
class AcousticModel:
    """A Whisper-type model with all that belongs to it."""

    name: str
    scorer: WhisperScorer
    tokenizer: Any
    features: FeatureSettings
    tokens: WhisperTokens
    ctc_head: CtcHead | None = None


def load_whisper(name: str, device: torch.device, dtype: torch.dtype) -> AcousticModel:
    """A Whisper model, its tokenizer, feature settings, special tokens and, in a local directory, its CTC head.

    Raises:
        ModelError: no such directory or hub id, no weights, or not a Whisper model.
    """
    from transformers import AutoConfig, AutoTokenizer, WhisperForConditionalGeneration

    _check_directory(name)
    config = _loaded(AutoConfig.from_pretrained, name, "a model configuration")
    if config.model_type != "whisper":
        raise ModelError(
            f"{name} is a {config.model_type!r} model, wanted a Whisper-type model (model_type 'whisper'); "
            "a language model goes to lm=..., a CTC model to CTCDecoder.from_pretrained."
        )
    model = _loaded(
        WhisperForConditionalGeneration.from_pretrained,
        name,
        "a Whisper model",
        dtype=loading_dtype(dtype),
        attn_implementation="sdpa",
    )
    tokenizer = _loaded(AutoTokenizer.from_pretrained, name, "a tokenizer")
    model = model.to(device).eval()
    tokens = whisper_tokens(model, tokenizer)
    vocabulary = vocabulary_of(tokenizer, config.vocab_size, tokens.end, name=name)
    head = load_ctc_head(name, config.d_model, config.vocab_size, device)
    scorer = _prepared(WhisperScorer(model, vocabulary), dtype)
    return AcousticModel(name, scorer, tokenizer, _feature_settings(name), tokens, head)


def load_causal_lm(name: str, device: torch.device, dtype: torch.dtype) -> CausalLMScorer:
    """A causal language model and its tokenizer.

    Raises:
        ModelError: no such directory or hub id, no weights, or not a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    _check_directory(name)
    config = _loaded(AutoConfig.from_pretrained, name, "a model configuration")
    if config.model_type == "whisper":
        raise ModelError(f"{name} is a Whisper model, wanted a causal language model such as GPT-2.")
    model = _loaded(
        AutoModelForCausalLM.from_pretrained,
        name,
        "a causal language model",
        dtype=loading_dtype(dtype),
        attn_implementation="sdpa",
    )
    tokenizer = _loaded(AutoTokenizer.from_pretrained, name, "a tokenizer")
    end = _single(config.eos_token_id)
    if end is None:
        raise ModelError(f"{name} has no eos_token_id in its configuration; the decoder needs an end token.")
    begin = _single(config.bos_token_id)
    vocabulary = vocabulary_of(tokenizer, config.vocab_size, end, end if begin is None else begin, name=name)
    return _prepared(CausalLMScorer(model.to(device).eval(), vocabulary, tokenizer), dtype)


def _prepared(scorer: ModelScorer, dtype: torch.dtype) -> ModelScorer:
    """The scorer with its model made ready to run in that dtype; its fingerprint stays that of the model on disk."""
    scorer.known_fingerprint = fingerprint(scorer)
    prepare(scorer.model, dtype)
    return scorer


def load_language_model(
    name: str, acoustic: Vocabulary, device: torch.device, dtype: torch.dtype, lookups: Lookups = "auto"
) -> LanguageModel:
    """An n-gram model of acoustic pieces or of words if the name ends in .arpa or .arpa.gz, else a causal LM.

    An n-gram model is taken for one of words if none of its words holds a space; pieces of a text do.

    Raises:
        ModelError: it cannot be loaded.
        VocabularyError: an n-gram model of neither the acoustic model's pieces nor words it can spell.
    """
    if is_arpa(name):
        model = read_arpa(name)
        if is_of_words(model, acoustic):
            return WordLanguage(model, acoustic)
        return NgramScorer(model, acoustic, device, lookups)
    return load_causal_lm(name, device, dtype)


def choose_device(device: str | torch.device) -> torch.device:
    """`auto` is CUDA where there is a device, else the CPU."""
    if device != "auto":
        try:
            return torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise InvalidArgumentError(f"device must be 'auto', 'cpu' or 'cuda[:n]', got {device!r}.") from error
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """`auto` is float16 on CUDA and float32 on the CPU; int8 is for the CPU alone (see `prepare`)."""
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if dtype not in (*known, *known.values()):
        raise InvalidArgumentError(f"dtype must be 'auto', {', '.join(map(repr, known))}, got {dtype!r}.")
    chosen = dtype if isinstance(dtype, torch.dtype) else known[dtype]
    if chosen == torch.int8:
        check_int8(device)
    return chosen


def choose_attention(attention: str, device: torch.device) -> str:
    """`auto` is "sdpa" on CUDA until a GPU has run the kernels, and on the CPU what `prepare` chose.

    Raises:
        InvalidArgumentError: no such attention, or Triton's without a CUDA device.
    """
    known = ("auto", "triton", "sdpa")
    require(attention in known, f"attention must be one of {', '.join(map(repr, known))}, got {attention!r}.")
    require(
        attention != "triton" or device.type == "cuda",
        f"attention='triton' needs a CUDA device, got {device}; leave it at 'auto' there.",
    )
    return attention


def load_models(
    asr: str,
    names: Sequence[str],
    device: str | torch.device,
    dtype: str | torch.dtype,
    lookups: Lookups = "auto",
    attention: Attention = "auto",
) -> tuple[AcousticModel, list[LanguageModel]]:
    """A Whisper model and the language models that go with it; arguments as for `FusionDecoder.from_pretrained`."""
    where = choose_device(device)
    number = choose_dtype(dtype, where)
    attends = choose_attention(attention, where)
    acoustic = load_whisper(asr, where, number)
    models = [load_language_model(name, acoustic.scorer.vocabulary, where, number, lookups) for name in names]
    set_attention((acoustic.scorer, *models), attends)
    return acoustic, models


def set_attention(scorers: Iterable[Any], attention: str) -> None:
    """Lets the transformers among these models, loaded here, attend as asked for."""
    for scorer in scorers:
        if isinstance(scorer, CachedScorer) and attention != "auto":
            if attention == "triton":
                set_slot_attention(scorer.model, "triton")
            else:
                scorer.model.set_attn_implementation(attention)


def whisper_tokens(model: Any, tokenizer: Any = None) -> WhisperTokens:
    """Special tokens as the model's generation settings name them, else as its tokenizer does."""
    settings, config = model.generation_config, model.config
    start = _single(getattr(settings, "decoder_start_token_id", None)) or _single(config.decoder_start_token_id)
    end = _single(getattr(settings, "eos_token_id", None)) or _single(config.eos_token_id)
    if start is None or end is None:
        raise ModelError(f"{config.name_or_path} names no decoder_start_token_id or eos_token_id.")
    languages = {key.strip("<|>"): value for key, value in (getattr(settings, "lang_to_id", None) or {}).items()}
    no_timestamps = _named(settings, "no_timestamps_token_id", tokenizer, "<|notimestamps|>")
    return WhisperTokens(
        start=start,
        end=end,
        no_timestamps=no_timestamps,
        previous=_named(settings, "prev_sot_token_id", tokenizer, "<|startofprev|>"),
        languages=languages if getattr(settings, "is_multilingual", bool(languages)) else {},
        tasks=dict(getattr(settings, "task_to_id", None) or {}),
        suppressed=tuple(getattr(settings, "suppress_tokens", None) or ()),
        first_suppressed=tuple(getattr(settings, "begin_suppress_tokens", None) or ()),
        num_timestamps=0 if no_timestamps is None else _num_timestamps(config, tokenizer, no_timestamps + 1),
    )


def _num_timestamps(config: Any, tokenizer: Any, begin: int) -> int:
    """One for each frame of the encoder and one for the end, as far as the vocabulary goes.

    Some tokenizers do not list them; where the id of the first is called otherwise there are none.
    """
    if tokenizer is not None and begin < len(tokenizer) and tokenizer.convert_ids_to_tokens(begin) != "<|0.00|>":
        return 0
    return max(0, min(int(config.vocab_size) - begin, int(config.max_source_positions) + 1))


def _named(settings: Any, setting: str, tokenizer: Any, token: str) -> int | None:
    found = getattr(settings, setting, None)
    if found is None and tokenizer is not None:
        found = tokenizer.get_vocab().get(token)
    return None if found is None else int(found)


def _feature_settings(name: str) -> FeatureSettings:
    if Path(name).is_dir():
        return FeatureSettings.from_pretrained(name)
    from transformers.utils import cached_file

    path = _loaded(cached_file, name, "feature settings", filename="preprocessor_config.json")
    return FeatureSettings.from_pretrained(Path(path).parent)


def _check_directory(name: str) -> None:
    """A path is checked here, so that its errors name files; anything else is taken for a hub id."""
    path = Path(name)
    if not path.is_dir():
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise ModelError(f"{name} is not a directory; give a model directory or a hub id such as 'gpt2'.")
        return
    if not (path / "config.json").is_file():
        raise ModelError(f"{name} holds no config.json, wanted a model directory as transformers saves it.")
    if not any((path / file).is_file() for file in WEIGHT_FILES):
        raise ModelError(f"{name} holds no weights, wanted one of {', '.join(WEIGHT_FILES)}.")


def _loaded(load: Any, name: str, what: str, **options: Any) -> Any:
    try:
        return load(name, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{name} cannot be loaded as {what} ({type(error).__name__}: {reason}); "
            "give a model directory as transformers saves it, or a hub id this machine can reach."
        ) from error


def _single(ids: Any) -> int | None:
    if isinstance(ids, (list, tuple)):
        return int(ids[0]) if ids else None
    return None if ids is None else int(ids)
