"""Reading recordings."""

from shallowfusion.audio.reading import read_audio

__all__ = ["read_audio"]
