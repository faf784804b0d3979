from __future__ import annotations

import gzip
import logging
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion.errors import InvalidArgumentError, ModelError
from shallowfusion.ngrams.arpa import is_arpa, read_arpa, write_arpa
from shallowfusion.ngrams.arpa_native import read_plain_arpa
from shallowfusion.ngrams.arpa_reference import read_any_arpa
from shallowfusion.ngrams.model import LOG_10, NgramModel
from shallowfusion.ngrams.table import NgramTable, word_log_probs
from tests.ngrams.conftest import ARPA_FILES, SHARED_DATA, shared_model

GOOD = """\\data\\
ngram 1=5
ngram 2=3
ngram 3=1

\\1-grams:
-1\t<unk>
-99\t<s>\t-0.5
-1.25\t</s>
-0.5\tdé\t-0.25
-0.75\tb\t0

\\2-grams:
-0.125\t<s> dé\t-0.5
-0.25\tdé b
-0.5\tb </s>

\\3-grams:
-0.0625\t<s> dé b

\\end\\
"""


def write(directory: Path, text: str | bytes, name: str = "lm.arpa") -> Path:
    path = directory / name
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def assert_equal(found: NgramModel, wanted: NgramModel) -> None:
    assert found.words == wanted.words
    assert found.order == wanted.order
    for ours, theirs in zip(found.orders, wanted.orders, strict=True):
        assert ours.words.tolist() == theirs.words.tolist()
        np.testing.assert_allclose(ours.log_probs, theirs.log_probs, rtol=1e-6)
        np.testing.assert_allclose(ours.back_offs, theirs.back_offs, rtol=1e-6)


def test_fields_become_ids_and_nats(tmp_path: Path) -> None:
    model = read_arpa(write(tmp_path, GOOD))
    assert model.words == ("<unk>", "<s>", "</s>", "dé", "b")
    assert (model.begin_word, model.end_word, model.unknown_word) == (1, 2, 0)
    assert [ngrams.words.tolist() for ngrams in model.orders[1:]] == [[[1, 3], [3, 4], [4, 2]], [[1, 3, 4]]]
    np.testing.assert_allclose(model.orders[0].log_probs, np.array([-1, -99, -1.25, -0.5, -0.75]) * LOG_10)
    np.testing.assert_allclose(model.orders[1].back_offs, np.array([-0.5, 0, 0]) * LOG_10)
    assert [ngrams.words.dtype for ngrams in model.orders] == [np.int32] * 3
    assert (model.id_of("dé"), model.id_of("nothing")) == (3, 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\t", " "),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n\n", "\n"),
        lambda text: text.replace("\n\n", "\n\n\n"),
        lambda text: "# made by a toolkit\n\n" + text + "\nanything after the end",
        lambda text: text.replace("<unk>", "<UNK>"),
        lambda text: text.replace("ngram 1=5", "ngram 1 = 5"),
        lambda text: text.replace("-0.25\tdé b", "-2.5E-1\tdé b\t0.0"),
    ],
)
def test_variants_of_the_form_read_alike(tmp_path: Path, change) -> None:
    found = read_arpa(write(tmp_path, change(GOOD)))
    words = [word.lower() for word in found.words]
    assert tuple(words) == read_arpa(write(tmp_path, GOOD)).words
    assert word_log_probs(NgramTable(found), ["dé", "b"]).sum() == pytest.approx((-0.125 - 0.0625 - 0.5) * LOG_10)


def test_gzipped_files_read_alike(tmp_path: Path) -> None:
    assert_equal(read_arpa(write(tmp_path, GOOD, "lm.arpa.gz")), read_arpa(write(tmp_path, GOOD)))
    assert is_arpa(tmp_path / "lm.arpa.gz")
    assert is_arpa("LM.ARPA")
    assert not is_arpa("gpt2")


def test_missing_special_words_are_added_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "\\data\\\nngram 1=2\n\n\\1-grams:\n-0.5\ta\n-0.25\tb\n\n\\end\\\n"
    with caplog.at_level(logging.WARNING):
        table = NgramTable.from_arpa(write(tmp_path, text))
    assert "<unk>" in caplog.text
    assert "</s>" in caplog.text
    found = word_log_probs(table, ["a", "neverheardof"]) / LOG_10
    np.testing.assert_allclose(found, [-0.5, -100.0, -100.0], rtol=1e-6)
    other = NgramTable.from_arpa(tmp_path / "lm.arpa", unknown_log_prob=-7.0)
    np.testing.assert_allclose(word_log_probs(other, ["neverheardof"], end=False), [-7.0])
    with pytest.raises(InvalidArgumentError, match="unknown_log_prob"):
        read_arpa(tmp_path / "lm.arpa", unknown_log_prob=1.0)


