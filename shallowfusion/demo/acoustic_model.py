"""The demo's acoustic model: Whisper's architecture with a joint CTC head on the encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from shallowfusion.demo.synthesis import DEMO_FEATURES
from shallowfusion.demo.vocabulary import (
    BLANK,
    CHARACTERS,
    END_OF_TEXT,
    NO_TIMESTAMPS,
    START_OF_TRANSCRIPT,
    WHISPER_VOCAB_SIZE,
    write_tokenizer,
)
from shallowfusion.errors import ModelError

__all__ = ["JointModel", "load_acoustic_model", "new_acoustic_model", "save_acoustic_model"]

_MAX_TARGET_POSITIONS = 448
_NUM_LABELS = len(CHARACTERS) + 1


class JointModel(nn.Module):
    """A `WhisperForConditionalGeneration` and the linear CTC head that reads its encoder."""

    def __init__(self, whisper: Any) -> None:
        super().__init__()
        self.whisper = whisper
        self.ctc_head = nn.Linear(whisper.config.d_model, _NUM_LABELS)

    def encode(self, features: Tensor) -> Tensor:
        """Run the encoder on windows of any even length, which transformers' own forward refuses.

        Args:
            features: [utterances, mels, frames] log-mel features.

        Returns:
            [utterances, frames / 2, d_model]; on full windows equal to `whisper.model.encoder`.
        """
        encoder = self.whisper.model.encoder
        states = functional.gelu(encoder.conv1(features))
        states = functional.gelu(encoder.conv2(states)).transpose(1, 2)
        states = states + encoder.embed_positions.weight[: states.shape[1]].to(states.dtype)
        states = functional.dropout(states, encoder.dropout, self.training)
        for layer in encoder.layers:
            states = layer(states, None)
        normed: Tensor = encoder.layer_norm(states)
        return normed

    def decode(self, prefixes: Tensor, states: Tensor) -> Tensor:
        """Next-token logits [utterances, tokens, vocab] of teacher-forced prefixes [utterances, tokens]."""
        decoder = self.whisper.model.decoder
        hidden = decoder(input_ids=prefixes, encoder_hidden_states=states, use_cache=False).last_hidden_state
        logits: Tensor = self.whisper.proj_out(hidden)
        return logits


def new_acoustic_model(width: int = 192, encoder_layers: int = 5, decoder_layers: int = 2) -> JointModel:
    """Build an untrained model; the caller seeds torch."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=WHISPER_VOCAB_SIZE,
        num_mel_bins=DEMO_FEATURES.feature_size,
        d_model=width,
        encoder_layers=encoder_layers,
        encoder_attention_heads=max(1, width // 64),
        encoder_ffn_dim=width * 8 // 3,
        decoder_layers=decoder_layers,
        decoder_attention_heads=max(1, width // 64),
        decoder_ffn_dim=width * 5 // 3,
        max_source_positions=DEMO_FEATURES.chunk_frames // 2,
        max_target_positions=_MAX_TARGET_POSITIONS,
        dropout=0.0,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
        decoder_start_token_id=START_OF_TRANSCRIPT,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return JointModel(WhisperForConditionalGeneration(config))


def save_acoustic_model(model: JointModel, directory: Path) -> None:
    """Write a directory that `WhisperForConditionalGeneration.from_pretrained` loads, plus the CTC head.

    Weights are stored as float16. The files of the head are `ctc_head.safetensors` and `ctc_head.json`.
    """
    import copy

    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    whisper = copy.deepcopy(model.whisper).half().eval()
    whisper.generation_config = _generation_config()
    whisper.save_pretrained(directory)
    head = {name: tensor.detach().half().contiguous() for name, tensor in model.ctc_head.state_dict().items()}
    save_file(head, str(directory / "ctc_head.safetensors"))
    description = {
        "input": "last hidden state of the Whisper encoder",
        "input_size": whisper.config.d_model,
        "num_labels": _NUM_LABELS,
        "blank_id": BLANK,
        "labels": [*CHARACTERS, "<blank>"],
        "label_token_ids": list(range(len(CHARACTERS))),
        "frame_seconds": 2 * DEMO_FEATURES.hop_length / DEMO_FEATURES.sampling_rate,
    }
    _write_json(directory / "ctc_head.json", description)
    _write_json(directory / "preprocessor_config.json", _preprocessor_config())
    write_tokenizer(directory, whisper=True)


def load_acoustic_model(directory: Path) -> JointModel:
    """Read a saved model in float32, ready for inference.

    Raises:
        ModelError: a file is missing.
    """
    from safetensors.torch import load_file
    from transformers import WhisperForConditionalGeneration

    for name in ("config.json", "model.safetensors", "ctc_head.safetensors"):
        if not (directory / name).exists():
            raise ModelError(f"{directory / name} is missing; train the model first.")
    model = JointModel(WhisperForConditionalGeneration.from_pretrained(directory, dtype=torch.float32))
    model.ctc_head.load_state_dict(load_file(str(directory / "ctc_head.safetensors")))
    return model.eval()


def _generation_config() -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
        decoder_start_token_id=START_OF_TRANSCRIPT,
        no_timestamps_token_id=NO_TIMESTAMPS,
        is_multilingual=False,
        return_timestamps=False,
        suppress_tokens=[],
        begin_suppress_tokens=[END_OF_TEXT],
        max_length=_MAX_TARGET_POSITIONS,
    )


def _preprocessor_config() -> dict[str, Any]:
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": DEMO_FEATURES.feature_size,
        "sampling_rate": DEMO_FEATURES.sampling_rate,
        "hop_length": DEMO_FEATURES.hop_length,
        "n_fft": DEMO_FEATURES.n_fft,
        "chunk_length": DEMO_FEATURES.chunk_seconds,
        "n_samples": DEMO_FEATURES.chunk_samples,
        "nb_max_frames": DEMO_FEATURES.chunk_frames,
        "padding_side": "right",
        "padding_value": 0.0,
        "dither": 0.0,
        "return_attention_mask": False,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
