"""Ranking by what the decoder listened to."""

from __future__ import annotations

import pytest
import torch

from shallowfusion import DecodingOptions, fusion
from shallowfusion.decoder import FusionDecoder
from shallowfusion.demo.shipped import HERE, decoders, read_manifest
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.scorers.cross_attention import attention_over_frames
from tests.tiny import NO_TIMESTAMPS, START, random_encoder_output, tiny_whisper


def test_attention_equals_what_transformers_reports() -> None:
    acoustic = tiny_whisper(2, sharpness=1.5)
    model = acoustic.scorer.model
    states = random_encoder_output(acoustic, 1)[0]
    prefix, texts = [START, NO_TIMESTAMPS], [[3, 5, 9, 1], [7], []]
    found = attention_over_frames(acoustic.scorer, states, prefix, texts)
    model.set_attn_implementation("eager")
    for own, text in zip(found, texts, strict=True):
        with torch.inference_mode():
            looked = model.model.decoder(
                input_ids=torch.tensor([[*prefix, *text]]), encoder_hidden_states=states[None], output_attentions=True
            ).cross_attentions
        wanted = torch.stack(looked).mean(dim=(0, 2))[0, len(prefix) - 1 :]
        torch.testing.assert_close(own, wanted, atol=1e-5, rtol=0)
        assert own.shape == (len(text) + 1, len(states))


@pytest.fixture(scope="module")
def medical() -> FusionDecoder:
    return decoders("cpu")["medical"]


PATHS = [clip.path for clip in read_manifest(HERE / "dev")[:6]]
CUT_SHORT = {"beam_size": 8, "end_threshold": None, "length_penalty": 0.0, "rule": fusion.article(0.3)}


def words(results: list) -> int:
    return sum(len(result.text.split()) for result in results)


def test_coverage_and_the_attention_centre_bring_back_what_an_early_end_cut_off(medical) -> None:
    cut = medical.transcribe(PATHS, **CUT_SHORT)
    covered = medical.transcribe(PATHS, coverage_weight=0.5, **CUT_SHORT)
    centred = medical.transcribe(PATHS, min_attention_centre=0.5, **CUT_SHORT)
    assert words(covered) > words(cut)
    assert words(centred) > words(cut)
    for kind in ("gnmt", "excess"):
        assert len(medical.transcribe(PATHS[:1], coverage_weight=0.1, coverage=kind)[0].text) > 0


def test_ends_too_early_in_the_recording_are_flagged_and_come_last(medical) -> None:
    results = medical.transcribe(PATHS, n_best=8, min_attention_centre=0.5, **CUT_SHORT)
    for result in results:
        lengths = [len(hypothesis.text.split()) for hypothesis in result.n_best]
        if max(lengths) >= 8:  # one of them heard most of the recording
            assert lengths[0] >= 0.5 * max(lengths)
    assert any("truncation" in hypothesis.flags for result in results for hypothesis in result.n_best)
    whole = medical.transcribe(PATHS, min_attention_centre=0.5, lm_weight=0.8)
    assert not any("truncation" in result.flags for result in whole)


def test_without_either_option_nothing_is_ranked_anew() -> None:
    for bad in ({"coverage_weight": float("nan")}, {"coverage": "all"}, {"min_attention_centre": 1.5}):
        with pytest.raises(InvalidArgumentError, match=next(iter(bad))):
            DecodingOptions(**bad)
