"""Gates and mixtures: published numbers, and the hypothesis that dodges the language model."""

from __future__ import annotations

import math

import pytest
import torch

from shallowfusion import fusion
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.fusion.gates import AgreementGate, StepView
from shallowfusion.fusion.weighing import step_weights

SHUT_OR_OPEN = [
    fusion.entropy_gate(1.0),
    fusion.entropy_gate(1.0, squash="vocabulary"),
    fusion.confidence_gate(1.0),
    fusion.confidence_gate(1.0, power=2.0),
    fusion.margin_gate(1.0),
    fusion.inverse_entropy_gate(1.0),
]


def view(acoustic: list[list[float]], language: list[list[float]], step: int = 0) -> StepView:
    logits = [torch.tensor(rows).log() for rows in (acoustic, language)]
    return StepView(logits, (1.0, 1.0), step)


def shares(rule: fusion.Rule, seen: StepView) -> list[float]:
    return step_weights(rule, seen).weights[:, 1].tolist()


SURE, UNSURE = [0.98, 0.01, 0.01], [0.4, 0.35, 0.25]
LM_ROW = [0.2, 0.7, 0.1]


def test_worked_numbers_of_each_gate() -> None:
    seen = view([SURE, UNSURE], [LM_ROW, LM_ROW])
    entropies = [-sum(p * math.log(p) for p in row) for row in (SURE, UNSURE, LM_ROW)]
    squashed = [2 / (1 + math.exp(-h)) - 1 for h in entropies[:2]]
    margins = [math.log(98), math.log(0.4 / 0.35)]
    wanted = {
        "entropy_gate": squashed,
        "confidence_gate": [0.02, 0.6],
        "margin_gate": [1 / (1 + math.exp(-(2 - margin))) for margin in margins],
        "inverse_entropy_gate": [h / (h + entropies[2]) for h in entropies[:2]],
    }
    for name, numbers in wanted.items():
        rule = getattr(fusion, name)(1.0)
        assert shares(rule, seen) == pytest.approx(numbers, abs=1e-5), name
    assert shares(fusion.entropy_gate(1.0, squash="vocabulary"), seen) == pytest.approx(
        [h / math.log(3) for h in entropies[:2]], abs=1e-5
    )
    assert shares(fusion.confidence_gate(0.5, power=2.0), seen) == pytest.approx([0.5 * 0.02**2, 0.5 * 0.36], abs=1e-5)


@pytest.mark.parametrize("rule", SHUT_OR_OPEN, ids=lambda rule: f"{rule.name}-{rule.gate}")
def test_gates_open_where_the_acoustic_model_is_unsure(rule: fusion.Rule) -> None:
    sure, unsure = shares(rule, view([SURE, UNSURE], [LM_ROW, LM_ROW]))
    assert 0 <= sure < unsure <= 1


def test_agreement_looks_for_the_lm_favourite_among_the_best_acoustic_tokens() -> None:
    acoustic, language = [[0.5, 0.3, 0.15, 0.05]] * 2, [[0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]]
    assert shares(fusion.agreement_gate(0.4, top_k=2), view(acoustic, language)) == pytest.approx([0.4, 0.0])
    moved = torch.tensor([1, 3, 0, -1], dtype=torch.int32)  # the LM's favourite 3 is acoustic token 1
    seen = StepView([torch.tensor(acoustic).log(), torch.tensor(language).log()], (1.0, 1.0), 0, (None, moved))
    assert AgreementGate(2).shares(seen)[:, 0].tolist() == [1.0, 1.0]
    assert AgreementGate(1).shares(seen)[:, 0].tolist() == [1.0, 0.0]


