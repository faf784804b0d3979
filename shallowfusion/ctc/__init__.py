"""CTC prefix beam search with language models inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shallowfusion.ctc.decoder import CTCDecoder
    from shallowfusion.ctc.settings import CtcLanguage, CtcOptions

__all__ = ["CTCDecoder", "CtcLanguage", "CtcOptions"]


def __getattr__(name: str) -> Any:
    # The parts below import each other: only those who ask for the front wait for all of it.
    if name == "CTCDecoder":
        from shallowfusion.ctc.decoder import CTCDecoder

        return CTCDecoder
    if name in __all__:
        from shallowfusion.ctc import settings

        return getattr(settings, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
