"""Calibration: confidence meets accuracy, known temperatures are found again, other models are refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from shallowfusion import DecodingOptions
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.training.calibration import (
    LOWEST,
    Calibration,
    calibrate,
    calibrate_logits,
    expected_calibration_error,
)
from shallowfusion.training.decoder_file import with_calibration
from tests.tiny import TEXT_TOKENS, random_encoder_output, tiny_decoder


@cache
def texts() -> tuple[torch.Tensor, list[tuple[int, ...]]]:
    decoder = tiny_decoder(3)
    encoded = random_encoder_output(decoder.acoustic, 4, seed=5)
    results = decoder.decode(encoded, DecodingOptions(beam_size=2, max_new_tokens=20, lm_weight=0.3))
    return encoded, [result.best.token_ids for result in results]


@cache
def measured() -> Calibration:
    encoded, ids = texts()
    batches = [(encoded[:3], ids[:3]), (encoded[3:], ids[3:])]
    return Calibration(calibrate(tiny_decoder(3), batches, DecodingOptions()))


def sampled(temperature: float, tokens: int = 4000, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and tokens drawn from their softmax at a temperature, so that this one is right."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn((tokens, 30), generator=generator)
    return logits, torch.multinomial(torch.softmax(logits / temperature, dim=1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_made_the_tokens_is_found_by_both_criteria(temperature: float) -> None:
    found = calibrate_logits("asr", "x", *sampled(temperature))
    assert found.temperature == pytest.approx(temperature, rel=0.1)
    assert found.nll_temperature == pytest.approx(temperature, rel=0.1)
    assert found.confidence[1] == pytest.approx(found.accuracy, abs=1e-3)
    assert found.ece[1] < 0.03
    assert found.nll[2] <= min(found.nll[:2]) + 1e-12
    if temperature != 1.0:
        assert found.ece[1] < found.ece[0]


def test_the_gradient_that_is_bisected_is_that_of_the_likelihood() -> None:
    logits, targets = sampled(2.0, 300)
    found = calibrate_logits("asr", "x", logits, targets)
    beta = torch.tensor(1 / found.nll_temperature, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.cross_entropy(logits.double() * beta, targets).backward()
    assert beta.grad is not None
    assert abs(float(beta.grad)) < 1e-9


def test_a_model_that_is_always_right_reaches_the_end_of_the_range() -> None:
    logits = torch.eye(20) * 5
    found = calibrate_logits("asr", "x", logits, torch.arange(20))
    assert found.accuracy == 1.0
    assert found.temperature == LOWEST or found.confidence[1] == pytest.approx(1.0, abs=1e-6)
    wrong = calibrate_logits("asr", "x", logits, torch.arange(20).roll(1))
    assert wrong.is_at_bound  # never right: no temperature is unsure enough


def test_expected_calibration_error_by_hand() -> None:
    confidences = torch.tensor([0.05, 0.95, 0.95, 1.0])
    right = torch.tensor([False, True, False, True])
    # bins of 1/15: the first alone is 0.05 off; the last three: 2.90 sure, 2 right
    assert expected_calibration_error(confidences, right) == pytest.approx((0.05 + 0.90) / 4, abs=1e-6)


def test_models_are_calibrated_on_forced_texts_whatever_the_batches() -> None:
    found = measured()
    assert [model.name for model in found.models] == ["asr", "lm"]
    asr, lm = found.models
    _, ids = texts()
    assert asr.num_tokens == sum(map(len, ids)) + 4  # the ends
    assert lm.num_tokens == sum(token < TEXT_TOKENS for own in ids for token in own)
    for model in found.models:
        assert model.is_at_bound or model.confidence[1] == pytest.approx(model.accuracy, abs=1e-3)


def test_many_tokens_are_thinned_evenly() -> None:
    decoder = tiny_decoder(3)
    encoded = random_encoder_output(decoder.acoustic, 2, seed=5)
    texts = [tuple(range(20)), tuple(range(20, 40))]
    few = calibrate(decoder, [(encoded, texts)], DecodingOptions(), most_tokens=6)
    assert 6 <= few[0].num_tokens <= 12


def test_files_keep_every_number_and_refuse_other_models(tmp_path: Path) -> None:
    found = measured()
    found.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == found
    decoder, other = tiny_decoder(3), tiny_decoder(4)
    options = with_calibration(decoder, DecodingOptions(), found)
    assert (options.asr_temperature, options.lm_temperature) == (found.temperatures[0], found.temperatures[1:])
    with pytest.raises(InvalidArgumentError, match="temperatures of other models do not fit"):
        with_calibration(other, DecodingOptions(), found)
    with pytest.raises(InvalidArgumentError, match="give either a calibration or"):
        with_calibration(decoder, DecodingOptions(asr_temperature=2.0), found)
    nll = Calibration(found.models, "nll")
    assert nll.temperatures == tuple(model.nll_temperature for model in found.models)


BAD = [
    "",
    "[]",
    "{}",
    '{"kind": "shallowfusion calibration", "version": 2}',
    '{"kind": "shallowfusion calibration", "version": 1, "models": [{}], "criterion": "nll", "measured_on": ""}',
    '{"kind": "shallowfusion calibration", "version": 1, "models": [], "criterion": "nll", "measured_on": ""}',
]


@pytest.mark.parametrize("text", BAD)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(InvalidArgumentError, match="is no calibration"):
        Calibration.load(tmp_path / "c.json")


def test_a_temperature_below_zero_in_a_file_is_refused(tmp_path: Path) -> None:
    data = measured().as_data()
    data["models"][0]["temperature"] = -1.0
    (tmp_path / "c.json").write_text(json.dumps(data))
    with pytest.raises(InvalidArgumentError, match="is no temperature"):
        Calibration.load(tmp_path / "c.json")
    with pytest.raises(InvalidArgumentError, match="no tokens"):
        calibrate(tiny_decoder(3), [], DecodingOptions())
