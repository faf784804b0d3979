"""A tiny acoustic model whose tokens spell words, and a tiny language model with a byte-pair tokenizer of its own."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from shallowfusion.decoder import FusionDecoder
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.scorers.loading import AcousticModel
from shallowfusion.text.vocabulary import Vocabulary, vocabulary_of
from tests.tiny import ACOUSTIC_VOCAB, END, TEXT_TOKENS, piece, tiny_whisper

OPTIONS = {"suppress_blank": False, "suppress_tokens": [41, 42, 43], "end_threshold": None, "max_new_tokens": 12}


@cache
def tokenizer() -> Any:
    """Byte pairs learned from what the acoustic tokens spell; 290 tokens."""
    generator = random.Random(0)
    texts = ["".join(piece(generator.randrange(TEXT_TOKENS)).decode() for _ in range(12)) for _ in range(200)]
    trainer = ByteLevelBPETokenizer(add_prefix_space=False)
    trainer.train_from_iterator(texts, vocab_size=290, min_frequency=1, special_tokens=["<|endoftext|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=trainer._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


def bpe_lm(seed: int = 5, positions: int = 96, sharpness: float = 4.0) -> CausalLMScorer:
    torch.manual_seed(seed)
    own = tokenizer()
    end = own.eos_token_id
    config = GPT2Config(
        vocab_size=len(own), n_embd=32, n_layer=2, n_head=4, n_positions=positions, bos_token_id=end, eos_token_id=end
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.mul_(sharpness)
    return CausalLMScorer(model, vocabulary_of(own, len(own), end, end, "tiny bpe"), own)


def spoken(seed: int = 0) -> AcousticModel:
    """A tiny Whisper whose tokens are the two letters, or space and letter, that its tokenizer writes."""
    acoustic = tiny_whisper(seed)
    pieces = [piece(i) for i in range(TEXT_TOKENS)]
    acoustic.scorer.vocabulary = Vocabulary((*pieces, *[None] * (ACOUSTIC_VOCAB - TEXT_TOKENS)), END, None, "spoken")
    return acoustic


def across(seed: int = 0) -> FusionDecoder:
    """The acoustic model with the language model of another tokenizer."""
    return FusionDecoder(spoken(seed), [bpe_lm()])
