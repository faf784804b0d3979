"""A trained context makes the deaf decoder a better language model, and is used by internal_lm."""

from __future__ import annotations

import json

import pytest
import torch

from shallowfusion import FusionDecoder, fusion
from shallowfusion.cli.main import main
from shallowfusion.demo.shipped import HERE, model_directory, read_manifest
from shallowfusion.errors import InvalidArgumentError, ModelError
from shallowfusion.scorers.loading import load_whisper
from shallowfusion.training.internal_context import train_internal_context

TEXTS = [clip.text for clip in read_manifest(HERE / "dev")]


def test_the_trained_context_predicts_transcripts_better_than_zeros_and_serves_the_decoder(tmp_path, capsys) -> None:
    texts, out = tmp_path / "texts.txt", tmp_path / "context.safetensors"
    texts.write_text("\n".join(TEXTS), encoding="utf-8")
    asr, lm = str(model_directory("asr")), str(model_directory("lm_medical"))
    assert main(["train-ilm", str(texts), "--asr", asr, "--out", str(out), "--steps", "60", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["perplexity_trained"] < 0.97 * figures["perplexity_zero_encoder"]
    decoder = FusionDecoder.from_pretrained(asr, lm, "cpu", internal_context=out)
    clip = read_manifest(HERE / "clips")[0].path
    best = decoder.transcribe([clip], rule=fusion.internal_lm(0.8, 0.2, "trained"))[0].best
    wanted = best.parts["asr"] + 0.8 * best.parts["lm"] - 0.2 * best.parts["ilm"]
    assert best.total == pytest.approx(wanted, abs=1e-3)


def test_training_changes_nothing_in_the_model_and_bad_input_is_refused(tmp_path) -> None:
    acoustic = load_whisper(str(model_directory("asr")), torch.device("cpu"), torch.float32)
    before = {name: tensor.clone() for name, tensor in acoustic.scorer.model.state_dict().items()}
    found = train_internal_context(acoustic, TEXTS[:12], num_frames=2, steps=3, batch_size=4)
    assert found.context.shape == (2, acoustic.scorer.model.config.d_model) or found.after == found.before
    assert all(torch.equal(before[name], tensor) for name, tensor in acoustic.scorer.model.state_dict().items())
    with pytest.raises(InvalidArgumentError, match="at least 10 transcripts"):
        train_internal_context(acoustic, TEXTS[:3])
    with pytest.raises(InvalidArgumentError, match="num_frames must be"):
        train_internal_context(acoustic, TEXTS, num_frames=0)
    with pytest.raises(ModelError, match="no trained internal context"):
        FusionDecoder.from_pretrained(model_directory("asr"), internal_context=tmp_path / "none.safetensors")
