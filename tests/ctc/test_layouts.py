"""Scores in every order of axes, alone and as lists, decode as the usual batch; what may mean two things is refused."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch

from shallowfusion.ctc.decoder import CTCDecoder
from shallowfusion.ctc.layouts import batch_of
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.results import Transcription
from tests.ctc.conftest import LIBRI_LABELS, LIBRI_TEXT, libri, random_log_probs

DECODER = CTCDecoder(("_", " ", "a", "b"), 0, 1, threads=1)


def texts(results: list[Transcription]) -> list[list[tuple[str, float]]]:
    return [[(found.text, found.total) for found in result.n_best] for result in results]


def decode(given: Any, lengths: Any = None, layout: str | None = None) -> list[list[tuple[str, float]]]:
    return texts(DECODER.decode(given, lengths, n_best=3, beam_size=20, layout=layout))


@pytest.mark.parametrize("layout", ["".join(axes) for axes in permutations("UFL")])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_every_order_of_axes_gives_the_same(layout: str, as_tensor: bool) -> None:
    log_probs = random_log_probs(1, (3, 9, 4))
    given = log_probs.transpose(["UFL".index(axis) for axis in layout])
    assert [given.shape[layout.index(axis)] for axis in "UFL"] == [3, 9, 4]
    assert decode(torch.from_numpy(given) if as_tensor else given, [9, 5, 7], layout) == decode(log_probs, [9, 5, 7])


def test_one_utterance_needs_no_axis_for_utterances() -> None:
    log_probs = random_log_probs(2, (1, 8, 4))
    wanted = decode(log_probs)
    for given in (log_probs[0], torch.from_numpy(log_probs[0]), [log_probs[0]]):
        assert decode(given) == wanted
    assert decode(log_probs[0].T, layout="LF") == wanted
    assert decode(log_probs.transpose(1, 0, 2), layout="FUL") == wanted
    assert decode(log_probs[0], [5]) == decode(log_probs, [5])
    (result,) = CTCDecoder(LIBRI_LABELS, blank="", delimiter=" ").decode(libri(), beam_size=20)
    assert result.text == LIBRI_TEXT


@pytest.mark.parametrize("kind", ["arrays", "tensors", "both", "half and whole"])
def test_a_list_of_different_lengths_gives_what_each_gives_alone(kind: str) -> None:
    several: list[Any] = [random_log_probs(seed, (frames, 4)) for seed, frames in enumerate((7, 1, 12))]
    if kind == "half and whole":
        several = [several[0].astype(np.float16), np.full((3, 4), -2, np.int64), several[2]]
    if kind in ("tensors", "both"):
        several = [torch.from_numpy(own) if kind == "tensors" or i else own for i, own in enumerate(several)]
    assert decode(several) == [decode(own)[0] for own in several]
    assert decode(tuple(own.T for own in several), layout="LF") == decode(several)
    batch, lengths = batch_of(several, None, 4)
    assert isinstance(batch, torch.Tensor) == (kind == "tensors")
    assert lengths.tolist() == [len(own) for own in several]
    assert decode([]) == []


def test_what_may_mean_two_things_is_refused_with_the_cure() -> None:
    log_probs = random_log_probs(3, (6, 1, 4))
    with pytest.raises(InvalidArgumentError, match=r"one utterance of 6 frames, time first, .* layout='FUL' or"):
        DECODER.decode(log_probs)
    assert len(decode(log_probs, layout="FUL")) == 1
    assert len(decode(log_probs, layout="UFL")) == 6
    with pytest.raises(InvalidArgumentError, match=r"lengths are of 2 utterances, .* layout='FUL'"):
        DECODER.decode(random_log_probs(3, (6, 2, 4)), [6, 5])
    with pytest.raises(InvalidArgumentError, match=r"alphabet has 4 labels; .* layout="):
        DECODER.decode(np.zeros((2, 4, 7)))


@pytest.mark.parametrize(
    ("given", "lengths", "layout", "words"),
    [
        (np.zeros((2, 3, 4)), None, "ULK", "layout must be one of UFL,"),
        (np.zeros((2, 3, 4)), None, "FL", "must have 2 axes"),
        (np.zeros((3, 4)), None, "UFL", "must have 3 axes"),
        ([np.zeros((3, 4))], [3], None, "lengths go with one array"),
        ([np.zeros((3, 4))], None, "UFL", "arrays in a list have two axes"),
        ([np.zeros((3, 4)), np.zeros((3, 5))], None, None, r"log_probs\[1\] must be real numbers of shape"),
        ([[0.0, -1.0]], None, None, r"log_probs\[0\] .* one utterance as an array"),
        ([np.zeros((3, 4), "U1")], None, None, "real numbers"),
        (np.zeros(4), None, None, "must have shape"),
    ],
)
def test_bad_layouts_are_refused(given: Any, lengths: Any, layout: str | None, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        DECODER.decode(given, lengths, layout=layout)


@pytest.mark.gpu
def test_scores_on_a_gpu_stay_there_whatever_their_layout() -> None:
    several = [torch.from_numpy(random_log_probs(seed, (frames, 4))).cuda() for seed, frames in enumerate((7, 1, 12))]
    batch, lengths = batch_of(several, None, 4)
    assert batch.device == several[0].device
    assert lengths.tolist() == [7, 1, 12]
    decoder = CTCDecoder(("_", "x", "a", "b"), 0, threads=1)
    wanted = texts(decoder.decode([own.cpu() for own in several], n_best=3, beam_size=20))
    for given, layout in ((several, None), ([own.T for own in several], "LF")):
        found = texts(decoder.decode(given, n_best=3, beam_size=20, layout=layout, backend="device"))
        for one, two in zip(found, wanted, strict=True):
            assert [text for text, _ in one] == [text for text, _ in two]
            assert [total for _, total in one] == pytest.approx([total for _, total in two], abs=1e-5)
    timed = torch.stack([several[2], several[2]], dim=1)
    assert batch_of(timed, None, 4, "FUL")[0].device == timed.device
