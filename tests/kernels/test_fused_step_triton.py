"""The Triton fused step against its reference: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.kernels.fused_step import fused_step_triton, load_limit, plan_fused_step, row_statistics_triton
from shallowfusion.kernels.fused_step_reference import fused_step_reference, row_statistics_reference
from shallowfusion.values import Candidates, SparseBonus, StepRequest, Unmapped
from tests.kernels.cases import IMPOSSIBLE, assert_same, extras, logits, request, to_device

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEVERAL = {"neutral": Unmapped("neutral"), "floor": Unmapped("floor", -3.0), "forbid": Unmapped("forbid")}


def run(asked: StepRequest, block: int = 128) -> Candidates:
    found = fused_step_triton(to_device(asked, DEVICE), block=block)
    assert found.backend == "triton"
    return to_device(found, torch.device("cpu"))


def check(asked: StepRequest, block: int = 128) -> Candidates:
    found = run(asked, block)
    assert_same(found, asked)
    return found


def kernels(asked: StepRequest) -> list[str]:
    return [launch.kernel.__name__ for launch in plan_fused_step(asked, block=64)[0]]


@pytest.mark.parametrize(
    ("dtype", "vocab", "beam_size", "block", "padding"),
    [
        (torch.float32, 1, 1, 64, None),
        (torch.float16, 7, 5, 64, None),
        (torch.bfloat16, 255, 1, 64, 16),
        (torch.float32, 507, 5, 128, None),
        (torch.float16, 507, 1, 512, 64),  # one split
        (torch.float32, 1031, 2, 64, 128),
        (torch.bfloat16, 1031, 2, 128, None),
    ],
)
def test_agrees_with_the_reference_on_odd_shapes(dtype, vocab, beam_size, block, padding):
    rows = beam_size * (2 if beam_size < 5 else 1)
    sources = [logits(rows, vocab, seed=seed, dtype=dtype, padding=padding) for seed in (1, 2)]
    asked = request(*sources, beam_size=beam_size, end_id=vocab - 1 if vocab > 1 else -1)
    assert kernels(asked) == ["fuse_logits", "row_select", "merge_rows"]
    check(asked, block)


def test_padding_is_loaded_but_never_counted():
    padded = logits(2, 507, seed=1, padding=64)
    assert load_limit(padded) == 512
    assert load_limit(padded.clone()) == 507  # row stride 507
    assert load_limit(torch.zeros(512 + 507).as_strided((2, 507), (512, 1))) == 507  # memory ends at the vocabulary
    assert torch.isnan(padded.as_strided((2, 512), (512, 1))[:, 507:]).all()
    narrow = torch.full((2, 999), float("nan"))
    narrow[:, 3:510] = logits(2, 507, seed=2)
    check(request(padded, narrow[:, 3:510]), 64)


def test_ties_go_to_the_lowest_row_and_token():
    rows, vocab = 4, 507
    acoustic, language = ((logits(rows, vocab, seed=seed) / 8).round() / 2 for seed in (3, 4))
    acoustic[1], language[1] = acoustic[0], language[0]
    asked = request(acoustic, language, weights=[1.0, 0.5], totals=torch.zeros(rows), top_k=16, end_id=200)
    found = check(asked, 64)
    fused = acoustic.double().log_softmax(1) + 0.5 * language.double().log_softmax(1)
    order = fused.float().reshape(2, -1).sort(dim=1, descending=True, stable=True).indices[:, :16]
    assert torch.equal(found.token_ids, order % vocab)
    assert len(set(found.totals[0].tolist())) < 8  # there were ties to break


def test_signed_zeros_tie():
    acoustic = torch.tensor([[-0.0, 0.0, -0.0, 0.0]])
    found = run(request(acoustic, beam_size=1, top_k=4, end_id=-1), 64)
    assert found.token_ids.tolist() == [[0, 1, 2, 3]]


def test_rows_that_cannot_continue_yield_nothing():
    acoustic, language = (logits(10, 255, seed=seed) for seed in (5, 6))
    acoustic[0, 17] = float("nan")
    acoustic[2, 18] = float("inf")
    language[4] = float("nan")
    acoustic[6] = IMPOSSIBLE
    language[7] = IMPOSSIBLE
    acoustic[8:] = IMPOSSIBLE
    totals = -torch.arange(10.0)
    totals[5] = IMPOSSIBLE
    totals[1] = float("nan")
    found = check(request(acoustic, language, totals=totals))
    assert found.flags.nonzero().flatten().tolist() == [0, 1, 2, 4]
    assert (found.token_ids[[0, 3, 4]] == -1).all()


def test_impossible_tokens_stay_impossible_under_negative_weights():
    acoustic, language, internal = (logits(2, 255, seed=seed) for seed in (7, 8, 9))
    language[:, :128] = IMPOSSIBLE
    internal[:, 64:192] = IMPOSSIBLE
    found = check(request(acoustic, language, internal, weights=[1.0, 0.4, -0.3], top_k=8))
    assert (found.token_ids >= 192).all()


def test_fewer_possible_tokens_than_asked_for():
    acoustic = torch.full((2, 70), IMPOSSIBLE)
    acoustic[0, [3, 69]] = torch.tensor([1.0, 2.0])
    acoustic[1, 40] = 0.5
    found = check(request(acoustic, top_k=16), 64)
    assert (found.token_ids[0] >= 0).sum() == 3
    check(request(logits(2, 3, seed=1), top_k=16), 64)  # more asked for than beam_size * vocab


@pytest.mark.parametrize("other", ["random", "nan", "impossible"])
def test_a_weight_of_zero_is_no_source_at_all(other):
    acoustic, language = logits(4, 255, seed=1), logits(4, 200, seed=2)
    if other != "random":
        language.fill_(float("nan") if other == "nan" else IMPOSSIBLE)
    fused = check(request(acoustic, language, weights=[1.0, 0.0]))
    alone = run(request(acoustic))
    assert torch.equal(fused.totals, alone.totals)
    assert torch.equal(fused.token_ids, alone.token_ids)
    assert not fused.flags.any()
    factored = run(request(acoustic, language, weights=[1.0, 0.0], normalize="end_factored"))
    assert torch.equal(factored.token_ids, alone.token_ids)
    torch.testing.assert_close(factored.totals, alone.totals, rtol=0, atol=2e-6)


@pytest.mark.parametrize("policy", SEVERAL)
@pytest.mark.parametrize("normalize", ["none", "end_factored", "local"])
def test_a_shorter_source_keeps_to_one_pass(policy, normalize):
    """The production case in small: the end token is the last that both know, special tokens follow."""
    acoustic, language = logits(4, 300, seed=1), logits(4, 201, seed=2)
    acoustic[:, 230:] += 6.0
    language[3, :] = IMPOSSIBLE
    asked = request(acoustic, language, unmapped=(SEVERAL[policy],) * 2, end_id=200, normalize=normalize, top_k=8)
    assert kernels(asked) == ["fuse_logits", "row_select", "merge_rows"]
    found = check(asked, 64)
    assert (found.token_ids[0] > 200).any() == (policy != "forbid")


def test_sources_that_share_a_vocabulary_keep_to_one_pass():
    acoustic, language, internal, long = (logits(2, size, seed=size) for size in (300, 201, 201, 500))
    asked = request(acoustic, language, internal, long, weights=[1.0, 0.4, -0.2, 0.1], end_id=100)
    assert kernels(asked) == ["fuse_logits", "row_select", "merge_rows"]
    check(asked, 64)


@pytest.mark.parametrize("policy", SEVERAL)
def test_maps_and_different_vocabularies_take_two_passes(policy):
    acoustic, language, internal = logits(2, 255, seed=1), logits(2, 180, seed=2), logits(2, 100, seed=3)
    mapping = (torch.arange(255, dtype=torch.int32) * 7) % 180
    mapping[::5] = -1
    unmapped = (SEVERAL["neutral"], SEVERAL[policy], SEVERAL["neutral"])
    asked = request(acoustic, language, internal, maps=(None, mapping, None), unmapped=unmapped, end_id=64)
    assert kernels(asked) == ["source_statistics", "fuse_increments", "row_select", "merge_rows"]
    check(asked)
    check(dataclasses.replace(asked, maps=(None,) * 3))


def test_temperatures():
    asked = request(logits(2, 255, seed=1), logits(2, 255, seed=2), temperatures=(0.7, 1.9))
    check(asked)
    check(dataclasses.replace(asked, combine="mixture"))


@pytest.mark.parametrize("normalize", ["none", "local", "end_factored"])
@pytest.mark.parametrize("combine", ["log_linear", "mixture"])
def test_every_option_at_once(combine, normalize):
    rows, vocab, end_id = 4, 507, 350
    sources = logits(rows, vocab, seed=1, padding=64), logits(rows, 400, seed=2, dtype=torch.float16)
    weights = [0.8, 0.2] if combine == "mixture" else [1.0, 0.3]
    options = {"combine": combine, "normalize": normalize, **extras(rows, vocab, end_id)}
    found = check(request(*sources, weights=weights, end_id=end_id, top_k=8, **options))
    assert (found.totals > IMPOSSIBLE).all()


@pytest.mark.parametrize("option", ["token_bias", "allowed", "bonus", "length_bonus"])
def test_each_option_alone(option):
    given = extras(2, 255, 254)[option]
    asked = request(logits(2, 255, seed=1), logits(2, 255, seed=2), **{option: given})
    assert ("mark_bonus" in kernels(asked)) == (option == "bonus")
    check(asked)


def test_many_bonuses_in_one_row_are_all_considered():
    tokens = torch.randperm(500, generator=torch.Generator().manual_seed(1))[:200].int()
    values = (tokens % 7 == 0).float() * 3.0 + 25.0
    bonus = SparseBonus(torch.tensor([0, 0, 200], dtype=torch.int32), tokens, values)
    found = check(request(logits(2, 507, seed=1), bonus=bonus, top_k=8), 64)
    assert set(found.token_ids.flatten().tolist()) <= set(tokens.tolist())


def test_forbidding_everything_leaves_nothing():
    found = check(request(logits(2, 70, seed=1), allowed=torch.zeros((2, 3), dtype=torch.int32), normalize="local"), 64)
    assert (found.totals == IMPOSSIBLE).all()
    assert not found.flags.any()


def test_the_worked_example_of_the_article_and_its_flip():
    """METHODS 1.2: melanoma, diploma, aroma; LM weight 0.2, and the weight 0.8 / 4.7 at which the winner changes."""
    rest = [math.log(1.0 - sum(math.exp(part) for part in parts)) for parts in ((-1.8, -1.0, -3.5), (-0.3, -5.0, -3.8))]
    acoustic = torch.tensor([[-1.8, -1.0, -3.5, rest[0]]])
    language = torch.tensor([[-0.3, -5.0, -3.8, rest[1]]])
    allowed = torch.tensor([[0b0111]], dtype=torch.int32)
    plain = {"beam_size": 1, "totals": torch.zeros(1), "end_id": -1, "allowed": allowed}
    found = check(request(acoustic, language, weights=[1.0, 0.2], **plain), 64)
    assert found.token_ids.tolist() == [[0, 1, 2, -1]]
    torch.testing.assert_close(found.totals[0, :3], torch.tensor([-1.86, -2.0, -4.26]), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.parts[0, 0], torch.tensor([-1.8, -0.3]), rtol=0, atol=1e-5)
    for weight, winner in ((0.1701, 1), (0.1703, 0)):
        assert run(request(acoustic, language, weights=[1.0, weight], **plain), 64).token_ids[0, 0] == winner


def test_the_end_token_keeps_its_acoustic_score_when_factored():
    """METHODS 1.5: LM weight 0.5, acoustic (.55, .25, end .20), LM over words (.1, .9)."""
    acoustic = torch.tensor([[0.55, 0.25, 0.20]]).log()
    language = torch.tensor([[0.1, 0.9, 0.0]]).log()
    plain = {"beam_size": 1, "weights": [1.0, 0.5], "totals": torch.zeros(1), "end_id": 2, "top_k": 3}
    found = check(request(acoustic, language, normalize="end_factored", **plain), 64)
    assert found.token_ids.tolist() == [[1, 0, 2]]
    torch.testing.assert_close(found.totals[0], torch.tensor([-0.7732, -1.0833, -1.6094]), rtol=0, atol=1e-4)
    assert found.totals.exp().sum().item() == pytest.approx(1.0, abs=1e-6)
    naive = check(request(acoustic, language[:, :2], unmapped=(Unmapped("floor"),) * 2, **plain), 64)
    assert naive.token_ids.tolist() == [[1, 2, 0]]
    torch.testing.assert_close(naive.totals[0], torch.tensor([-1.4390, -1.6094, -1.7491]), rtol=0, atol=1e-4)


def test_an_end_token_that_takes_all_mass_leaves_finite_words():
    acoustic, language = logits(2, 255, seed=1), logits(2, 255, seed=2)
    acoustic[:, 254] = 200.0
    check(request(acoustic, language, normalize="end_factored"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_budget_against_float64(dtype):
    """At most twice the error of torch in float32 (on the same logits), row by row, plus 1e-5."""
    sources = [logits(4, 507, seed=seed, dtype=dtype) * 4 for seed in (1, 2)]
    asked = request(*sources, beam_size=1, top_k=16)
    found, exact = run(asked), fused_step_reference(asked)
    single = [source.float().log_softmax(1) for source in sources]
    single_totals = asked.totals[:, None] + (single[0] + torch.tensor(0.3) * single[1])
    double = [source.double().log_softmax(1) for source in sources]
    double_totals = asked.totals.double()[:, None] + (double[0] + asked.weights[:, 1:].double() * double[1])
    at = exact.token_ids
    error = (found.totals.sort(dim=1, descending=True).values - double_totals.gather(1, at)).abs().amax(dim=1)
    torch_error = (single_totals.gather(1, at) - double_totals.gather(1, at)).abs().amax(dim=1)
    assert (error <= 2 * torch_error + 1e-5).all()


def test_rows_more_than_two_to_the_31_elements_apart():
    """Address arithmetic only: most of this memory is never touched."""
    stride, vocab = 2**31 + 16, 70
    far = torch.empty(stride + 128, dtype=torch.float16).as_strided((2, vocab), (stride, 1))
    far.copy_(logits(2, vocab, seed=1, dtype=torch.float16))
    check(request(logits(2, vocab, seed=2), far), 64)


def test_the_same_inputs_give_the_same_bits_and_blocks_do_not_change_the_order():
    sources = [logits(2, 507, seed=seed, dtype=torch.float16) for seed in (1, 2)]
    asked = request(*sources, top_k=16)
    first, second, other = run(asked, 64), run(asked, 64), run(asked, 256)
    for name in ("totals", "parent_rows", "token_ids", "parts"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert torch.equal(first.token_ids, other.token_ids)


def test_four_sources_of_mixed_types_and_more_are_refused():
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.float32]
    sources = [logits(2, 120 + 60 * seed, seed=seed, dtype=kind) for seed, kind in enumerate(kinds)]
    check(request(sources[1], sources[0], *sources[2:], unmapped=(SEVERAL["forbid"],) * 4))
    with pytest.raises(InvalidArgumentError, match="at most 4 sources"):
        plan_fused_step(request(*[sources[0]] * 5))


def test_what_the_backend_cannot_do_is_refused():
    acoustic = logits(2, 507, seed=1)
    with pytest.raises(InvalidArgumentError, match="takes no map"):
        plan_fused_step(request(acoustic, maps=(torch.zeros(507, dtype=torch.int32),)))
    with pytest.raises(InvalidArgumentError, match="at most 64 candidates"):
        plan_fused_step(request(acoustic, top_k=65))


@pytest.mark.parametrize(
    ("vocab", "block", "temperature"), [(1, 64, 1.0), (7, 64, 1.0), (507, 128, 1.0), (507, 64, 1.7)]
)
def test_row_statistics(vocab, block, temperature):
    source = logits(7, vocab, seed=1, padding=64)
    source[0] = IMPOSSIBLE
    source[1, vocab // 2] = float("nan")
    source[2, vocab // 3] = float("inf")
    source[3, : vocab // 2 + 1] = IMPOSSIBLE
    source[4] = 2.5  # every token ties
    source[5, -1] = source[5].max()  # a tie at the top, far apart
    found = row_statistics_triton(to_device(source, DEVICE), temperature, block=block)
    expected = row_statistics_reference(source, temperature)
    for name in ("log_sum_exp", "entropy", "max_log_prob", "margin"):
        ours, exact = getattr(found, name).cpu(), getattr(expected, name)
        torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-5, equal_nan=True)


@pytest.mark.slow
def test_the_full_vocabulary_of_whisper_and_gpt2():
    sources = logits(5, 51866, seed=1, padding=128), logits(5, 50257, seed=2, padding=128)
    check(request(*sources, beam_size=5, top_k=10, end_id=50256, normalize="end_factored"), 4096)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 5), (8, 5), (64, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "end_factored", "local", "mixture", "mapped", "extras", "unpadded"])
def test_full_size_on_the_gpu(shape, dtype, kind):
    utterances, beam_size = shape
    rows, vocab = utterances * beam_size, 51866
    padding = None if kind == "unpadded" else 128
    sources = [logits(rows, size, seed=size, dtype=dtype, padding=padding) for size in (vocab, 50257)]
    options = {}
    if kind in ("end_factored", "local"):
        options["normalize"] = kind
    if kind == "mixture":
        options |= {"combine": "mixture", "weights": [0.8, 0.2]}
    if kind == "mapped":
        options["maps"] = (None, torch.where(torch.arange(vocab) % 9 == 0, -1, torch.arange(vocab) % 50257).int())
    if kind == "extras":
        options |= extras(rows, vocab, 50256)
    asked = request(*sources, beam_size=beam_size, top_k=2 * beam_size, end_id=50256, **options)
    asked = to_device(asked, DEVICE)
    assert_same(fused_step_triton(asked), asked, same_order=False)


@pytest.mark.gpu
def test_a_captured_step_replays_to_the_same_bits():
    sources = [logits(40, size, seed=size, padding=128) for size in (51866, 50257)]
    asked = to_device(request(*sources, beam_size=5, top_k=10, end_id=50256, normalize="end_factored"), DEVICE)
    eager = fused_step_triton(asked)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fused_step_triton(asked)
    asked.sources[0].mul_(0.5)
    graph.replay()
    changed = fused_step_triton(asked)
    asked.sources[0].mul_(2.0)
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(changed.totals, eager.totals)
    for name in ("totals", "parent_rows", "token_ids", "parts", "flags"):
        assert torch.equal(getattr(captured, name), getattr(eager, name))
