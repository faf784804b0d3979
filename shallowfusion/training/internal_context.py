"""An encoder output that stands for "no recording", trained so that the decoder behind it is a good language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shallowfusion.config import require
from shallowfusion.scorers.loading import AcousticModel

__all__ = ["TrainedContext", "train_internal_context", "write_internal_context"]


@dataclass(frozen=True)
class TrainedContext:
    """The outcome of a training.

    Args:
        context: float32 [frames, size].
        before, after: perplexity per token of the held-out texts with an encoder output of zeros and with `context`.
    """

    context: Tensor
    before: float
    after: float


def train_internal_context(
    acoustic: AcousticModel,
    texts: Sequence[str],
    num_frames: int = 1,
    steps: int = 300,
    batch_size: int = 16,
    learning_rate: float = 0.02,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> TrainedContext:
    """Fit encoder frames to transcripts of the kind the acoustic model was trained on; the decoder stays as it is.

    The fewer surprises the transcripts hold for the deaf decoder, the better it stands for what the acoustic model
    takes for likely without listening (METHODS 6.2, variant "trained"). Every tenth text is held out.

    Args:
        texts: at least ten.
        num_frames: of the context; all layers see the same.

    Raises:
        InvalidArgumentError: too few texts, or a number below 1.

    Source: after "learned context" for LAS models; ours shares it between layers.
    """
    require(len(texts) >= 10, f"texts must hold at least 10 transcripts, got {len(texts)}.")
    for name, value in (("num_frames", num_frames), ("steps", steps), ("batch_size", batch_size)):
        require(isinstance(value, int) and value >= 1, f"{name} must be an integer of at least 1, got {value!r}.")
    rows = [_ids(acoustic, text) for text in texts]
    held_out = rows[::10]
    trained = [row for i, row in enumerate(rows) if i % 10]
    size = acoustic.scorer.model.config.d_model
    zeros = torch.zeros((1, size))
    before = _perplexity(acoustic, zeros, held_out, batch_size)
    generator = torch.Generator().manual_seed(0)
    context = (0.02 * torch.randn((num_frames, size), generator=generator)).requires_grad_()
    optimiser = torch.optim.Adam([context], lr=learning_rate)
    best, kept = before, zeros
    for step in range(steps):
        chosen = torch.randint(0, len(trained), (batch_size,), generator=generator).tolist()
        loss = _loss(acoustic, context, [trained[i] for i in chosen])
        optimiser.zero_grad()
        (context.grad,) = torch.autograd.grad(loss, [context])
        optimiser.step()
        progress(step, float(loss.detach()))
        if (step + 1) % 50 == 0 or step + 1 == steps:
            own = _perplexity(acoustic, context.detach(), held_out, batch_size)
            if own < best:
                best, kept = own, context.detach().clone()
    return TrainedContext(kept, before, best)


def write_internal_context(path: Path, found: TrainedContext) -> None:
    """Store it as safetensors."""
    from safetensors.torch import save_file

    figures = {"perplexity_before": f"{found.before:.4f}", "perplexity_after": f"{found.after:.4f}"}
    save_file({"internal_context": found.context.contiguous()}, str(path), metadata=figures)


def _ids(acoustic: AcousticModel, text: str) -> list[int]:
    """Start, text and end tokens, as far as the decoder's window reaches."""
    tokens = acoustic.tokens
    prefix = [tokens.start, *([] if tokens.no_timestamps is None else [tokens.no_timestamps])]
    ids = [*prefix, *acoustic.tokenizer.encode(text, add_special_tokens=False), tokens.end]
    return ids[: acoustic.scorer.window]


def _loss(acoustic: AcousticModel, context: Tensor, rows: Sequence[Sequence[int]], reduction: str = "mean") -> Tensor:
    """Cross-entropy of everything after the start token; padding does not count."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), acoustic.tokens.end)
    wanted = torch.full((len(rows), longest - 1), -100)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        wanted[i, : len(row) - 1] = torch.tensor(row[1:])
    model = acoustic.scorer.model
    device, number = model.device, model.dtype
    heard = context.to(device, number).expand(len(rows), -1, -1)
    hidden = model.model.decoder(input_ids=ids[:, :-1].to(device), encoder_hidden_states=heard, use_cache=False)
    logits = model.proj_out(hidden.last_hidden_state).float()
    return torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), wanted.to(device), ignore_index=-100, reduction=reduction
    )


@torch.no_grad()
def _perplexity(acoustic: AcousticModel, context: Tensor, rows: Sequence[Sequence[int]], batch_size: int) -> float:
    total, count = 0.0, 0
    for first in range(0, len(rows), batch_size):
        own = rows[first : first + batch_size]
        total += float(_loss(acoustic, context, own, reduction="sum"))
        count += sum(len(row) - 1 for row in own)
    return math.exp(total / count)
