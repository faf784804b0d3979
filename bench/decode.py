"""Whole decodes at whisper-small and gpt2 shapes, random weights, against transformers' generate."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.timing import Measurement, measurements, take_turns

__all__ = [
    "SHAPES", "WEIGHT", "Pair", "Shape", "decoders", "encoder_output", "generate", "make_pair", "ours", "run",
]  # fmt: skip

WEIGHT = 0.3
TEXT_TOKENS, END, START, NO_TIMESTAMPS = 50_256, 50_256, 50_257, 50_362


@dataclass(frozen=True)
class Shape:
    """Sizes of an acoustic and a language model.

    Args:
        lm_key_heads: of a Llama-type language model; 0 = it is a GPT-2.
        encoder_layers: few where nothing is encoded.
    """

    width: int
    layers: int
    heads: int
    lm_width: int
    lm_layers: int
    lm_heads: int
    frames: int = 1500
    lm_key_heads: int = 0
    lm_vocab: int = 50_257
    encoder_layers: int = 1


SHAPES = {
    "whisper-small.en+gpt2": Shape(768, 12, 12, 768, 12, 12),
    "whisper-base.en+gpt2": Shape(512, 6, 8, 768, 12, 12),
    "tiny": Shape(64, 2, 4, 64, 2, 4, frames=100),
}


@dataclass(frozen=True)
class Pair:
    """Our decoder with and without the LM, the models it runs, and what generate and other peers run."""

    fused: object
    alone: object
    own_whisper: torch.nn.Module
    own_lm: torch.nn.Module
    whisper: torch.nn.Module
    lm: torch.nn.Module


def make_pair(shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32, prepared: bool = True) -> Pair:
    """Random weights, peaked enough that hypotheses differ by more than rounding; ends are never reached.

    Args:
        dtype: of our models on the CPU; peers have float32 ones of the same weights. Elsewhere all share one pair.
        prepared: ours are as `from_pretrained` makes them ready; False = as they are.
    """
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    from shallowfusion.scorers.preparation import prepare

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=51_864, d_model=shape.width, encoder_layers=shape.encoder_layers, decoder_layers=shape.layers,
        encoder_attention_heads=shape.heads, decoder_attention_heads=shape.heads, encoder_ffn_dim=4 * shape.width,
        decoder_ffn_dim=4 * shape.width, max_source_positions=shape.frames, pad_token_id=END, bos_token_id=END,
        eos_token_id=END, decoder_start_token_id=START, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    whisper = WhisperForConditionalGeneration(config).eval()
    whisper.generation_config.no_timestamps_token_id = NO_TIMESTAMPS
    lm, last_norm = language_model(shape)
    for norm in (whisper.model.decoder.layer_norm, last_norm):
        torch.nn.init.constant_(norm.weight, 6.0)
    whisper, lm = whisper.to(device), lm.to(device)
    own = (whisper, lm)
    if device == "cpu" and prepared:
        own = (copy.deepcopy(whisper), copy.deepcopy(lm))
        for model in own:
            prepare(model, dtype)
    return Pair(*decoders(*own), *own, whisper, lm)


def language_model(shape: Shape) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A causal LM of random weights, and the norm before its head."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if not shape.lm_key_heads:
        gpt2 = GPT2Config(n_embd=shape.lm_width, n_layer=shape.lm_layers, n_head=shape.lm_heads)
        lm = GPT2LMHeadModel(gpt2).eval()
        return lm, lm.transformer.ln_f
    config = LlamaConfig(
        vocab_size=shape.lm_vocab, hidden_size=shape.lm_width, intermediate_size=4 * shape.lm_width,
        num_hidden_layers=shape.lm_layers, num_attention_heads=shape.lm_heads, num_key_value_heads=shape.lm_key_heads,
        max_position_embeddings=2048, bos_token_id=END, eos_token_id=END, tie_word_embeddings=True,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    return llama, llama.model.norm


def decoders(whisper: torch.nn.Module, lm: torch.nn.Module) -> tuple[object, object]:
    """Ours over given models, with the LM and without."""
    from shallowfusion.decoder import FusionDecoder
    from shallowfusion.features.log_mel import FeatureSettings
    from shallowfusion.scorers.causal_lm import CausalLMScorer
    from shallowfusion.scorers.loading import AcousticModel, whisper_tokens
    from shallowfusion.scorers.whisper import WhisperScorer
    from shallowfusion.text.vocabulary import Vocabulary

    pieces = [str(i).encode() for i in range(TEXT_TOKENS)]
    acoustic = AcousticModel(
        "whisper",
        WhisperScorer(whisper, Vocabulary((*pieces, *[None] * (51_864 - TEXT_TOKENS)), END, name="whisper")),
        NumberTokenizer(),
        FeatureSettings(chunk_seconds=whisper.config.max_source_positions // 50),
        whisper_tokens(whisper),
    )
    unknown = lm.config.vocab_size - TEXT_TOKENS  # type: ignore[union-attr]
    scorer = CausalLMScorer(lm, Vocabulary((*pieces, *[None] * unknown), END, END, "language model"))
    return FusionDecoder(acoustic, [scorer]), FusionDecoder(acoustic)


class NumberTokenizer:
    """Tokens are written as their numbers."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(str(i) for i in ids)


