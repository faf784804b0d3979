"""`transcribe --ctc`: a CTC model beside a Whisper-type model, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shallowfusion import FusionDecoder
from shallowfusion.cli.main import main
from tests.ctc.tiny_models import save_tiny_model
from tests.shipped import ASR, MEDICAL, clip


@pytest.fixture(scope="module")
def ctc(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("ctc")
    save_tiny_model("wav2vec2", directory)
    return str(directory)


def test_a_ctc_model_has_its_part_in_the_totals(capsys: pytest.CaptureFixture[str], ctc: str) -> None:
    arguments = ["transcribe", str(clip(2)), "--asr", ASR, "--device", "cpu", "--json", "--beam-size", "2"]
    assert main([*arguments, "--ctc", ctc, "--ctc-weight", "0.01", "--max-new-tokens", "20"]) == 0
    best = json.loads(capsys.readouterr().out)["n_best"][0]
    assert best["total"] == pytest.approx(0.99 * best["parts"]["asr"] + 0.01 * best["parts"]["ctc"], abs=1e-2)


def test_its_list_is_ranked(capsys: pytest.CaptureFixture[str], ctc: str) -> None:
    arguments = ["transcribe", str(clip(2)), "--asr", ASR, "--device", "cpu", "--json", "--beam-size", "3"]
    assert main([*arguments, "--ctc", ctc, "--ctc-rescore", "0.5", "--n-best", "3"]) == 0
    listed = json.loads(capsys.readouterr().out)["n_best"]
    assert len(listed) == 3
    for own in listed:
        assert own["total"] == pytest.approx(0.5 * (own["parts"]["asr"] + own["parts"]["ctc"]), abs=1e-2)


@pytest.mark.parametrize(
    ("asr", "arguments", "message"),
    [
        (ASR, [], "--ctc-weight 0.3"),
        (ASR, ["--ctc-weight", "0"], "--ctc-weight 0.3"),
        (None, ["--ctc-weight", "0.3"], "is a CTC model itself"),
    ],
)
def test_what_goes_unheard_is_refused(
    capsys: pytest.CaptureFixture[str], ctc: str, asr: str | None, arguments: list[str], message: str
) -> None:
    command = ["transcribe", str(clip(2)), "--asr", asr or ctc, "--device", "cpu", "--ctc", ctc, *arguments]
    assert main(command) == 2
    assert message in capsys.readouterr().err


def test_evaluate_hears_it_in_the_baseline_too(capsys: pytest.CaptureFixture[str], ctc: str, tmp_path: Path) -> None:
    manifest = tmp_path / "set.tsv"
    manifest.write_text(f"{clip(2)}\tsome words\n")
    command = ["evaluate", str(manifest), "--asr", ASR, "--lm", MEDICAL, "--lm-weight", "0.2", "--device", "cpu"]
    command += ["--json", "--beam-size", "2", "--max-new-tokens", "20"]
    assert main([*command, "--ctc", ctc, "--save-nbest", str(tmp_path / "n"), "--n-best", "2"]) == 2
    assert "--ctc-weight 0.3" in capsys.readouterr().err
    asked = [*command, "--ctc", ctc, "--ctc-weight", "0.02"]
    assert main([*asked, "--save-nbest", str(tmp_path / "n"), "--n-best", "2"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert "ctc" in (tmp_path / "n").read_text()
    decoder = FusionDecoder.from_pretrained(ASR, device="cpu", ctc=ctc)
    alone = decoder.transcribe([clip(2)], beam_size=2, n_best=2, max_new_tokens=20, ctc_weight=0.02)[0].text
    assert alone in json.dumps(shown, ensure_ascii=False)


def test_a_model_that_is_no_ctc_model_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["transcribe", str(clip(2)), "--asr", ASR, "--device", "cpu", "--ctc-weight", "0.3", "--ctc"]
    assert main([*command, ASR]) == 2
    assert "wanted a CTC model" in capsys.readouterr().err
    assert main([*command, str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
