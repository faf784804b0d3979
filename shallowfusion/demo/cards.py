"""Measure the trained demo models and write the card, `README.md`, of each."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from shallowfusion.demo.acoustic_model import JointModel, load_acoustic_model
from shallowfusion.demo.corpus import EVALUATION_SOURCES, GENERAL_SOURCES, MEDICAL_SOURCES, held_out_sentences
from shallowfusion.demo.evaluation import transcribe_attention, transcribe_ctc
from shallowfusion.demo.lm_training import load_lm, nats_per_token
from shallowfusion.demo.recordings import read_an4, read_clips
from shallowfusion.demo.synthesis import Utterance
from shallowfusion.evaluation.word_errors import word_errors

__all__ = ["write_cards"]

_TEXT_ORIGINS = {
    "gen_gutenberg_train": "Pride and Prejudice, The Adventures of Sherlock Holmes (Project Gutenberg), public domain",
    "med_medquad_train": "MedQuAD (Ben Abacha and Demner-Fushman 2019), CC BY 4.0",
    "med_pubmed_train": "PubMed abstracts of BC5CDR and NCBI-disease, public domain (NIH)",
    "med_mtsdialog_train": "MTS-Dialog (Ben Abacha et al. 2023), CC BY 4.0",
    "med_acibench_train": "ACI-Bench (Yim et al. 2023), CC BY 4.0",
}

_TEXT_FORM = """\
Text form: lower case, a-z, apostrophe and space; numbers up to 999,999 spelled out; lines with other symbols or
letter-digit mixes dropped; every target begins with a space. One token is one character; the tokenizer is a
byte-level BPE without merges. Ids 0..27 are the characters, 28 is `<|endoftext|>`; they are the same in all four
models."""

_ACOUSTIC_CARD = """\
# {title}

Whisper's architecture, small: {parameters:,} parameters with the CTC head, float16 weights. Load it with
`WhisperForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)`; `generate` works as for any
English-only Whisper. Beside it lies a joint CTC head: `ctc_head.safetensors` (`weight` [29, width], `bias` [29]) maps
the encoder's last hidden state to the 28 characters and, as label 28, the blank; `ctc_head.json` describes it.
Label 28 of the head is the blank and not the end of text, which has the same number among the tokens.

Features: 80 mel bands, 50 frames a second (hop 320, FFT 512), so 25 encoder frames a second; the window is 30 s.

{text_form}

The decoder's history is noisy in training: a quarter of the characters it is shown are random. It listens more than
it guesses, so its internal language model is weak and a fused one has something to add.

## Data

{data}

## Training

{training}

## Figures

{figures}

{limits}
"""

_LM_CARD = """\
# {title}

GPT-2's architecture, small: {parameters:,} parameters, 448 positions, float16 weights, `gelu_pytorch_tanh`. Load it
with `GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32)`. Every sequence begins and ends with
`<|endoftext|>`; nine training batches in ten hold one sentence per sequence.

{text_form}

## Data

{data}

## Training

{training}

## Figures

Perplexity per character on up to 600 held-out sentences that are no training sentence, each scored on its own, end
of text included:

{figures}

Perplexity per character is not comparable with perplexity per word or per subword.
"""

_SPEECH = """\
Speech made by espeak-ng from these texts, in several English accents and voices, with mild noise:

{origins}

espeak-ng's voices are synthetic: the model has heard no human being."""

_AN4_DATA = """\
Weights start from `../asr`. Further training on the training part of AN4 (Carnegie Mellon University, 1991; a
BSD-style licence), every tenth speaker held out for development and each recording at three playing speeds, with
words of its transcripts in random order spoken by espeak-ng, and a little of the speech that `../asr` was trained on.
No audio of AN4 is contained in the repository."""

_TRAINING = """\
{updates:,} updates. The shipped weights were made on two CPU cores in several runs, while the recipe settled: the
first updates of `asr` and of the language models used AdamW throughout, before Muon took over the layers' matrices;
`asr` got its history noise half-way, and its labels were smoothed until shortly before the end. A fresh run of
`python -m shallowfusion.demo.train` gives like weights, not the same."""


