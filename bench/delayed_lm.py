"""A small medical language model on byte-pair tokens of its own, for the benches of fusion across tokenizers.

`python -m bench.delayed_lm --data ../shared/data --out DIRECTORY [--minutes 10]`
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shallowfusion.demo.corpus import EVALUATION_SOURCES, MEDICAL_SOURCES, held_out_sentences, read_sentences
from shallowfusion.demo.training_attention import round_up, use_training_attention
from shallowfusion.demo.training_loop import Budget, TrainingState

__all__ = ["main", "train"]

END = "<|endoftext|>"
VOCABULARY = 1000
WIDTH, LAYERS, HEADS = 160, 4, 4
POSITIONS = 128
BATCH_TOKENS = 6000
IGNORED = -100


def train(
    texts: list[str], held_out: list[str], out: Path, minutes: float, vocabulary: int = VOCABULARY, seed: int = 17
) -> float:
    """Train a tokenizer and a model, and save both where `load_causal_lm` reads them.

    Returns:
        nats per character of the held-out texts, their ends included.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = new_tokenizer(texts, vocabulary, out)
    end = tokenizer.eos_token_id
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=POSITIONS, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    rows = [[end, *ids, end][: POSITIONS + 1] for ids in tokenizer([f" {text}" for text in texts])["input_ids"]]
    state = TrainingState(model, Budget(1_000_000, 3e-3, minutes, decay_start=0.2), weight_decay=0.05)
    use_training_attention(model)
    for block in model.transformer.h:
        block.mlp.act = torch.nn.GELU()  # many times as fast on a CPU in bfloat16, within 0.001 of its tanh form
    model.train()
    generator = random.Random(seed)
    while not state.finished:
        for batch in batches(rows, generator):
            value = loss(model, batch)
            value.backward()  # type: ignore[no-untyped-call]
            state.update()
            if state.step % 200 == 0:
                print(f"step {state.step} after {state.elapsed_seconds:.0f} s: {float(value):.3f}", flush=True)
            if state.finished:
                break
    saved = copy.deepcopy(state.average).eval()
    saved.set_attn_implementation("sdpa")
    saved.half().save_pretrained(out)
    return held_out_loss(saved.float(), tokenizer, held_out)


def new_tokenizer(texts: list[str], size: int, out: Path) -> Any:
    """A byte-level BPE tokenizer trained on the texts, saved in `out`."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trainer = ByteLevelBPETokenizer(add_prefix_space=False)
    trainer.train_from_iterator((f" {text}" for text in texts), vocab_size=size, special_tokens=[END])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trainer._tokenizer, bos_token=END, eos_token=END)
    tokenizer.save_pretrained(out)
    return tokenizer


def batches(rows: list[list[int]], generator: random.Random) -> list[Tensor]:
    """Every text once, in batches of alike length."""
    order = sorted(rows, key=lambda row: len(row) + generator.random() * 4)
    found: list[list[list[int]]] = [[]]
    for row in order:
        if found[-1] and len(row) * (len(found[-1]) + 1) > BATCH_TOKENS:
            found.append([])
        found[-1].append(row)
    generator.shuffle(found)
    return [padded(batch) for batch in found]


def padded(rows: list[list[int]]) -> Tensor:
    width = min(round_up(max(map(len, rows)) - 1, 16), POSITIONS) + 1
    return torch.tensor([row + [IGNORED] * (width - len(row)) for row in rows])


def loss(model: Any, rows: Tensor) -> Tensor:
    inputs, targets = rows[:, :-1].clamp(min=0), rows[:, 1:]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=inputs, use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


@torch.inference_mode()
def held_out_loss(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Nats per character, the end and the leading space counted as one each."""
    end, total, characters = tokenizer.eos_token_id, 0.0, 0
    for text in texts:
        ids = [end, *tokenizer(f" {text}")["input_ids"], end]
        if len(ids) > POSITIONS:
            continue
        logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0]
        total += float(functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
        characters += len(text) + 2
    return total / characters


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="directory that holds text/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    texts = [sentence.text for sentence in read_sentences(chosen.data, MEDICAL_SOURCES, speakable=False)]
    held_out = held_out_sentences(chosen.data, EVALUATION_SOURCES, MEDICAL_SOURCES)
    print(f"held out: {train(texts, held_out, chosen.out, chosen.minutes):.4f} nats per character")
    return 0


if __name__ == "__main__":
    sys.exit(main())