def ours(pair: Pair, states: Tensor, beam_size: int, tokens: int, with_lm: bool) -> list[tuple[int, ...]]:
    decoder = pair.fused if with_lm else pair.alone
    results = decoder.decode(  # type: ignore[attr-defined]
        states, beam_size=beam_size, min_new_tokens=tokens, max_new_tokens=tokens, lm_weight=WEIGHT if with_lm else 0.0,
        end_policy="asr_only", end_threshold=None, suppress_blank=False, suppress_tokens=None,
    )  # fmt: skip
    return [result.n_best[0].token_ids for result in results]


def generate(pair: Pair, states: Tensor, beam_size: int, tokens: int, lm: str) -> list[tuple[int, ...]]:
    """transformers' generate: `lm` is "none", "uncached" (the article's processor) or "cached"."""
    from transformers import LogitsProcessorList
    from transformers.generation.utils import GenerationMixin
    from transformers.modeling_outputs import BaseModelOutput

    processors = {"none": [], "uncached": [UncachedLM(pair.lm)], "cached": [CachedLM(pair.lm)]}[lm]
    prompt = torch.tensor([[START, NO_TIMESTAMPS]] * len(states), device=states.device)
    found = GenerationMixin.generate(
        pair.whisper,
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        decoder_input_ids=prompt,
        attention_mask=torch.ones(states.shape[:2], dtype=torch.int64, device=states.device),
        num_beams=beam_size,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList(processors),
    )
    return [tuple(row[2 : 2 + tokens]) for row in found.tolist()]


class UncachedLM:
    """The article's processor: the LM reads every hypothesis from its beginning at each step."""

    def __init__(self, lm: torch.nn.Module) -> None:
        self.lm = lm

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        begin = torch.full((len(input_ids), 1), END, device=input_ids.device)
        text = torch.cat([begin, input_ids[:, 2:].clamp(max=END)], dim=1)
        logits = self.lm(input_ids=text, use_cache=False).logits[:, -1]
        return fuse(scores, logits)


class CachedLM:
    """The same with a KV cache, reordered by finding each row's parent among the rows of the step before."""

    def __init__(self, lm: torch.nn.Module) -> None:
        self.lm = lm
        self.cache: object | None = None
        self.before: Tensor | None = None

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.before is None:
            new = torch.full((len(input_ids), 1), END, device=input_ids.device)
        else:
            same = (input_ids[:, None, :-1] == self.before[None]).all(dim=-1)
            own = torch.arange(len(input_ids), device=input_ids.device)
            beams = max(1, int(same.sum(dim=1).max()))
            near = same & ((own[:, None] - own[None]).abs() < beams + len(own))
            self.cache.reorder_cache(near.int().argmax(dim=1))  # type: ignore[attr-defined]
            new = input_ids[:, -1:].clamp(max=END)
        found = self.lm(input_ids=new, past_key_values=self.cache, use_cache=True)
        self.cache, self.before = found.past_key_values, input_ids
        return fuse(scores, found.logits[:, -1])


def fuse(scores: Tensor, logits: Tensor) -> Tensor:
    scores = torch.log_softmax(scores.float(), dim=-1)  # processors see raw logits in greedy search
    scores[:, :TEXT_TOKENS] += WEIGHT * torch.log_softmax(logits.float(), dim=-1)[:, :TEXT_TOKENS]
    return scores