def write_cards(data: Path, out: Path, work: Path) -> None:
    """Measure whatever models are present under `out/models` and write their cards.

    Args:
        data: directory with `text/` and `audio/`.
        out: directory with `models/`, `clips/` and `dev/`.
        work: directory with the checkpoints, which know the number of updates.
    """
    clips = {"20 test clips": read_clips(out / "clips"), "development clips": read_clips(out / "dev")}
    models = out / "models"
    if (models / "asr").exists():
        origins = _bullets(["gen_gutenberg_train", "med_mtsdialog_train", "med_acibench_train"])
        limits = "It spells what it hears: medical words it never met come out wrong. It is of no use for real speech."
        speech = _SPEECH.format(origins=origins)
        _write_acoustic_card(models / "asr", "Demo acoustic model", speech, _training(work, "asr"), clips, limits)
    if (models / "asr_an4").exists():
        recordings = {f"AN4 {part} (real speech)": read_an4(data, part) for part in ("dev", "test")}
        recordings["20 test clips"] = clips["20 test clips"]
        limits = "AN4 is spelled names, numbers and a few commands; beyond those, real speech is not recognised."
        title, training = "Demo acoustic model, adapted to AN4", _training(work, "asr_an4")
        _write_acoustic_card(models / "asr_an4", title, _AN4_DATA, training, recordings, limits)
    held_out = {
        "medical (MedQuAD test, PubMed and MTS-Dialog validation)": held_out_sentences(
            data, EVALUATION_SOURCES, MEDICAL_SOURCES
        ),
        "general (Gutenberg test)": held_out_sentences(data, ("gen_gutenberg_test",), GENERAL_SOURCES),
    }
    for name, title, sources in (
        ("lm_medical", "Demo medical language model", MEDICAL_SOURCES),
        ("lm_general", "Demo general language model", GENERAL_SOURCES),
    ):
        if (models / name).exists():
            _write_lm_card(models / name, title, list(sources), _training(work, name), held_out)


def _write_acoustic_card(
    directory: Path, title: str, data: str, training: str, recordings: dict[str, list[Utterance]], limits: str
) -> None:
    model = load_acoustic_model(directory)
    lines = ["| recordings | attention, greedy | attention, beam 5 | CTC, greedy |", "| --- | --- | --- | --- |"]
    for name, utterances in recordings.items():
        references = [utterance.text for utterance in utterances]
        outputs = (
            transcribe_attention(model, utterances),
            transcribe_attention(model, utterances, num_beams=5),
            transcribe_ctc(model, utterances),
        )
        cells = " | ".join(str(word_errors(references, texts)) for texts in outputs)
        lines.append(f"| {name} ({len(utterances)}) | {cells} |")
        print(f"{directory.name}: {lines[-1]}", flush=True)
    figures = "Word error rate of the model alone, full 30 s windows, `transformers` decoding:\n\n" + "\n".join(lines)
    card = _ACOUSTIC_CARD.format(
        title=title,
        parameters=_count(model),
        text_form=_TEXT_FORM,
        data=data,
        training=training,
        figures=figures,
        limits=limits,
    )
    (directory / "README.md").write_text(card, encoding="utf-8")


def _write_lm_card(
    directory: Path, title: str, sources: list[str], training: str, held_out: dict[str, list[str]]
) -> None:
    model = load_lm(directory)
    lines = []
    for name, texts in held_out.items():
        lines.append(f"- {name}: {math.exp(nats_per_token(model, texts)):.3f}")
        print(f"{directory.name}: {lines[-1]}", flush=True)
    card = _LM_CARD.format(
        title=title,
        parameters=_count(model),
        text_form=_TEXT_FORM,
        data=_bullets(sources),
        training=training,
        figures="\n".join(lines),
    )
    (directory / "README.md").write_text(card, encoding="utf-8")


def _training(work: Path, name: str) -> str:
    """How long a model was trained, as far as its checkpoint is still at hand."""
    checkpoint = work / f"{name}.pt"
    if not checkpoint.exists():
        return "The checkpoint is not at hand, so the number of updates is not known."
    stored: dict[str, Any] = torch.load(checkpoint, weights_only=True, mmap=True)
    return _TRAINING.format(updates=int(stored["step"]))


def _bullets(sources: list[str]) -> str:
    return "\n".join(f"- {_TEXT_ORIGINS[source]}" for source in sources)


def _count(model: JointModel | Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
