"""`transcribe --ctc-rescore`, and language models that score candidates alone, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shallowfusion.cli.main import main
from shallowfusion.demo.shipped import HERE, read_manifest
from tests.shipped import ASR, MEDICAL

CLIPS = read_manifest(HERE / "clips")[:2]
PATHS = [str(clip.path) for clip in CLIPS]


@pytest.fixture(scope="module")
def words_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    (folder / "texts.txt").write_text("\n".join(clip.text for clip in CLIPS), encoding="utf-8")
    assert main(["build-ngram", str(folder / "texts.txt"), "--order", "2", "--out", str(folder / "words.arpa")]) == 0
    return folder / "words.arpa"


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    capsys.readouterr()
    assert main(["transcribe", *PATHS, "--asr", str(ASR), "--device", "cpu", "--json", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_ctc_list_is_ranked_by_attention_and_language_models(capsys, words_file: Path) -> None:
    arguments = ["--ctc-rescore", "0.3", "--lm", str(words_file), "--lm", str(MEDICAL), "--n-best", "3"]
    for result in said(capsys, *arguments, "--lm-weight", "0.5", "--lm-weight", "0.4"):
        assert len(result["n_best"]) == 3
        for hypothesis in result["n_best"]:
            parts = hypothesis["parts"]
            assert set(parts) == {"ctc", "asr", "lm"}
            wanted = 0.3 * parts["ctc"] + 0.7 * parts["asr"] + 0.4 * parts["lm"]
            assert hypothesis["total"] == pytest.approx(wanted, abs=1e-3)
        assert result["n_best"] == sorted(result["n_best"], key=lambda own: -own["total"])


def test_an_n_gram_model_of_words_goes_to_the_decoder(capsys, words_file: Path) -> None:
    texts = [result["text"] for result in said(capsys, "--lm", str(words_file), "--lm-weight", "0.8")]
    known = {word for clip in CLIPS for word in clip.text.split()}
    assert sum(word not in known for text in texts for word in text.split()) <= 3


def test_a_bridge_without_need_changes_nothing(capsys) -> None:
    plain, bridged = (said(capsys, "--lm", str(MEDICAL), *more) for more in ([], ["--lm-bridge", "bytes"]))
    assert [(r["text"], r["n_best"][0]["total"]) for r in plain] == [
        (r["text"], r["n_best"][0]["total"]) for r in bridged
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ctc-rescore", "0.3", "--hotword", "mole"], "hotword mean nothing"),
        (["--ctc-rescore", "1.3"], "ctc_weight must be from 0 to 1"),
        (["--ctc-rescore", "0.3", "--lm", str(MEDICAL), "--lm-weight", "1", "--lm-weight", "2"], "one --lm-weight per"),
        (["--hotword", "Fallot"], "no tokens spell the phrase 'Fallot'"),
    ],
)
def test_what_cannot_be_done_is_said(capsys, arguments: list[str], message: str) -> None:
    assert main(["transcribe", PATHS[0], "--asr", str(ASR), "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
