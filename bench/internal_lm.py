"""The internal language model: a pass of its own, against rows stacked below the acoustic ones (METHODS 6.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from bench.decode import SHAPES, START, Shape, make_pair
from bench.timing import Measurement, measurements, take_turns

__all__ = ["run"]

BEAM = 5


def run(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """Decoder steps of an acoustic model and its internal LM of variant zero_encoder, which both ways can express.

    Every provider reads the same tokens; log-probs of all rows are compared before anything is timed.
    """
    if device == "cpu":
        torch.set_num_threads(1)
    steps, repeats = (3, 1) if quick else (10, 5)
    for name, utterances in (("tiny", 2),) if quick else (("tiny", 8), ("whisper-small.en+gpt2", 1)):
        providers = made(SHAPES[name], utterances, steps, device)
        seconds = take_turns(providers, repeats, 1, device)
        title = f"{name}, {utterances} utterances, beam {BEAM}, {steps} steps"
        yield measurements("internal_lm", title, "float32", seconds, "a pass of its own, zero_encoder")


def made(shape: Shape, utterances: int, steps: int, device: str) -> dict[str, Callable[[], object]]:
    """The providers of one shape, after their log-probs were found equal."""
    from shallowfusion.scorers.base import Context
    from shallowfusion.scorers.internal_lm import InternalLMScorer

    scorer = make_pair(shape, device).alone.acoustic.scorer  # type: ignore[attr-defined]
    states = torch.randn((utterances, shape.frames, shape.width), device=device)
    tokens = np.random.default_rng(0).integers(0, 1000, (steps, utterances, BEAM))
    twice = np.concatenate([tokens, tokens], axis=1)
    prompts = [[START]] * utterances
    heard = Context(prompts, BEAM, steps + 1, states)
    both = Context(prompts * 2, BEAM, steps + 1, torch.cat([states, torch.zeros_like(states)]))
    zeros, left_out = (InternalLMScorer(scorer, variant) for variant in ("zero_encoder", "zero_context"))
    together = stepped(scorer, both, twice).log_softmax(dim=1).chunk(2)
    torch.testing.assert_close(stepped(scorer, heard, tokens).log_softmax(dim=1), together[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(stepped(zeros, heard, tokens), together[1].clamp_min(-20.0), atol=1e-3, rtol=1e-3)
    return {
        "acoustic alone": lambda: stepped(scorer, heard, tokens),
        "a pass of its own, zero_encoder": lambda: [stepped(own, heard, tokens) for own in (scorer, zeros)],
        "a pass of its own, zero_context": lambda: [stepped(own, heard, tokens) for own in (scorer, left_out)],
        "stacked rows, zero_encoder": lambda: stepped(scorer, both, twice),
    }


def stepped(scorer: object, context: object, tokens: np.ndarray) -> Tensor:
    """Logits after all steps, [rows, vocab]; every row grows from itself."""
    state = scorer.start(context)  # type: ignore[attr-defined]
    parents = np.zeros(tokens.shape[1:], dtype=np.int64)
    for step in tokens:
        state = scorer.fork(state, parents)  # type: ignore[attr-defined]
        logits, state = scorer.score(state, step)  # type: ignore[attr-defined]
        parents = np.tile(np.arange(BEAM), (tokens.shape[1], 1))
    found: Tensor = logits
    return found