def test_a_highest_order_without_ngrams_is_left_out(tmp_path: Path) -> None:
    text = GOOD.replace("ngram 3=1", "ngram 3=0").replace("-0.0625\t<s> dé b\n", "")
    assert read_arpa(write(tmp_path, text)).order == 2


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("\\data\\", "data", ["no line \\data\\", "an ARPA file"]),
        ("ngram 1=5", "ngram 1=six", ["line 2", "ngram 1=COUNT"]),
        ("ngram 2=3", "ngram 3=3", ["line 3", "ngram 2=COUNT"]),
        ("ngram 1=5", "ngram 1=6", ["line 12", "only 5 1-grams", "6 as the header counts"]),
        ("ngram 1=5", "ngram 1=4", ["line 11", "-0.75", "\\\\2-grams:"]),
        ("ngram 3=1", "ngram 3=2", ["line 20", "only 1 3-grams"]),
        ("-0.25\tdé b", "-0.25\tdé", ["line 15", "2 fields", "2 words"]),
        ("-0.0625\t<s> dé b", "-0.0625\t<s> dé b\t-1", ["line 19", "5 fields"]),
        ("-0.25\tdé b", "x\tdé b", ["line 15", "'x'", "log10 probability"]),
        ("-0.25\tdé b", "nan\tdé b", ["line 15", "NaN"]),
        ("-0.25\tdé b", "0.25\tdé b", ["line 15", "above 0"]),
        ("-0.125\t<s> dé\t-0.5", "-0.125\t<s> dé\tinf", ["line 14", "infinity", "back-off"]),
        ("-0.25\tdé b", "-0.25\tdé c", ["line 15", "the word 'c'", "unigrams"]),
        ("-0.75\tb\t0", "-0.75\tdé\t0", ["line 11", "twice"]),
        ("\\end\\", "", ["end of the file", "cut short"]),
        ("\\3-grams:", "\\4-grams:", ["line 18", "3-grams:"]),
        ("\\end\\", "\\4-grams:", ["line 21", "\\\\4-grams:"]),
    ],
)
def test_malformed_files_are_refused_with_the_line(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    assert old in GOOD
    with pytest.raises(ModelError) as caught:
        read_arpa(write(tmp_path, GOOD.replace(old, new)))
    for word in ["lm.arpa", "wanted", *words]:
        assert word in str(caught.value)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a file"):
        read_arpa(tmp_path / "nowhere.arpa")
    with pytest.raises(ModelError, match="no line"):
        read_arpa(write(tmp_path, ""))
    packed = gzip.compress(GOOD.encode())
    for data in (packed[:-9], packed[:20] + b"\0\0\0\0" + packed[24:]):
        with pytest.raises(ModelError, match="cut short"):
            read_arpa(write(tmp_path, data, "lm.arpa"))
    with pytest.raises(ModelError, match=r"line 10.*UTF-8"):
        read_arpa(write(tmp_path, GOOD.encode("latin-1")))


def assert_readers_agree(data: bytes) -> None:
    """What the fast reader reads at all, the other reads alike, to the bit."""
    found = read_plain_arpa(data)
    if found is None:
        return
    words, orders = read_any_arpa(data, "lm.arpa")
    assert found[0] == words
    assert len(found[1]) == len(orders)
    for ours, theirs in zip(found[1], orders, strict=True):
        assert ours.words.tolist() == theirs.words.tolist()
        assert ours.log_probs.tobytes() == theirs.log_probs.tobytes()
        assert ours.back_offs.tobytes() == theirs.back_offs.tobytes()


@pytest.mark.parametrize("name", ARPA_FILES)
def test_both_readers_agree_on_real_files(name: str) -> None:
    shared_model(name)  # skips without the data
    data = (SHARED_DATA / name).read_bytes()
    data = gzip.decompress(data) if name.endswith(".gz") else data
    assert read_plain_arpa(data) is not None
    assert_readers_agree(data)


def test_unusual_files_are_left_to_the_reader_in_python(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unusual = GOOD.replace("ngram 1=5", "ngram 1 = 5")
    assert read_plain_arpa(GOOD.encode()) is not None
    assert read_plain_arpa(unusual.encode()) is None
    with caplog.at_level(logging.INFO):
        read_arpa(write(tmp_path, unusual))
    assert "is read in Python" in caplog.text
    for huge in ("ngram 3=999999999999999", "ngram 3=99999999999999999999"):
        assert read_plain_arpa(GOOD.replace("ngram 3=1", huge).encode()) is None


def mutated(data: st.DataObject, original: bytes) -> bytes:
    """The text with up to four cuts, gaps, pieces of junk and lines said twice."""
    text = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text)))
        kind = data.draw(st.sampled_from(["cut", "drop", "insert", "overwrite", "line"]))
        if kind == "cut":
            del text[place:]
        elif kind == "drop":
            del text[place : place + data.draw(st.integers(1, 20))]
        elif kind == "line":  # a line said twice
            lines = bytes(text).split(b"\n")
            lines.insert(place % len(lines), lines[data.draw(st.integers(0, len(lines) - 1))])
            text = bytearray(b"\n".join(lines))
        else:
            junk = data.draw(st.one_of(st.binary(max_size=8), st.sampled_from([b"\n", b"\t", b"1e999", b"-inf", b"9"])))
            text[place : place + (len(junk) if kind == "overwrite" else 0)] = junk
    return bytes(text)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_mutated_files_load_or_raise_our_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    text = mutated(data, GOOD.encode())
    assert_readers_agree(text)
    path = tmp_path_factory.mktemp("mutated") / "lm.arpa"
    path.write_bytes(text)
    wanted, table, message = "", None, ""
    try:
        table = NgramTable.from_arpa(path)
    except ModelError as error:
        wanted, message = "lm.arpa, line ", str(error)
    except InvalidArgumentError as error:  # the form is right, but an n-gram is there twice
        wanted, message = "twice", str(error)
    assert wanted in message
    if table is None:
        return
    scores = word_log_probs(table, ["dé", "b", "neverheardof"])
    assert not np.isnan(scores).any()
    assert table.dense([table.start_state]).shape == (1, len(table.model.words))


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(["ctc/parlance/test.arpa", "ctc/pyctcdecode/bugs_bunny_kenlm.arpa"]))
def test_mutated_real_files_name_the_line_in_both_readers(data: st.DataObject, name: str) -> None:
    shared_model(name)  # skips without the data
    text = mutated(data, (SHARED_DATA / name).read_bytes())
    assert_readers_agree(text)
    message = ""
    try:
        words, orders = read_any_arpa(text, "lm.arpa")
    except ModelError as error:
        message = str(error)
    if message:
        place = re.match(r"lm\.arpa, line (\d+): got .*, wanted .*; .*\.$", message, re.DOTALL)
        assert place is not None, message
        assert 0 <= int(place[1]) <= len(text.split(b"\n")) + 1
        return
    assert all(ngrams.words.max(initial=0) < len(words) for ngrams in orders)
    assert all(np.isfinite(ngrams.back_offs).all() for ngrams in orders)


