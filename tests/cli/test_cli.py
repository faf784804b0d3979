"""The command line as a user meets it: output, exit codes, one sentence for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shallowfusion.cli.main import main
from tests.shipped import ASR, MEDICAL, clip, decoder


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_transcribe_prints_the_text(capsys) -> None:
    code, out, _ = run(
        capsys, "transcribe", clip(2), "--asr", ASR, "--lm", MEDICAL, "--lm-weight", 0.2, "--beam-size", 3
    )
    assert code == 0
    assert out.strip() == decoder().transcribe([clip(2)], lm_weight=0.2, beam_size=3)[0].text


def test_json_holds_scores_and_options_reach_the_decoder(capsys) -> None:
    code, out, _ = run(
        capsys, "transcribe", clip(2), "--asr", ASR, "--lm", MEDICAL, "--lm-weight", 0.2, "--num-beams", 3,
        "--n-best", 2, "--initial-steps", 2, "--ramp", 3, "--catch-up", "--end-policy", "lm", "--stop-rule", "whisper",
        "--patience", 2, "--length-penalty", "none", "--length-bonus", 0.1, "--end-threshold", "none",
        "--suppress-tokens", "3,4", "--json",
    )  # fmt: skip
    assert code == 0
    record = json.loads(out)
    assert len(record["n_best"]) == 2
    assert set(record["n_best"][0]["parts"]) == {"asr", "lm"}
    assert not {3, 4} & set(record["n_best"][0]["token_ids"])
    for words in ("piecewise", "initial_steps=2", "ramp=3", "catch_up=True"):
        assert words in record["rule"]


def test_prompt_and_driver_reach_the_decoder(capsys) -> None:
    given = ("transcribe", clip(2), "--asr", ASR, "--lm", MEDICAL, "--lm-weight", 0.9, "--json")
    prompt = "The patient has a stent."
    code, out, _ = run(capsys, *given, "--lm-prompt", prompt, "--driver", "device")
    assert code == 0
    wanted = decoder().transcribe([clip(2)], lm_weight=0.9, lm_prompt=prompt, driver="device")[0]
    plain = decoder().transcribe([clip(2)], lm_weight=0.9)[0]
    parts = json.loads(out)["n_best"][0]["parts"]
    assert parts["lm"] == pytest.approx(wanted.n_best[0].parts["lm"], abs=1e-3)
    assert parts["lm"] != pytest.approx(plain.n_best[0].parts["lm"], abs=1e-3)


def test_where_ngrams_are_looked_up_reaches_the_decoder(capsys, monkeypatch) -> None:
    seen: list[tuple] = []

    def remember(*given):
        seen.append(given)
        return decoder()

    monkeypatch.setattr("shallowfusion.decoder.FusionDecoder.from_pretrained", remember)
    given = ("transcribe", clip(2), "--asr", ASR, "--lm", "pieces.arpa")
    assert run(capsys, *given, "--ngram-lookups", "candidates")[0] == 0
    assert run(capsys, *given)[0] == 0
    assert [arguments[-1] for arguments in seen] == ["candidates", "auto"]
    code, _, error = run(capsys, *given, "--ctc-rescore", 0.5, "--ngram-lookups", "rows")
    assert (code, "ngram_lookups" in error) == (2, True)


def test_a_failing_file_is_listed_and_the_others_are_transcribed(capsys, tmp_path: Path) -> None:
    (tmp_path / "notes.wav").write_text("no audio here")
    code, out, err = run(
        capsys, "transcribe", clip(2), tmp_path / "notes.wav", clip(3), "nowhere.wav", "--asr", ASR, "--beam-size", 1
    )
    assert code == 2
    assert [line.split(":")[0] for line in out.splitlines()] == [str(clip(2)), str(clip(3))]
    assert "notes.wav cannot be read as audio" in err
    assert "nowhere.wav does not exist" in err
    assert "2 of 4 recordings failed" in err


BAD = {
    "is not a directory": ["--asr", "./nowhere"],
    "beam_size must be": ["--asr", ASR, "--beam-size", "0"],
    "lm_weight must be finite and >= 0": ["--asr", ASR, "--lm", MEDICAL, "--lm-weight", "-0.5"],
    "weighs 1 language model": ["--asr", ASR, "--lm-weight", "0.5"],
    "wanted a Whisper-type model": ["--asr", MEDICAL],
    "device must be": ["--asr", ASR, "--device", "abacus"],
    "English-only": ["--asr", ASR, "--language", "fr"],
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, words: str) -> None:
    code, out, err = run(capsys, "transcribe", clip(2), *BAD[words])
    assert code == 2
    assert out == ""
    assert words in err
    assert len([line for line in err.strip().splitlines() if line.startswith("shallowfusion:")]) == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [["transcribe"], ["nonsense"], ["transcribe", "x.wav", "--beamsize", "3"]])
def test_bad_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_the_installed_command_runs() -> None:
    command = [str(Path(sys.executable).parent / "shallowfusion"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0.1.0"


def test_a_delayed_rule_from_the_command_line_tells_its_calls(capsys) -> None:
    code, out, _ = run(
        capsys, "transcribe", clip(2), "--asr", ASR, "--lm", MEDICAL, "--json",
        "--rule", "delayed(0.6, interval=4, unit='words')",
    )  # fmt: skip
    assert code == 0
    record = json.loads(out)
    assert record["rule"].startswith("delayed((0.6,), delay=Delay(trigger='interval', interval=4")
    assert record["timing"]["llm_calls"] > 1
