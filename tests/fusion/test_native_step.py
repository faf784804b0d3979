"""The C++ fused step against the float64 reference, at every SIMD level this machine runs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion.fusion.native_step import available_levels, fused_step_cpu, row_statistics_cpu
from shallowfusion.kernels.fused_step_reference import fused_step_reference, row_statistics_reference
from shallowfusion.values import StepRequest, Unmapped
from tests.step_cases import (
    DTYPES,
    IMPOSSIBLE,
    assert_close,
    assert_matches_reference,
    assert_same_bits,
    make_request,
    packed_mask,
    random_bias,
    random_bonus,
    random_map,
    random_mask,
)

LEVELS = available_levels()
NORMALIZE = ("none", "local", "end_factored")
POLICIES = (Unmapped("neutral"), Unmapped("floor", -7.5), Unmapped("forbid"))

pytestmark = pytest.mark.parametrize("level", LEVELS)


def check(request: StepRequest, level: str, path: str | None = None) -> None:
    """Agrees with the reference, ran at the level asked for and, when given, on the path named."""
    found = fused_step_cpu(request, level=level, threads=1)
    assert found.backend.startswith(f"cpu ({level};")
    if path is not None:
        one_pass, several = (request.num_rows, 0) if path == "one pass" else (0, request.num_rows)
        assert f"rows in one pass {one_pass}, in several {several}," in found.backend
    assert_matches_reference(request, found)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference_in_one_pass(level: str, dtype: torch.dtype, normalize: str) -> None:
    vocabs = (4099, 3507)
    request = make_request(vocabs=vocabs, dtypes=(dtype,), normalize=normalize, token_bias=random_bias(4099), end_id=17)
    check(request, level, "one pass")


@pytest.mark.parametrize("dtype", DTYPES)
def test_total_is_within_the_error_budget_at_production_size(level: str, dtype: torch.dtype) -> None:
    request = make_request(utterances=1, beam_size=4, vocabs=(51_866, 50_257), dtypes=(dtype,), end_id=50_257)
    found = fused_step_cpu(request, level=level, threads=1)
    acoustic, lm = (torch.log_softmax(source.float(), dim=1) for source in request.sources)
    exact = fused_step_reference(request)
    assert torch.equal(found.token_ids, exact.token_ids)
    rows, tokens = exact.parent_rows[0], exact.token_ids[0]
    unmapped = tokens >= lm.shape[1]
    lm_part = torch.where(unmapped, lm.max(dim=1).values[rows], lm[rows, tokens.clamp(max=lm.shape[1] - 1)])
    torch_totals = request.totals[rows] + (acoustic[rows, tokens] + 0.3 * lm_part)
    for row in rows.unique():
        here = rows == row
        theirs = (torch_totals - exact.totals[0])[here].abs().max()
        ours = (found.totals - exact.totals)[0][here].abs().max()
        assert ours <= 2 * theirs + 1e-5


@pytest.mark.parametrize("vocab", [1, 7, 255, 507, 513, 4099, 51_866])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_any_vocabulary_size(level: str, vocab: int, normalize: str) -> None:
    for lm_vocab in {vocab, max(1, vocab - 3), vocab + 5}:
        check(make_request(utterances=1, beam_size=2, vocabs=(vocab, lm_vocab), normalize=normalize), level)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("policy", POLICIES)
def test_unmapped_policies_with_shared_ids(level: str, policy: Unmapped, normalize: str) -> None:
    request = make_request(vocabs=(600, 40), unmapped=(policy, policy), normalize=normalize, temperatures=(0.8, 1.7))
    check(request, level, "one pass")


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("combine", ["log_linear", "mixture"])
def test_unmapped_policies_with_maps(level: str, policy: Unmapped, normalize: str, combine: str) -> None:
    request = make_request(
        vocabs=(600, 333, 900),
        dtypes=DTYPES,
        maps=(None, random_map(600, 333, seed=1), random_map(600, 900, seed=2)),
        unmapped=(policy,) * 3,
        normalize=normalize,
        combine=combine,
        temperatures=(1.0, 0.7, 1.3),
    )
    check(request, level, "several")


@pytest.mark.parametrize("combine", ["log_linear", "mixture"])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_bias_mask_bonus_and_length_bonus_together(level: str, normalize: str, combine: str) -> None:
    request = make_request(vocabs=(507, 490), normalize=normalize, combine=combine)
    request = dataclasses.replace(
        request,
        token_bias=random_bias(507),
        allowed=random_mask(6, 507),
        bonus=random_bonus(6, 507, per_row=25),
        length_bonus=torch.linspace(-1.0, 1.0, 6),
    )
    check(request, level)


@pytest.mark.parametrize("num_sources", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_any_number_of_sources_of_mixed_dtypes(level: str, num_sources: int, normalize: str) -> None:
    vocabs = [500, 480, 530, 20, 500, 1, 700, 499][:num_sources]
    check(make_request(vocabs=vocabs, dtypes=DTYPES, normalize=normalize), level, "one pass")


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_negative_weights_keep_the_impossible_impossible(level: str, normalize: str) -> None:
    request = make_request(vocabs=(300, 300, 280), normalize=normalize)
    request.sources[1][:, ::3] = IMPOSSIBLE
    request.sources[0][:, ::5] = IMPOSSIBLE
    weights = torch.tensor([[1.0, -0.3, 0.4], [-1.0, 0.3, -0.2], [0.0, -0.5, 1.0]] * 2)
    check(dataclasses.replace(request, weights=weights), level)


@pytest.mark.parametrize("spread", [1e-3, 40.0, 3e3, 1e7, 1e37])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_logits_of_any_size(level: str, spread: float, normalize: str) -> None:
    check(make_request(vocabs=(700, 650), spread=spread, normalize=normalize), level)


@pytest.mark.parametrize("shift", [-3e38, -1e9, -300.0, 300.0])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_references_far_from_the_maximum_fall_back_to_the_general_path(
    level: str, shift: float, normalize: str
) -> None:
    request = make_request(vocabs=(2000, 1900), normalize=normalize, end_id=1500)
    request.sources[0][:, :400] += shift
    request.sources[1][:, 300:] -= abs(shift)
    check(request, level, None if shift == 300.0 else "several")


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("beam_size", [1, 2])
def test_more_candidates_asked_for_than_possible(level: str, beam_size: int, normalize: str) -> None:
    request = make_request(utterances=2, beam_size=beam_size, vocabs=(40, 30), top_k=300, normalize=normalize)
    check(request, level)
    bias = torch.full((40,), IMPOSSIBLE)
    bias[[3, 20, 39]] = 0.0
    check(dataclasses.replace(request, token_bias=bias), level)
    check(dataclasses.replace(request, token_bias=bias, top_k=2), level)
    check(dataclasses.replace(request, token_bias=torch.full((40,), IMPOSSIBLE)), level)


def test_finite_stand_ins_for_impossible_still_count(level: str) -> None:
    request = make_request(vocabs=(600, 600), top_k=9, weights=torch.tensor([[1.0, 0.5]] * 6))
    request.sources[0][:, 4:] = torch.finfo(torch.float32).min
    check(request, level)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_padding_between_rows_is_never_read(level: str, dtype: torch.dtype, normalize: str) -> None:
    for vocab in (7, 255, 1024, 1300):
        request = make_request(vocabs=(vocab, vocab - 3), dtypes=(dtype,), padding=13, normalize=normalize)
        check(request, level)


@pytest.mark.parametrize("combine", ["log_linear", "mixture"])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_broken_impossible_and_dead_rows(level: str, normalize: str, combine: str) -> None:
    request = make_request(utterances=4, beam_size=3, vocabs=(700, 650), normalize=normalize, combine=combine)
    acoustic, lm = request.sources
    acoustic[0, 650] = float("nan")
    lm[1, 649] = float("inf")
    acoustic[2] = IMPOSSIBLE
    lm[3] = IMPOSSIBLE
    acoustic[4, 0] = float("inf")
    request.totals[5] = IMPOSSIBLE
    request.totals[6] = float("nan")
    request.totals[9:] = IMPOSSIBLE
    lm[9, 3] = float("nan")
    weights = request.weights.clone()
    lm[7, 5] = float("nan")
    lm[8] = float("inf")
    weights[7, 1] = 0.0
    weights[8, 1] = 0.0
    request = dataclasses.replace(request, weights=weights)
    check(request, level)
    assert fused_step_cpu(request, level=level).flags.tolist() == [
        *(True, True, False, False, True, False),
        *(True, False, False, True, False, False),
    ]


@pytest.mark.parametrize("weights", [(0.0, 1.0), (0.0, 0.0), (1.0, 0.0), (0.7, 0.0)])
@pytest.mark.parametrize("combine", ["log_linear", "mixture"])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_zero_weights(level: str, normalize: str, combine: str, weights: tuple[float, float]) -> None:
    request = make_request(vocabs=(300, 200), normalize=normalize, combine=combine)
    request.sources[0][1, 7] = float("nan")
    request.sources[1][2, 7] = float("inf")
    check(dataclasses.replace(request, weights=torch.tensor([weights] * 6)), level)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("combine", ["log_linear", "mixture"])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_sources_of_weight_zero_change_no_bit(level: str, normalize: str, combine: str, dtype: torch.dtype) -> None:
    fields = {"normalize": normalize, "combine": combine, "token_bias": random_bias(4099)}
    three = make_request(
        vocabs=(4099, 3000, 5000), dtypes=(dtype,), weights=torch.tensor([[1.0, 0.0, 0.0]] * 6), **fields
    )
    one = make_request(vocabs=(4099,), dtypes=(dtype,), weights=torch.ones(6, 1), totals=three.totals, **fields)
    one = dataclasses.replace(one, sources=three.sources[:1])
    found, alone = fused_step_cpu(three, level=level), fused_step_cpu(one, level=level)
    assert torch.equal(found.totals, alone.totals)
    assert torch.equal(found.token_ids, alone.token_ids)
    assert torch.equal(found.parent_rows, alone.parent_rows)
    assert_matches_reference(three, found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("end_id", [-1, 0, 2500])
def test_thousands_of_ties_go_to_the_lowest_row_and_token(level: str, dtype: torch.dtype, end_id: int) -> None:
    request = make_request(
        utterances=2, beam_size=3, vocabs=(5003, 4001), dtypes=(dtype,), spread=1.0, end_id=end_id, top_k=60
    )
    sources = tuple((source.float() * 2).round().clamp(-4, 4).div(2).to(dtype) for source in request.sources)
    for source in sources:
        source[:] = source[0]
    totals = torch.tensor([-3.0, -3.0, -2.5, -1.0, -1.0, -1.0])
    request = dataclasses.replace(
        request,
        sources=sources,
        totals=totals,
        weights=torch.tensor([[1.0, 0.5]] * 6),
        unmapped=(Unmapped("forbid"),) * 2,
    )
    for top_k in (1, 6, 60, 700):
        case = dataclasses.replace(request, top_k=top_k)
        found, wanted = fused_step_cpu(case, level=level), fused_step_reference(case)
        assert torch.equal(found.parent_rows, wanted.parent_rows)
        assert torch.equal(found.token_ids, wanted.token_ids)
        assert_close(found.totals, wanted.totals)


def test_all_tokens_equal(level: str) -> None:
    request = make_request(vocabs=(3000, 3000), spread=0.0, end_id=1, top_k=5)
    found = fused_step_cpu(dataclasses.replace(request, totals=torch.zeros(6)), level=level)
    assert found.token_ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert found.parent_rows.tolist() == [[0] * 5, [3] * 5]


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("combine", ["log_linear", "mixture"])
def test_threads_change_no_bit(level: str, normalize: str, combine: str) -> None:
    for rows in (1, 3, 5):
        request = make_request(
            utterances=1, beam_size=rows, vocabs=(9001, 8000), normalize=normalize, combine=combine, end_id=8500
        )
        alone = fused_step_cpu(request, level=level, threads=1)
        for threads in (2, 4, 7):
            found = fused_step_cpu(request, level=level, threads=threads)
            assert_same_bits(alone, found)
            split = rows if threads > rows and combine == "log_linear" else 0
            assert found.backend.endswith(f"shared between threads {split})")


def test_worked_table_of_shallow_fusion_flips_at_its_weight(level: str) -> None:
    acoustic = torch.log(torch.tensor([-1.8, -1.0, -3.5]).exp())
    lm = torch.tensor([-0.3, -5.0, -3.8])

    def rest(scores: torch.Tensor) -> torch.Tensor:  # one more token, so that these are log-probs already
        return torch.cat([scores, torch.log1p(-scores.exp().sum())[None]])[None]

    def totals(weight: float) -> list[float]:
        request = make_request(
            utterances=1, beam_size=1, vocabs=(4, 4), end_id=-1, top_k=4, weights=torch.tensor([[1.0, weight]])
        )
        request = dataclasses.replace(
            request,
            sources=(rest(acoustic), rest(lm)),
            totals=torch.zeros(1),
            token_bias=torch.tensor([0.0, 0.0, 0.0, IMPOSSIBLE]),
        )
        found = fused_step_cpu(request, level=level)
        by_token = dict(zip(found.token_ids[0].tolist(), found.totals[0].tolist(), strict=True))
        return [by_token[token] for token in range(3)]

    assert totals(0.2) == pytest.approx([-1.86, -2.00, -4.26], abs=1e-5)
    below, above = totals(0.1702 - 1e-4), totals(0.1703)
    assert below[0] < below[1]
    assert above[0] > above[1]


def test_published_numbers_of_the_end_token_rules(level: str) -> None:
    acoustic = torch.log(torch.tensor([[0.55, 0.25, 0.20]]))
    lm = torch.log(torch.tensor([[0.1, 0.9]]))
    request = make_request(
        utterances=1, beam_size=1, vocabs=(3, 2), end_id=2, top_k=3, weights=torch.tensor([[1.0, 0.5]])
    )
    request = dataclasses.replace(request, sources=(acoustic, lm), totals=torch.zeros(1))

    def by_token(case: StepRequest) -> list[float]:
        found = fused_step_cpu(case, level=level)
        return found.totals[0][found.token_ids[0].argsort()].tolist()

    naive = dataclasses.replace(request, unmapped=(Unmapped("neutral"), Unmapped("floor", 0.0)))
    assert by_token(naive) == pytest.approx([-1.7491, -1.4390, -1.6094], abs=1e-4)
    assert by_token(request) == pytest.approx([-1.7491, -1.4390, -1.6621], abs=1e-4)
    factored = by_token(dataclasses.replace(request, normalize="end_factored"))
    assert factored == pytest.approx([-1.0833, -0.7732, -1.6094], abs=1e-4)
    assert sum(math.exp(value) for value in factored) == pytest.approx(1.0, abs=1e-6)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_small_request(level: str, data: st.DataObject) -> None:
    draw = data.draw
    seed = draw(st.integers(0, 2**20))
    vocab = draw(st.sampled_from([1, 2, 16, 33, 255, 300, 1030, 2100]))
    num_sources = draw(st.integers(1, 4))
    sizes = st.sampled_from([1, 5, vocab, vocab + 40, max(1, vocab - 9)])
    vocabs = [vocab, *(draw(sizes) for _ in range(num_sources - 1))]
    utterances, beam_size = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    rows = utterances * beam_size
    combine = draw(st.sampled_from(["log_linear", "mixture"]))
    weight = st.sampled_from([0.0, 0.3, 1.0, 2.5] + ([-0.4] if combine == "log_linear" else []))
    request = make_request(
        utterances=utterances,
        beam_size=beam_size,
        vocabs=vocabs,
        dtypes=draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3)),
        spread=draw(st.sampled_from([0.5, 3.0, 30.0])),
        seed=seed,
        weights=torch.tensor([[draw(weight) for _ in vocabs] for _ in range(rows)]),
        top_k=draw(st.sampled_from([1, 3, 10, 70])),
        end_id=draw(st.integers(0, vocab - 1)),
        temperatures=tuple(draw(st.sampled_from([0.5, 1.0, 1.9])) for _ in vocabs),
        maps=tuple(
            random_map(vocab, size, seed + 1) if index and draw(st.booleans()) else None
            for index, size in enumerate(vocabs)
        ),
        unmapped=tuple(draw(st.sampled_from(POLICIES)) for _ in vocabs),
        token_bias=random_bias(vocab, seed) if draw(st.booleans()) else None,
        allowed=random_mask(rows, vocab, seed) if draw(st.booleans()) else None,
        bonus=random_bonus(rows, vocab, draw(st.sampled_from([0, 1, 9])), seed) if draw(st.booleans()) else None,
        length_bonus=torch.full((rows,), draw(st.sampled_from([0.0, 0.7]))),
        combine=combine,
        normalize=draw(st.sampled_from(NORMALIZE)),
    )
    threads = draw(st.sampled_from([1, 3]))
    assert_matches_reference(request, fused_step_cpu(request, level=level, threads=threads))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 7, 255, 1030, 51_866])
def test_row_statistics_match_reference(level: str, dtype: torch.dtype, vocab: int) -> None:
    for spread in (0.0, 3.0, 60.0, 3000.0):
        source = make_request(vocabs=(vocab,), dtypes=(dtype,), spread=spread, padding=5).sources[0]
        source[1] = IMPOSSIBLE
        source[2, vocab // 2] = float("nan")
        source[3, vocab - 1] = float("inf")
        source[4, : vocab // 2] = IMPOSSIBLE
        wanted = row_statistics_reference(source, 1.3)
        found = row_statistics_cpu(source, 1.3, level=level, threads=2)
        for name in ("log_sum_exp", "entropy", "max_log_prob", "margin"):
            assert_close(getattr(found, name), getattr(wanted, name))


def test_masks_are_packed_as_the_contract_says(level: str) -> None:
    allowed = torch.zeros(6, 300, dtype=torch.bool)
    allowed[:, [0, 31, 32, 255, 256, 299]] = True
    request = make_request(vocabs=(300, 300), allowed=packed_mask(allowed), top_k=40)
    found = fused_step_cpu(request, level=level)
    assert set(found.token_ids[found.token_ids >= 0].tolist()) == {0, 31, 32, 255, 256, 299}
    check(request, level)
