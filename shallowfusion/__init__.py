"""Beam search that fuses the scores of speech-recognition and language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shallowfusion import fusion
from shallowfusion.errors import ShallowFusionError
from shallowfusion.fusion.step import fused_step, row_statistics
from shallowfusion.options import DecodingOptions

if TYPE_CHECKING:
    from shallowfusion.decoder import FusionDecoder

__all__ = ["DecodingOptions", "FusionDecoder", "ShallowFusionError", "fused_step", "fusion", "row_statistics"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The decoder imports transformers, which takes seconds: only those who ask for it wait for it.
    if name == "FusionDecoder":
        from shallowfusion.decoder import FusionDecoder

        return FusionDecoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