def dodging_search(rule: fusion.Rule) -> int:
    """Which of two hypotheses wins the next step; the second is likelier and its word is the LM's favourite.

    The first walks through a state in which the acoustic model is sure of a word that the LM finds all but
    impossible; its gate is nearly shut there. The second is unsure, and even a favourite costs the LM 1.5 nats.
    """
    acoustic = [[0.997, 0.001, 0.001, 0.001], [0.001, 0.498, 0.500, 0.001]]
    language = [[0.0001, 0.3333, 0.3333, 0.3333], [0.2, 0.25, 0.223, 0.327]]
    seen = view(acoustic, language)
    numbers = step_weights(rule, seen)
    totals = torch.tensor([-1.4, -0.22])
    found = fusion.fused_step(
        seen.logits,
        numbers.weights,
        totals if numbers.shift is None else totals + numbers.shift,
        beam_size=2,
        top_k=1,
        end_id=None,
        normalize=rule.normalize("neutral"),
    )
    return int(found.parent_rows[0, 0])


@pytest.mark.parametrize("name", ["entropy_gate", "confidence_gate"])
def test_a_hypothesis_cannot_dodge_the_lm_through_confident_states_unless_the_form_is_plain(name: str) -> None:
    gate = getattr(fusion, name)
    assert dodging_search(fusion.static(1.5)) == 1
    assert dodging_search(gate(1.5, form="plain")) == 0
    assert dodging_search(gate(1.5, form="advantage")) == 1
    assert dodging_search(gate(1.5, form="local")) == 1


def test_advantage_leaves_the_favourite_free_of_lm_cost() -> None:
    seen = view([UNSURE], [LM_ROW])
    rule = fusion.gated(1.0, fusion.entropy_gate(1.0).gate, form="advantage")  # type: ignore[arg-type]
    numbers = step_weights(rule, seen)
    found = fusion.fused_step(seen.logits, numbers.weights, numbers.shift, beam_size=1, top_k=3, end_id=None)
    favourite = found.token_ids[0].tolist().index(1)
    assert float(found.totals[0, favourite]) == pytest.approx(math.log(UNSURE[1]), abs=1e-5)


@pytest.mark.parametrize(
    ("language", "acoustic", "entropy", "weight", "mixed", "winner"),
    [
        ((0.6, 0.3, 0.1), (0.2, 0.7, 0.1), 0.897946, 0.210527, (0.642105, 0.447369, 0.121053), 0),
        ((0.4, 0.35, 0.25), (0.1, 0.8, 0.1), 1.080528, 0.246594, (0.424659, 0.547275, 0.274659), 1),
    ],
)
def test_uadf_as_published(language, acoustic, entropy, weight, mixed, winner) -> None:
    seen = view([list(acoustic)], [list(language)])
    assert float(seen.language[0].entropy) == pytest.approx(entropy, abs=1e-5)
    rule = fusion.uadf()
    numbers = step_weights(rule, seen)
    assert numbers.weights[0].tolist() == pytest.approx([weight / (1 + weight), 1 / (1 + weight)], abs=1e-5)
    found = fusion.fused_step(
        seen.logits, numbers.weights, torch.zeros(1), beam_size=1, top_k=3, end_id=None, combine="mixture"
    )
    assert int(found.token_ids[0, 0]) == winner
    in_order = found.totals[0][found.token_ids[0].argsort()]
    assert (in_order.exp() * (1 + weight)).tolist() == pytest.approx(list(mixed), abs=1e-5)


def row_of(entropy: float) -> list[float]:
    """64 falling probabilities of that entropy, nats."""
    low, high = 0.01, 20.0
    for _ in range(60):
        row = torch.softmax(-torch.arange(64, dtype=torch.float64) * (low + high) / 2, dim=0)
        high, low = (high, (low + high) / 2) if torch.special.entr(row).sum() > entropy else ((low + high) / 2, low)
    return row.tolist()


