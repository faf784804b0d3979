"""What a gate is trained on: the models' scores of references, of what was heard, and of n-best lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from shallowfusion.decoder import FusionDecoder
from shallowfusion.evaluation.manifest import Recording
from shallowfusion.evaluation.word_errors import word_errors
from shallowfusion.fusion.catalogue import gated, static
from shallowfusion.fusion.gates import Form
from shallowfusion.fusion.learned_gate import GateNetwork, LearnedGate
from shallowfusion.options import DecodingOptions
from shallowfusion.training.gate_training import TracedList, corrupted_text
from shallowfusion.training.kept import Kept
from shallowfusion.training.session import EncodedSet, Progress
from shallowfusion.training.teacher_forcing import ForcedText, Trace, force, text_ids
from shallowfusion.values import RowStatistics

__all__ = ["GateSet", "with_gate"]


class GateSet:
    """Recordings with references, as a gate sees them.

    Args:
        decoder: with the language models the gate is to weigh.
        options: without a rule.
        normalise: as word errors are counted.
        kept: where traces, lists and transcripts go batch by batch; None keeps nothing.
    """

    def __init__(
        self,
        decoder: FusionDecoder,
        recordings: Sequence[Recording],
        encoded: EncodedSet,
        options: DecodingOptions,
        normalise: Callable[[str], str],
        progress: Progress,
        kept: Kept | None = None,
    ) -> None:
        self._decoder, self._encoded, self._progress = decoder, encoded, progress
        self._options, self._normalise = options, normalise
        self.recordings = tuple(recordings)
        self._kept = kept or Kept(None)
        # Decodings of training: every model is read, none has its final weight yet.
        self._forced = replace(options, rule=static((1.0,) * len(decoder.language_models)))

    def traces(self, with_heard: bool) -> list[Trace]:
        """Of every reference, and with `with_heard` of what the acoustic model alone makes of the recording.

        Price: a forced pass of all models per batch; with `with_heard` a search and another forced pass.
        """
        found: list[Trace] = []
        for batch, encoded in self._batches("reading references"):
            made = self._kept.had(
                ("traces", with_heard, *self._key(batch)),
                lambda batch=batch, encoded=encoded: _as_data(self._traces(batch, encoded, with_heard)),  # type: ignore[misc]
            )
            found += map(_as_trace, made)
        return found

    def _traces(self, batch: Sequence[Recording], encoded: Tensor, with_heard: bool) -> list[Trace]:
        end = self._decoder.acoustic.tokens.end
        references = [text_ids(self._decoder, recording.text) for recording in batch]
        found = self._force(encoded, [ForcedText.of(ids, end) for ids in references])
        if with_heard:
            plain = replace(self._options, asr_temperature=1.0, lm_temperature=1.0)
            heard = FusionDecoder(self._decoder.acoustic).decode(encoded, plain)
            pairs = zip(references, heard, strict=True)
            found += self._force(encoded, [corrupted_text(ids, own.best.token_ids, end) for ids, own in pairs])
        return found

    def lists(self, weight: float, n_best: int) -> list[TracedList]:
        """N-best lists decoded with a constant weight, where their hypotheses differ in errors."""
        rule = static((weight,) * len(self._decoder.language_models))
        options = replace(self._options, rule=rule, n_best=min(n_best, self._options.beam_size))
        found: list[TracedList] = []
        for batch, encoded in self._batches("n-best lists"):
            made = self._kept.had(
                ("lists", repr(options), *self._key(batch)),
                lambda batch=batch, encoded=encoded: [  # type: ignore[misc]
                    (_as_data(own.traces), list(own.errors)) for own in self._lists(batch, encoded, options)
                ],
            )
            found += [TracedList(tuple(map(_as_trace, traces)), tuple(errors)) for traces, errors in made]
        return found

    def _lists(self, batch: Sequence[Recording], encoded: Tensor, options: DecodingOptions) -> list[TracedList]:
        end, found = self._decoder.acoustic.tokens.end, []
        for i, result in enumerate(self._decoder.decode(encoded, options)):
            listed = [own for own in result.n_best if own.ended]
            texts = [own.text for own in listed]
            if len(listed) < 2:
                continue
            errors = word_errors([batch[i].text] * len(texts), texts, self._normalise).errors
            if len(set(errors)) > 1:
                rows = encoded[i : i + 1].expand(len(listed), -1, -1)
                traces = self._force(rows, [ForcedText.of(own.token_ids, end) for own in listed])
                found.append(TracedList(tuple(traces), errors))
        return found

    def errors(self, options: DecodingOptions, title: str, fuses: bool = True) -> int:
        """Word errors of decoding with the options."""
        decoder = self._decoder if fuses else FusionDecoder(self._decoder.acoustic)
        gate = None if options.rule is None else options.rule.gate
        weights = list(gate.network.state_dict().values()) if isinstance(gate, LearnedGate) else []
        texts: list[str] = []
        for batch, encoded in self._batches(title):
            texts += self._kept.had(
                ("texts", fuses, repr(options), *self._key(batch), *weights),
                lambda encoded=encoded: [own.text for own in decoder.decode(encoded, options)],  # type: ignore[misc]
            )
        return sum(word_errors([own.text for own in self.recordings], texts, self._normalise).errors)

    def _batches(self, title: str) -> Iterator[tuple[Sequence[Recording], Tensor]]:
        size = self._options.batch_size
        batches = [self.recordings[start : start + size] for start in range(0, len(self.recordings), size)]
        for batch in self._progress(batches, title):
            yield batch, self._encoded.read(batch)

    def _key(self, batch: Sequence[Recording]) -> list[str]:
        """Which models and recordings a piece was made of."""
        dtype = str(self._decoder.acoustic.scorer.model.dtype)
        forced = [repr(self._forced), *self._decoder.fingerprints, dtype]
        return [*forced, *(f"{own.id} {own.text}" for own in batch), *self._encoded.names(batch)]

    def _force(self, encoded: Tensor, texts: Sequence[ForcedText]) -> list[Trace]:
        return force(self._decoder, encoded, texts, self._forced)


def _as_data(traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """Traces as dictionaries of tensors."""
    return [{**vars(own), "statistics": [vars(one) for one in own.statistics]} for own in traces]


def _as_trace(data: dict[str, Any]) -> Trace:
    return Trace(**{**data, "statistics": tuple(RowStatistics(**one) for one in data["statistics"])})


def with_gate(
    options: DecodingOptions, network: GateNetwork, fingerprints: Sequence[str], form: Form
) -> DecodingOptions:
    """The options with a gate that is in memory as the rule."""
    settings = network.settings
    gate = LearnedGate(settings, network, tuple(fingerprints), "in training")
    return replace(options, rule=gated((settings.largest_weight,) * settings.num_models, gate, form))
