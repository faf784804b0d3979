"""`tune`, `calibrate`, `explain` and the files they hand on, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shallowfusion.cli.main import main
from shallowfusion.demo.shipped import model_directory
from tests.shipped import ASR, MEDICAL, clip, decoder
from tests.training.worlds import manifest

MODELS = ["--asr", ASR, "--lm", MEDICAL]
FAST = ["--beam-size", "2", "--grid", "0.4,0.8", "--trials", "0", "--no-internal-lm", "--normaliser", "basic"]


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A calibration and a tuned decoder with it."""
    directory = tmp_path_factory.mktemp("tuned")
    dev, test = manifest(directory / "dev.jsonl", 1, 5), manifest(directory / "test.jsonl", 9)
    assert main(["calibrate", str(dev), *MODELS, "--out", str(directory / "cal.json"), "--json"]) == 0
    command = [
        "tune",
        dev,
        "--test",
        test,
        *MODELS,
        "--calibration",
        directory / "cal.json",
        "--out",
        directory / "out",
    ]
    assert main([str(word) for word in [*command, *FAST, "--json"]]) == 0
    return directory


def test_tune_writes_a_decoder_a_report_and_its_figures(files: Path, capsys) -> None:
    out = files / "out"
    data = json.loads((out / "tuning.json").read_text())
    assert data["utterances"] == 2
    assert len(data["tried"]) >= 2
    assert len(data["test"]["systems"]) >= 2
    assert data["chosen"]["errors"] == min(own["errors"] for own in data["tried"])
    page = (out / "report.html").read_text()
    assert data["chosen"]["rule"] in page
    record = json.loads((out / "decoder.json").read_text())
    assert record["rule"] == data["chosen"]["rule"]
    assert record["fingerprints"] == list(decoder().fingerprints)
    assert not Path(record["asr"]).is_absolute()


def test_the_decoder_file_transcribes_as_tune_decoded(files: Path, capsys) -> None:
    record = json.loads((files / "out" / "decoder.json").read_text())
    code, out, _ = run(capsys, "transcribe", clip(2), "--config", files / "out" / "decoder.json", "--json")
    assert code == 0
    temperatures = [model["temperature"] for model in record["calibration"]["models"]]
    options = {**record["options"], "asr_temperature": temperatures[0], "lm_temperature": temperatures[1:]}
    from shallowfusion.fusion import parse_rule

    own = decoder().transcribe([clip(2)], rule=parse_rule(record["rule"]), **options)[0]
    found = json.loads(out)
    assert found["text"] == own.text
    assert found["n_best"][0]["total"] == pytest.approx(own.best.total, abs=1e-3)


def test_evaluate_and_explain_take_the_decoder_file(files: Path, capsys) -> None:
    config = ["--config", files / "out" / "decoder.json"]
    code, out, _ = run(capsys, "evaluate", files / "test.jsonl", *config, "--normaliser", "basic", "--json")
    assert code == 0
    tuned = json.loads((files / "out" / "tuning.json").read_text())["test"]["systems"]
    assert [own["texts"] for own in json.loads(out)["systems"]] == [tuned[0]["texts"], tuned[-1]["texts"]]
    code, out, _ = run(capsys, "explain", clip(2), *config, "--html", files / "page.html")
    assert code == 0
    assert out.splitlines()[0].startswith("fused  ")
    assert "Why this transcript" in (files / "page.html").read_text()
    code, out, _ = run(capsys, "explain", clip(2), *MODELS, "--rule", "margin_gate(0.9)", "--json")
    assert code == 0
    assert json.loads(out)["tokens"]


def test_a_rule_in_words_is_the_rule(capsys) -> None:
    code, out, _ = run(capsys, "transcribe", clip(2), *MODELS, "--rule", "margin_gate(0.9, width=2)", "--beam-size", 2)
    from shallowfusion import fusion

    assert code == 0
    assert out.strip() == decoder().transcribe([clip(2)], beam_size=2, rule=fusion.margin_gate(0.9, width=2))[0].text


