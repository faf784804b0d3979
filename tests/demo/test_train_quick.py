"""The demo's training runs from texts to model directories that transformers loads."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch

from shallowfusion.demo import train
from shallowfusion.demo.acoustic_model import load_acoustic_model, new_acoustic_model
from shallowfusion.demo.acoustic_training import joint_loss, make_batch
from shallowfusion.demo.corpus import ACOUSTIC_SOURCES, EVALUATION_SOURCES, GENERAL_SOURCES, MEDICAL_SOURCES
from shallowfusion.demo.synthesis import DEMO_FEATURES, load_cache
from shallowfusion.demo.vocabulary import CHARACTERS, END_OF_TEXT, decode, encode
from shallowfusion.errors import AudioError, InvalidArgumentError

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")

TRAINED = ["The doctor listens to the heart.", "She has a mild fever today.", "It was a dark night.", "Take two pills."]
UNSEEN = [
    f"The {organ} of the patient is {state} at this time." for organ in ("liver", "lung") for state in ("well", "ill")
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory with a handful of sentences in every text the training reads."""
    directory = tmp_path / "data" / "text"
    directory.mkdir(parents=True)
    for source in {*ACOUSTIC_SOURCES, *GENERAL_SOURCES, *MEDICAL_SOURCES}:
        write_lines(directory / f"{source}.txt.gz", TRAINED)
    for source in (*EVALUATION_SOURCES, "gen_gutenberg_test"):
        write_lines(directory / f"{source}.txt.gz", UNSEEN + TRAINED)
    return tmp_path / "data"


def write_lines(path: Path, lines: list[str]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.write("\n".join(lines) + "\n")


@needs_espeak
def test_quick_training_writes_models_that_transformers_loads(data: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GPT2LMHeadModel, WhisperFeatureExtractor, WhisperForConditionalGeneration

    out, work = tmp_path / "out", tmp_path / "work"
    arguments = ["--data", str(data), "--out", str(out), "--work", str(work), "--quick", "--steps", "2"]
    for stage in ("speech", "clips", "lm", "asr", "cards"):
        assert train.main([*arguments, "--stage", stage, "--threads", "1"]) == 0

    entry = json.loads((out / "clips" / "manifest.jsonl").read_text().splitlines()[0])
    assert (out / "clips" / entry["audio"]).exists()
    assert entry["text"] not in {sentence.lower().rstrip(".") for sentence in TRAINED}

    asr = out / "models" / "asr"
    whisper = WhisperForConditionalGeneration.from_pretrained(asr, dtype=torch.float32)
    extractor = WhisperFeatureExtractor.from_pretrained(asr)
    features = extractor(torch.zeros(16000).numpy(), sampling_rate=16000, return_tensors="pt").input_features
    assert features.shape == (1, 80, DEMO_FEATURES.chunk_frames)
    assert whisper.generate(features, max_new_tokens=4).shape[1] <= 6
    assert "Word error rate" in (asr / "README.md").read_text()

    text = " the patient's pulse"
    for name, vocab_size in (("lm_medical", len(CHARACTERS) + 1), ("lm_general", len(CHARACTERS) + 1)):
        lm = GPT2LMHeadModel.from_pretrained(out / "models" / name, dtype=torch.float32)
        assert lm.config.vocab_size == vocab_size
        assert lm.config.activation_function == "gelu_pytorch_tanh"
        tokenizer = AutoTokenizer.from_pretrained(out / "models" / name)
        assert tokenizer.encode(text) == encode(text.strip())
        assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer = AutoTokenizer.from_pretrained(asr)
    assert tokenizer.encode(text, add_special_tokens=False) == encode(text.strip())
    assert tokenizer.eos_token_id == END_OF_TEXT


@needs_espeak
def test_updates_lower_the_loss_of_what_was_heard(data: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    plan = train.Plan(data=data, out=tmp_path / "out", work=work, acoustic_steps=25, quick=True)
    train.run_stages(plan, ("speech", "asr"))
    utterances = load_cache(work / "speech-0")
    longest = max(len(utterance.features) for utterance in utterances)
    batch = make_batch(utterances, longest + longest % 2, None)
    torch.manual_seed(plan.seed)
    untrained = new_acoustic_model(32, 1, 1).eval()
    trained = load_acoustic_model(plan.models / "asr")
    with torch.inference_mode():
        before, after = (float(joint_loss(model, batch, 0.6)[0]) for model in (untrained, trained))
    assert after < before


def test_encoder_without_padding_equals_transformers_on_full_windows() -> None:
    torch.manual_seed(3)
    model = new_acoustic_model(32, 1, 1).eval()
    features = torch.randn(1, 80, DEMO_FEATURES.chunk_frames)
    with torch.inference_mode():
        theirs = model.whisper.model.encoder(features).last_hidden_state
        torch.testing.assert_close(model.encode(features), theirs)


def test_missing_data_and_synthesiser_are_named(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = train.Plan(data=tmp_path / "nowhere", out=tmp_path, work=tmp_path)
    with pytest.raises(InvalidArgumentError, match="--data"):
        train.run_stages(plan)
    with pytest.raises(InvalidArgumentError, match="stage must be one of"):
        train.run_stages(train.Plan(data=data, out=tmp_path, work=tmp_path), ("sing",))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AudioError, match="install the package espeak-ng"):
        train.run_stages(train.Plan(data=data, out=tmp_path, work=tmp_path), ("speech",))


def test_texts_survive_encoding() -> None:
    assert decode(encode("the patient's pulse")) == "the patient's pulse"