@pytest.mark.parametrize("name", ARPA_FILES)
@pytest.mark.parametrize("ending", [".arpa", ".arpa.gz"])
def test_written_files_read_back_equal(tmp_path: Path, name: str, ending: str) -> None:
    model = shared_model(name)
    write_arpa(model, tmp_path / f"copy{ending}")
    assert_equal(read_arpa(tmp_path / f"copy{ending}"), model)


def test_equal_models_give_equal_files(tmp_path: Path) -> None:
    model = read_arpa(write(tmp_path, GOOD))
    write_arpa(model, tmp_path / "one.arpa.gz")
    time.sleep(1.1)
    write_arpa(model, tmp_path / "two.arpa.gz")
    assert (tmp_path / "one.arpa.gz").read_bytes() == (tmp_path / "two.arpa.gz").read_bytes()


def test_words_with_white_space_and_bad_places_are_refused(tmp_path: Path) -> None:
    model = read_arpa(write(tmp_path, GOOD))
    spaced = NgramModel(("<unk>", "<s>", "</s>", "d e", "b"), model.orders, 1, 2, 0)
    with pytest.raises(ModelError, match="'d e'"):
        write_arpa(spaced, tmp_path / "spaced.arpa")
    with pytest.raises(ModelError, match="cannot be written"):
        write_arpa(model, tmp_path / "nowhere" / "lm.arpa")


def test_kenlm_reads_what_we_write(tmp_path: Path) -> None:
    kenlm = pytest.importorskip("kenlm")
    model = shared_model("lm/an4/an4_full.trigram.arpa")
    write_arpa(model, tmp_path / "copy.arpa")
    text = "enter nine one six nine"
    wanted = kenlm.Model(str(SHARED_DATA / "lm/an4/an4_full.trigram.arpa")).score(text)
    assert kenlm.Model(str(tmp_path / "copy.arpa")).score(text) == pytest.approx(wanted, abs=1e-5)
