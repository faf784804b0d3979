"""The command line as a user meets it: output, exit codes, one sentence for bad input."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from shallowfusion import DecodingOptions, FusionDecoder
from shallowfusion.cli.main import main
from shallowfusion.cli.transcribe import add_decoding_options, options_from
from shallowfusion.errors import InvalidArgumentError
from tests.ctc.tiny_models import save_tiny_model
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


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_attention_reaches_the_models(capsys, attention: str) -> None:
    wanted = FusionDecoder.from_pretrained(ASR, MEDICAL, "cpu", attention=attention)
    given = ["--asr", ASR, "--lm", MEDICAL, "--beam-size", 2, "--device", "cpu", "--attention", attention]
    code, out, _ = run(capsys, "transcribe", clip(2), *given)
    assert code == 0
    assert out.strip() == wanted.transcribe([clip(2)], beam_size=2)[0].text


@pytest.mark.parametrize("command", ["transcribe", "evaluate", "tune", "explain", "calibrate", "train-gate"])
def test_commands_that_load_models_hand_attention_on(capsys, monkeypatch, tmp_path: Path, command: str) -> None:
    seen: list[str] = []

    def remember(*given, ctc, attention):
        seen.append(attention)
        raise InvalidArgumentError("seen enough.")

    monkeypatch.setattr("shallowfusion.decoder.FusionDecoder.from_pretrained", remember)
    one, other = tmp_path / "one.tsv", tmp_path / "other.tsv"
    one.write_text(f"{clip(2)}\tsome words\n")
    other.write_text(f"{clip(3)}\tother words\n")
    own = {
        "transcribe": [clip(2)],
        "explain": [clip(2)],
        "evaluate": [one],
        "tune": [one, "--out", tmp_path / "out"],
        "calibrate": [one, "--out", tmp_path / "temperatures.json"],
        "train-gate": [one, "--dev", other, "--out", tmp_path / "gate"],
    }
    code, _, error = run(capsys, command, *own[command], "--asr", ASR, "--lm", MEDICAL, "--attention", "triton")
    assert (code, "seen enough" in error) == (2, True), error
    assert seen == ["triton"]


def test_attention_goes_where_a_whisper_type_model_runs(capsys, tmp_path: Path) -> None:
    given = ("transcribe", clip(2), "--asr", ASR, "--device", "cpu")
    code, _, error = run(capsys, *given, "--attention", "triton")
    assert (code, "attention='triton' needs a CUDA device" in error) == (2, True)
    code, out, _ = run(capsys, *given, "--ctc-rescore", 0.5, "--attention", "sdpa")
    assert (code, bool(out.strip())) == (0, True)
    save_tiny_model("wav2vec2", tmp_path)
    code, _, error = run(capsys, "transcribe", clip(2), "--asr", tmp_path, "--attention", "sdpa")
    assert (code, "is a CTC model, for which attention mean nothing" in error) == (2, True)


def parsed(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_decoding_options(parser)
    return parser.parse_args(given)


def test_options_of_every_kind_are_understood() -> None:
    given = options_from(parsed(
        "--coverage", "gnmt", "--coverage-weight", "0.2", "--max-initial-timestamp", "none", "--timestamps",
        "--min-attention-centre", "0.5", "--lm-temperature", "1,0.9", "--suppress-tokens", "none",
        "--hotword", "stent", "--hotword", "Fallot=2", "--hotword-weight", "3", "--end-threshold", "none",
    ))  # fmt: skip
    assert given == DecodingOptions(
        coverage="gnmt", coverage_weight=0.2, max_initial_timestamp=None, without_timestamps=False,
        min_attention_centre=0.5, lm_temperature=(1.0, 0.9), suppress_tokens=[], hotword_weight=3.0,
        hotwords={"stent": 3.0, "Fallot": 2.0}, end_threshold=None,
    )  # fmt: skip
    assert options_from(parsed("--lm-temperature", "0.9")).lm_temperature == 0.9
    assert options_from(parsed("--suppress-tokens", "1,2")).suppress_tokens == [1, 2]
    assert options_from(parsed()) == DecodingOptions()


def test_every_decoding_option_can_be_given() -> None:
    otherwise = {"hotwords": "hotword", "suppress_blank": "keep_blank", "without_timestamps": "timestamps"}
    wanted = {otherwise.get(entry.name, entry.name) for entry in dataclasses.fields(DecodingOptions)}
    assert wanted <= set(vars(parsed()))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--lm-temperature", "warm"], "--lm-temperature must be numbers"),
        (["--suppress-tokens", "a"], "--suppress-tokens must be -1, none or ids"),
        (["--hotword", ""], "hotwords must be texts, got ''"),
        (["--hotword", " =2"], "hotwords must be texts, got ''"),
    ],
)
def test_values_that_cannot_be_read_are_named(given: list[str], words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        options_from(parsed(*given))


def test_where_ngrams_are_looked_up_reaches_the_decoder(capsys, monkeypatch) -> None:
    seen: list[tuple] = []

    def remember(*given, ctc, attention):
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


@pytest.mark.parametrize(
    "arguments",
    [
        ["transcribe"],
        ["nonsense"],
        ["transcribe", "x.wav", "--beamsize", "3"],
        ["transcribe", "x.wav", "--length-penalty", "long"],
        ["transcribe", "x.wav", "--attention", "flash"],
    ],
)
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
