"""Tiny random models and worlds: everything a test of the search needs, made in milliseconds."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, WhisperConfig, WhisperForConditionalGeneration

from shallowfusion.decoder import FusionDecoder
from shallowfusion.features.log_mel import FeatureSettings
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.scorers.loading import AcousticModel, whisper_tokens
from shallowfusion.scorers.whisper import WhisperScorer
from shallowfusion.text.vocabulary import Vocabulary

TEXT_TOKENS = 40
END, START, NO_TIMESTAMPS = 40, 41, 42
ACOUSTIC_VOCAB, LANGUAGE_VOCAB = 44, 41
END_QUANTILE = 1.0
FEATURES = FeatureSettings(feature_size=16, sampling_rate=16000, hop_length=160, n_fft=400, chunk_seconds=30)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class LetterTokenizer:
    """Ids 0..39 are two-letter pieces; the rest is special."""

    name_or_path = "letters"

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(piece(i).decode() for i in ids if i < TEXT_TOKENS)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        written = text.strip()
        if written.isdigit() and len(written) % 2 == 0:  # as `vocabulary` spells its tokens
            return [int(written[i : i + 2]) % TEXT_TOKENS for i in range(0, len(written), 2)]
        return [ord(character) % TEXT_TOKENS for character in text]


def piece(token: int) -> bytes:
    return (" " if token % 5 == 0 else chr(97 + token % 7)).encode() + chr(97 + token % 26).encode()


def vocabulary(size: int, begin_id: int | None = None, name: str = "tiny") -> Vocabulary:
    pieces = [f"{i:02d}".encode() for i in range(TEXT_TOKENS)]
    return Vocabulary((*pieces, *[None] * (size - TEXT_TOKENS)), END, begin_id, name)


def tiny_whisper(
    seed: int = 0, sharpness: float = 4.0, layers: int = 2, positions: int = 64, timestamps: int = 1, **changes: object
) -> AcousticModel:
    """A random Whisper of width 32 whose distributions are peaked enough for a search to mean something."""
    vocab_size = NO_TIMESTAMPS + 1 + timestamps
    torch.manual_seed(seed)
    model = random_whisper(vocab_size, sharpness, decoder_layers=layers, max_target_positions=positions, **changes)
    with torch.no_grad():
        _favour_end(model)
    model.generation_config.no_timestamps_token_id = NO_TIMESTAMPS
    scorer = WhisperScorer(model, vocabulary(vocab_size, name="tiny whisper"))
    return AcousticModel("tiny whisper", scorer, LetterTokenizer(), FEATURES, whisper_tokens(model))


def random_whisper(
    vocab_size: int, sharpness: float, end: int = END, start: int = START, **changes: object
) -> WhisperForConditionalGeneration:
    """The model of transformers alone, of width 32, with the end and start tokens it is told."""
    sizes = {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 16,
        "max_source_positions": 30, "max_target_positions": 64,
    }  # fmt: skip
    config = WhisperConfig(
        vocab_size=vocab_size, pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=start,
        suppress_tokens=None, begin_suppress_tokens=None, **{**sizes, **changes},
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.model.decoder.parameters():
            parameter.mul_(sharpness)
    return model


def _favour_end(model: WhisperForConditionalGeneration) -> None:
    """Turn the end token towards what the decoder says on average, so that searches end, at different steps."""
    ids = torch.randint(0, TEXT_TOKENS, (8, 24))
    states = torch.randn((8, model.config.max_source_positions, model.config.d_model))
    hidden = model.model.decoder(input_ids=ids, encoder_hidden_states=states).last_hidden_state
    mean = hidden.mean(dim=(0, 1))
    weight = model.model.decoder.embed_tokens.weight
    wanted = model.proj_out(hidden).quantile(END_QUANTILE, dim=-1).mean()
    weight[END] += mean * (wanted - weight[END] @ mean) / (mean @ mean)


def tiny_lm(seed: int = 1, sharpness: float = 4.0, positions: int = 96, size: int = LANGUAGE_VOCAB) -> CausalLMScorer:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=positions, bos_token_id=END, eos_token_id=END
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.mul_(sharpness)
    return CausalLMScorer(model, vocabulary(size, END, "tiny lm"))


def tiny_decoder(seed: int = 0, lm: bool = True, **changes: object) -> FusionDecoder:
    return FusionDecoder(tiny_whisper(seed, **changes), [tiny_lm(seed + 1)] if lm else [])


def decoder_on(device: str, seed: int = 1) -> FusionDecoder:
    """A tiny decoder of its own, on that device."""
    decoder = tiny_decoder(seed)
    for scorer in (decoder.acoustic.scorer, *decoder.language_models):
        moved(scorer, device)
    return decoder


def moved(scorer: CausalLMScorer | WhisperScorer, device: str) -> CausalLMScorer | WhisperScorer:
    scorer.model.to(device)
    scorer.device = torch.device(device)
    return scorer


def random_encoder_output(model: AcousticModel, utterances: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    config = model.scorer.model.config
    return torch.randn((utterances, config.max_source_positions, config.d_model), generator=generator)