def test_a_trained_gate_is_a_rule_for_its_own_models(capsys, tmp_path: Path) -> None:
    train, dev = manifest(tmp_path / "train.jsonl", 1, 5), manifest(tmp_path / "dev.jsonl", 9)
    out = tmp_path / "gate"
    code, told, _ = run(
        capsys, "train-gate", train, "--dev", dev, *MODELS, "--out", out, "--epochs", "10", "--list-epochs", "1",
        "--beam-size", "3", "--normaliser", "basic", "--json",
    )  # fmt: skip
    assert code == 0
    figures = json.loads(told)
    assert len(figures["dev_errors_by_epoch"]) == 3
    assert figures["dev_errors"]["gate"] == min(errors for _, errors in figures["dev_errors_by_epoch"])
    assert figures["train_loss_by_epoch"][-1] < figures["train_loss_by_epoch"][0]
    code, text, _ = run(capsys, "transcribe", clip(2), *MODELS, "--rule", f"learned('{out}')")
    assert code == 0
    assert text.strip()
    other = ["--asr", ASR, "--lm", str(model_directory("lm_general"))]
    code, text, err = run(capsys, "transcribe", clip(2), *other, "--rule", f"learned('{out}')")
    assert (code, text) == (2, "")
    assert "was trained for models" in err


def test_files_made_for_other_models_are_refused(files: Path, capsys, tmp_path: Path) -> None:
    other = ["--asr", ASR, "--lm", str(model_directory("lm_general"))]
    code, out, err = run(capsys, "transcribe", clip(2), *other, "--calibration", files / "cal.json")
    assert (code, out) == (2, "")
    assert "temperatures of other models do not fit" in err
    record = json.loads((files / "out" / "decoder.json").read_text())
    (tmp_path / "d.json").write_text(json.dumps(record | {"asr": ASR, "lm": [str(model_directory("lm_general"))]}))
    code, out, err = run(capsys, "transcribe", clip(2), "--config", tmp_path / "d.json")
    assert (code, out) == (2, "")
    assert "tune again" in err


BAD = {
    "give either --rule or": ["transcribe", clip(2), *MODELS, "--rule", "static(0.1)", "--lm-weight", "0.2"],
    "unknown rule 'magic'": ["transcribe", clip(2), *MODELS, "--rule", "magic(0.1)"],
    "give a Whisper-type model with --asr, or": ["transcribe", clip(2)],
    "so --asr, --lm cannot be given": ["transcribe", clip(2), "--config", "d.json", *MODELS],
    "d.json is no decoder file": ["transcribe", clip(2), "--config", "d.json"],
    "n.json is no calibration": ["transcribe", clip(2), *MODELS, "--calibration", "n.json"],
    "there is nothing to explain": ["explain", clip(2), "--asr", ASR],
    "--alternatives must be": ["explain", clip(2), *MODELS, "--alternatives", "0"],
    "does not exist": ["explain", "nowhere.wav", *MODELS],
    "tune weighs language models; give one": ["tune", "dev.jsonl", "--asr", ASR, "--out", "o"],
    "tune chooses the rule": ["tune", "dev.jsonl", *MODELS, "--out", "o", "--lm-weight", "0.1"],
    "makes decoder files and reads none": ["tune", "dev.jsonl", *MODELS, "--out", "o", "--config", "d.json"],
    "shares 1 of its 1 recordings": ["tune", "dev.jsonl", "--test", "dev.jsonl", *MODELS, "--out", "o"],
    "--grid must be numbers": ["tune", "dev.jsonl", *MODELS, "--out", "o", "--grid", "x"],
    "grid must hold at least two": ["tune", "dev.jsonl", *MODELS, "--out", "o", "--grid", "0.1"],
    "unknown family": ["tune", "dev.jsonl", *MODELS, "--out", "o", "--families", "magic"],
    "cannot be made": ["tune", "dev.jsonl", *MODELS, "--out", "dev.jsonl"],
    "train-gate weighs language models": ["train-gate", "dev.jsonl", "--dev", "dev.jsonl", "--asr", ASR, "--out", "g"],
    "the development set shares": ["train-gate", "dev.jsonl", "--dev", "dev.jsonl", *MODELS, "--out", "g"],
    "cannot be loaded as a learned gate": ["transcribe", clip(2), *MODELS, "--rule", "learned('nowhere')"],
    "nowhere.jsonl cannot be read": ["calibrate", "nowhere.jsonl", *MODELS, "--out", "c.json"],
    "calibrate measures the models as they are": [
        "calibrate", "dev.jsonl", *MODELS, "--out", "c.json", "--calibration", "n.json",
    ],
    "nowhere/c.json cannot be written": ["calibrate", "dev.jsonl", *MODELS, "--out", "nowhere/c.json"],
}  # fmt: skip


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, tmp_path: Path, monkeypatch, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    manifest(tmp_path / "dev.jsonl", 1)
    (tmp_path / "d.json").write_text("{}")
    (tmp_path / "n.json").write_text("[]")
    code, out, err = run(capsys, *BAD[words])
    assert code == 2
    assert out == ""
    assert words in err
    assert len([line for line in err.strip().splitlines() if line.startswith("shallowfusion:")]) == 1
    assert "Traceback" not in err
