"""`transcribe --timestamps` on the shipped model, given timestamp tokens it was not trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, WhisperForConditionalGeneration

from shallowfusion.cli.main import main
from tests.shipped import ASR, clip

COUNT = 301


@pytest.fixture(scope="module")
def timed_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with 301 more tokens, likely enough to be said now and then."""
    directory = tmp_path_factory.mktemp("timed")
    tokenizer = AutoTokenizer.from_pretrained(ASR)
    tokenizer.add_tokens([f"<|{step * 0.02:.2f}|>" for step in range(COUNT)])
    model = WhisperForConditionalGeneration.from_pretrained(ASR)
    torch.manual_seed(0)
    begin = model.config.vocab_size
    model.resize_token_embeddings(begin + COUNT, mean_resizing=False)
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight[begin:] = 0.5 * weight[:begin].mean(dim=0) + 0.02 * torch.randn_like(weight[begin:])
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for name in ("preprocessor_config.json", "generation_config.json"):
        if (Path(ASR) / name).exists() and not (directory / name).exists():
            (directory / name).write_bytes((Path(ASR) / name).read_bytes())
    return directory


def test_segments_are_printed_with_their_seconds(timed_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["transcribe", str(clip(2)), "--asr", str(timed_model), "--beam-size", "2", "--max-new-tokens", "40"]
    assert main([*asked, "--timestamps", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert main([*asked, "--timestamps"]) == 0
    lines = capsys.readouterr().out.splitlines()
    segments = record["segments"]
    assert segments
    assert "".join(segment["text"] for segment in segments) == record["text"]
    assert "<|" not in record["text"]
    found = [re.fullmatch(r"\[(\d+\.\d\d) -> (\d+\.\d\d)\] (.*)", line) for line in lines[: len(segments)]]
    assert [(float(m[1]), float(m[2]), m[3]) for m in found if m] == [
        (round(s["start"], 2), round(s["end"], 2), s["text"].strip()) for s in segments
    ]
    assert segments[0]["start"] <= 1.0
    assert main([*asked, "--json"]) == 0
    assert "segments" not in json.loads(capsys.readouterr().out)


def test_the_first_timestamp_is_bounded(timed_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["transcribe", str(clip(2)), "--asr", str(timed_model), "--beam-size", "1", "--max-new-tokens", "8"]
    assert main([*asked, "--timestamps", "--max-initial-timestamp", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["segments"][0]["start"] == 0.0


def test_a_model_without_timestamp_tokens_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transcribe", str(clip(2)), "--asr", str(ASR), "--timestamps"]) == 2
    assert "needs timestamp tokens" in capsys.readouterr().err
