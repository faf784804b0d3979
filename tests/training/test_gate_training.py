"""Gate training: the gradient is the published one, and a toy whose answer is known is learnt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.fusion.gates import StepView
from shallowfusion.fusion.learned_gate import GateNetwork, GateSettings
from shallowfusion.training.gate_training import (
    GateTraining,
    TracedList,
    best_constant,
    corrupted_text,
    fused_log_probs,
    mwer_coefficients,
    train_gate,
)
from shallowfusion.training.teacher_forcing import Trace, trace_rows
from shallowfusion.values import Unmapped

VOCAB = 24
POLICIES = (Unmapped("neutral"),) * 3


def traced(logits: list[torch.Tensor], targets: torch.Tensor, top_k: int = 64) -> Trace:
    return trace_rows(StepView(logits, (1.0,) * len(logits)), targets, POLICIES, len(logits) - 1, top_k)


def toy(tokens: int = 600, seed: int = 0) -> tuple[Trace, torch.Tensor]:
    """The acoustic model is sure and right, and the LM wrong; or it wavers between two, and the LM knows which."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, VOCAB, (tokens,), generator=generator)
    others = (targets + torch.randint(1, VOCAB, (tokens,), generator=generator)) % VOCAB
    unsure = torch.rand(tokens, generator=generator) < 0.5
    acoustic, language = (torch.randn((tokens, VOCAB), generator=generator) for _ in range(2))
    rows = torch.arange(tokens)
    acoustic[rows, targets] += torch.where(unsure, 6.0, 9.0)
    acoustic[rows, others] += torch.where(unsure, 6.5, 0.0)
    language[rows, torch.where(unsure, targets, others)] += 7.0
    return traced([acoustic, language], targets), unsure


