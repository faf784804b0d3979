"""Whole decodes of the same random-weight Whisper by its peers: transformers, openai-whisper, CTranslate2.

The engine of faster-whisper is CTranslate2; it is called directly, with encoder output, so that all decode the same.
Peers know no language model: rows with one say what ours adds. Float32 hypotheses are asserted equal before timing.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.decode import (
    END,
    NO_TIMESTAMPS,
    SHAPES,
    START,
    Pair,
    encoder_output,
    generate,
    make_pair,
    ours,
)
from bench.timing import Measurement, measurements, take_turns

__all__ = ["run"]

Decode = Callable[[Tensor, int, int], list[tuple[int, ...]]]
OPENAI_NAMES = (
    ("model.", ""), ("encoder.layer_norm.", "encoder.ln_post."), ("decoder.layer_norm.", "decoder.ln."),
    (".layers.", ".blocks."), ("self_attn_layer_norm", "attn_ln"), ("encoder_attn_layer_norm", "cross_attn_ln"),
    ("final_layer_norm", "mlp_ln"), ("self_attn", "attn"), ("encoder_attn", "cross_attn"), ("q_proj", "query"),
    ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out"), ("fc1", "mlp.0"), ("fc2", "mlp.2"),
    ("embed_positions.weight", "positional_embedding"), ("embed_tokens", "token_embedding"),
)  # fmt: skip


def run(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """Rows for 1 and 8 utterances of beam 5, and for beams 1 and 10 of one utterance."""
    name = "tiny" if quick else "whisper-small.en+gpt2"
    tokens = 6 if quick else 16
    pair, whole = make_pair(SHAPES[name], device), make_pair(SHAPES[name], device, torch.int8)
    alike, rounded = peers(pair)
    for utterances, beam_size in [(2, 5)] if quick else [(1, 5), (1, 1), (1, 10), (8, 5)]:
        yield compare(pair, whole, alike, rounded, name, utterances, beam_size, tokens)


def compare(
    pair: Pair,
    whole: Pair,
    alike: dict[str, Decode],
    rounded: dict[str, Decode],
    name: str,
    utterances: int,
    beam_size: int,
    tokens: int,
) -> list[Measurement]:
    states = encoder_output(SHAPES[name], utterances)
    calls: dict[str, Callable[[], list[tuple[int, ...]]]] = {
        "shallowfusion, no LM": lambda: ours(pair, states, beam_size, tokens, with_lm=False),
        "shallowfusion int8, no LM": lambda: ours(whole, states, beam_size, tokens, with_lm=False),
        "shallowfusion": lambda: ours(pair, states, beam_size, tokens, with_lm=True),
        "shallowfusion int8": lambda: ours(whole, states, beam_size, tokens, with_lm=True),
        "generate, no LM": lambda: generate(pair, states, beam_size, tokens, "none"),
        "generate, cached LM": lambda: generate(pair, states, beam_size, tokens, "cached"),
    }
    for key, decode in {**alike, **rounded}.items():
        calls[key] = lambda decode=decode: decode(states, beam_size, tokens)  # type: ignore[misc]
    found = {key: call() for key, call in calls.items()}
    plain, fused = found["shallowfusion, no LM"], found["shallowfusion"]
    shape = f"{name} utterances={utterances} beams={beam_size} tokens={tokens} threads={torch.get_num_threads()}"
    wrong = [key for key in ("generate, no LM", *alike) if found[key] != plain]
    wrong += ["generate, cached LM"] * (found["generate, cached LM"] != fused)
    if wrong:
        raise AssertionError(f"hypotheses of {', '.join(wrong)} differ at {shape}: no speed is reported")
    notes = {key: same_of(found[key], plain) for key in ("shallowfusion int8, no LM", *rounded)}
    notes["shallowfusion int8"] = same_of(found["shallowfusion int8"], fused)
    seconds = take_turns(calls, repeats=3 if utterances < 8 else 2, warm_up=0)
    return measurements("peers", shape, "float32", seconds, "shallowfusion", note=notes)


def same_of(found: list[tuple[int, ...]], wanted: list[tuple[int, ...]]) -> str:
    pairs = [(a, b) for own, other in zip(found, wanted, strict=True) for a, b in zip(own, other, strict=False)]
    tokens = sum(a == b for a, b in pairs)
    return f"{sum(a == b for a, b in zip(found, wanted, strict=True))} of {len(found)} hypotheses as float32, " + (
        f"{tokens} of {len(pairs)} tokens"
    )


def peers(pair: Pair) -> tuple[dict[str, Decode], dict[str, Decode]]:
    """Peers that must find what we find, and those with rounded weights; what is not installed is left out."""
    alike: dict[str, Decode] = {}
    rounded: dict[str, Decode] = {}
    if importlib.util.find_spec("whisper") is not None:
        alike["openai-whisper, no LM"] = openai_whisper(pair.whisper)
    if importlib.util.find_spec("ctranslate2") is not None:
        alike["CTranslate2 float32, no LM"] = ctranslate(pair.whisper, "float32")
        rounded["CTranslate2 int8, no LM"] = ctranslate(pair.whisper, "int8_float32")
    else:
        print("peers: CTranslate2 is not installed (pip install ctranslate2); its rows are left out")
    return alike, rounded


def openai_whisper(whisper: Any) -> Decode:
    from whisper.decoding import DecodingOptions, DecodingTask
    from whisper.model import ModelDimensions, Whisper

    config = whisper.config
    dimensions = ModelDimensions(
        config.num_mel_bins, config.max_source_positions, config.d_model, config.encoder_attention_heads,
        config.encoder_layers, config.vocab_size, config.max_target_positions, config.d_model,
        config.decoder_attention_heads, config.decoder_layers,
    )  # fmt: skip
    model = Whisper(dimensions).eval()
    weights = {}
    for name, tensor in whisper.state_dict().items():
        for theirs, own in OPENAI_NAMES:
            name = name.replace(theirs, own)
        weights[name] = tensor
    weights.pop("proj_out.weight")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or any("mask" not in name for name in missing):
        raise AssertionError(f"openai-whisper's weights have other names: {missing}, {unexpected}")

    def decode(states: Tensor, beam_size: int, tokens: int) -> list[tuple[int, ...]]:
        options = DecodingOptions(
            language="en", beam_size=beam_size if beam_size > 1 else None, sample_len=tokens, without_timestamps=True,
            suppress_tokens=None, suppress_blank=False, fp16=False,
        )  # fmt: skip
        # One at a time: its cross-attention takes one recording with beams, or several without.
        return [tuple(DecodingTask(model, options).run(own[None])[0].tokens) for own in states]

    return torch.inference_mode()(decode)


def ctranslate(whisper: Any, compute_type: str) -> Decode:
    import ctranslate2
    from ctranslate2.converters.transformers import WhisperLoader

    spec = WhisperLoader().get_model_spec(copy.deepcopy(whisper))  # rounding writes into the weights it is given
    special = {END: "<|endoftext|>", START: "<|startoftranscript|>", NO_TIMESTAMPS: "<|notimestamps|>"}
    spec.register_vocabulary([special.get(i, str(i)) for i in range(whisper.config.vocab_size)])
    spec.config.suppress_ids, spec.config.suppress_ids_begin = [], []
    spec.config.lang_ids, spec.config.alignment_heads = [START + 1], [(0, 0)]
    spec.validate()
    spec.optimize(quantization=None if compute_type == "float32" else "int8")
    with tempfile.TemporaryDirectory() as directory:
        spec.save(directory)
        (Path(directory) / "preprocessor_config.json").write_text("{}")
        model = ctranslate2.models.Whisper(
            directory, device="cpu", compute_type=compute_type, intra_threads=torch.get_num_threads()
        )

    def decode(states: Tensor, beam_size: int, tokens: int) -> list[tuple[int, ...]]:
        found = model.generate(  # it makes half of max_length tokens at the most
            ctranslate2.StorageView.from_array(states.numpy()), [[START, NO_TIMESTAMPS]] * len(states),
            beam_size=beam_size, max_length=2 * tokens, suppress_blank=False, suppress_tokens=[],
        )  # fmt: skip
        return [tuple(result.sequences_ids[0]) for result in found]

    return decode
