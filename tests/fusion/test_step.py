"""The border of the fused step: what it refuses, which backend it takes, and the published numbers on each."""

from __future__ import annotations

import math

import pytest
import torch

from shallowfusion import fused_step, row_statistics
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.values import SparseBonus

BACKENDS = ["reference", "cpu"]
IMPOSSIBLE = float("-inf")


def call(**changes: object) -> object:
    arguments: dict = {
        "sources": [torch.zeros(4, 10), torch.zeros(4, 9)],
        "weights": torch.ones(4, 2),
        "totals": torch.zeros(4),
        "beam_size": 2,
        "top_k": 3,
        "end_id": 9,
    } | changes
    return fused_step(arguments.pop("sources"), arguments.pop("weights"), arguments.pop("totals"), **arguments)


BAD = [
    ({"sources": []}, "at least the acoustic logits"),
    ({"sources": [torch.zeros(4)]}, r"sources\[0\] must be a float32"),
    ({"sources": [torch.zeros(4, 10, dtype=torch.float64)]}, "float64"),
    ({"sources": [[1.0]]}, "got list"),
    ({"sources": [torch.zeros(4, 0)]}, "must not be empty"),
    ({"sources": [torch.zeros(4, 10), torch.zeros(3, 9)]}, "must have the 4 rows"),
    ({"sources": [torch.zeros(10, 4).T, torch.zeros(4, 9)]}, "unit stride"),
    ({"beam_size": 3}, "multiple of beam_size=3"),
    ({"beam_size": 0}, "beam_size must be"),
    ({"top_k": 0}, "top_k must be"),
    ({"end_id": 10}, "end_id must be"),
    ({"weights": torch.ones(4, 3)}, r"weights must be a float tensor of shape \[4, 2\]"),
    ({"totals": torch.zeros(3)}, "totals must be"),
    ({"temperatures": [1.0]}, "one per source"),
    ({"temperatures": [1.0, 0.0]}, "above 0"),
    ({"maps": [None]}, "maps must be one per source"),
    ({"maps": [torch.zeros(10, dtype=torch.int32), None]}, r"maps\[0\] must be None"),
    ({"maps": [None, torch.zeros(9, dtype=torch.int32)]}, r"maps\[1\] must be an int32"),
    ({"unmapped": "maybe"}, "unmapped must be"),
    ({"unmapped": 0.5}, "log-prob <= 0"),
    ({"unmapped": ["neutral"]}, "one for all or one per source"),
    ({"token_bias": torch.zeros(9)}, "token_bias must be"),
    ({"allowed": torch.zeros(4, 2, dtype=torch.int32)}, "allowed must be"),
    ({"length_bonus": float("nan")}, "length_bonus must be finite"),
    ({"combine": "sum"}, "combine must be"),
    ({"normalize": "global"}, "normalize must be"),
    ({"normalize": "end_factored", "end_id": None}, "needs combine='log_linear' and an end_id"),
    ({"normalize": "end_factored", "combine": "mixture"}, "needs combine='log_linear'"),
    ({"combine": "mixture", "weights": -torch.ones(4, 2)}, "must be >= 0"),
    ({"backend": "tpu"}, "backend must be one of"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_calls_are_refused_with_a_reason(changes: dict, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        call(**changes)


@pytest.mark.parametrize(
    ("offsets", "tokens", "values", "words"),
    [
        ([0, 1, 1, 1], [0], [1.0], "row_offsets must be"),
        ([0, 1, 0, 1, 1], [0], [1.0], "must rise"),
        ([0, 1, 1, 1, 2], [0], [1.0], "must rise"),
        ([0, 1, 1, 1, 1], [10], [1.0], "from 0 to 9"),
        ([0, 1, 1, 1, 1], [3], [float("nan")], "NaN"),
    ],
)
def test_bad_bonuses_are_refused(offsets, tokens, values, words) -> None:
    bonus = SparseBonus(torch.tensor(offsets, dtype=torch.int32), torch.tensor(tokens), torch.tensor(values))
    with pytest.raises(InvalidArgumentError, match=words):
        call(bonus=bonus)


def test_auto_says_which_backend_ran_and_why() -> None:
    assert call().backend == "cpu: cpu tensors"
    assert call(backend="reference").backend == "reference: as asked"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("weight", "winner"), [(0.0, 1), (0.170, 1), (0.1703, 0), (0.2, 0)])
def test_the_article_s_table_flips_at_0_1702(backend: str, weight: float, winner: int) -> None:
    rest = math.log(1 - math.exp(-1.8) - math.exp(-1.0) - math.exp(-3.5))
    lm_rest = math.log(1 - math.exp(-0.3) - math.exp(-5.0) - math.exp(-3.8))
    acoustic = torch.tensor([[-1.8, -1.0, -3.5, rest]])
    language = torch.tensor([[-0.3, -5.0, -3.8, lm_rest]])
    bias = torch.tensor([0.0, 0.0, 0.0, IMPOSSIBLE])
    found = fused_step(
        [acoustic, language], torch.tensor([[1.0, weight]]), torch.zeros(1), beam_size=1, top_k=3, end_id=None,
        token_bias=bias, backend=backend,
    )  # fmt: skip
    assert int(found.token_ids[0, 0]) == winner
    if weight == 0.2:
        assert found.token_ids[0].tolist() == [0, 1, 2]
        assert found.totals[0].tolist() == pytest.approx([-1.86, -2.00, -4.26], abs=1e-5)
        assert found.parts[0, 0].tolist() == pytest.approx([-1.8, -0.3], abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_end_policies_give_the_numbers_of_the_worked_example(backend: str) -> None:
    acoustic = torch.tensor([[0.55, 0.25, 0.20]]).log()
    language = torch.tensor([[0.1, 0.9]]).log()
    common = {"beam_size": 1, "top_k": 3, "end_id": 2, "backend": backend}

    def totals(**changes: object) -> list[float]:
        found = fused_step([acoustic, language], torch.tensor([[1.0, 0.5]]), torch.zeros(1), **common, **changes)
        return [float(found.totals[0][found.token_ids[0] == token]) for token in range(3)]

    assert totals(unmapped=0.0) == pytest.approx([-1.7491, -1.4390, -1.6094], abs=1e-4)
    assert totals(unmapped="neutral") == pytest.approx([-1.7491, -1.4390, -1.6621], abs=1e-4)
    factored = totals(normalize="end_factored")
    assert factored == pytest.approx([-1.0833, -0.7732, -1.6094], abs=1e-4)
    assert sum(math.exp(total) for total in factored) == pytest.approx(1.0, abs=1e-5)
    local = totals(normalize="local", unmapped=0.0)
    assert sum(math.exp(total) for total in local) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_by_hand(backend: str) -> None:
    source = torch.tensor([[0.6, 0.3, 0.1], [1.0, 1.0, 1.0]]).log()
    found = row_statistics(source, backend=backend)
    assert found.entropy.tolist() == pytest.approx([0.897946, math.log(3)], abs=1e-5)
    assert found.max_log_prob.tolist() == pytest.approx([math.log(0.6), -math.log(3)], abs=1e-5)
    assert found.margin.tolist() == pytest.approx([math.log(2), 0.0], abs=1e-5)
    assert found.log_sum_exp.tolist() == pytest.approx([0.0, math.log(3)], abs=1e-5)


def test_published_mixture_numbers() -> None:
    language, acoustic = torch.tensor([[0.4, 0.35, 0.25]]), torch.tensor([[0.1, 0.8, 0.1]])
    weight = 1 / (1 + math.exp(-1.080528)) - 0.5
    for backend in BACKENDS:
        found = fused_step(
            [language.log(), acoustic.log()], torch.tensor([[1.0, weight]]), torch.zeros(1), beam_size=1, top_k=3,
            end_id=None, combine="mixture", backend=backend,
        )  # fmt: skip
        assert found.token_ids[0].tolist() == [1, 0, 2]
        assert found.totals[0].exp().tolist() == pytest.approx([0.547275, 0.424659, 0.274659], abs=1e-5)
