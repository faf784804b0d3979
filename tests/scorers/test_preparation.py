"""Models made ready: int8 products against the same in float64, float32 logits, and whole decodes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation

from shallowfusion.decoder import FusionDecoder
from shallowfusion.demo.shipped import HERE, lm_weights, model_directory, read_manifest
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.scorers import preparation
from shallowfusion.scorers.attention import ATTENTION
from shallowfusion.scorers.loading import choose_dtype, load_causal_lm, load_whisper
from shallowfusion.scorers.preparation import Float32Head, Int8Linear, PackedLinear, check_int8
from shallowfusion.scorers.row_rounding import has_int8_rows
from shallowfusion.scorers.tile_products import has_tile_rows
from shallowfusion.scorers.weight_memory import WeightMemory

CPU = torch.device("cpu")


def rounded(matrix: Tensor) -> Tensor:
    """Each row as multiples of a 127th of its largest magnitude, float64."""
    scales = (matrix.float().abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-30)
    return (matrix.float() / scales).round().double() * scales.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 3, 5), (7, 64, 33), (40, 96, 200), (20, 64, 64)])
def test_an_int8_layer_is_the_product_of_rounded_rows(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
    given = (torch.randn(rows, inputs) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
    found = Int8Linear(weight, bias, torch.float32)(given).double()
    wanted = rounded(given) @ rounded(weight).T + bias.double()
    spread = rounded(given).norm(dim=1, keepdim=True) * rounded(weight).norm(dim=1)
    assert ((found - wanted).abs() <= 1e-5 * (spread + 1)).all()
    exact = given.double() @ weight.double().T
    assert (found - bias.double() - exact).norm() < 0.03 * exact.norm()


def test_few_rows_and_many_give_the_same() -> None:
    torch.manual_seed(0)
    layer = Int8Linear(torch.randn(70, 64), torch.randn(70))
    given = torch.randn(60, 64)
    many = layer(given)
    for few in (1, 5, 24):
        torch.testing.assert_close(layer(given[:few]), many[:few], atol=1e-6, rtol=1e-6)
    only_many = Int8Linear(torch.randn(70, 64), None, few_rows=False)
    assert only_many(given[:2]).shape == (2, 70)


def test_a_transposed_weight_is_taken_for_what_it_is() -> None:
    torch.manual_seed(0)
    weight, given = torch.randn(48, 64), torch.randn(5, 48)
    found = Int8Linear(weight.t(), None)(given)
    torch.testing.assert_close(found, Int8Linear(weight.t().contiguous(), None)(given))
    torch.testing.assert_close(found, given @ weight, atol=0.6, rtol=0.05)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    layer = Int8Linear(torch.randn(33, 64), None)
    rows = torch.randn(9, 64)
    rows[3] *= 1000.0
    together = layer(rows)
    for i in range(9):
        assert torch.equal(layer(rows[i : i + 1])[0], together[i])
    assert torch.equal(layer(rows.view(3, 3, 64)), together.view(3, 3, 33))


def test_rows_and_outputs_of_zeros_stay_zero() -> None:
    weight = torch.randn(4, 8)
    weight[2] = 0.0
    found = Int8Linear(weight, torch.tensor([0.0, 1.0, 2.0, 3.0]))(torch.stack([torch.zeros(8), torch.ones(8)]))
    assert found[0].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert found[1, 2] == 2.0


def test_not_a_number_stays_in_its_row() -> None:
    layer = Int8Linear(torch.randn(5, 8), None)
    rows = torch.randn(3, 8)
    rows[1, 4] = float("nan")
    found = layer(rows)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_float32_logits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, hidden = torch.randn(50, 16).to(dtype), torch.randn(2, 3, 16).to(dtype)
    logits = Float32Head(weight)(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), hidden.double() @ weight.double().T, atol=1e-4, rtol=1e-5)
    loaded = load_causal_lm(str(model_directory("lm_medical")), CPU, dtype)
    assert loaded.head(torch.zeros(1, loaded.model.config.n_embd, dtype=dtype)).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [128, 1003])
def test_half_precision_heads_on_a_gpu(dtype: torch.dtype, vocab_size: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(vocab_size, 64, device="cuda").to(dtype)
    hidden = torch.randn(5, 64, device="cuda").to(dtype)
    logits = Float32Head(weight)(hidden)
    assert logits.shape == (5, vocab_size)
    assert logits.dtype == torch.float32
    assert logits.stride(0) % 64 == 0
    torch.testing.assert_close(logits.double(), hidden.double() @ weight.double().T, atol=1e-3, rtol=1e-4)


def test_a_decoder_of_int8_weights_hears_what_the_float32_one_hears() -> None:
    directory, lm = model_directory("asr"), model_directory("lm_medical")
    clips = read_manifest(HERE / "clips")[:6]
    plain, rounded_ = (FusionDecoder.from_pretrained(directory, lm, "cpu", dtype) for dtype in ("float32", "int8"))
    weight = lm_weights()["medical"]["lm_weight"]
    texts = [
        [result.text for result in decoder.transcribe([clip.path for clip in clips], lm_weight=weight)]
        for decoder in (plain, rounded_)
    ]
    same = sum(a == b for a, b in zip(*texts, strict=True))
    assert same >= 4, texts
    assert plain.fingerprints == rounded_.fingerprints
    layers = [type(layer) for layer in rounded_.acoustic.scorer.model.modules()]
    assert Int8Linear in layers
    assert nn.Linear not in layers


FORMS = [False, pytest.param(True, marks=pytest.mark.skipif(not has_tile_rows(), reason="needs AMX"))]


@pytest.mark.parametrize("tiles", FORMS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 5, 40])
def test_a_packed_layer_is_the_same_product(rows: int, with_bias: bool, tiles: bool) -> None:
    torch.manual_seed(rows)
    layer = nn.Linear(48, 33, bias=with_bias)
    given = torch.randn(2, rows, 48)
    packed = PackedLinear(layer.weight, layer.bias, tiles)
    torch.testing.assert_close(packed(given), layer(given).detach(), atol=1e-5, rtol=1e-5)
    transposed = torch.randn(48, 33)
    found = PackedLinear(transposed.t(), None, tiles)(given)
    torch.testing.assert_close(found, given @ transposed, atol=1e-5, rtol=1e-5)
    assert packed.num_bytes == 4 * 48 * 33


@pytest.mark.skipif(not has_tile_rows() or not has_int8_rows(64), reason="needs AMX")
def test_a_pickled_layer_takes_its_own_weights_along() -> None:
    torch.manual_seed(0)
    memory = WeightMemory()
    for layer in (
        PackedLinear(torch.randn(64, 64), None, memory=memory),
        Int8Linear(torch.randn(64, 64), None, memory=memory),
    ):
        pickled = pickle.dumps(layer)
        assert len(pickled) < 40_000
        given = torch.randn(3, 64)
        assert torch.equal(pickle.loads(pickled)(given), layer(given))
        assert torch.equal(copy.deepcopy(layer)(given), layer(given))


@pytest.mark.parametrize("tiles", FORMS)
def test_gradients_go_through_a_packed_layer_to_its_inputs(tiles: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 8)
    given = torch.randn(3, 16, requires_grad=True)
    (wanted,) = torch.autograd.grad(layer(given).square().sum(), given)
    (found,) = torch.autograd.grad(PackedLinear(layer.weight, layer.bias, tiles)(given).square().sum(), given)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("tiles", FORMS)
def test_float32_models_are_packed(tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "has_tile_rows", lambda: tiles)
    acoustic = load_whisper(str(model_directory("asr")), CPU, torch.float32).scorer.model
    decoder, encoder = acoustic.get_decoder(), acoustic.get_encoder()
    read = PackedLinear if tiles else nn.Linear  # oneDNN's product of many rows is no faster packed
    assert {type(layer) for layer in encoder.modules()} & {PackedLinear, nn.Linear} == {read}
    kinds = {name.split(".")[-1]: type(layer) for name, layer in decoder.layers[0].encoder_attn.named_children()}
    assert kinds == {"k_proj": read, "v_proj": read, "q_proj": PackedLinear, "out_proj": PackedLinear}
    assert isinstance(acoustic.proj_out, PackedLinear)
    assert acoustic.config._attn_implementation == ATTENTION
    lm = load_causal_lm(str(model_directory("lm_medical")), CPU, torch.float32).model
    assert {type(layer) for layer in lm.modules()} & {PackedLinear, nn.Linear, NewGELUActivation} == {PackedLinear}


def test_int8_is_refused_where_it_cannot_run() -> None:
    assert choose_dtype("int8", CPU) == torch.int8
    with pytest.raises(InvalidArgumentError, match="is for the CPU, got device cuda"):
        check_int8(torch.device("cuda"))
    with pytest.raises(InvalidArgumentError, match="dtype must be"):
        choose_dtype("int4", CPU)
