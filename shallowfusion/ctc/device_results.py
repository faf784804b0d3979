"""From the beam of the device search to hypotheses: final scores, equal texts as one, labels and times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shallowfusion.ctc.device_step import Beam, DeviceRules, Trail
from shallowfusion.ctc.results import CtcHypothesis
from shallowfusion.ctc.search_reference import log_add
from shallowfusion.ctc.settings import CtcAlphabet

__all__ = ["hypotheses_of"]

Int32Array = npt.NDArray[np.int32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Final:
    """A hypothesis before its labels are known."""

    place: int
    asr: float
    total: float


@dataclass(frozen=True, eq=False)
class Spelled:
    """The labels of one place, with the first frame of each and the one after its last."""

    labels: Int32Array
    frames: Int32Array


def hypotheses_of(
    beam: Beam, trails: Sequence[tuple[Trail, Tensor]], rules: DeviceRules, alphabet: CtcAlphabet,
    n_best: int, ended: bool, scores_end: bool,
) -> list[list[CtcHypothesis]]:  # fmt: skip
    """The best hypotheses of every utterance; synchronises.

    Args:
        ended: the last word is closed; with `scores_end` the end of the sentence is scored then.
    """
    mass = rules.add(beam.blank, beam.label)
    said, lm, lm_states = rules.ended(beam, scores_end) if ended else (beam.fused, beam.lm, beam.lm_state)
    columns = {"mass": mass, "fused": beam.fused, "lm": lm, "said": said}
    scores: dict[str, Doubles] = {name: tensor.cpu().numpy() for name, tensor in columns.items()}
    states = lm_states.cpu().numpy()
    num_utterances, size = scores["mass"].shape
    by_text = alphabet.delimiter is not None and alphabet.is_ambiguous and rules.spelling is None
    if by_text:
        everywhere = np.broadcast_to(np.arange(size), (num_utterances, size))
        spelled = _spelled(beam, trails, everywhere)
        texts = [[text_of(own.labels, alphabet) for own in row] for row in spelled]
        keys: Any = texts
    else:
        keys = _text_hashes(beam, rules).tolist()
    finals = [
        _finals(scores["mass"][u], scores["fused"][u], scores["said"][u], keys[u], rules)[:n_best]
        for u in range(num_utterances)
    ]
    width = max((len(own) for own in finals), default=0)
    places = np.array([[f.place for f in own] + [0] * (width - len(own)) for own in finals], dtype=np.int64)
    chosen = _spelled(beam, trails, places.reshape(num_utterances, width))
    return [
        [
            _hypothesis(final, chosen[u][n], scores["lm"][u], states[u], rules, alphabet)
            for n, final in enumerate(finals[u])
        ]
        for u in range(num_utterances)
    ]


def _text_hashes(beam: Beam, rules: DeviceRules) -> Tensor:
    """Equal where texts are: a delimiter at the end does not show."""
    if rules.spelling is not None:
        return rules.spelling.texts(beam.sites[rules.trackers.index(rules.spelling)])
    return torch.where(beam.last == rules.delimiter, beam.parent_hash, beam.hash) if rules.delimiter >= 0 else beam.hash


def _finals(mass: Doubles, fused: Doubles, said: Doubles, keys: Sequence[Any], rules: DeviceRules) -> list[Final]:
    """Best first; of places with equal texts the first stands for all."""
    first: dict[Any, int] = {}
    asr: dict[int, float] = {}
    add = max if rules.use_max else log_add
    for place in range(len(mass)):
        if mass[place] == -math.inf:
            break  # the rest is empty
        own = float(mass[place] - fused[place])
        head = first.setdefault(keys[place], place)
        asr[head] = own if head == place else add(asr[head], own)
    found = [Final(place, value, float(value + said[place])) for place, value in asr.items()]
    best = max((final.total for final in found), default=-math.inf)
    return sorted((f for f in found if f.total >= best - rules.margin), key=lambda final: -final.total)


def _spelled(beam: Beam, trails: Sequence[tuple[Trail, Tensor]], places: npt.NDArray[np.int64]) -> list[list[Spelled]]:
    """Labels and times at places [utterances, wanted], walking the best alignments backwards on the device."""
    place = torch.from_numpy(places.copy()).to(beam.last.device)
    ending = (beam.label_best > beam.blank_best).long().gather(1, place)
    said: list[npt.NDArray[Any]] = []
    begun: list[npt.NDArray[Any]] = []
    counted: list[npt.NDArray[Any]] = []
    for trail, numbers in reversed(trails):
        label_of = torch.empty((len(numbers), *place.shape), dtype=torch.int32, device=place.device)
        begins = torch.empty(label_of.shape, dtype=torch.bool, device=place.device)
        flat = trail.codes.flatten(2)
        for number in range(len(numbers) - 1, -1, -1):
            is_active = (numbers[number] >= 0)[:, None]
            code = flat[number].gather(1, place * 2 + ending).long()
            last = trail.last[number].gather(1, place)
            label_of[number] = last.masked_fill(~is_active | (ending == 0), -1)
            begins[number] = (code % 2 == 1) & is_active & (ending == 1)
            place = torch.where(is_active, code // 4, place)
            ending = torch.where(is_active, code // 2 % 2, ending)
        said.append(label_of.cpu().numpy())
        begun.append(begins.cpu().numpy())
        counted.append(numbers.cpu().numpy())
    if not said:
        nothing = Spelled(np.zeros(0, np.int32), np.zeros((0, 2), np.int32))
        return [[nothing] * places.shape[1] for _ in places]
    labels, starts, frames = (np.concatenate(parts[::-1]) for parts in (said, begun, counted))
    return [[_runs(labels[:, u, n], starts[:, u, n], frames[:, u]) for n in range(places.shape[1])]
            for u in range(len(places))]  # fmt: skip


def _runs(labels: npt.NDArray[Any], starts: npt.NDArray[Any], frames: npt.NDArray[Any]) -> Spelled:
    """Each label from where it begins to its last frame."""
    begin = np.flatnonzero(starts)
    spoken = np.flatnonzero(labels >= 0)
    stop = np.append(begin[1:], len(labels))
    last = spoken[np.searchsorted(spoken, stop) - 1] if len(begin) else begin
    times = np.stack([frames[begin], frames[last] + 1], axis=1).astype(np.int32).reshape(-1, 2)
    return Spelled(labels[begin].astype(np.int32), times)


def text_of(labels: Int32Array, alphabet: CtcAlphabet) -> str:
    return words_of(Spelled(labels, np.zeros((len(labels), 2), np.int32)), alphabet)[0]


def words_of(spelled: Spelled, alphabet: CtcAlphabet) -> tuple[str, Int32Array]:
    """The text, and the first frame of each word and the one after its last."""
    words: list[str] = []
    times: list[list[int]] = []
    fresh = True
    for label, (start, end) in zip(spelled.labels.tolist(), spelled.frames.tolist(), strict=True):
        piece = alphabet.pieces[label]
        fresh = fresh or piece.begins_word
        if piece.text and fresh:
            words.append(piece.text)
            times.append([start, end])
            fresh = False
        elif piece.text:
            words[-1] += piece.text
            times[-1][1] = end
        fresh = fresh or piece.ends_word
    return " ".join(words), np.array(times, dtype=np.int32).reshape(-1, 2)


def _hypothesis(
    final: Final, spelled: Spelled, lm: Doubles, states: npt.NDArray[Any], rules: DeviceRules, alphabet: CtcAlphabet
) -> CtcHypothesis:
    text, word_frames = words_of(spelled, alphabet)
    parts = {"asr": final.asr} if rules.table is None else {"asr": final.asr, "lm": float(lm[final.place])}
    return CtcHypothesis(
        text=text,
        label_ids=spelled.labels,
        label_frames=spelled.frames,
        word_frames=word_frames,
        total=final.total,
        parts=parts,
        lm_state=int(states[final.place]),
    )
