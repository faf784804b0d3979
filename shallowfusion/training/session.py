"""A development set decoded many times: recordings are encoded once, every list is kept, a killed run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shallowfusion.audio.reading import read_audio
from shallowfusion.config import require
from shallowfusion.decoder import FusionDecoder
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.evaluation.manifest import Recording
from shallowfusion.evaluation.nbest import NBestList, list_of
from shallowfusion.evaluation.stored import HypothesisStore
from shallowfusion.evaluation.word_errors import WordErrors, word_errors
from shallowfusion.options import DecodingOptions
from shallowfusion.scorers.fingerprints import tensor_fingerprint

__all__ = ["EncodedSet", "Progress", "TunedSet"]

Progress = Callable[[Sequence[Any], str], Iterable[Any]]


class EncodedSet:
    """Encoder output of recordings on disk, each made once.

    Price on disk: frames * size numbers per recording (Whisper small, float16: 2.3 MB).

    Args:
        decoder: whose encoder it is.
        directory: where the files are; made if it is not there.
    """

    def __init__(self, decoder: FusionDecoder, directory: Path) -> None:
        self._decoder, self._directory = decoder, directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidArgumentError(f"{directory} cannot be made ({error}); name another directory.") from error

    def make(self, recordings: Sequence[Recording], progress: Progress, batch_size: int) -> None:
        """Encode what is not there yet.

        Raises:
            AudioError: a recording cannot be read; what was encoded before stays.
        """
        todo = [recording for recording in recordings if not self._path(recording).exists()]
        batches = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
        for batch in progress(batches, "encoding"):
            encoded = self._decoder.encode([recording.audio for recording in batch])
            rate = self._decoder.acoustic.features.sampling_rate
            for recording, output in zip(batch, encoded, strict=True):
                seconds = len(read_audio(recording.audio, rate)) / rate
                self._write(self._path(recording), output, seconds)

    def read(self, recordings: Sequence[Recording]) -> Tensor:
        """[recordings, frames, size] of recordings that were made."""
        from safetensors.torch import load_file

        return torch.stack([load_file(self._path(recording))["encoded"] for recording in recordings])

    def seconds(self, recordings: Sequence[Recording]) -> list[float]:
        """Length of each recording that was made."""
        from safetensors.torch import load_file

        return [float(load_file(self._path(recording))["seconds"]) for recording in recordings]

    def names(self, recordings: Sequence[Recording]) -> list[str]:
        """What tells one recording's encoder output from another's."""
        return [self._path(recording).stem for recording in recordings]

    def _write(self, path: Path, output: Tensor, seconds: float) -> None:
        """Under another name first, so that a cut file is never taken for a whole one."""
        from safetensors.torch import save_file

        half = path.with_suffix(".part")
        save_file({"encoded": output.cpu().contiguous(), "seconds": torch.tensor(seconds, dtype=torch.float64)}, half)
        half.replace(path)

    def _path(self, recording: Recording) -> Path:
        require(recording.audio.is_file(), f"{recording.audio} does not exist.")
        status = recording.audio.stat()
        parts = ["with seconds", self._decoder.fingerprints[0], str(self._decoder.acoustic.scorer.model.dtype)]
        parts += [str(recording.audio.resolve()), str(status.st_size), str(status.st_mtime_ns)]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
        return self._directory / f"{digest}.safetensors"


@dataclass(frozen=True)
class TunedSet:
    """Recordings with references, decoded again and again from what was encoded once.

    Args:
        recordings: with references.
        normalise: as word errors are counted.
    """

    decoder: FusionDecoder
    recordings: tuple[Recording, ...]
    encoded: EncodedSet
    store: HypothesisStore
    normalise: Callable[[str], str]
    progress: Progress

    @cached_property
    def references(self) -> list[str]:
        return [recording.text for recording in self.recordings]

    def decode(self, options: DecodingOptions, title: str, fuses: bool = True) -> dict[str, NBestList]:
        """N-best lists by id, with references, best first; only what the store lacks is decoded.

        Args:
            fuses: False leaves the language models out altogether.
        """
        decoder = self.decoder if fuses else FusionDecoder(self.decoder.acoustic)
        system = self._system(options, fuses)
        done = {recording.id: self.store.find(system, recording) for recording in self.recordings}
        todo = [recording for recording in self.recordings if done[recording.id] is None]
        batches = [todo[start : start + options.batch_size] for start in range(0, len(todo), options.batch_size)]
        for batch in self.progress(batches, title):
            results = decoder.decode(self.encoded.read(batch), options, seconds=self.encoded.seconds(batch))
            for recording, result in zip(batch, results, strict=True):
                found = list_of(result, recording.id)
                self.store.add(system, recording, found)
                done[recording.id] = found
        references = {recording.id: recording.text for recording in self.recordings}
        return {id: replace(own, reference=references[id]) for id, own in done.items() if own is not None}

    def texts(self, lists: Mapping[str, NBestList]) -> list[str]:
        """First choices, in the order of the recordings."""
        return [lists[recording.id].first.text for recording in self.recordings]

    def errors(self, lists: Mapping[str, NBestList]) -> WordErrors:
        """Word errors of the first choices."""
        return word_errors(self.references, self.texts(lists), self.normalise)

    def _system(self, options: DecodingOptions, fuses: bool) -> str:
        """Which models and options made a stored list, independent of where they lie on disk and of the batch."""
        prints = self.decoder.fingerprints if fuses else self.decoder.fingerprints[:1]
        dtype = str(self.decoder.acoustic.scorer.model.dtype)
        parts = ["with seconds", repr(replace(options, batch_size=1)), *prints, dtype]
        context = self.decoder.internal_context
        if options.rule is not None and options.rule.ilm_variant == "trained" and context is not None:
            parts.append(tensor_fingerprint(context))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
