"""CTC models of transformers: equal to their own greedy decoding, with language models, and errors by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shallowfusion import fusion
from shallowfusion.cli.main import main
from shallowfusion.ctc.decoder import CTCDecoder
from shallowfusion.ctc.models import is_ctc_model, load_ctc_model
from shallowfusion.errors import AudioError, InvalidArgumentError, ModelError, VocabularyError
from shallowfusion.scorers.preparation import Int8Linear
from tests.ctc.tiny_models import KINDS, LETTERS, PIECES, save_tiny_model
from tests.shipped import ASR, MEDICAL, clip

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("models")
    for i, kind in enumerate(KINDS):
        save_tiny_model(kind, base / str(i), seed=i)
    return {kind: str(base / str(i)) for i, kind in enumerate(KINDS)}


def recordings(count: int = 3) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    lengths = [16000, 9000, 12345, 20000][:count]
    return [generator.normal(size=length).astype(np.float32) * 0.1 for length in lengths]


def greedy(directory: str, samples: np.ndarray) -> str:
    """transformers' own: features, argmax, batch_decode."""
    import transformers

    extractor = transformers.AutoFeatureExtractor.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCTC.from_pretrained(directory).eval()
    with torch.inference_mode():
        logits = model(**extractor(samples, sampling_rate=16000, return_tensors="pt")).logits
    return " ".join(tokenizer.batch_decode(logits.argmax(dim=-1))[0].split())


@pytest.mark.parametrize("kind", KINDS)
def test_texts_equal_greedy_decoding_of_transformers(directories: dict[str, str], kind: str) -> None:
    decoder = CTCDecoder.from_pretrained(directories[kind], device="cpu", threads=1)
    results = decoder.transcribe(recordings(), beam_size=50)
    texts = [" ".join(result.text.split()) for result in results]
    assert texts == [greedy(directories[kind], samples) for samples in recordings()]
    assert len(set(texts)) == 3
    assert all(texts)
    assert [result.duration for result in results] == pytest.approx([len(s) / 16000 for s in recordings()])


@pytest.mark.parametrize("kind", KINDS)
def test_batches_change_nothing_and_frames_fit(directories: dict[str, str], kind: str) -> None:
    model = load_ctc_model(directories[kind], CPU, torch.float32)
    samples = [torch.from_numpy(own) for own in recordings()]
    together, lengths = model.log_probs(samples)
    assert together.shape[1] == lengths.max()
    for i, own in enumerate(samples):
        alone, count = model.log_probs([own])
        assert count[0] == lengths[i]
        assert lengths[i] * model.frame_seconds == pytest.approx(len(own) / 16000, abs=2.5 * model.frame_seconds)
        said = torch.isfinite(alone[0, : count[0]])
        assert torch.equal(together[i, : count[0]].argmax(dim=1), alone[0, : count[0]].argmax(dim=1))
        torch.testing.assert_close(together[i, : count[0]][said], alone[0, : count[0]][said], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "wavlm"])
