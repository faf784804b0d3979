"""The language model inside a Whisper-type decoder: what it says without hearing anything (METHODS 6.2)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from shallowfusion.config import require
from shallowfusion.errors import ModelError
from shallowfusion.scorers.base import Context, DecoderState
from shallowfusion.scorers.slots import SlotPlan
from shallowfusion.scorers.whisper import WhisperScorer

__all__ = ["InternalLMScorer", "read_internal_context"]

SMALLEST_LOG_PROB = -20.0


class InternalLMScorer(WhisperScorer):
    """Log-probs of the acoustic model's decoder with the recording taken away, kept above -20.

    Below that an impossible token would earn weight * (a large number) when its log-prob is subtracted.

    Price: one decoder pass per step beside the acoustic one, with one frame of cross-attention ("zero_encoder",
    "mean_context"), as many as were trained, all of them ("silence"), or none ("zero_context").

    Args:
        scorer: the acoustic model.
        variant: "zero_encoder": encoder output 0, so that biases still speak; "zero_context": the cross-attention
            branch is left out; "mean_context": the mean of the recording's frames; "silence" and "trained":
            `substitute` takes the encoder output's place.
        substitute: [frames, size], for "silence" and "trained".
    """

    def __init__(self, scorer: WhisperScorer, variant: str, substitute: Tensor | None = None) -> None:
        super().__init__(scorer.model, scorer.vocabulary)
        size = self.model.config.d_model
        require(
            (substitute is not None) == (variant in ("silence", "trained")),
            f"the variant {variant!r} {'needs' if substitute is None else 'takes no'} encoder output of its own.",
        )
        if substitute is not None:
            require(
                substitute.dim() == 2 and substitute.shape[1] == size and len(substitute) > 0,
                f"the encoder output of variant {variant!r} must be [frames, {size}], got {list(substitute.shape)}.",
            )
        self.variant = variant
        self.substitute = substitute

    def start(self, context: Context) -> DecoderState:
        """Read the prompts; the recordings' encoder output is replaced first."""
        assert context.encoder_output is not None
        return super().start(dataclasses.replace(context, encoder_output=self._deaf(context.encoder_output)))

    def hidden_states(self, state: DecoderState, token_ids: Tensor, positions: Tensor, plan: SlotPlan) -> Tensor:
        if self.variant != "zero_context":
            return super().hidden_states(state, token_ids, positions, plan)
        hidden: Tensor = self.model.model.decoder(
            input_ids=token_ids,
            position_ids=positions,
            attention_mask=plan.mask_for(self.model),
            encoder_hidden_states=None,  # leaves the cross-attention branch out
            past_key_values=state.cache,
            use_cache=True,
            **plan.options,
        ).last_hidden_state
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        return torch.log_softmax(super().head(hidden).float(), dim=-1).clamp_min(SMALLEST_LOG_PROB)

    def _deaf(self, encoder_output: Tensor) -> Tensor:
        utterances, _, size = encoder_output.shape
        if self.variant == "mean_context":
            return encoder_output.mean(dim=1, keepdim=True)
        if self.substitute is None:
            return encoder_output.new_zeros((utterances, 1, size))
        return self.substitute.to(encoder_output).expand(utterances, -1, -1)


def read_internal_context(path: str | Path) -> Tensor:
    """Encoder output [frames, size] that `shallowfusion train-ilm` stored.

    Raises:
        ModelError: no such file, or another kind of file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: Tensor = load_file(str(path))["internal_context"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelError(
            f"{path} holds no trained internal context ({error}); make one with shallowfusion train-ilm."
        ) from error
    return found
