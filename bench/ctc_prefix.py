"""CTC prefix scores inside a label-synchronous search: ours, its Python twin, and torch over all candidates at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.timing import Measurement, measurements, take_turns
from shallowfusion.ctc.prefix_scores import PrefixScores
from shallowfusion.ctc.prefix_scores_reference import ReferencePrefixScores

__all__ = ["run"]

SHAPES = ((1, 250, 29), (8, 250, 29), (8, 750, 1025))  # utterances, frames, labels
BEAM, CANDIDATES, STEPS = 5, 20, 12
TOLERANCE = 1e-3  # torch's scores are float32


class TorchPrefixScores:
    """The same in float32 on the torch side: one frame after the other for all candidates, as toolkits do it."""

    def __init__(self, log_probs: Tensor) -> None:
        self.log_probs = log_probs  # [utterances, frames, labels], blank 0
        silent = torch.cumsum(log_probs[:, :, 0], dim=1)
        start = torch.zeros((len(log_probs), 1))
        blank = torch.cat([start, silent], dim=1)[:, None]
        self.blank, self.label = blank, torch.full_like(blank, -torch.inf)  # [utterances, rows, frames + 1]
        self.psi = torch.zeros((len(log_probs), 1))
        self.last = torch.full((len(log_probs), 1), -1)
        self.made: tuple[Tensor, ...] = ()

    def scores(self, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
        own_rows, own_labels = torch.from_numpy(rows), torch.from_numpy(labels)
        utterances = torch.arange(len(rows))[:, None]
        spoken = self.log_probs[utterances, :, own_labels]  # [utterances, candidates, frames]
        blanks = self.log_probs[:, None, :, 0]
        before_blank, before_label = self.blank[utterances, own_rows], self.label[utterances, own_rows]
        is_repeat = (self.last[utterances, own_rows] == own_labels)[:, :, None]
        before = torch.where(is_repeat, before_blank, torch.logaddexp(before_blank, before_label))[:, :, :-1]
        psi = torch.logsumexp(before + spoken, dim=2)
        in_label, in_blank = [torch.full_like(psi, -torch.inf)], [torch.full_like(psi, -torch.inf)]
        for t in range(self.log_probs.shape[1]):
            was = in_label[-1]
            in_label.append(torch.logaddexp(was, before[:, :, t]) + spoken[:, :, t])
            in_blank.append(torch.logaddexp(in_blank[-1], was) + blanks[:, :, t])
        self.made = (torch.stack(in_label, 2), torch.stack(in_blank, 2), psi, own_labels)
        return (psi - self.psi[utterances, own_rows]).numpy()

    def follow(self, places: np.ndarray) -> None:
        """Row k is now candidate places[k] of the latest `scores`."""
        utterances, chosen = torch.arange(len(places))[:, None], torch.from_numpy(places)
        self.label, self.blank, self.psi, self.last = (made[utterances, chosen] for made in self.made)


def searched(scores: Any, labels: np.ndarray) -> np.ndarray:
    """STEPS steps of a search that goes on with the best candidates; all scores that were given."""
    given = []
    rows = np.zeros(labels.shape[1:], dtype=np.int64)
    for step_labels in labels:
        found = scores.scores(rows, step_labels)
        given.append(found)
        best = np.argsort(-found, axis=1, kind="stable")[:, :BEAM]
        if isinstance(scores, TorchPrefixScores):
            scores.follow(best)
        else:
            scores.follow(np.take_along_axis(rows, best, 1), np.take_along_axis(step_labels, best, 1))
        rows = np.tile(np.arange(BEAM), (len(rows), CANDIDATES // BEAM))
    return np.array(given)


def run(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """Milliseconds of a whole search; scores agree before anything is timed."""
    torch.set_num_threads(1)
    for utterances, frames, labels in SHAPES[:1] if quick else SHAPES:
        generator = np.random.default_rng(0)
        logits = generator.normal(size=(utterances, frames, labels)) * 2.0
        logits[:, :, 0] += 4.0 + np.log(labels)
        log_probs = torch.log_softmax(torch.from_numpy(logits), dim=-1).float()
        chosen = generator.integers(1, labels, size=(STEPS, utterances, CANDIDATES))
        providers: dict[str, Callable[[], np.ndarray]] = {
            "ours": lambda p=log_probs, c=chosen: searched(PrefixScores(p, threads=1), c),
            "ours, margin 300": lambda p=log_probs, c=chosen: searched(PrefixScores(p, margin=300.0, threads=1), c),
            "torch, all candidates": lambda p=log_probs, c=chosen: searched(TorchPrefixScores(p), c),
            "python twin": lambda p=log_probs, c=chosen: searched(ReferencePrefixScores(p), c),
        }
        if utterances > 1:
            del providers["python twin"]
        wanted = providers["ours"]()
        for name, provider in providers.items():
            worst = float(np.abs(provider() - wanted).max())
            assert worst < TOLERANCE * max(1.0, float(np.abs(wanted).max())), (name, worst)
        seconds = take_turns(providers, 3 if quick else 9)
        shape = f"{utterances} utterances, {frames} frames, {labels} labels, beam {BEAM}, {STEPS} steps"
        yield measurements("ctc_prefix", shape, "float32", seconds, "ours")