def test_int8_hears_what_float32_hears(directories: dict[str, str], kind: str) -> None:
    plain, whole = (load_ctc_model(directories[kind], CPU, dtype) for dtype in (torch.float32, torch.int8))
    rounded = [module for module in whole.model.modules() if isinstance(module, Int8Linear)]
    linear = [module for module in plain.model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(rounded) == len(linear) > 0
    assert not any(isinstance(module, torch.nn.Linear) for module in whole.model.modules())
    samples = [torch.from_numpy(own) for own in recordings()]
    (wanted, lengths), (found, counts) = plain.log_probs(samples), whole.log_probs(samples)
    assert found.dtype == torch.float32
    assert counts.tolist() == lengths.tolist()
    assert torch.equal(torch.isneginf(found), torch.isneginf(wanted))
    best = [own.argmax(2)[torch.arange(own.shape[1]) < torch.from_numpy(lengths)[:, None]] for own in (wanted, found)]
    assert not torch.equal(wanted, found)
    assert float((best[0] == best[1]).float().mean()) > 0.95
    alone, _ = whole.log_probs(samples[:1])
    torch.testing.assert_close(alone[0], found[0, : len(alone[0])], rtol=0.05, atol=1.5)


def test_int8_is_refused_where_weights_are_read_directly(directories: dict[str, str]) -> None:
    with pytest.raises(InvalidArgumentError, match="WavLMForCTC reads the weights of one"):
        CTCDecoder.from_pretrained(directories["wavlm"], device="cpu", dtype="int8")
    decoder = CTCDecoder.from_pretrained(directories["hubert"], device="cpu", dtype="int8", threads=1)
    assert decoder.transcribe(recordings(1), beam_size=10)[0].text


def test_labels_come_from_the_tokenizer(directories: dict[str, str]) -> None:
    letters = load_ctc_model(directories["hubert"], CPU, torch.float32)
    assert (letters.blank, letters.delimiter, letters.word_start) == (0, LETTERS.index("|"), None)
    assert letters.silenced == (1, 2, 3)
    pieces = load_ctc_model(directories["parakeet_ctc"], CPU, torch.float32)
    assert (pieces.blank, pieces.delimiter, pieces.word_start) == (len(PIECES), None, "▁")
    assert pieces.labels[: len(PIECES)] == PIECES
    assert pieces.silenced == (0,)
    assert (letters.frame_seconds, pieces.frame_seconds) == (80 / 16000, 0.08)
    log_probs, _ = letters.log_probs([torch.from_numpy(recordings()[0])])
    assert torch.isneginf(log_probs[:, :, [1, 2, 3]]).all()


@pytest.mark.parametrize("kind", ["wav2vec2, layer norm", "parakeet_ctc"])
def test_a_language_model_has_its_say(directories: dict[str, str], kind: str, tmp_path: Path) -> None:
    plain = CTCDecoder.from_pretrained(directories[kind], device="cpu", threads=1)
    first = plain.transcribe(recordings(1))[0]
    words = sorted({*first.text.split(), "the", "a"})
    arpa = tmp_path / "words.arpa"
    lines = ["\\data\\", f"ngram 1={len(words) + 3}", "", "\\1-grams:", "-9\t<unk>", "-99\t<s>", "-1\t</s>"]
    arpa.write_text("\n".join([*lines, *(f"-1\t{word}" for word in words), "", "\\end\\", ""]), encoding="utf-8")
    fused = CTCDecoder.from_pretrained(directories[kind], str(arpa), device="cpu", threads=1)
    result = fused.transcribe(recordings(1), lm_weight=0.5, n_best=2)[0]
    count = len(result.text.split())
    assert set(result.best.parts) == {"asr", "lm"}
    if set(result.text.split()) <= set(words):
        assert result.best.parts["lm"] == pytest.approx(-(count + 1) * np.log(10.0), abs=1e-3)
    assert result.best.total == pytest.approx(result.best.parts["asr"] + 0.5 * result.best.parts["lm"], abs=1e-4)


def test_a_late_language_model_need_not_spell_labels_that_are_never_said(directories: dict[str, str]) -> None:
    decoder = CTCDecoder.from_pretrained(directories["hubert"], device="cpu", threads=1, llm=MEDICAL)
    assert decoder.model is not None
    assert any("<" in decoder.model.labels[label] for label in decoder.model.silenced)
    (result,) = decoder.transcribe(recordings(1), rule=fusion.delayed(0.3, interval=None), beam_size=4)
    assert result.best.parts["llm"] < 0
    with pytest.raises(VocabularyError, match="'<'"):
        CTCDecoder(["", "a", "<"], llm=decoder.llm).decode(np.full((1, 2, 3), -2.0), rule=fusion.delayed(0.3))


def test_failures_stay_alone(directories: dict[str, str]) -> None:
    decoder = CTCDecoder.from_pretrained(directories["wavlm"], device="cpu", threads=1)
    given = [recordings()[0], "missing.wav", clip(2), np.zeros(100, dtype=np.float32)]
    one, bad, other, short = decoder.transcribe(given, batch_size=2)
    assert "too short" in str(short.error)
    assert isinstance(bad.error, AudioError)
    assert one.text
    assert other.source == str(clip(2))
    assert other.duration > 1


def test_what_is_no_ctc_model_is_refused(directories: dict[str, str], tmp_path: Path) -> None:
    assert is_ctc_model(directories["hubert"])
    assert not is_ctc_model(ASR)
    with pytest.raises(ModelError, match="whisper"):
        CTCDecoder.from_pretrained(ASR)
    with pytest.raises(ModelError, match="holds no"):
        CTCDecoder.from_pretrained(tmp_path)
    decoder = CTCDecoder(["_", "a"])
    with pytest.raises(InvalidArgumentError, match="from_pretrained"):
        decoder.transcribe(recordings())
    loaded: Any = CTCDecoder.from_pretrained(directories["hubert"], device="cpu", threads=1)
    for arguments in ({"batch_size": 0}, {"beam_size": 0}, {"width": 3}):
        with pytest.raises(InvalidArgumentError):
            loaded.transcribe(recordings(1), **arguments)
    with pytest.raises(InvalidArgumentError, match="empty"):
        loaded.transcribe([])


def test_the_command_line_chooses_by_model(directories: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["transcribe", str(clip(2)), "--asr", directories["wav2vec2"], "--device", "cpu"]
    assert main([*command, "--beam-size", "20", "--n-best", "2"]) == 0
    text = capsys.readouterr().out.strip()
    decoder = CTCDecoder.from_pretrained(directories["wav2vec2"], device="cpu")
    assert text == decoder.transcribe(clip(2), beam_size=20)[0].text
    for given in (
        ["--stop-rule", "whisper"],
        ["--ctc-weight", "0.3"],
        ["--lm", MEDICAL, "--lm", MEDICAL],
        ["--lm", MEDICAL],
        ["--rule", "delayed(0.5)"],
        ["--lm", MEDICAL, "--lm-weight", "0.3"],
    ):
        assert main([*command, *given]) == 2
        assert "CTC model" in capsys.readouterr().err
    assert main(["transcribe", str(clip(2)), "--asr", ASR, "--word-bonus", "1", "--backend", "native"]) == 2
    assert "word_bonus, backend are for the search of CTC models" in capsys.readouterr().err


def words_arpa(path: Path) -> str:
    lines = ["\\data\\", "ngram 1=4", "", "\\1-grams:", "-2\t<unk>", "-99\t<s>", "-1\t</s>", "-1\tt", "", "\\end\\", ""]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_the_command_line_gives_a_ctc_model_both_language_models_and_its_own_options(
    directories: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arpa, model = words_arpa(tmp_path / "words.arpa"), directories["hubert"]
    command = [
        "transcribe", str(clip(2)), "--asr", model, "--device", "cpu", "--lm", MEDICAL, "--lm", arpa,
        "--rule", "delayed(0.4, interval=20, proxy_weight=0.3)", "--beam-size", "6", "--n-best", "2",
        "--word-bonus", "0.5", "--beam-margin", "40", "--blank-skip", "0.99", "--backend", "native", "--json",
    ]  # fmt: skip
    assert main(command) == 0
    record = json.loads(capsys.readouterr().out)
    decoder = CTCDecoder.from_pretrained(model, arpa, device="cpu", llm=MEDICAL)
    (wanted,) = decoder.transcribe(
        clip(2), n_best=2, rule=fusion.delayed(0.4, interval=20, proxy_weight=0.3), beam_size=6, word_bonus=0.5,
        beam_margin=40.0, blank_skip=0.99, backend="native",
    )  # fmt: skip
    assert [found["text"] for found in record["n_best"]] == [found.text for found in wanted.n_best]
    assert record["n_best"][0]["total"] == pytest.approx(wanted.best.total)
    assert set(record["n_best"][0]["parts"]) == {"asr", "lm", "llm"}
    assert record["timing"]["llm_calls"] > 1
    assert " ".join(word["word"] for word in record["words"]) == record["text"]
    ends = [word["end"] for word in record["words"]]
    assert ends == sorted(ends)
    assert ends[-1] <= record["duration"]
    assert main([*command[:6], "--blank-skip", "2"]) == 2
    assert "blank_skip" in capsys.readouterr().err


def test_a_ctc_model_is_evaluated_alone_and_fused(
    directories: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arpa, model, manifest = words_arpa(tmp_path / "words.arpa"), directories["wav2vec2"], tmp_path / "test.jsonl"
    manifest.write_text(json.dumps({"audio": str(clip(2)), "text": "some words", "id": "one"}) + "\n")
    command = ["evaluate", str(manifest), "--asr", model, "--device", "cpu", "--lm", arpa, "--beam-size", "8", "--json"]
    assert main([*command, "--try-weights", "0,3", "--word-bonus", "1"]) == 0
    baseline, zero, three = json.loads(capsys.readouterr().out)["systems"]
    alone = CTCDecoder.from_pretrained(model, device="cpu").transcribe(clip(2), beam_size=8, word_bonus=1.0)[0]
    fused = CTCDecoder.from_pretrained(model, arpa, device="cpu")
    texts = [fused.transcribe(clip(2), beam_size=8, word_bonus=1.0, lm_weight=weight)[0].text for weight in (0.0, 3.0)]
    assert [list(found["texts"].values()) for found in (baseline, zero, three)] == [[alone.text], *([t] for t in texts)]
    assert texts[1] != alone.text
    assert main([*command, "--calibration", "nowhere.json"]) == 2
    assert "calibration mean nothing" in capsys.readouterr().err
