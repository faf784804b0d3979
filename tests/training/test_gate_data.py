"""What gates are trained on, and that a killed run makes nothing twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shallowfusion import DecodingOptions, FusionDecoder, fusion
from shallowfusion.evaluation.manifest import read_manifest
from shallowfusion.evaluation.normalisation import normaliser
from shallowfusion.fusion.learned_gate import GateNetwork, GateSettings
from shallowfusion.training.gate_data import GateSet, with_gate
from shallowfusion.training.gate_training import path_total
from shallowfusion.training.kept import Kept
from shallowfusion.training.session import EncodedSet
from tests.shipped import decoder
from tests.training.worlds import manifest

OPTIONS = DecodingOptions(beam_size=3, batch_size=1)


class Counting(FusionDecoder):
    """The demo decoder; dies after a number of decodings."""

    calls = 0
    most: int | None = None

    def decode(self, *arguments, **names):
        if self.most is not None and self.calls >= self.most:
            raise KeyboardInterrupt
        self.calls += 1
        return super().decode(*arguments, **names)


def gate_set(directory: Path, most: int | None = None) -> tuple[Counting, GateSet]:
    recordings = read_manifest(manifest(directory / "dev.jsonl", 1, 5))
    own = Counting(decoder().acoustic, decoder().language_models)
    own.most = most
    encoded = EncodedSet(own, directory / "work")
    encoded.make(recordings, lambda batches, _: batches, 8)
    kept = Kept(directory / "work")
    return own, GateSet(own, recordings, encoded, OPTIONS, normaliser("basic"), lambda batches, _: batches, kept)


def test_an_untrained_gate_in_plain_form_is_the_constant_weight(tmp_path: Path) -> None:
    _, own = gate_set(tmp_path)
    network = GateNetwork(GateSettings(largest_weight=1.6, first_weight=0.8))
    recordings = [recording.audio for recording in own.recordings]
    gate = with_gate(OPTIONS, network, decoder().fingerprints, "plain")
    constant = decoder().transcribe(recordings, rule=fusion.static(0.8), beam_size=3)
    for found, wanted in zip(decoder().transcribe(recordings, gate), constant, strict=True):
        assert found.best.token_ids == wanted.best.token_ids
        assert found.best.total == pytest.approx(wanted.best.total, abs=1e-3)


def test_totals_of_lists_are_those_of_the_search(tmp_path: Path) -> None:
    _, own = gate_set(tmp_path)
    results = decoder().transcribe(
        [recording.audio for recording in own.recordings], rule=fusion.static(0.8), beam_size=3, n_best=3
    )
    ranked = [[h for h in result.n_best if h.ended] for result in results]
    lists = own.lists(0.8, 3)
    assert lists
    for listed in lists:
        hypotheses = next(h for h in ranked if len(h) == len(listed.traces) and _fits(h, listed))
        for hypothesis, trace in zip(hypotheses, listed.traces, strict=True):
            total = path_total(torch.full((len(trace), 1), 0.8), trace, "plain")
            assert float(total) == pytest.approx(hypothesis.total, abs=2e-2)


def _fits(hypotheses, listed) -> bool:
    return all(len(h.tokens) == len(t) for h, t in zip(hypotheses, listed.traces, strict=True))


def test_a_killed_run_makes_nothing_twice(tmp_path: Path) -> None:
    def run(own: GateSet) -> tuple[int, int, int]:
        traces = own.traces(True)
        lists = own.lists(0.8, 3)
        return len(traces), len(lists), own.errors(DecodingOptions(rule=fusion.static(0.4), batch_size=1), "")

    (tmp_path / "whole").mkdir()
    whole, own = gate_set(tmp_path / "whole")
    wanted = run(own)
    (tmp_path / "cut").mkdir()
    first, cut = gate_set(tmp_path / "cut", most=3)
    with pytest.raises(KeyboardInterrupt):
        run(cut)
    second, rest = gate_set(tmp_path / "cut")
    assert run(rest) == wanted
    assert first.calls + second.calls == whole.calls
    third, again = gate_set(tmp_path / "cut")
    assert run(again) == wanted
    assert third.calls == 0
