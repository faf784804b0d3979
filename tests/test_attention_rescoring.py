"""Rescoring of CTC lists by the attention decoder: equal to a search's own scores, and ranked by their weighted sum."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shallowfusion import FusionDecoder, fusion
from shallowfusion.attention_rescoring import AttentionRescorer, RescoringOptions
from shallowfusion.ctc.decoder import CTCDecoder
from shallowfusion.ctc.joint import CtcFrames
from shallowfusion.ctc.settings import CtcOptions
from shallowfusion.errors import AudioError, InvalidArgumentError
from shallowfusion.rescoring import score_continuations, score_texts
from shallowfusion.scorers.loading import load_causal_lm
from tests import tiny
from tests.ctc.joint import joint_decoder
from tests.ctc.test_joint import head_model, toy_model
from tests.ctc.tiny_models import save_tiny_model
from tests.shipped import MEDICAL, clip
from tests.shipped import decoder as shipped_decoder

SEARCH = CtcOptions(beam_size=8)


def test_continuations_have_the_scores_of_a_search() -> None:
    decoder = tiny.tiny_decoder(seed=1, lm=False)
    encoded = tiny.random_encoder_output(decoder.acoustic, 3)
    results = decoder.decode(encoded, beam_size=5, n_best=5, max_new_tokens=12)
    texts = [[list(h.token_ids) for h in result.n_best] for result in results]
    prompts = [[tiny.START, tiny.NO_TIMESTAMPS]] * 3
    found = score_continuations(decoder.acoustic.scorer, encoded, prompts, texts)
    for result, own in zip(results, found, strict=True):
        for hypothesis, scores in zip(result.n_best, own, strict=True):
            wanted = [token.parts["asr"] for token in hypothesis.tokens]
            np.testing.assert_allclose(scores[: len(wanted)], wanted, atol=1e-4)
            assert len(scores) == len(hypothesis.token_ids) + 1


def test_texts_beyond_the_window_are_impossible() -> None:
    decoder = tiny.tiny_decoder(lm=False)
    encoded = tiny.random_encoder_output(decoder.acoustic, 1)
    prompt = [tiny.START, tiny.NO_TIMESTAMPS]
    long, short = score_continuations(decoder.acoustic.scorer, encoded, [prompt], [[[1] * 63, [1] * 62]])[0]
    assert np.isneginf(long).all()
    assert np.isfinite(short).all()


def test_lists_are_ranked_by_the_weighted_sum() -> None:
    rescorer = AttentionRescorer(shipped_decoder(with_lm=True), SEARCH, threads=1)
    options = RescoringOptions(0.3, fusion.static(0.4), length_bonus=0.1, n_best=8, list_size=8)
    for result in rescorer.transcribe([clip(2), clip(5)], options):
        assert len(result.n_best) > 3
        totals = [h.total for h in result.n_best]
        assert totals == sorted(totals, reverse=True)
        for hypothesis in result.n_best:
            parts = hypothesis.parts
            wanted = 0.3 * parts["ctc"] + 0.7 * parts["asr"] + 0.4 * parts["lm"] + 0.1 * len(hypothesis.token_ids)
            assert hypothesis.total == pytest.approx(wanted, abs=1e-4)
        again = result.rerank(fusion.static(0.0), 0.0, ctc_weight=1.0)
        assert again.best.total == pytest.approx(max(h.parts["ctc"] for h in result.n_best), abs=1e-4)


def test_language_scores_are_those_of_the_texts() -> None:
    decoder = shipped_decoder(with_lm=True)
    rescorer = AttentionRescorer(decoder, SEARCH, threads=1)
    result = rescorer.transcribe(clip(2), RescoringOptions(n_best=4, list_size=4))[0]
    lm = load_causal_lm(str(MEDICAL), torch.device("cpu"), torch.float32)
    for hypothesis, scores in zip(
        result.n_best, score_texts(lm, [hypothesis.text for hypothesis in result.n_best]), strict=True
    ):
        assert hypothesis.parts["lm"] == pytest.approx(float(scores.sum()), abs=1e-3)


def test_attention_alone_ranks_as_it_scores() -> None:
    rescorer = AttentionRescorer(shipped_decoder(with_lm=False), CtcOptions(beam_size=30), threads=1)
    result = rescorer.transcribe(clip(2), RescoringOptions(0.0, n_best=20))[0]
    heard = [h.parts["asr"] for h in result.n_best]
    assert heard == sorted(heard, reverse=True)
    first_pass = rescorer.transcribe(clip(2), RescoringOptions(1.0, n_best=20))[0]
    assert {h.text for h in first_pass.n_best} == {h.text for h in result.n_best}


def test_failures_stay_alone(tmp_path: object) -> None:
    rescorer = AttentionRescorer(shipped_decoder(with_lm=False), SEARCH, threads=1)
    good, bad = rescorer.transcribe([clip(2), "missing.wav"])
    assert good.text
    assert isinstance(bad.error, AudioError)
    decoder = shipped_decoder(with_lm=False)
    states = torch.zeros((2, 750, 192))
    states[1] = float("nan")
    fine, broken = AttentionRescorer(decoder, SEARCH, threads=1).decode(states)
    assert fine.error is None
    assert "utterance 1" in str(broken.error)


def test_what_cannot_rescore_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="CTC head"):
        AttentionRescorer(tiny.tiny_decoder(lm=False))
    decoder = joint_decoder()
    with pytest.raises(InvalidArgumentError, match="causal"):
        AttentionRescorer(_with_model(decoder, object()))
    for options in ({"ctc_weight": 1.1}, {"n_best": 0}, {"n_best": 30}):
        with pytest.raises(InvalidArgumentError):
            RescoringOptions(**options)
    with pytest.raises(InvalidArgumentError, match="empty"):
        AttentionRescorer(joint_decoder()).transcribe([])


def test_the_lists_of_a_ctc_model_are_ranked_in_small_letters() -> None:
    decoder = shipped_decoder(with_lm=True)
    options = RescoringOptions(0.3, fusion.static(0.4), n_best=4, list_size=8)
    wanted = AttentionRescorer(decoder, SEARCH, threads=1).transcribe([clip(2), clip(5)], options)
    model = head_model(upper=True)
    joint = FusionDecoder(decoder.acoustic, decoder.language_models, ctc=model)
    own = CTCDecoder(model.labels, model.blank, model.delimiter, threads=1)
    own.model = model
    for rescorer in (AttentionRescorer(joint, SEARCH, threads=1), AttentionRescorer(decoder, SEARCH, ctc=own)):
        found = rescorer.transcribe([clip(2), clip(5)], options)
        for one, other in zip(found, wanted, strict=True):
            assert one.text == other.text
            assert one.best.parts["asr"] == pytest.approx(other.best.parts["asr"], abs=1e-3)
            assert one.best.parts["lm"] == pytest.approx(other.best.parts["lm"], abs=1e-3)
            assert one.best.total == max(h.total for h in one.n_best)


def test_a_model_of_transformers_makes_the_list(tmp_path: Path) -> None:
    save_tiny_model("wav2vec2", tmp_path)
    decoder = shipped_decoder(with_lm=False)
    rescorer = AttentionRescorer(decoder, SEARCH, ctc=CTCDecoder.from_pretrained(tmp_path, device="cpu", threads=1))
    generator = np.random.default_rng(0)
    recordings = [generator.normal(size=length).astype(np.float32) * 0.1 for length in (16000, 800)]
    results = rescorer.transcribe([*recordings, "missing.wav"], RescoringOptions(0.5, n_best=4, list_size=4))
    lists = rescorer.ctc.transcribe(recordings[0], SEARCH, n_best=4)[0]
    assert {h.text for h in results[0].n_best} == {h.text for h in lists.n_best}
    assert results[1].error is None
    assert isinstance(results[2].error, AudioError)
    tokenizer = decoder.acoustic.tokenizer
    texts = [[tokenizer.encode(" " + h.text, add_special_tokens=False) for h in results[0].n_best]]
    prompts = rescorer._prompts(decoder.encode(recordings[:1]))
    scores = score_continuations(decoder.acoustic.scorer, decoder.encode(recordings[:1]), prompts, texts)[0]
    for hypothesis, heard in zip(results[0].n_best, scores, strict=True):
        assert hypothesis.parts["asr"] == pytest.approx(float(heard.sum()), abs=1e-3)
        assert hypothesis.total == pytest.approx(0.5 * (hypothesis.parts["asr"] + hypothesis.parts["ctc"]), abs=1e-3)


def test_lists_that_nobody_heard_are_refused() -> None:
    decoder = joint_decoder()
    own = CTCDecoder(("", "|", "a"), 0, 1)
    with pytest.raises(InvalidArgumentError, match="brings its own"):
        AttentionRescorer(decoder, ctc=own, threads=1)
    rescorer = AttentionRescorer(decoder, ctc=own)
    with pytest.raises(InvalidArgumentError, match="no acoustic model"):
        rescorer.transcribe(np.zeros(16000, dtype=np.float32))
    encoded = tiny.random_encoder_output(decoder.acoustic, 2)
    for frames in (None, CtcFrames(np.zeros((1, 4, 3)))):
        with pytest.raises(InvalidArgumentError, match="each of the 2 utterances"):
            rescorer.decode(encoded, ctc_frames=frames)
    own.model = toy_model(("", "|", "a"), sampling_rate=8000)
    with pytest.raises(InvalidArgumentError, match="8000 samples"):
        AttentionRescorer(decoder, ctc=own)


def _with_model(decoder: FusionDecoder, model: object) -> FusionDecoder:
    decoder.language_models = (model,)  # type: ignore[assignment]
    return decoder
