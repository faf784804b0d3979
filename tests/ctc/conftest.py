"""Both searches, stored emissions of real networks (found beside the repository), and small random problems."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shallowfusion.ctc.device_search import DeviceCtcSearch
from shallowfusion.ctc.results import CtcResult
from shallowfusion.ctc.search import CtcSearch
from shallowfusion.ctc.search_reference import ReferenceCtcSearch
from shallowfusion.ctc.settings import CtcAlphabet, CtcLanguage, CtcOptions

SHARED_CTC = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "ctc"


@pytest.fixture(params=[CtcSearch, ReferenceCtcSearch], ids=["native", "reference"])
def search_class(request: pytest.FixtureRequest) -> type:
    return request.param


@pytest.fixture(params=[CtcSearch, ReferenceCtcSearch, DeviceCtcSearch], ids=["native", "reference", "device"])
def any_search_class(request: pytest.FixtureRequest) -> type:
    """The search in torch too, for what needs no words."""
    return request.param


def shared_file(name: str) -> Path:
    path = SHARED_CTC / name
    if not path.exists():
        pytest.skip("the stored emissions are not here")
    return path


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@cache
def shared_matrix(name: str) -> np.ndarray:
    """A `;`-separated matrix of network outputs as log-probs."""
    lines = shared_file(name).read_text(encoding="utf-8").splitlines()
    return log_softmax(np.array([[float(cell) for cell in line.split(";") if cell] for line in lines if line]))


@cache
def libri() -> np.ndarray:
    return log_softmax(np.array(json.loads(shared_file("pyctcdecode/libri_logits.json").read_text(encoding="utf-8"))))


LIBRI_LABELS = (" ", *"abcdefghijklmnopqrstuvwxyz", "'", "")
LIBRI_TEXT = (
    "i have a good deal of will you remember and what i have set my mind upon no doubt i shall some day achieve"
)


@cache
def ocr() -> tuple[tuple[str, ...], list[np.ndarray], list[dict[str, Any]]]:
    """Labels, log-probs of each line and the records of their references."""
    labels = json.loads(shared_file("ocr_en_mobile/labels.json").read_text(encoding="utf-8"))
    stored = np.load(shared_file("ocr_en_mobile/ocr_ctc_logprobs_f16.npz"))
    lines = shared_file("ocr_en_mobile/ocr_ctc_refs.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return tuple(labels), [stored[record["utt"]] for record in records], records


def random_log_probs(seed: int, shape: tuple[int, ...], scale: float = 2.0) -> np.ndarray:
    return log_softmax(np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def searched(search: Any, log_probs: Any, n_best: int = 1, lengths: Any = None) -> list[CtcResult]:
    """Everything in one step."""
    state = search.begin(len(log_probs))
    search.step(state, log_probs, lengths)
    results: list[CtcResult] = search.end(state, n_best)
    return results


def assert_same(one: CtcResult, other: CtcResult, tolerance: float = 1e-9) -> None:
    """Equal hypotheses in equal order, with equal scores and times."""
    assert (one.error is None) == (other.error is None), (one.error, other.error)
    assert [h.text for h in one.hypotheses] == [h.text for h in other.hypotheses]
    for ours, theirs in zip(one.hypotheses, other.hypotheses, strict=True):
        assert ours.label_ids.tolist() == theirs.label_ids.tolist()
        assert ours.label_frames.tolist() == theirs.label_frames.tolist()
        assert ours.word_frames.tolist() == theirs.word_frames.tolist()
        assert ours.total == pytest.approx(theirs.total, abs=tolerance)
        assert dict(ours.parts) == pytest.approx(dict(theirs.parts), abs=tolerance)


def assert_chunks_give_the_same(
    search: Any, seed: int, sizes: Sequence[int], num_labels: int, tolerance: float
) -> None:
    """Steps over chunks of those sizes, looked at on the way, end as one search over all frames."""
    log_probs = random_log_probs(seed, (2, sum(sizes), num_labels))
    state, at = search.begin(2), 0
    for size in sizes:
        search.step(state, log_probs[:, at : at + size])
        at += size
        search.results(state)  # looking changes nothing
    for one, other in zip(search.end(state, 4), searched(search, log_probs, 4), strict=True):
        assert_same(one, other, tolerance)


def assert_replays_equal_the_native_search(
    alphabet: CtcAlphabet, options: CtcOptions, language: CtcLanguage | None
) -> None:
    """Batches on a GPU, of which the second and third replay the graph of the first."""
    device = DeviceCtcSearch(alphabet, options, language, device="cuda")
    for seed in range(3):
        log_probs = random_log_probs(seed, (9, 120, 6))
        lengths = [120, 1, 17, 120, 3, 22, 39, 0, 120]
        native = searched(CtcSearch(alphabet, options, language), log_probs, 4, lengths)
        found = searched(device, torch.from_numpy(log_probs).cuda(), 4, lengths)
        for one, other in zip(native, found, strict=True):
            assert_same(one, other, 1e-8)