def run(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """Ours against generate with no LM, an uncached and a cached LM; same hypotheses are asserted first."""
    if quick:
        yield compare(make_pair(SHAPES["tiny"], device), "tiny", 1, 5, 6, device)
        return
    name, tokens = "whisper-small.en+gpt2", 16
    pair = make_pair(SHAPES[name], device)
    for utterances, beam_size in [(1, 5), (4, 5), (1, 1), (1, 2), (1, 10)]:  # (8, 5) is among the peers
        yield compare(pair, name, utterances, beam_size, tokens, device)
    base = "whisper-base.en+gpt2"
    pair = make_pair(SHAPES[base], device)
    for utterances, beam_size in [(1, 5), (16, 5)]:
        yield compare(pair, base, utterances, beam_size, tokens, device)
    if device == "cpu":
        for utterances in (1, 4, 8):
            yield memory_rows(name, utterances, tokens)


def compare(pair: Pair, name: str, utterances: int, beam_size: int, tokens: int, device: str) -> list[Measurement]:
    states = encoder_output(SHAPES[name], utterances).to(device)
    providers = providers_of(pair, states, beam_size, tokens, with_uncached=(utterances, beam_size) == (1, 5))
    is_large = utterances * beam_size * tokens >= 1000  # a turn takes minutes
    if is_large:
        providers = {key: call for key, call in providers.items() if "no LM" not in key}
    shape = f"{name} utterances={utterances} beams={beam_size} tokens={tokens} threads={torch.get_num_threads()}"
    found = {key: call() for key, call in providers.items()}
    fused = {str(value) for key, value in found.items() if "no LM" not in key}
    plain = {str(value) for key, value in found.items() if "no LM" in key}
    if len(fused) != 1 or len(plain) > 1:
        raise AssertionError(f"hypotheses differ at {shape}: no speed is reported")
    seconds = take_turns(providers, 1 if is_large else 3, warm_up=0, device=device)  # the check above has warmed up
    return measurements("decode", shape, "float32", seconds, "shallowfusion")


def encoder_output(shape: Shape, utterances: int) -> Tensor:
    return torch.randn((utterances, shape.frames, shape.width), generator=torch.Generator().manual_seed(1))


def providers_of(
    pair: Pair, states: Tensor, beam_size: int, tokens: int, with_uncached: bool
) -> dict[str, Callable[[], list[tuple[int, ...]]]]:
    providers: dict[str, Callable[[], list[tuple[int, ...]]]] = {
        "shallowfusion": lambda: ours(pair, states, beam_size, tokens, with_lm=True),
        "shallowfusion, no LM": lambda: ours(pair, states, beam_size, tokens, with_lm=False),
        "generate, no LM": lambda: generate(pair, states, beam_size, tokens, "none"),
        "generate, cached LM": lambda: generate(pair, states, beam_size, tokens, "cached"),
    }
    if with_uncached:
        providers["generate, uncached LM"] = lambda: generate(pair, states, beam_size, tokens, "uncached")
    return providers


def memory_rows(name: str, utterances: int, tokens: int) -> list[Measurement]:
    """Peak resident memory of one decode in a process of its own, less that of the loaded models."""
    rows = []
    for provider in ("shallowfusion", "generate, cached LM"):
        command = [sys.executable, "-m", "bench.decode", name, provider, str(utterances), str(tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        shape = f"{name} utterances={utterances} beams=5 tokens={tokens}"
        nan = float("nan")
        peak = float(done.stdout.split()[-1])
        rows.append(Measurement("memory", shape, "float32", provider, nan, nan, nan, peak_memory_mb=peak))
    return rows


def main(arguments: list[str]) -> None:
    """Print the growth of peak memory in MB: `python -m bench.decode SHAPE PROVIDER UTTERANCES TOKENS`."""
    name, provider, utterances, tokens = arguments[0], arguments[1], int(arguments[2]), int(arguments[3])
    pair = make_pair(SHAPES[name])
    states = encoder_output(SHAPES[name], utterances)
    providers = providers_of(pair, states, 5, tokens, with_uncached=True)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak that building the models left
    before = resident_kilobytes("VmRSS")
    providers[provider]()
    print((resident_kilobytes("VmHWM") - before) / 1024)


def resident_kilobytes(field: str) -> int:
    """VmRSS: resident now; VmHWM: its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main(sys.argv[1:])
