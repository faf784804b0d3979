"""The replay of the article on the demo models: its manifest is read, its table is what plain calls give."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from bench.article import main, read_article_manifest, split_documents
from shallowfusion import fusion
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.evaluation.normalisation import normaliser
from shallowfusion.evaluation.word_errors import word_errors
from tests.shipped import ASR, MEDICAL, decoder
from tests.training.worlds import HERE, ROWS


def manifest(path: Path, numbers: list[int], documents: list[int]) -> Path:
    """Shipped clips in the article's own format."""
    rows = [
        {
            "uuid": f"u{i}", "file": str(HERE / "dev" / ROWS[i]["audio"]), "chunk_id": f"{document}_000",
            "orig_id": document, "label": 15, "text": ROWS[i]["text"],
        }
        for i, document in zip(numbers, documents, strict=True)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_table_is_what_plain_calls_give(tmp_path: Path, capsys) -> None:
    dev, test = manifest(tmp_path / "dev.jsonl", [1, 5], [1, 2]), manifest(tmp_path / "test.jsonl", [9, 2], [3, 3])
    command = [
        "--manifest", str(test), "--dev-manifest", str(dev), "--asr", ASR, "--lm", MEDICAL, "--lambdas", "0,0.4,0.8",
        "--beams", "1,3", "--work", str(tmp_path / "work"), "--test-curve", "--device", "cpu",
    ]  # fmt: skip
    assert main(command) == 0
    told = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "work" / "article.csv").open()))
    assert len(rows) == 2 * 2 * 3
    normalise = normaliser("article")
    for row in rows:
        own = read_article_manifest(dev if row["part"] == "dev" else test)
        weight, beam = float(row["lambda"]), int(row["beam_size"])
        names = {"rule": fusion.article(weight, 2), "end_threshold": None} if weight else {}
        results = decoder(weight > 0).transcribe([one.audio for _, one in own], beam_size=beam, **names)
        wanted = word_errors([one.text for _, one in own], [result.text for result in results], normalise)
        assert int(row["errors"]) == sum(wanted.errors)
        assert f"{100 * wanted.rate:6.2f}" in told
    for beam in ("1", "3"):
        curve = {row["lambda"]: int(row["errors"]) for row in rows if (row["part"], row["beam_size"]) == ("dev", beam)}
        chosen = next(row["lambda"] for row in rows if row["chosen"] == "True" and row["beam_size"] == beam)
        assert curve[chosen] == min(curve.values())
    lines = (tmp_path / "work" / "hypotheses.jsonl").read_text()
    assert main(command) == 0
    assert (tmp_path / "work" / "hypotheses.jsonl").read_text() == lines  # nothing is decoded again
    assert capsys.readouterr().out == told


def test_documents_stay_whole(tmp_path: Path) -> None:
    rows = read_article_manifest(manifest(tmp_path / "m.jsonl", list(range(12)), [i // 2 for i in range(12)]))
    dev, test = split_documents(rows)
    document = {own.id: name for name, own in rows}
    assert len(dev) + len(test) == 12
    assert not {document[own.id] for own in dev} & {document[own.id] for own in test}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"uuid": "a", "text": "x"}\n', "wanted file"),
        ('{"uuid": "a", "file": "a.wav"}\n', "wanted file"),
        ('{"uuid": "a", "file": "a.wav", "text": "x"}\n' * 2, "was there before"),
        ("no json\n", "cannot be read as JSON lines"),
        ("", "holds no recordings"),
    ],
)
def test_other_manifests_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "m.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=words):
        read_article_manifest(tmp_path / "m.jsonl")


def test_bad_input_is_one_sentence(tmp_path: Path, capsys) -> None:
    one = manifest(tmp_path / "m.jsonl", [1], [1])
    for more, words in (
        ([], "give --manifest"),
        (["--manifest", str(one)], "too few documents"),
        (["--manifest", str(one), "--lambdas", "0"], "above 0"),
    ):
        assert main(["--work", str(tmp_path / "work"), "--asr", ASR, "--lm", MEDICAL, *more]) == 2
        assert words in capsys.readouterr().err
    shared = ["--manifest", str(one), "--dev-manifest", str(one), "--asr", ASR, "--lm", MEDICAL]
    assert main([*shared, "--work", str(tmp_path / "work"), "--device", "cpu"]) == 2
    assert "shares 1 of its 1 recordings" in capsys.readouterr().err
