"""N-best lists in files: what is written is read, what is wrong is refused with its place."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from shallowfusion.errors import AudioError, InvalidArgumentError
from shallowfusion.evaluation import word_errors
from shallowfusion.evaluation.nbest import (
    ListedHypothesis,
    NBestList,
    list_of,
    oracle_errors,
    read_nbest,
    with_references,
    with_scores,
    write_nbest,
)
from shallowfusion.results import Transcription
from shallowfusion.values import Hypothesis
from tests.tiny import random_encoder_output, tiny_decoder

SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"


def entry(id: str = "u1", reference: str | None = "a b") -> NBestList:
    hypotheses = (
        ListedHypothesis("a x", -1.0, {"asr": -1.0, "lm": -9.0}, 3),
        ListedHypothesis("a b", -1.5, {"asr": -1.5, "lm": -2.0}, 4),
    )
    return NBestList(id, hypotheses, reference)


@pytest.mark.parametrize("name", ["lists.jsonl", "lists.jsonl.gz"])
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    lists = [entry(), entry("ü2", None)]
    write_nbest(path, lists)
    assert read_nbest(path) == lists
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == name.endswith(".gz")


def test_our_results_become_lists_with_every_models_part() -> None:
    decoder = tiny_decoder()
    result = decoder.decode(random_encoder_output(decoder.acoustic, 1), beam_size=4, n_best=4, lm_weight=0.3)[0]
    found = list_of(result, "u1", "some words").check(fewest=2)
    assert found.first.text == result.text
    by_text = {hypothesis.text: hypothesis for hypothesis in reversed(result.n_best)}
    assert len(found.hypotheses) == len(by_text)
    for hypothesis in found.hypotheses:
        assert set(hypothesis.parts) == {"asr", "lm"}
        assert hypothesis.num_words == len(hypothesis.text.split())
        assert hypothesis.num_tokens is not None


def test_equal_texts_are_merged_into_the_best() -> None:
    def made(text: str, total: float) -> Hypothesis:
        return Hypothesis(text, (), (), total, total, {"asr": total})

    result = Transcription("x.wav", (made("a", -3.0), made("b", -2.0), made("a", -1.0)))
    found = list_of(result)
    assert [(h.text, h.total) for h in found.hypotheses] == [("a", -1.0), ("b", -2.0)]
    assert found.id == "x.wav"
    with pytest.raises(AudioError):
        list_of(Transcription("y.wav", error=AudioError("y.wav is silent.")))


def test_the_published_lists_have_their_published_error_rates() -> None:
    path = SHARED_DATA / "nbest" / "pocketsphinx_an4.jsonl.gz"
    if not path.exists():
        pytest.skip("the public n-best lists are not beside this checkout")
    lists = read_nbest(path)
    references = [str(found.reference) for found in lists]
    first = word_errors(references, [found.first.text for found in lists])
    assert f"{100 * first.rate:.1f}" == "26.8"
    assert f"{100 * oracle_errors(lists).rate:.1f}" == "11.9"


def test_oracle_takes_the_best_of_each_list() -> None:
    assert oracle_errors([entry()]).errors == (0,)
    assert oracle_errors([entry(reference="a c d")]).errors == (2,)
    with pytest.raises(InvalidArgumentError, match="no reference"):
        oracle_errors([entry(reference=None)])


def test_references_are_paired_by_id() -> None:
    lists = [entry("u1", None), entry("u2", None)]
    found = with_references(lists, {"u2": "two", "u1": "one"})
    assert [item.reference for item in found] == ["one", "two"]
    with pytest.raises(InvalidArgumentError, match=r"1 lists without reference \['u2'\], 1 references"):
        with_references(lists, {"u1": "one", "u3": "three"})


def test_scores_become_a_part() -> None:
    found = with_scores([entry("u1"), entry("u2")], "big", [1, 2, 3, 4])
    assert [h.parts["big"] for item in found for h in item.hypotheses] == [1, 2, 3, 4]
    with pytest.raises(InvalidArgumentError, match="one number per hypothesis, 2, got 1"):
        with_scores([entry()], "big", [1.0])
    with pytest.raises(InvalidArgumentError, match="big=nan"):
        with_scores([entry()], "big", [1.0, math.nan])


def line(*hypotheses: object, id: object = "u1") -> str:
    return json.dumps({"id": id, "hypotheses": hypotheses})


A, B = {"text": "a", "total": -1}, {"text": "b", "total": -2}
BAD = {
    "'a' twice": line(A, A),
    "holds 1 hypotheses, wanted at least 2": line(A),
    "misses a score: total=None": line(A, {"text": "b"}),
    "total=nan": line(A, {"text": "b", "total": math.nan}),
    "lm=-inf": line({**A, "parts": {"lm": -math.inf}}, {**B, "parts": {"lm": 0}}),
    "other parts": line({**A, "parts": {"lm": 0}}, B),
    "must have a 'text'": line(A, {"total": 1}),
    "misses a score: total=-1, parts=3": line({**A, "parts": 3}, B),
    "num_tokens": line({**A, "num_tokens": -1}, B),
    "must have an 'id'": line(A, B, id=3),
    "must have 'hypotheses'": '{"id": "u1"}',
    "must be a JSON object": "[1]",
    "line 1": "not json",
    "was there before": line(A, B) + "\n" + line(A, B),
    "holds no n-best list": "\n",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_files_are_refused(tmp_path: Path, words: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(BAD[words])
    with pytest.raises(InvalidArgumentError, match=r"bad\.jsonl") as raised:
        read_nbest(path)
    assert words in str(raised.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.gz").write_bytes(b"\x1f\x8b\x08")
    for name in ("cut.gz", "nowhere"):
        with pytest.raises(InvalidArgumentError, match="cannot be read"):
            read_nbest(tmp_path / name)


def test_single_entries_are_accepted_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(line(A))
    assert len(read_nbest(path, fewest=1)[0].hypotheses) == 1
