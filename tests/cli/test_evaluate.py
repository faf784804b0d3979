"""`shallowfusion evaluate` as a user meets it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from shallowfusion import fusion
from shallowfusion.cli.main import main
from shallowfusion.decoder import FusionDecoder
from shallowfusion.demo.shipped import HERE, read_manifest
from shallowfusion.evaluation.nbest import read_nbest
from tests.shipped import ASR, MEDICAL, clip, decoder

FAST = ["--beam-size", "2", "--n-best", "2", "--batch-size", "2"]
CLIPS = read_manifest(HERE / "clips")


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def manifest(path: Path, *numbers: int, more: str = "") -> Path:
    rows = [json.dumps({"audio": str(CLIPS[i].path), "text": CLIPS[i].text, "id": f"clip{i}"}) for i in numbers]
    path.write_text("\n".join(rows) + "\n" + more, encoding="utf-8")
    return path


def test_a_baseline_against_the_fused_system_stored_and_resumed(capsys, tmp_path: Path) -> None:
    own = manifest(tmp_path / "test.jsonl", 2, 16)
    command = [
        "evaluate", own, "--asr", ASR, "--lm", MEDICAL, "--lm-weight", 0.3, *FAST, "--json", "--results",
        tmp_path / "results.jsonl", "--save-nbest", tmp_path / "lists.jsonl",
    ]  # fmt: skip
    code, out, _ = run(capsys, *command)
    assert code == 0
    data = json.loads(out)
    baseline, fused = data["systems"]
    paths = [CLIPS[2].path, CLIPS[16].path]
    alone = decoder(with_lm=False).transcribe(paths, beam_size=2)
    together = decoder().transcribe(paths, beam_size=2, lm_weight=0.3)
    assert list(baseline["texts"].values()) == [result.text for result in alone]
    assert list(fused["texts"].values()) == [result.text for result in together]
    lists = read_nbest(tmp_path / "lists.jsonl", fewest=1)
    assert [entry.reference for entry in lists] == [CLIPS[2].text, CLIPS[16].text]
    assert set(lists[0].first.parts) == {"asr", "lm"}
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 4
    (tmp_path / "results.jsonl").write_text("\n".join(lines[:3]) + "\n")
    code, again, _ = run(capsys, *command)
    assert json.loads(again) == data
    stored = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    wanted = [json.loads(line) for line in lines]
    for name in ("system", "recording", "id"):  # totals move in their last bits with the batch
        assert [row[name] for row in stored] == [row[name] for row in wanted]


def test_a_weight_is_chosen_on_the_development_set(capsys, tmp_path: Path) -> None:
    test, dev = manifest(tmp_path / "test.jsonl", 2), manifest(tmp_path / "dev.jsonl", 16)
    code, out, _ = run(
        capsys, "evaluate", test, "--asr", ASR, "--lm", MEDICAL, "--try-weights", "0,0.3", "--dev", dev, *FAST
    )
    assert code == 0
    assert "chosen on the development set (errors 0:" in out
    assert out.count("against baseline") == 1
    code, out, _ = run(capsys, "evaluate", test, "--asr", ASR, "--lm", MEDICAL, "--try-weights", "0,0.3", *FAST)
    assert code == 0
    assert out.startswith("weights were tried on the test set itself")
    assert out.count("after Holm's correction") == 2
    assert "fused 0 against baseline: +0.00 points" in out  # weight 0 is the baseline


def test_the_baseline_is_the_plain_decoder_whatever_serves_the_fusion(capsys, tmp_path: Path) -> None:
    own = manifest(tmp_path / "test.jsonl", 2, 16)
    code, out, _ = run(
        capsys, "evaluate", own, "--asr", ASR, "--lm", MEDICAL, "--rule", "entropy_gate(0.8)", "--asr-temperature", 3,
        *FAST, "--json",
    )  # fmt: skip
    assert code == 0
    baseline, fused = json.loads(out)["systems"]
    paths = [CLIPS[2].path, CLIPS[16].path]
    alone = decoder(with_lm=False).transcribe(paths, beam_size=2)
    assert list(baseline["texts"].values()) == [result.text for result in alone]
    together = decoder().transcribe(paths, beam_size=2, rule=fusion.entropy_gate(0.8), asr_temperature=3.0)
    assert list(fused["texts"].values()) == [result.text for result in together]


def test_failing_files_are_listed_and_the_others_evaluated(capsys, tmp_path: Path) -> None:
    (tmp_path / "notes.wav").write_text("no audio")
    shutil.copy(clip(2), tmp_path / "silent.flac")
    more = '{"audio": "notes.wav", "text": "x"}\n{"audio": "silent.flac", "silence": true}\n'
    own = manifest(tmp_path / "test.jsonl", 2, more=more)
    code, out, err = run(capsys, "evaluate", own, "--asr", ASR, *FAST)
    assert code == 2
    assert "1 utterances" in out
    assert "words in 100.0 % of silent recordings" in out
    assert "notes.wav cannot be read as audio" in err
    assert "1 of 2 recordings failed" in err


def test_an_interruption_says_where_to_go_on(capsys, tmp_path: Path, monkeypatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FusionDecoder, "transcribe", interrupted)
    own = manifest(tmp_path / "test.jsonl", 2)
    code, out, err = run(capsys, "evaluate", own, "--asr", ASR, "--results", tmp_path / "results.jsonl")
    assert code == 130
    assert out == ""
    assert f"the same command goes on from {tmp_path / 'results.jsonl'}" in err


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_stored_hypotheses_are_scored_without_a_model(capsys, tmp_path: Path) -> None:
    references = write(tmp_path / "r.tsv", "u1\tthe renal cyst\nu2\tno pain\n")
    hypotheses = write(tmp_path / "h.tsv", "u2\tno pain\nu1\tthe renal cyst\n")
    baseline = write(tmp_path / "b.jsonl", '{"id": "u1", "text": "the renal sister"}\n{"id": "u2", "text": ""}\n')
    terms = write(tmp_path / "terms.txt", "Renal Cyst\n")
    text = write(tmp_path / "lm.txt", "a renal cyst\n")
    code, out, _ = run(
        capsys, "evaluate", "--hypotheses", hypotheses, "--references", references, "--baseline", baseline,
        "--terms", terms, "--lm-text", text, "--normaliser", "basic",
    )  # fmt: skip
    assert code == 0
    assert "2 wins, 0 losses, 0 ties" in out
    assert "recall 100.0 % (1/1)" in out
    assert "1-10: 1/1" in out
    code, out, _ = run(capsys, "evaluate", "--hypotheses", hypotheses, "--references", references, "--json")
    assert code == 0
    assert json.loads(out)["systems"][0]["wer"]["rate"] == 0.0


BAD = {
    "go together": ["--hypotheses", "h.tsv"],
    "give a MANIFEST": [],
    "give a MANIFEST and --asr": ["test.jsonl"],
    "no model runs, so asr": ["--hypotheses", "h.tsv", "--references", "r.tsv", "--asr", ASR],
    "decoding options say nothing": ["--hypotheses", "h.tsv", "--references", "r.tsv", "--beam-size", "3"],
    "leaves no word": ["--hypotheses", "h.tsv", "--references", "um.tsv"],
    "do not pair": ["--hypotheses", "other.tsv", "--references", "r.tsv"],
    "baseline hypotheses do not pair": ["--hypotheses", "h.tsv", "--references", "r.tsv", "--baseline", "other.tsv"],
    "reference of u1 is empty": ["--hypotheses", "h.tsv", "--references", "empty.tsv"],
    "the reference of a.wav is empty": ["empty_reference.jsonl", "--asr", ASR],
    "the reference of a.wav is missing": ["no_reference.jsonl", "--asr", ASR],
    "shares 1 of its 1 recordings": [
        "test.jsonl", "--asr", ASR, "--lm", MEDICAL, "--dev", "dev.jsonl", "--try-weights", "0.1",
    ],
    "chooses among": ["test.jsonl", "--asr", ASR, "--dev", "dev.jsonl"],
    "needs one --lm": ["test.jsonl", "--asr", ASR, "--try-weights", "0.1"],
    "--lm-weight and --initial-steps": ["test.jsonl", "--asr", ASR, "--lm-weight", "0.1"],
    "1 of 1 terms are in no reference, first 'melanoma'": ["test.jsonl", "--asr", ASR, "--terms", "terms.txt"],
    "none of the 1 terms": [
        "--hypotheses", "h.tsv", "--references", "r.tsv", "--terms", "terms.txt", "--allow-absent-terms",
    ],
    "give both": ["--hypotheses", "h.tsv", "--references", "r.tsv", "--lm-text", "terms.txt"],
    "needs the field speaker": ["test.jsonl", "--asr", ASR, "--by-speaker"],
    "nowhere.jsonl cannot be read": ["nowhere.jsonl", "--asr", ASR],
    "is not a directory": ["test.jsonl", "--asr", "./nowhere"],
    "cannot hold results": ["test.jsonl", "--asr", ASR, "--results", "nowhere/results.jsonl"],
    "give --n-best 2": ["test.jsonl", "--asr", ASR, "--save-nbest", "lists.jsonl"],
    "none of the 1 recordings": ["broken.tsv", "--asr", ASR],
}  # fmt: skip


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, tmp_path: Path, monkeypatch, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    manifest(tmp_path / "test.jsonl", 2)
    manifest(tmp_path / "dev.jsonl", 2)
    write(tmp_path / "h.tsv", "u1\tx\n")
    write(tmp_path / "r.tsv", "u1\tx\n")
    write(tmp_path / "other.tsv", "u2\tx\n")
    write(tmp_path / "um.tsv", "u1\tum\n")
    write(tmp_path / "empty.tsv", "u1\t\n")
    write(tmp_path / "terms.txt", "melanoma\n")
    write(tmp_path / "empty_reference.jsonl", '{"audio": "a.wav", "text": ""}\n')
    write(tmp_path / "no_reference.jsonl", '{"audio": "a.wav"}\n')
    write(tmp_path / "broken.tsv", "a.wav\tx\n")
    code, out, err = run(capsys, "evaluate", *BAD[words])
    assert code == 2
    assert out == ""
    assert words in err
    assert len([line for line in err.strip().splitlines() if line.startswith("shallowfusion:")]) == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("weights", ["x", "0.1,0.1", ","])
def test_weights_that_are_no_list_of_numbers_are_refused(weights: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "test.jsonl", "--try-weights", weights])
    assert stop.value.code == 2
