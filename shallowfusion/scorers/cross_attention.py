"""Where a Whisper-type decoder looks while it says given tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shallowfusion.scorers.whisper import WhisperScorer

__all__ = ["attention_over_frames"]


@torch.inference_mode()
def attention_over_frames(
    scorer: WhisperScorer, encoder_output: Tensor, prefix: Sequence[int], hypotheses: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Cross-attention of each token of each hypothesis, mean over layers and heads.

    All hypotheses are read in one pass side by side, so the recording's keys are computed once.

    Args:
        encoder_output: [frames, size] of one recording.
        prefix: tokens before the text; attention is reported from the step that says the first text token on.
        hypotheses: text tokens of each.

    Returns:
        Per hypothesis float32 [tokens + 1, frames], rows sum to 1; the last row is that of the step after the text,
        which says the end token or would.
    """
    rows = [[*prefix, *tokens] for tokens in hypotheses]
    lengths = torch.tensor([len(row) for row in rows])
    owner = torch.repeat_interleave(torch.arange(len(rows)), lengths)
    positions = torch.cat([torch.arange(int(n)) for n in lengths])
    visible = (owner[:, None] == owner[None]) & (positions[:, None] >= positions[None])
    device = encoder_output.device
    decoder = scorer.model.model.decoder
    found: list[Tensor] = []
    hooks = [
        layer.encoder_attn.register_forward_pre_hook(_looks(found, encoder_output[None]), with_kwargs=True)
        for layer in decoder.layers
    ]
    try:
        decoder(
            input_ids=torch.tensor([[token for row in rows for token in row]], device=device),
            position_ids=positions[None].to(device),
            attention_mask=visible[None, None].to(device),
            encoder_hidden_states=encoder_output[None],
            use_cache=False,
        )
    finally:
        for hook in hooks:
            hook.remove()
    mean = torch.stack(found).mean(dim=0)
    first = len(prefix) - 1
    return [part[first:].cpu() for part in torch.split(mean, lengths.tolist())]


def _looks(found: list[Tensor], heard: Tensor) -> Any:
    """A hook that computes what the attention is about to see, [tokens, frames], mean over heads."""

    def look(module: Any, arguments: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        hidden = named["hidden_states"] if "hidden_states" in named else arguments[0]
        tokens, heads = hidden.shape[1], module.num_heads
        query = module.q_proj(hidden).view(tokens, heads, -1).transpose(0, 1).float()
        key = module.k_proj(heard).view(heard.shape[1], heads, -1).transpose(0, 1).float()
        scores = query @ key.transpose(1, 2) * module.head_dim**-0.5
        found.append(torch.softmax(scores, dim=-1).mean(dim=0))

    return look
