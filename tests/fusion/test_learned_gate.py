"""Learned gates: features are what they are called, files keep the gate, other models are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shallowfusion import DecodingOptions, fusion
from shallowfusion.errors import InvalidArgumentError, ModelError
from shallowfusion.fusion.gates import StepView
from shallowfusion.fusion.learned_gate import GateNetwork, GateSettings, LearnedGate, feature_names, gate_features
from shallowfusion.fusion.weighing import step_weights
from tests.tiny import random_encoder_output, tiny_decoder


def gate(
    settings: GateSettings | None = None, fingerprints: tuple[str, ...] = ("a", "b"), seed: int = 0
) -> LearnedGate:
    """With random last weights, so that rows differ."""
    torch.manual_seed(seed)
    settings = settings or GateSettings()
    network = GateNetwork(settings)
    torch.nn.init.normal_(network.layers[-1].weight)
    return LearnedGate(settings, network.eval(), fingerprints)


def view(models: int = 1, rows: int = 6, seed: int = 0, **names: object) -> StepView:
    generator = torch.Generator().manual_seed(seed)
    logits = [3 * torch.randn((rows, 12), generator=generator) for _ in range(1 + models)]
    return StepView(logits, (1.0,) * (1 + models), 3, **names)


def test_features_by_hand() -> None:
    acoustic = torch.tensor([[2.0, 1.0, 0.0]])
    language = torch.tensor([[0.0, 1.5, 0.5]])
    found = dict(
        zip(feature_names(1), gate_features(StepView([acoustic, language], (1.0, 2.0), 4))[0].tolist(), strict=True)
    )
    own, other = torch.log_softmax(acoustic[0], 0), torch.log_softmax(language[0] / 2, 0)
    wanted = {
        "entropy_asr": -(own.exp() * own).sum(),
        "max_log_prob_asr": own[0],
        "margin_asr": 1.0,
        "step": torch.tensor(5.0).log(),
        "entropy_lm0": -(other.exp() * other).sum(),
        "max_log_prob_lm0": other[1],
        "margin_lm0": 0.5,
        "agreement0": 0.0,
        "log_prob_of_asr_best0": other[0],
        "log_ratio0": other[0] - own[0],
    }
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(float(value), abs=1e-5), name


def test_features_follow_the_map_and_survive_what_a_model_lacks() -> None:
    acoustic = torch.tensor([[0.0, 5.0, 1.0], [9.0, 0.0, 0.0]])
    language = torch.tensor([[4.0, 0.0], [4.0, 0.0]])
    moved = StepView([acoustic, language], (1.0, 1.0), 0, [None, torch.tensor([-1, 0, 1], dtype=torch.int32)])
    columns = {name: i for i, name in enumerate(feature_names(1))}
    found = gate_features(moved)
    assert found[:, columns["agreement0"]].tolist() == [1.0, 0.0]
    assert found[0, columns["log_prob_of_asr_best0"]] == pytest.approx(
        float(torch.log_softmax(language[0], 0)[0]), abs=1e-5
    )
    assert found[1, columns["log_prob_of_asr_best0"]] == -20.0
    shorter = gate_features(StepView([torch.tensor([[0.0, 0.0, 9.0]]), language[:1]], (1.0, 1.0)))
    assert shorter[0, columns["log_prob_of_asr_best0"]] == -20.0
    broken = gate_features(StepView([torch.full((1, 3), float("nan")), language[:1]], (1.0, 1.0)))
    assert torch.isfinite(broken).all()


@pytest.mark.parametrize("shares_strength", [False, True])
def test_shares_are_one_per_model_between_0_and_1(shares_strength: bool) -> None:
    own = gate(GateSettings(num_models=2, shares_strength=shares_strength))
    shares = own.shares(view(2))
    assert shares.shape == (6, 2)
    assert ((shares >= 0) & (shares <= 1)).all()
    assert shares.std(dim=0).min() > 0
    if shares_strength:
        assert (shares.sum(dim=1) <= 1 + 1e-6).all()
    with pytest.raises(InvalidArgumentError, match="weighs 2 language"):
        own.shares(view(1))


def test_the_rule_weighs_by_the_gate(tmp_path: Path) -> None:
    own = gate(GateSettings(largest_weight=0.7))
    own.save(tmp_path / "gate")
    rule = fusion.learned(tmp_path / "gate", form="plain")
    assert rule.lm_weights == (0.7,)
    assert not rule.is_linear
    here = view()
    torch.testing.assert_close(step_weights(rule, here).weights[:, 1:], 0.7 * own.shares(here))
    assert repr(rule) != repr(_saved(gate(seed=1), tmp_path / "other"))


def _saved(own: LearnedGate, directory: Path) -> fusion.Rule:
    own.save(directory)
    return fusion.learned(directory)


def test_files_keep_the_gate_and_say_what_is_wrong_with_them(tmp_path: Path) -> None:
    own = gate(GateSettings(num_models=2, largest_weight=1.5, shares_strength=True))
    own.save(tmp_path)
    again = LearnedGate.load(tmp_path)
    assert (again.settings, again.fingerprints) == (own.settings, own.fingerprints)
    torch.testing.assert_close(again.shares(view(2)), own.shares(view(2)))
    record = json.loads((tmp_path / "gate.json").read_text())
    bad = [
        record | {"kind": "cake"},
        record | {"features": ["entropy"]},
        record | {"settings": {"num_models": 1}},
        record | {"settings": {"layers": 3}},
    ]
    for wrong in bad:
        (tmp_path / "gate.json").write_text(json.dumps(wrong))
        with pytest.raises(ModelError, match="cannot be loaded as a learned gate"):
            LearnedGate.load(tmp_path)
    (tmp_path / "gate.json").write_text(json.dumps(record))
    (tmp_path / "gate.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot be loaded as a learned gate"):
        LearnedGate.load(tmp_path)
    with pytest.raises(ModelError, match="make one with"):
        LearnedGate.load(tmp_path / "nowhere")


@pytest.mark.parametrize("form", ["local", "advantage", "plain"])
def test_a_gate_that_is_always_open_is_a_constant_weight(form: str) -> None:
    decoder = tiny_decoder(3)
    own = gate(fingerprints=decoder.fingerprints)
    with torch.no_grad():
        own.network.layers[-1].weight.zero_()
        own.network.layers[-1].bias.fill_(50.0)
    encoded = random_encoder_output(decoder.acoustic, 3, seed=5)
    learned = decoder.decode(
        encoded, DecodingOptions(beam_size=3, max_new_tokens=12, rule=fusion.gated(1.0, own, form))
    )
    if form == "plain":
        constant = decoder.decode(encoded, DecodingOptions(beam_size=3, max_new_tokens=12, rule=fusion.static(1.0)))
        assert [a.best.token_ids for a in learned] == [b.best.token_ids for b in constant]
        assert [a.best.total for a in learned] == pytest.approx([b.best.total for b in constant], abs=1e-4)
    assert all(result.best.total <= 0 for result in learned)


def test_other_models_than_it_was_trained_for_are_refused_before_any_search() -> None:
    decoder = tiny_decoder(3)
    options = DecodingOptions(rule=fusion.gated(1.0, gate()))
    with pytest.raises(InvalidArgumentError, match="was trained for models a, b, but"):
        decoder.decode(random_encoder_output(decoder.acoustic, 1), options)
