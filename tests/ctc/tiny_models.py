"""Tiny random CTC models of transformers, saved as directories with their features and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LETTERS = ("<pad>", "<s>", "</s>", "<unk>", "|", *"etaoinshrdlu")
PIECES = ("<unk>", "▁the", "▁a", "▁cat", "s", "ing", "▁", "o", "n", "e")
KINDS = ("wav2vec2", "wav2vec2, layer norm", "hubert", "wavlm", "parakeet_ctc")


def save_tiny_model(kind: str, directory: Path, seed: int = 0) -> Any:
    """Write a model of a kind and return it; its outputs are peaked, so that best path and best text agree."""
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = _parakeet(directory) if kind == "parakeet_ctc" else _wav2vec2_like(kind, directory)
    model = model.eval()
    _sharpen(model, *((1, 2e5) if kind == "parakeet_ctc" else (4, 300.0)))
    model.save_pretrained(directory)
    return model


def _wav2vec2_like(kind: str, directory: Path) -> Any:
    name, _, norm = kind.partition(", ")
    configs = {
        "wav2vec2": (transformers.Wav2Vec2Config, transformers.Wav2Vec2ForCTC),
        "hubert": (transformers.HubertConfig, transformers.HubertForCTC),
        "wavlm": (transformers.WavLMConfig, transformers.WavLMForCTC),
    }
    config_class, model_class = configs[name]
    config = config_class(
        vocab_size=len(LETTERS), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        conv_dim=(16, 16, 16), conv_stride=(5, 4, 4), conv_kernel=(10, 8, 4), num_feat_extract_layers=3,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, pad_token_id=0, num_buckets=16,
        feat_extract_norm="layer" if norm else "group", do_stable_layer_norm=bool(norm),
    )  # fmt: skip
    (directory / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(LETTERS)}))
    transformers.Wav2Vec2CTCTokenizer(str(directory / "vocab.json")).save_pretrained(directory)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=bool(norm))
    extractor.save_pretrained(directory)
    return model_class(config)


def _parakeet(directory: Path) -> Any:
    encoder = transformers.ParakeetEncoderConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, conv_kernel_size=9,
        subsampling_conv_channels=16, num_mel_bins=80,
    )  # fmt: skip
    config = transformers.ParakeetCTCConfig(
        encoder_config=encoder.to_dict(), vocab_size=len(PIECES) + 1, pad_token_id=len(PIECES)
    )
    scores = [(piece, 0.0) for piece in PIECES]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    transformers.ParakeetTokenizer(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>").save_pretrained(
        directory
    )
    transformers.ParakeetFeatureExtractor().save_pretrained(directory)
    return transformers.ParakeetForCTC(config)


def _sharpen(model: Any, num_silenced: int, scale: float) -> None:
    """Scale the output layer; special labels, which we never say, are unlikely."""
    head = model.ctc_head if hasattr(model, "ctc_head") else model.lm_head
    with torch.no_grad():
        head.weight.mul_(scale)
        bias = head.bias
        bias.zero_()
        for label in range(bias.shape[0]):
            if label != model.config.pad_token_id and label < num_silenced:
                bias[label] = -1e5