@pytest.mark.parametrize(
    ("row", "weight"),
    [
        (row_of(0.1), 0.025), (row_of(0.5), 0.122), (row_of(1.0), 0.231), (row_of(2.0), 0.381),
        ([1 / 32_000] * 32_000, 0.49997), ([1.0, 0.0, 0.0], 0.0),
    ],
    ids=["0.1", "0.5", "1.0", "2.0", "uniform", "one possible token"],
)  # fmt: skip
def test_uadf_never_gives_the_acoustic_model_half(row: list[float], weight: float) -> None:
    """The published weights by the entropy of the language model."""
    acoustic, language = step_weights(fusion.uadf(), view([row], [row])).weights[0].tolist()
    assert acoustic / language == pytest.approx(weight, abs=6e-4 if weight < 0.4 else 1e-5)


def test_uadf_with_swapped_roles_and_its_constant_baseline() -> None:
    seen = view([UNSURE], [LM_ROW])
    weight = 1 / (1 + math.exp(-float(seen.acoustic.entropy))) - 0.5
    pair = step_weights(fusion.uadf_asr_primary(), seen).weights[0].tolist()
    assert pair == pytest.approx([1 / (1 + weight), weight / (1 + weight)], abs=1e-6)
    assert step_weights(fusion.late_fusion(0.25), seen).weights[0].tolist() == pytest.approx([0.8, 0.2])
    assert step_weights(fusion.late_fusion(0.25, primary="lm"), seen).weights[0].tolist() == pytest.approx([0.2, 0.8])


def test_evidence_compares_the_lm_with_the_internal_one_on_the_best_row_of_each_utterance() -> None:
    rule = fusion.evidence_gate(0.8, ilm_weight=0.2, scale=0.3, margin=0.5)
    logits = [torch.tensor([UNSURE] * 4).log(), torch.tensor([LM_ROW] * 4).log(), torch.tensor([UNSURE] * 4).log()]
    sums = torch.tensor([[-1.0, -4.0, -9.0], [-2.0, -50.0, -1.0], [-1.0, -9.0, -4.0], [-2.0, -1.0, -50.0]])
    seen = StepView(logits, (1.0, 1.0, 1.0), 6, None, sums, beam_size=2)
    right, wrong = (1 / (1 + math.exp(-0.3 * (advantage - 3.0))) for advantage in (5.0, -5.0))
    found = step_weights(rule, seen).weights
    for row, share in enumerate((right, right, wrong, wrong)):
        assert found[row].tolist() == pytest.approx([1.0, 0.8 * share, -0.2 * share], abs=1e-6)
    with pytest.raises(InvalidArgumentError, match="ilm_weight must be above 0"):
        fusion.evidence_gate(0.8, ilm_weight=0.0)


def test_rows_with_nan_get_no_say_and_are_flagged_by_the_step() -> None:
    seen = view([[float("nan"), 0.5, 0.5], UNSURE], [LM_ROW, LM_ROW])
    numbers = step_weights(fusion.entropy_gate(0.5), seen)
    assert numbers.weights[0].tolist() == [1.0, 0.0]
    found = fusion.fused_step(seen.logits, numbers.weights, torch.zeros(2), beam_size=1, top_k=1, end_id=None)
    assert found.flags.tolist() == [True, False]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fusion.confidence_gate(0.3, power=0), "power must be finite and above 0"),
        (lambda: fusion.agreement_gate(0.3, top_k=0), "top_k must be at least 1"),
        (lambda: fusion.entropy_gate(0.3, squash="tanh"), "squash must be"),
        (lambda: fusion.entropy_gate(0.3, form="global"), "form must be one of"),
        (lambda: fusion.late_fusion(-1.0), "must be finite and >= 0"),
        (lambda: fusion.late_fusion(0.3, primary="both"), "primary must be"),
        (lambda: fusion.internal_lm(0.3, -0.1), "ilm_weight must be finite"),
        (lambda: fusion.internal_lm(0.3, 0.1, "nothing"), "ilm_variant must be one of"),
        (lambda: fusion.Rule("x", (0.3,), catch_up=True, gate=AgreementGate()), "catch_up"),
    ],
)
def test_illegal_rules_are_refused(make, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        make()
