"""The front of CTC decoding: same records as the attention decoder's."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from shallowfusion import fusion
from shallowfusion.ctc.backends import SearchChooser
from shallowfusion.ctc.decoder import CTCDecoder
from shallowfusion.ctc.device_search import DeviceCtcSearch
from shallowfusion.ctc.settings import CtcLanguage, CtcOptions
from shallowfusion.errors import AcousticScoresError, InvalidArgumentError, ModelError
from tests.ctc.conftest import LIBRI_LABELS, LIBRI_TEXT, libri, random_log_probs, shared_file

LABELS = ("_", " ", "a", "b")


def test_librispeech_sentence_with_a_batch_of_tensors() -> None:
    decoder = CTCDecoder(LIBRI_LABELS, blank="", delimiter=" ", frame_seconds=0.02)
    batch = torch.from_numpy(libri()).float().repeat(2, 1, 1)
    whole, part = decoder.decode(batch, [371, 100], beam_size=20, n_best=3)
    assert whole.text == LIBRI_TEXT
    assert whole.duration == pytest.approx(7.42)
    assert len(whole.n_best) == 3
    assert LIBRI_TEXT.startswith(part.text[:-2])
    assert part.segments[0].end == pytest.approx(2.0)
    best = whole.best
    assert best.total == pytest.approx(best.parts["asr"])
    assert "".join(token.text for token in best.tokens).strip() == LIBRI_TEXT


def runs_of(best: np.ndarray, blank: int) -> list[tuple[int, int, int]]:
    """Label, first frame and the one after the last of each label of a path."""
    found: list[tuple[int, int, int]] = []
    for frame, label in enumerate(best.tolist()):
        if found and label == best[frame - 1] and label != blank:
            found[-1] = (label, found[-1][1], frame + 1)
        elif label != blank:
            found.append((label, frame, frame + 1))
    return found


def test_words_and_labels_of_the_librispeech_sentence_have_the_times_of_its_best_path() -> None:
    runs = runs_of(libri().argmax(axis=1), 28)
    text = "".join(LIBRI_LABELS[label] for label, _, _ in runs)
    assert text.strip() == LIBRI_TEXT
    places = [place for place, letter in enumerate(text) if letter == " "]
    bounds = [-1, *places, len(text)]
    wanted = [
        {"word": text[a + 1 : b], "start": runs[a + 1][1] * 0.02, "end": runs[b - 1][2] * 0.02}
        for a, b in itertools.pairwise(bounds)
        if b > a + 1
    ]
    (result,) = CTCDecoder(LIBRI_LABELS, blank="", delimiter=" ", frame_seconds=0.02).decode(
        libri()[None], beam_size=30
    )
    record = result.to_json()
    assert [word["word"] for word in record["words"]] == LIBRI_TEXT.split()
    for found, own in zip(record["words"], wanted, strict=True):
        assert found == {"word": own["word"], "start": pytest.approx(own["start"]), "end": pytest.approx(own["end"])}
    assert record["n_best"][0]["words"] == record["words"] == result.to_whisper()["segments"][0]["words"]
    assert result.words[-1].end <= result.duration == pytest.approx(7.42)
    tokens = record["n_best"][0]["tokens"]
    assert [token["start"] for token in tokens] == pytest.approx([start * 0.02 for _, start, _ in runs])
    ends = [(token["end"], end * 0.02) for token, (_, _, end) in zip(tokens, runs, strict=True) if token["text"] != " "]
    assert [found for found, _ in ends] == pytest.approx([end for _, end in ends])  # spaces tie with blanks here


def test_times_need_the_length_of_a_frame() -> None:
    log_probs = np.full((1, 6, 4), -9.0, np.float32)
    log_probs[0, range(6), [0, 2, 2, 3, 1, 3]] = -0.001
    (frames,), (nothing,) = (
        CTCDecoder(LABELS, 0, 1, frame_seconds=seconds).decode(log_probs) for seconds in (1.0, 0.0)
    )
    assert [(word.word, word.start, word.end) for word in frames.words] == [("ab", 1.0, 4.0), ("b", 5.0, 6.0)]
    assert [(token.start, token.end) for token in frames.best.tokens] == [(1, 3), (3, 4), (4, 5), (5, 6)]
    assert nothing.text == "ab b"
    assert nothing.words == ()
    assert "start" not in nothing.to_json()["n_best"][0]["tokens"][0]


def test_parts_add_up_and_can_be_reranked() -> None:
    path = shared_file("torchaudio_toy/kenlm.arpa")
    decoder = CTCDecoder(LABELS, 0, 1, CtcLanguage(CTCDecoder(LABELS, 0, 1, path).language.table, unknown_word=0.0))  # type: ignore[union-attr]
    (result,) = decoder.decode(random_log_probs(3, (1, 9, 4)), n_best=20, lm_weight=0.4)
    assert len(result.n_best) > 3
    for hypothesis in result.n_best:
        assert hypothesis.total == pytest.approx(hypothesis.parts["asr"] + 0.4 * hypothesis.parts["lm"], abs=1e-6)
        assert sum(token.total for token in hypothesis.tokens) == pytest.approx(hypothesis.total)
    again = result.rerank(fusion.static(0.0), length_penalty=0.0)
    assert again.best.parts["asr"] == max(hypothesis.parts["asr"] for hypothesis in result.n_best)


def test_a_failed_utterance_raises_when_its_text_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    log_probs = random_log_probs(1, (3, 6, 4))
    log_probs[1, 2, 0] = math.nan
    results = CTCDecoder(LABELS).decode(log_probs)
    with pytest.raises(AcousticScoresError, match=r"utterance 1 .* frame 2"):
        _ = results[1].text
    assert "utterance 1" in caplog.text
    assert [result.error is None for result in results] == [True, False, True]


def test_an_empty_text_keeps_its_score() -> None:
    log_probs = np.full((1, 4, 4), -9.0, np.float32)
    log_probs[..., 0] = -0.001
    hypothesis = CTCDecoder(LABELS).decode(log_probs)[0].best
    assert hypothesis.text == ""
    assert hypothesis.token_ids == ()
    assert sum(token.parts["asr"] for token in hypothesis.tokens) == pytest.approx(hypothesis.total)


def test_the_backend_is_chosen_by_the_scores_and_the_settings(caplog: pytest.LogCaptureFixture) -> None:
    decoder = CTCDecoder(LIBRI_LABELS, blank="", delimiter=" ")
    batch = torch.from_numpy(libri()).float()[None]
    results = [decoder.decode(batch, beam_size=12, backend=backend)[0] for backend in ("auto", "native", "device")]
    for result in results:
        assert result.text == LIBRI_TEXT
        assert result.best.total == pytest.approx(results[0].best.total, abs=1e-8)
    chooser, native = SearchChooser(), decoder.search(beam_size=12, backend="auto")
    there = torch.empty((1, 3, 29), device="meta")
    assert chooser.choose(native, batch) is native
    assert isinstance(chooser.choose(native, there), DeviceCtcSearch)
    assert chooser.choose(native, there) is chooser.choose(native, there)
    with caplog.at_level("INFO"):
        rare = decoder.search(beam_size=12, history_words=2)
        assert chooser.choose(rare, there) is rare
        assert chooser.choose(native, there, is_late=True) is native
    assert "history_words=2" in caplog.text
    assert "asked late" in caplog.text
    with pytest.raises(InvalidArgumentError, match="asked late"):
        chooser.choose(decoder.search(backend="device"), batch, is_late=True)
    with pytest.raises(InvalidArgumentError, match="history_words=2"):
        decoder.decode(batch, history_words=2, backend="device")
    assert isinstance(chooser.choose(decoder.search(word_bonus=1.0, hotwords="good deal"), there), DeviceCtcSearch)
    with pytest.raises(InvalidArgumentError, match="backend"):
        decoder.decode(batch, backend="gpu")


def test_bad_input_is_refused() -> None:
    for arguments in ({"blank": "x"}, {"blank": 9}, {"delimiter": "x"}, {"delimiter": 0}, {"lm": None, "threads": 0}):
        with pytest.raises(InvalidArgumentError):
            CTCDecoder(LABELS, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ModelError):
        CTCDecoder(LABELS, 0, 1, "nowhere.arpa")
    decoder = CTCDecoder(LABELS)
    with pytest.raises(InvalidArgumentError, match="beam_width"):
        decoder.decode(np.full((1, 2, 4), -2.0), beam_width=3)
    for bad in (None, np.float32(3), np.zeros((2, 3)), [[1.0]]):
        with pytest.raises(InvalidArgumentError, match="log_probs"):
            decoder.decode(bad)
    assert decoder.search(CtcOptions(beam_size=3)).options.beam_size == 3
