"""Models made ready: int8 products against the same in float64, float32 logits, and whole decodes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shallowfusion.decoder import FusionDecoder
from shallowfusion.demo.shipped import HERE, lm_weights, model_directory, read_manifest
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.scorers.loading import choose_dtype, load_causal_lm
from shallowfusion.scorers.preparation import Float32Head, Int8Linear, check_int8, prepare

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


def test_float32_changes_nothing() -> None:
    layer = nn.Linear(4, 4)
    prepare_target = nn.Sequential(layer)
    prepare_target.get_output_embeddings = lambda: layer  # type: ignore[assignment]
    prepare(prepare_target, torch.float32)
    assert prepare_target[0] is layer


def test_int8_is_refused_where_it_cannot_run() -> None:
    assert choose_dtype("int8", CPU) == torch.int8
    with pytest.raises(InvalidArgumentError, match="is for the CPU, got device cuda"):
        check_int8(torch.device("cuda"))
    with pytest.raises(InvalidArgumentError, match="dtype must be"):
        choose_dtype("int4", CPU)
