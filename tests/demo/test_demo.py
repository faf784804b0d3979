"""The demo keeps its promises on the 20 shipped clips."""

from __future__ import annotations

import json

import pytest

from shallowfusion.cli.main import main
from shallowfusion.demo.shipped import HERE, lm_weights, read_manifest
from tests.shipped import CLIPS


@pytest.fixture(scope="module")
def figures() -> dict:
    from shallowfusion.demo.report import run_demo

    return run_demo(device="cpu").to_json()


@pytest.mark.slow
def test_the_medical_lm_cuts_the_error_by_two_fifths_and_more_than_the_general_one(figures) -> None:
    assert figures["utterances"] == 20
    assert 0.15 <= figures["wer_asr"] <= 0.40
    assert figures["wer_medical"] <= 0.6 * figures["wer_asr"]
    assert figures["wer_medical"] < figures["wer_general"]
    assert figures["term_recall_medical"] > figures["term_recall_asr"]


@pytest.mark.slow
def test_the_report_has_the_promised_keys(figures) -> None:
    assert {"wer_asr", "wer_general", "wer_medical", "utterances", "rtfx"} <= set(figures)
    for name in ("asr", "general", "medical"):
        low, high = figures[f"wer_{name}_interval"]
        assert low <= figures[f"wer_{name}"] <= high
    json.dumps(figures)


def test_clips_and_development_clips_share_no_sentence() -> None:
    shown = {clip.text for clip in read_manifest(HERE / "clips")}
    tuned = {clip.text for clip in read_manifest(HERE / "dev")}
    assert len(shown) == len(CLIPS) == 20
    assert not shown & tuned
    assert lm_weights()["medical"]["lm_weight"] > 0


def test_all_weights_together_stay_below_16_mb() -> None:
    total = sum(path.stat().st_size for path in (HERE / "models").rglob("*.safetensors"))
    assert total <= 16 * 1024 * 1024


def test_an_incomplete_package_says_what_is_missing(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr("shallowfusion.demo.shipped.HERE", tmp_path)
    monkeypatch.setattr("shallowfusion.demo.report.HERE", tmp_path)
    assert main(["demo"]) == 2
    assert "manifest.jsonl is missing" in capsys.readouterr().err
