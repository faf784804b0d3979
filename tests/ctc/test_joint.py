"""A CTC model of its own beside an attention decoder: exhaustive search, the model's own head, and errors by name."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from shallowfusion import FusionDecoder, fusion
from shallowfusion.ctc.joint import CtcFrames, JointCtc
from shallowfusion.ctc.label_spelling import LetterSpelling, PieceSpelling, TokenSpelling
from shallowfusion.ctc.models import CtcModel, load_ctc_model
from shallowfusion.errors import InvalidArgumentError, ModelError, VocabularyError
from shallowfusion.features.log_mel import log_mel
from shallowfusion.scorers.whisper import WhisperScorer
from shallowfusion.text.vocabulary import Vocabulary
from tests import tiny
from tests.ctc.conftest import random_log_probs
from tests.ctc.joint import joint_decoder
from tests.ctc.test_prefix_scorer import FAST, attention_log_prob
from tests.ctc.test_spelled_scorer import text_probabilities
from tests.ctc.tiny_models import PIECES, save_tiny_model
from tests.shipped import ASR, clip
from tests.shipped import decoder as shipped_decoder

LETTERS = ("", "|", "A", "B")
TEXTS: tuple[bytes, ...] = (b" a", b"ab", b" B", b"a.")


def toy_model(labels: tuple[str, ...] = LETTERS, delimiter: int | None = 1, **changes: Any) -> CtcModel:
    """A record without a network, for frames that are given."""
    made = CtcModel("toy", None, None, labels, 0, delimiter, None, (), 16000, 0.02)
    return dataclasses.replace(made, **changes)


def lettered_whisper(seed: int = 0, texts: tuple[bytes, ...] = TEXTS) -> Any:
    """The tiny Whisper, its first tokens with texts of letters, the others without."""
    acoustic = tiny.tiny_whisper(seed)
    tokens = (*texts, *[None] * (tiny.ACOUSTIC_VOCAB - len(texts)))
    scorer = WhisperScorer(acoustic.scorer.model, Vocabulary(tokens, tiny.END, None, "lettered"))
    return dataclasses.replace(acoustic, scorer=scorer)


def frames_of(seed: int, utterances: int, labels: int = 4, count: int = 6) -> CtcFrames:
    lengths = np.array([count - u % 3 for u in range(utterances)])
    return CtcFrames(random_log_probs(seed, (utterances, count, labels)), lengths)


class HeadModel(CtcModel):
    """The head of the shipped model as a CTC model that hears recordings."""

    def log_probs(self, samples: Any) -> Any:
        acoustic = shipped_decoder(with_lm=False).acoustic
        head = acoustic.ctc_head
        assert head is not None
        found = head.log_probs(acoustic.scorer.encode(log_mel(list(samples), acoustic.features)))
        counts = [head.num_frames(len(own) / 16000, found.shape[1]) for own in samples]
        return found, np.array(counts)


def head_model(upper: bool) -> CtcModel:
    head = shipped_decoder(with_lm=False).acoustic.ctc_head
    assert head is not None
    labels = tuple("|" if label == " " else label.upper() for label in head.labels) if upper else head.labels
    delimiter = labels.index("|") if upper else None
    return HeadModel("head", None, None, labels, head.blank, delimiter, None, (), 16000, head.frame_seconds)


def test_a_wide_joint_search_is_exhaustive_over_spelled_texts() -> None:
    decoder = FusionDecoder(lettered_whisper(2), ctc=toy_model())
    assert isinstance(decoder.ctc.spelling, LetterSpelling)  # type: ignore[union-attr]
    encoded = tiny.random_encoder_output(decoder.acoustic, 2)
    frames = frames_of(1, 2)
    others = [token for token in range(tiny.ACOUSTIC_VOCAB) if token >= len(TEXTS) and token != tiny.END]
    results = decoder.decode(
        encoded, ctc_frames=frames, beam_size=300, max_new_tokens=4, suppress_tokens=others, suppress_blank=False,
        ctc_weight=0.45, length_penalty=0.0,
    )  # fmt: skip
    for utterance, result in enumerate(results):
        own = encoded[utterance : utterance + 1]
        probabilities = text_probabilities(frames.log_probs[utterance, : frames.lengths[utterance]])
        scores = {}
        for length in range(4):
            for tokens in itertools.product(range(len(TEXTS)), repeat=length):
                text = b"".join(TEXTS[token] for token in tokens).decode().upper().replace(".", "").strip()
                words = " ".join(text.split())
                found = sum(p for other, p in probabilities.items() if other.rstrip() == words)
                heard = np.log(found + 1e-300)
                scores[tokens] = 0.55 * attention_log_prob(decoder, own, list(tokens)) + 0.45 * heard
        ended = [hypothesis for hypothesis in result.n_best if hypothesis.ended]
        assert ended[0].total == pytest.approx(max(scores.values()), abs=1e-3)
        for hypothesis in ended[:20]:
            assert hypothesis.total == pytest.approx(scores[hypothesis.token_ids], abs=1e-3)


def test_pieces_score_what_torch_says_of_the_labels_of_their_tokenizer(tmp_path: Path) -> None:
    save_tiny_model("parakeet_ctc", tmp_path)
    texts, blank = (b" Th", b"e", b" cat", b"s", b" a,"), len(PIECES)
    model = toy_model((*PIECES, "<blank>"), None, blank=blank, word_start="\u2581", silenced=(0,))
    model = dataclasses.replace(model, tokenizer=AutoTokenizer.from_pretrained(tmp_path))
    decoder = FusionDecoder(lettered_whisper(1, texts), ctc=model)
    encoded, frames = tiny.random_encoder_output(decoder.acoustic, 3), frames_of(3, 3, blank + 1, 20)
    others = [token for token in range(tiny.ACOUSTIC_VOCAB) if token >= len(texts) and token != tiny.END]
    results = decoder.decode(
        encoded, ctc_frames=frames, beam_size=6, n_best=6, max_new_tokens=20, suppress_tokens=others, ctc_weight=0.3
    )
    seen = 0
    for utterance, result in enumerate(results):
        for hypothesis in result.n_best:
            if hypothesis.ended:
                text = b"".join(texts[token] for token in hypothesis.token_ids).decode().lower().replace(",", "")
                ids = [i for i in model.tokenizer(text.strip(), add_special_tokens=False)["input_ids"] if i]
                count = int(frames.lengths[utterance])
                log_probs = torch.from_numpy(frames.log_probs[utterance, :count, None]).double()
                loss = torch.nn.functional.ctc_loss(
                    log_probs, torch.tensor([ids]), torch.tensor([count]), torch.tensor([len(ids)]), blank, "sum"
                )
                assert hypothesis.parts["ctc"] == pytest.approx(-float(loss), abs=1e-3)
                seen += len(ids) > 1
    assert seen > 3


def test_labels_that_are_the_tokens_give_the_results_of_the_own_head_to_the_bit() -> None:
    own = joint_decoder(seed=3, lm=True)
    head = own.acoustic.ctc_head
    assert head is not None
    labels = ("", *(f"{i:02d}" for i in range(tiny.TEXT_TOKENS)))
    bare = dataclasses.replace(own.acoustic, ctc_head=None)
    other = FusionDecoder(bare, own.language_models, ctc=toy_model(labels, None))
    assert isinstance(other.ctc.spelling, TokenSpelling)  # type: ignore[union-attr]
    encoded = tiny.random_encoder_output(own.acoustic, 4)
    frames = CtcFrames(head.log_probs(encoded))
    options = {**FAST, "n_best": 4, "ctc_weight": 0.4, "rule": fusion.static(0.3)}
    for one, two in zip(
        own.decode(encoded, **options), other.decode(encoded, ctc_frames=frames, **options), strict=True
    ):
        assert one.n_best == two.n_best


def test_the_shipped_head_as_a_model_of_its_own_hears_the_same() -> None:
    decoder = shipped_decoder(with_lm=False)
    options = {"beam_size": 3, "n_best": 3, "ctc_weight": 0.3}
    wanted = decoder.transcribe([clip(2), clip(5)], **options)
    assert decoder.acoustic.ctc_head is not None
    same = FusionDecoder(decoder.acoustic, ctc=head_model(upper=False)).transcribe([clip(2), clip(5)], **options)
    assert [result.n_best for result in same] == [result.n_best for result in wanted]
    spelled = FusionDecoder(decoder.acoustic, ctc=head_model(upper=True)).transcribe([clip(2), clip(5)], **options)
    assert [result.text for result in spelled] == [result.text for result in wanted]
    for one, other in zip(spelled, wanted, strict=True):  # the delimiters that a text may end in are heard besides
        assert one.best.parts["ctc"] >= other.best.parts["ctc"] - 1e-4
        assert one.best.parts["ctc"] == pytest.approx(other.best.parts["ctc"], abs=1.0)
        assert one.timing is not None
        assert one.timing.stages["ctc"] > 0


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert", "parakeet_ctc"])
def test_models_of_transformers_join_from_recordings(kind: str, tmp_path: Path) -> None:
    save_tiny_model(kind, tmp_path)
    decoder = FusionDecoder.from_pretrained(ASR, device="cpu", ctc=str(tmp_path))
    assert decoder.ctc is not None
    wanted = PieceSpelling if kind == "parakeet_ctc" else LetterSpelling
    assert isinstance(decoder.ctc.spelling, wanted)
    generator = np.random.default_rng(0)
    recordings = [generator.normal(size=length).astype(np.float32) * 0.1 for length in (9000, 16000, 800)]
    options: dict[str, Any] = {"beam_size": 3, "n_best": 3, "ctc_weight": 0.02, "max_new_tokens": 12}
    together = decoder.transcribe(recordings, **options)
    alone = [decoder.transcribe(own, **options)[0] for own in recordings]
    for one, other in zip(together, alone, strict=True):
        assert one.error is None
        for a, b in zip(one.n_best, other.n_best, strict=True):
            assert a.token_ids == b.token_ids
            assert a.parts["ctc"] == pytest.approx(b.parts["ctc"], abs=2e-2, rel=1e-3)
            assert a.total == pytest.approx(0.98 * a.parts["asr"] + 0.02 * a.parts["ctc"], abs=1e-2)


def test_batches_do_not_change_results() -> None:
    decoder = FusionDecoder(lettered_whisper(4), ctc=toy_model())
    encoded, frames = tiny.random_encoder_output(decoder.acoustic, 5), frames_of(6, 5)
    options = {**FAST, "suppress_tokens": [*range(4, tiny.END), *range(41, 44)], "ctc_weight": 0.4}
    together = decoder.decode(encoded, ctc_frames=frames, **options)
    alone = [decoder.decode(encoded[i : i + 1], ctc_frames=frames.at([i]), **options)[0] for i in range(5)]
    assert [result.best.token_ids for result in together] == [result.best.token_ids for result in alone]


def test_weight_zero_changes_no_bit_and_is_remarked_once(caplog: pytest.LogCaptureFixture) -> None:
    plain = FusionDecoder(lettered_whisper())
    decoder = FusionDecoder(plain.acoustic, ctc=toy_model())
    encoded = tiny.random_encoder_output(plain.acoustic, 2)
    with caplog.at_level(logging.WARNING):
        found = [decoder.decode(encoded, n_best=4, **FAST) for _ in range(2)]
    assert [result.n_best for result in found[0]] == [
        result.n_best for result in plain.decode(encoded, n_best=4, **FAST)
    ]
    assert sum("ctc_weight is 0" in record.message for record in caplog.records) == 1


def test_an_utterance_of_which_the_model_says_nan_is_flagged_alone() -> None:
    decoder = FusionDecoder(lettered_whisper(4), ctc=toy_model())
    encoded, frames = tiny.random_encoder_output(decoder.acoustic, 3), frames_of(6, 3)
    wanted = decoder.decode(encoded, ctc_frames=frames, ctc_weight=0.3, **FAST)
    broken = frames.log_probs.copy()
    broken[0, 5:] = np.nan  # within its frames
    broken[1, 5:] = np.nan  # behind them
    found = decoder.decode(encoded, ctc_frames=CtcFrames(broken, frames.lengths), ctc_weight=0.3, **FAST)
    assert "nan" in found[0].flags
    assert [found[i].best for i in (1, 2)] == [wanted[i].best for i in (1, 2)]


def test_a_rule_that_gives_language_models_up_keeps_the_ctc_model() -> None:
    decoder = FusionDecoder(lettered_whisper(), [tiny.tiny_lm()], ctc=toy_model())
    decoder.language_models[0].vocabulary = decoder.acoustic.scorer.vocabulary
    encoded, frames = tiny.random_encoder_output(decoder.acoustic, 3), frames_of(2, 3)
    rule = fusion.trusted(fusion.static(0.3), floor=-1e-6)
    found = decoder.decode(encoded, ctc_frames=frames, ctc_weight=0.3, rule=rule, **FAST)
    plain = FusionDecoder(decoder.acoustic, ctc=toy_model())
    wanted = plain.decode(encoded, ctc_frames=frames, ctc_weight=0.3, **FAST)
    assert [result.best.total for result in found] == [result.best.total for result in wanted]
    assert all("lm_distrusted" in result.flags for result in found)


def test_what_has_not_been_heard_is_refused() -> None:
    decoder = FusionDecoder(lettered_whisper(), ctc=toy_model())
    encoded = tiny.random_encoder_output(decoder.acoustic, 2)
    with pytest.raises(InvalidArgumentError, match="hears recordings"):
        decoder.decode(encoded, ctc_weight=0.3, **FAST)
    for frames in (frames_of(0, 3), frames_of(0, 2, labels=5), CtcFrames(np.zeros((2, 4)))):
        with pytest.raises(InvalidArgumentError, match="of 2 utterances and the 4 labels"):
            decoder.decode(encoded, ctc_frames=frames, ctc_weight=0.3, **FAST)
    with pytest.raises(InvalidArgumentError, match="lengths"):
        decoder.decode(encoded, ctc_frames=CtcFrames(frames_of(0, 2).log_probs, [7, 1]), ctc_weight=0.3, **FAST)
    with pytest.raises(InvalidArgumentError, match=r"ctc=\.\.\."):
        FusionDecoder(lettered_whisper()).decode(encoded, ctc_weight=0.3, **FAST)


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    acoustic = lettered_whisper()
    with pytest.raises(InvalidArgumentError, match="8000 samples per second"):
        JointCtc(toy_model(sampling_rate=8000), acoustic)
    with pytest.raises(VocabularyError, match="same language"):
        JointCtc(toy_model(("", "|", "\u0410", "\u0411")), acoustic)
    with pytest.raises(VocabularyError, match="tokenizer"):
        JointCtc(toy_model(("", "\u2581a", "b"), None, word_start="\u2581"), acoustic)
    with pytest.raises(ModelError, match="CTC model"):
        FusionDecoder.from_pretrained(ASR, device="cpu", ctc=ASR)
    save_tiny_model("wav2vec2", tmp_path)
    loaded = load_ctc_model(str(tmp_path), torch.device("cpu"), torch.float32)
    assert FusionDecoder.from_pretrained(ASR, device="cpu", ctc=loaded).ctc.model is loaded  # type: ignore[union-attr]
