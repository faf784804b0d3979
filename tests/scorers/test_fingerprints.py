"""Fingerprints: equal for the same model however it is loaded, different for any other."""

from __future__ import annotations

import torch

from shallowfusion.demo.shipped import model_directory
from shallowfusion.ngrams.estimate import EstimateSettings, estimate
from shallowfusion.ngrams.pieces import spell_piece
from shallowfusion.scorers.fingerprints import fingerprint
from shallowfusion.scorers.loading import load_causal_lm
from shallowfusion.scorers.ngram import NgramScorer
from shallowfusion.text.vocabulary import Vocabulary
from tests.shipped import MEDICAL, decoder
from tests.tiny import tiny_lm, tiny_whisper


def test_the_same_model_has_the_same_fingerprint_in_either_precision() -> None:
    cpu = torch.device("cpu")
    own = decoder().fingerprints[1]
    assert len(own) == 16
    assert fingerprint(load_causal_lm(MEDICAL, cpu, torch.float32)) == own
    assert fingerprint(load_causal_lm(MEDICAL, cpu, torch.float16)) == own
    assert fingerprint(load_causal_lm(str(model_directory("lm_general")), cpu, torch.float32)) != own


def test_one_changed_weight_or_another_vocabulary_is_another_model() -> None:
    own = fingerprint(tiny_lm(1))
    assert fingerprint(tiny_lm(1)) == own
    assert fingerprint(tiny_lm(2)) != own
    changed = tiny_lm(1)
    with torch.no_grad():
        changed.model.transformer.wte.weight[0, 0] += 1
    assert fingerprint(changed) != own
    assert fingerprint(tiny_whisper(0).scorer) != fingerprint(tiny_whisper(1).scorer)


def test_ngram_models_are_told_apart_by_what_they_say() -> None:
    lines = [[spell_piece(piece) for piece in line] for line in ([b" a", b"b", b"b"], [b" a", b" a"], [b"b"])]
    vocabulary = Vocabulary((b" a", b"b", None), end_id=2, name="toy")

    def made(order: int) -> str:
        return fingerprint(NgramScorer(estimate(lines, EstimateSettings(order=order)).model, vocabulary))

    assert made(3) == made(3)
    assert made(3) != made(2)
