"""Training of the demo's character language models: GPT-2's architecture, one sentence per sequence."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shallowfusion.demo.training_attention import round_up, use_training_attention
from shallowfusion.demo.training_loop import Budget, TrainingState
from shallowfusion.demo.vocabulary import END_OF_TEXT, TEXT_VOCAB_SIZE, encode, write_tokenizer
from shallowfusion.errors import ModelError

__all__ = ["LmSettings", "load_lm", "nats_per_token", "new_lm", "save_lm", "train_lm"]

_POSITIONS = 448
_IGNORED = -100


@dataclass(frozen=True)
class LmSettings:
    """How a language model is trained.

    Args:
        batch_tokens: tokens in a batch, padding counted.
        packed_share: share of the batches whose rows hold sentences end to end, up to the last position;
            the other rows hold one sentence each, as the decoder scores it.
        report_every: updates between two printed lines.
        save_every: updates between two checkpoints.
    """

    batch_tokens: int = 12000
    packed_share: float = 0.1
    report_every: int = 100
    save_every: int = 500


def new_lm(width: int = 160, layers: int = 3, dropout: float = 0.0) -> Any:
    """Build an untrained `GPT2LMHeadModel` over the characters and the end of text; the caller seeds torch."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=TEXT_VOCAB_SIZE,
        n_positions=_POSITIONS,
        n_embd=width,
        n_layer=layers,
        n_head=max(1, width // 40),
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=0.0,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
        use_cache=True,
    )
    return GPT2LMHeadModel(config)


def save_lm(model: Any, directory: Path) -> None:
    """Write a directory that `GPT2LMHeadModel.from_pretrained` loads; weights are stored as float16."""
    directory.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).half().eval().save_pretrained(directory)
    write_tokenizer(directory, whisper=False)


def load_lm(directory: Path) -> Any:
    """Read a saved language model in float32, ready for inference.

    Raises:
        ModelError: the weights are missing.
    """
    from transformers import GPT2LMHeadModel

    if not (directory / "model.safetensors").exists():
        raise ModelError(f"{directory / 'model.safetensors'} is missing; train the model first.")
    return GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32).eval()


def train_lm(
    model: Any, texts: list[str], budget: Budget, settings: LmSettings, checkpoint: Path, seed: int, held_out: list[str]
) -> Any:
    """Train until the budget is spent, going on from `checkpoint` if it exists.

    Every save prints the loss on `held_out` and writes the averaged weights to `<name>-average/` beside it.

    Returns:
        the model with averaged weights.
    """
    sentences = [_row(text) for text in texts]
    state = TrainingState(model, budget, weight_decay=0.05)
    state.restore(checkpoint)
    generator = random.Random(f"{seed}-{state.step}")
    model.train()
    use_training_attention(model)
    _use_exact_gelu(model)
    total = 0.0
    while not state.finished:
        for rows in _epoch(sentences, settings, generator):
            loss = _loss(model, _pad(rows))
            loss.backward()  # type: ignore[no-untyped-call]
            state.update()
            total += float(loss.detach())
            if state.step % settings.report_every == 0:
                print(
                    f"{checkpoint.stem} step {state.step} after {state.elapsed_seconds:.0f} s: "
                    f"{total / settings.report_every:.3f} nats per character",
                    flush=True,
                )
                total = 0.0
            if state.step % settings.save_every == 0 or state.finished:
                state.save(checkpoint)
                save_lm(state.average, checkpoint.with_name(checkpoint.stem + "-average"))
                print(f"{checkpoint.stem} held out: {nats_per_token(state.average, held_out):.4f}", flush=True)
            if state.finished:
                break
    return state.average


def nats_per_token(model: Any, texts: list[str]) -> float:
    """Mean negative log probability of characters and ends of text, each sentence on its own after one end of text.

    Its exponential is the perplexity per character. Parts beyond the last position are left out.
    """
    rows = sorted((_row(text)[: _POSITIONS + 1] for text in texts), key=len)
    loss, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(rows), 32):
            chosen = rows[start : start + 32]
            num_tokens = sum(len(row) - 1 for row in chosen)
            loss += float(_loss(model, _pad(chosen))) * num_tokens
            count += num_tokens
    return loss / count if count else math.nan


def _use_exact_gelu(model: Any) -> None:
    """Train with the exact GELU, which is 15 times as fast on a CPU in bfloat16 and within 0.001 of its tanh form."""
    for block in model.transformer.h:
        block.mlp.act = torch.nn.GELU()


def _row(text: str) -> list[int]:
    return [END_OF_TEXT, *encode(text), END_OF_TEXT]


def _pad(rows: list[list[int]]) -> Tensor:
    width = min(round_up(max(map(len, rows)) - 1, 16), _POSITIONS) + 1
    return torch.tensor([row + [_IGNORED] * (width - len(row)) for row in rows])


def _loss(model: Any, rows: Tensor) -> Tensor:
    """Mean cross entropy of every token after the first; rows are [sequences, tokens], -100 where there is none."""
    inputs, targets = rows[:, :-1].clamp(min=0), rows[:, 1:]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=inputs, use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=_IGNORED)


def _epoch(sentences: list[list[int]], settings: LmSettings, generator: random.Random) -> Iterator[list[list[int]]]:
    """Every sentence once, in batches of alike length, with packed batches between them."""
    order = sorted(range(len(sentences)), key=lambda row: len(sentences[row]) + generator.random() * 10)
    batches: list[list[int]] = [[]]
    for row in order:
        longest = min(len(sentences[row]), _POSITIONS + 1)
        if batches[-1] and longest * (len(batches[-1]) + 1) > settings.batch_tokens:
            batches.append([])
        batches[-1].append(row)
    generator.shuffle(batches)
    for numbers in batches:
        if generator.random() < settings.packed_share:
            yield [_packed_row(sentences, generator) for _ in range(max(1, settings.batch_tokens // _POSITIONS))]
        else:
            yield [sentences[number][: _POSITIONS + 1] for number in numbers]


def _packed_row(sentences: list[list[int]], generator: random.Random) -> list[int]:
    row = [END_OF_TEXT]
    while len(row) <= _POSITIONS:
        row += generator.choice(sentences)[1:]
    return row[: _POSITIONS + 1]
