"""Scoring n-best lists with a GPT-2-shaped model: our trees against reading every text from its beginning."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch

from bench.timing import Measurement, measurements, take_turns

__all__ = ["run"]

END = 50_256
TEXT_TOKENS = 50_256

Texts = list[list[int]]


def run(device: str, quick: bool) -> list[Measurement]:
    """Random weights, random texts; every provider's totals are compared before anything is timed."""
    torch.set_num_threads(1)
    shapes = [(2, 64, 1, 5, 8)] if quick else [(12, 768, 4, 25, 16), (12, 768, 1, 100, 16)]
    rows: list[Measurement] = []
    for layers, width, num_lists, hypotheses, tokens in shapes:
        scorer = make_scorer(layers, width, device)
        texts = [text for seed in range(num_lists) for text in make_list(hypotheses, tokens, seed)]
        providers = {
            "trees": lambda scorer=scorer, texts=texts: trees(scorer, texts),
            "transformers, padded lists": lambda scorer=scorer, texts=texts, size=hypotheses: padded(
                scorer, texts, size
            ),
            "transformers, one by one": lambda scorer=scorer, texts=texts: padded(scorer, texts, 1),
        }
        totals = {name: provider() for name, provider in providers.items()}
        for name, found in totals.items():
            difference = float(np.abs(found - totals["trees"]).max())
            assert difference < 1e-2, f"{name} scores differ by {difference}"
        shape = f"{layers} layers of {width}, {num_lists} lists x {hypotheses} hypotheses of {tokens} tokens"
        seconds = take_turns(providers, 1 if quick else 5, 1, device)
        rows += measurements("rescoring", shape, "float32", seconds, "trees")
    return rows


def make_scorer(layers: int, width: int, device: str):  # type: ignore[no-untyped-def]
    from transformers import GPT2Config, GPT2LMHeadModel

    from shallowfusion.scorers.causal_lm import CausalLMScorer
    from shallowfusion.text.vocabulary import Vocabulary

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=max(1, width // 64))).eval().to(device)
    pieces = tuple(str(i).encode() for i in range(TEXT_TOKENS))
    return CausalLMScorer(model, Vocabulary((*pieces, None), END, END, "gpt2"))


def make_list(hypotheses: int, tokens: int, seed: int) -> Texts:
    """Texts as a beam leaves them: each is an earlier one with one or two tokens replaced."""
    generator = random.Random(seed)
    found = [[generator.randrange(TEXT_TOKENS) for _ in range(tokens)]]
    while len(found) < hypotheses:
        text = list(generator.choice(found))
        for _ in range(generator.randint(1, 2)):
            text[generator.randrange(tokens)] = generator.randrange(TEXT_TOKENS)
        if text not in found:
            found.append(text)
    return found


def trees(scorer, texts: Texts) -> np.ndarray:  # type: ignore[no-untyped-def]
    from shallowfusion.rescoring import score_texts

    return np.array([found.sum() for found in score_texts(scorer, texts)])


@torch.inference_mode()
def padded(scorer, texts: Sequence[list[int]], size: int) -> np.ndarray:  # type: ignore[no-untyped-def]
    """`size` texts a pass, each from its beginning with the end token last; all texts of a pass are equally long."""
    device, found = scorer.model.device, []
    for start in range(0, len(texts), size):
        ids = torch.tensor([[END, *text, END] for text in texts[start : start + size]], device=device)
        logits = scorer.model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        log_probs = torch.log_softmax(logits, dim=-1).gather(2, ids[:, 1:, None])[..., 0]
        found.append(log_probs.sum(dim=1).cpu().numpy())
    return np.concatenate(found)