@pytest.mark.parametrize("top_k", [8, 64])
def test_listed_tokens_and_the_rest_give_the_whole_softmax(top_k: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = [3 * torch.randn((50, VOCAB), generator=generator) for _ in range(3)]
    targets = torch.randint(0, VOCAB, (50,), generator=generator)
    weights = torch.rand((50, 2), generator=generator)
    trace = traced(logits, targets, top_k)
    log_probs = [torch.log_softmax(own, dim=1) for own in logits]
    whole = torch.log_softmax(log_probs[0] + weights[:, :1] * log_probs[1] + weights[:, 1:] * log_probs[2], dim=1)
    exact = whole.gather(1, targets[:, None])[:, 0]
    found = fused_log_probs(weights, trace)
    assert (found - exact).abs().max() < (1e-5 if top_k == 64 else 0.1)


def test_the_gradient_is_gold_minus_expected_log_prob() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = [3 * torch.randn((40, VOCAB), generator=generator) for _ in range(2)]
    targets = torch.randint(0, VOCAB, (40,), generator=generator)
    trace = traced(logits, targets)
    weights = torch.rand((40, 1), generator=generator).requires_grad_()
    (-fused_log_probs(weights, trace)).sum().backward()
    acoustic, language = (torch.log_softmax(own, dim=1) for own in logits)
    shares = torch.softmax(acoustic + weights.detach() * language, dim=1)
    stated = -(language.gather(1, targets[:, None])[:, 0] - (shares * language).sum(dim=1))
    torch.testing.assert_close(weights.grad[:, 0], stated, atol=1e-5, rtol=1e-4)
    step = 1e-2
    moved = [-fused_log_probs(weights.detach() + sign * step, trace) for sign in (1, -1)]
    torch.testing.assert_close((moved[0] - moved[1]) / (2 * step), stated, atol=5e-3, rtol=1e-2)


def test_a_gate_learns_to_open_where_the_acoustic_model_is_unsure() -> None:
    data, unsure = toy()
    held_out, held_unsure = toy(300, seed=1)
    outcome = train_gate([data], GateSettings(), GateTraining(epochs=30, batch_tokens=128))
    shares = outcome.network(held_out.features)[:, 0].detach()
    assert shares[held_unsure].mean() > 0.7
    assert shares[~held_unsure].mean() < 0.15
    assert outcome.losses[-1] < outcome.losses[0]
    learned = -float(fused_log_probs(shares[:, None], held_out).mean())
    _, constant = best_constant(held_out)
    assert learned < constant - 0.02
    assert unsure.any()


def test_the_best_constant_is_the_lowest_of_all_weights() -> None:
    data, _ = toy()
    weight, loss = best_constant(data)
    for other in torch.linspace(0, 2, 21).tolist():
        assert loss <= -float(fused_log_probs(torch.full((len(data), 1), other), data).mean()) + 1e-6
    assert 0 < weight < 2


def test_an_untrained_gate_gives_the_first_weight_everywhere() -> None:
    data, _ = toy(50)
    one = GateNetwork(GateSettings(largest_weight=2.0, first_weight=0.3))
    torch.testing.assert_close(2 * one(data.features), torch.full((50, 1), 0.3))
    experts = GateNetwork(GateSettings(num_models=2, first_weight=0.2, shares_strength=True))
    features = torch.randn((7, 16))
    torch.testing.assert_close(experts(features), torch.full((7, 2), 0.2))


def test_experts_prefer_the_model_that_knows_and_share_one_strength() -> None:
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(0, VOCAB, (400,), generator=generator)
    logits = [torch.randn((400, VOCAB), generator=generator) for _ in range(3)]
    logits[0][torch.arange(400), targets] += 2.0
    logits[2][torch.arange(400), targets] += 4.0  # only the second language model knows
    settings = GateSettings(num_models=2, shares_strength=True)
    outcome = train_gate([traced(logits, targets)], settings, GateTraining(epochs=20, batch_tokens=100))
    shares = outcome.network(traced(logits, targets).features).detach()
    assert (shares.sum(dim=1) <= 1).all()
    assert shares[:, 1].mean() > 5 * shares[:, 0].mean()


def test_the_cost_of_weights_keeps_a_gate_shut() -> None:
    data, _ = toy()
    free = train_gate([data], GateSettings(), GateTraining(epochs=40, weight_cost=0.0)).network(data.features).mean()
    dear = train_gate([data], GateSettings(), GateTraining(epochs=40, weight_cost=5.0)).network(data.features).mean()
    assert dear < free / 2


def test_the_gate_with_the_fewest_development_errors_is_kept_and_training_stops() -> None:
    data, _ = toy()
    errors = iter([9, 5, 7, 7, 7, 1])
    seen: list[torch.Tensor] = []

    def count(network: GateNetwork) -> int:
        seen.append(network(data.features).detach().clone())
        return next(errors)

    outcome = train_gate([data], GateSettings(), GateTraining(epochs=50, check_every=1, patience=3), count)
    assert outcome.dev_errors == ((0, 9), (1, 5), (2, 7), (3, 7), (4, 7))
    torch.testing.assert_close(outcome.network(data.features), seen[1])


def test_coefficients_are_the_gradient_of_expected_errors() -> None:
    scores = torch.tensor([-3.0, -3.5, -5.0, -4.0], dtype=torch.float64, requires_grad=True)
    errors = torch.tensor([2.0, 0.0, 1.0, 5.0], dtype=torch.float64)
    (torch.softmax(scores, dim=0) * errors).sum().backward()
    torch.testing.assert_close(mwer_coefficients(scores.detach(), errors), scores.grad)


def test_the_finish_on_lists_lowers_expected_errors() -> None:
    lists = []
    for seed in range(12):
        data, _ = toy(10, seed)
        wrong = replace(data, gold=data.gold.flip(0) * torch.tensor([0.7, 2.0]))  # heard well, said by no one
        lists.append(TracedList((data, wrong), (0, 3)))

    @torch.no_grad()
    def expected(network: GateNetwork) -> float:
        total = 0.0
        for own in lists:
            scores = torch.stack([fused_log_probs(network(t.features), t).sum() for t in own.traces])
            total += float((torch.softmax(scores, dim=0) * torch.tensor(own.errors)).sum())
        return total

    data, _ = toy(100)
    settings = GateTraining(epochs=1, learning_rate=1e-2, weight_cost=0.0)
    before = expected(train_gate([data], GateSettings(), settings).network)
    after = expected(train_gate([data], GateSettings(), replace(settings, list_epochs=8), lists=lists).network)
    assert after < before


def test_heard_texts_get_the_next_right_token() -> None:
    end = 99
    own = corrupted_text((1, 2, 3, 4), (1, 2, 3, 4), end)
    assert own.targets == (1, 2, 3, 4, end)
    assert corrupted_text((1, 2, 3), (1, 7, 3), end).targets == (1, 2, 3, end)  # replaced
    assert corrupted_text((1, 2, 3), (1, 3), end).targets == (1, 2, end)  # after 1 comes the 2 that was missed
    assert corrupted_text((1, 2), (1, 8, 2), end).targets == (1, 2, 2, end)  # 8 is too many
    assert corrupted_text((1, 2), (1, 2, 5), end).targets == (1, 2, end, end)
    assert corrupted_text((1, 2), (1,), end).targets == (1, 2)
    assert corrupted_text((1, 2), (), end).targets == (1,)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="epochs must be"):
        GateTraining(epochs=0)
    with pytest.raises(InvalidArgumentError, match="weight_cost"):
        GateTraining(weight_cost=-1.0)
    with pytest.raises(InvalidArgumentError, match="at least one trace"):
        train_gate([], GateSettings(), GateTraining())
    with pytest.raises(InvalidArgumentError, match="needs n-best lists"):
        train_gate([toy(5)[0]], GateSettings(), GateTraining(list_epochs=1))
    with pytest.raises(InvalidArgumentError, match="first_weight"):
        GateSettings(first_weight=1.0, largest_weight=1.0)
