"""CTC heads beside a model: what is read, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from shallowfusion.errors import ModelError
from shallowfusion.scorers.ctc_head import load_ctc_head
from shallowfusion.scorers.loading import load_whisper
from tests.shipped import ASR

DEVICE = torch.device("cpu")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("ctc_head.json", "ctc_head.safetensors"):
        shutil.copy(Path(ASR) / name, tmp_path / name)
    return tmp_path


def changed(directory: Path, **changes: Any) -> str:
    path = directory / "ctc_head.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        stored.pop(key) if value is None else stored.update({key: value})
    path.write_text(json.dumps(stored), encoding="utf-8")
    return str(directory)


def test_the_shipped_head() -> None:
    acoustic = load_whisper(str(ASR), DEVICE, torch.float32)
    head = acoustic.ctc_head
    assert head is not None
    assert (head.blank, len(head.labels), head.frame_seconds) == (28, 29, 0.04)
    assert head.label_tokens.tolist() == [*range(28), -1]
    log_probs = head.log_probs(torch.randn((2, 7, head.weight.shape[1])).half())
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.exp().sum(dim=2), torch.ones(2, 7))
    for token, label in zip(head.label_tokens[:28].tolist(), head.labels, strict=False):
        assert acoustic.tokenizer.decode([token]) == label


def test_frames_of_a_recording(directory: Path) -> None:
    head = load_ctc_head(str(directory), 192, 31, DEVICE)
    assert head is not None
    assert [head.num_frames(seconds, 750) for seconds in (0.0, 0.04, 0.041, 1.0, 40.0)] == [0, 1, 2, 25, 750]


def test_no_head_is_none_and_half_a_head_an_error(directory: Path) -> None:
    (directory / "ctc_head.json").rename(directory / "other.json")
    with pytest.raises(ModelError, match="only one"):
        load_ctc_head(str(directory), 192, 31, DEVICE)
    (directory / "ctc_head.safetensors").unlink()
    assert load_ctc_head(str(directory), 192, 31, DEVICE) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": None},
        {"labels": ["a", "b"]},
        {"blank_id": 29},
        {"blank_id": "last"},
        {"label_token_ids": [0] * 28},
        {"label_token_ids": [*range(27), 31]},
        {"frame_seconds": 0},
        {"frame_seconds": None},
    ],
)
def test_heads_that_do_not_fit_are_refused(directory: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="CTC head"):
        load_ctc_head(changed(directory, **changes), 192, 31, DEVICE)


def test_a_head_of_another_width_is_refused(directory: Path) -> None:
    with pytest.raises(ModelError, match="weight \\[29, 192\\]"):
        load_ctc_head(str(directory), 256, 31, DEVICE)
