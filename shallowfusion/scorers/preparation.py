"""What is changed in a loaded model so that it runs faster here: int8 products and our attention on the CPU, float32
logits.

Only models this library loaded itself are changed; a model handed to a scorer stays as it is.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor, nn

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.scorers.attention import set_slot_attention
from shallowfusion.scorers.row_rounding import (
    few_int8_rows,
    has_int8_rows,
    int8_rows,
    packed_int8,
    round_rows,
    scale_rows,
    unpacked_int8,
)
from shallowfusion.scorers.tile_products import has_tile_rows, packed_tiles, tile_rows, unpacked_tiles
from shallowfusion.scorers.weight_memory import WeightMemory

__all__ = [
    "Float32Head", "Int8Linear", "PackedLinear", "check_int8", "loading_dtype", "prepare", "prepare_encoder",
]  # fmt: skip

_ALIGNMENT = 64  # rows; logits then begin at multiples of 256 bytes


class PreparedLinear(nn.Module):
    """What prepared layers share: pickled, a layer takes its own weights along, not the piece of memory they lie in."""

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: own.clone() if isinstance(own, Tensor) and own.untyped_storage().nbytes() > own.nbytes else own
            for name, own in self.__dict__.items()
        }


class Int8Linear(PreparedLinear):
    """A linear layer whose weights are int8, one scale per output, and whose input rows become int8 as they come.

    y[r] = x_scale[r] * w_scale * (int8(x[r] / x_scale[r]) . int8(W / w_scale)) + bias, the product exact in int32. Each
    row has its own scale, so a row's result does not depend on its neighbours in the batch.

    Price: a quarter of float32's bytes per pass; relative error of an output about 1 % (measured on Gaussian numbers).
    Rows are multiplied in C++ where the CPU has the instructions: any number where it has matrix units, few where it
    has vector units; others by oneDNN, for which a layer that meets both keeps its weights in both forms. The result
    does not depend on which.

    Args:
        weight: [outputs, inputs], any float dtype.
        bias: [outputs] or None.
        output_dtype: of the result; None = as the input.
        few_rows: whether passes of few rows are to be expected.
        memory: for the weights; None = memory of their own.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        output_dtype: torch.dtype | None = None,
        few_rows: bool = True,
        memory: WeightMemory | None = None,
    ) -> None:
        super().__init__()
        weight = weight.detach().float()
        # Plain attributes: Module.to must turn neither the scales nor the packed weights into bfloat16.
        whole, scales = round_rows(weight)  # dense: the packing reads a transposed view as if it were not one
        self._scales = scales[:, 0]
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)
        self._rows = packed_int8(whole, memory) if few_rows and has_int8_rows(weight.shape[1]) else None
        self._packed: Tensor | None = None if self._rows is not None else torch.ops.onednn.qlinear_prepack(whole, None)
        self._bias = None if bias is None else bias.detach().float().clone()
        self._few = few_int8_rows(weight.shape[1])
        self._output_dtype = output_dtype
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, self.in_features)
        dtype = self._output_dtype or inputs.dtype
        if self._rows is not None and len(rows) <= self._few:
            result = int8_rows(rows, self._rows, self._scales, self._bias, dtype)
        else:
            if self._packed is None:
                assert self._rows is not None
                whole = unpacked_int8(self._rows, self.out_features, self.in_features)
                self._packed = torch.ops.onednn.qlinear_prepack(whole, None)
            whole, scales = round_rows(rows)
            product: Tensor = torch.ops.onednn.qlinear_pointwise(
                whole, 1.0, 0, self._packed, self._scales, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
            )
            result = scale_rows(product, scales, self._bias, dtype)
        return result.view(*inputs.shape[:-1], self.out_features)

    @property
    def num_bytes(self) -> int:
        """What a pass reads of it."""
        return self.in_features * self.out_features + self._scales.nbytes

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, int8"


class PackedLinear(PreparedLinear):
    """A float32 linear layer whose weights lie in memory as a product reads them: `tile_rows`', or oneDNN's.

    Gradients reach its inputs, by weights that are unpacked for it; its own weights have none.

    Price: the same bytes. Tiles: read at memory's speed up to 10 rows, 1.4 to 1.7 times as fast as oneDNN's for 40; a
    row's result does not depend on its neighbours. oneDNN's: 1.2 to 2.5 times as fast as torch's own product for 5 to
    40 rows, 10 to 20 % slower for one (docs/speed.md).

    Args:
        weight: float32 [outputs, inputs], on the CPU.
        bias: [outputs] or None.
        tiles: whether matrix units multiply; None = where there are any.
        memory: for the weights in tiles; None = memory of their own.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, tiles: bool | None = None, memory: WeightMemory | None = None
    ) -> None:
        super().__init__()
        weight = weight.detach().contiguous()
        self._has_tiles = has_tile_rows() if tiles is None else tiles
        self._packed = (
            packed_tiles(weight, memory) if self._has_tiles else torch.ops.mkldnn._reorder_linear_weight(weight, None)
        )
        self._bias = None if bias is None else bias.detach().clone()
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]

    def forward(self, inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled() and inputs.requires_grad:
            return nn.functional.linear(inputs, self._unpacked(), self._bias)
        if self._has_tiles:
            rows = tile_rows(inputs.reshape(-1, self.in_features), self._packed, self.out_features, self._bias)
            return rows.view(*inputs.shape[:-1], self.out_features)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self._bias, "none", [], "")
        return result

    def _unpacked(self) -> Tensor:
        if self._has_tiles:
            return unpacked_tiles(self._packed, self.out_features, self.in_features)
        return self._packed.to_dense()

    @property
    def num_bytes(self) -> int:
        """What a pass reads of it."""
        return 4 * self.in_features * self.out_features

    def extra_repr(self) -> str:
        kind = "in tiles" if self._has_tiles else "packed"
        return f"in_features={self.in_features}, out_features={self.out_features}, {kind}"


class Float32Head(nn.Module):
    """The output layer of a half-precision model with float32 logits: rounded ones tie (KERNELS 0.7).

    On CUDA the product itself writes float32, and rows of logits begin at aligned addresses; on the CPU, where no
    such product exists, the layer keeps a float32 copy of its weights.

    Args:
        weight: [vocab, size].
        bias: [vocab] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.vocab_size = len(weight)
        weight = weight.detach()
        if weight.is_cuda:
            missing = -len(weight) % _ALIGNMENT
            self._weight = nn.functional.pad(weight, (0, 0, 0, missing)) if missing else weight
        else:
            self._weight = weight.float()
        self._bias = None if bias is None else bias.detach().float()

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        if self._weight.is_cuda:
            logits = torch.mm(rows, self._weight.t(), out_dtype=torch.float32)[:, : self.vocab_size]
        else:
            logits = rows.float() @ self._weight.t()
        if self._bias is not None:
            logits = logits + self._bias
        return logits.view(*hidden.shape[:-1], self.vocab_size) if hidden.dim() > 2 else logits


def check_int8(device: torch.device) -> None:
    """Refuse int8 weights where there is no product for them.

    Raises:
        InvalidArgumentError: not on a CPU, or on one without the instructions.
    """
    if device.type != "cpu":
        raise InvalidArgumentError(
            f"dtype='int8' is for the CPU, got device {device}; take 'float16' or 'bfloat16' there."
        )
    if platform.machine().lower() not in ("x86_64", "amd64") or not hasattr(torch.ops.onednn, "qlinear_prepack"):
        raise InvalidArgumentError(
            f"dtype='int8' needs an x86-64 CPU and a torch with oneDNN, got {platform.machine()}; take 'float32'."
        )


def loading_dtype(dtype: torch.dtype) -> torch.dtype:
    """As what weights are read from their files: int8 ones are rounded from float32."""
    return torch.float32 if dtype == torch.int8 else dtype


def prepare(model: Any, dtype: torch.dtype) -> None:
    """Change a transformers model, already on its device, in place.

    On the CPU a model attends through this package (`set_slot_attention`), so that its passes have no dead rows and
    frames are attended to in C++; and GPT-2's activation is one operation.

    Args:
        dtype: torch.int8: every linear layer becomes an `Int8Linear`, the head with float32 logits, and what stays
            (norms, convolutions, embeddings, keys and values) bfloat16 where the CPU computes with it, else float32.
            Half precision: the head gives float32 logits. float32 on the CPU: linear layers become `PackedLinear`;
            where only oneDNN is there for it, not those that read whole recordings.
    """
    head = model.get_output_embeddings()
    is_cpu, memory = model.device.type == "cpu", WeightMemory()
    if is_cpu:
        _simplify(model)
        set_slot_attention(model)
    if dtype == torch.int8:
        read = _of_recordings(model)
        _replace_products(
            model,
            lambda weight, bias, layer: Int8Linear(
                weight, bias, torch.float32 if layer is head else None, layer not in read, memory
            ),
        )
        model.to(_activation_dtype())
    elif dtype != torch.float32:
        if isinstance(head, nn.Linear):
            model.set_output_embeddings(Float32Head(head.weight, head.bias))
    elif is_cpu and (has_tile_rows() or hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        kept = set() if has_tile_rows() else _of_recordings(model)
        _replace_products(model, lambda weight, bias, layer: PackedLinear(weight, bias, memory=memory), kept)


def prepare_encoder(model: nn.Module, head: nn.Module | None, probe: Callable[[], object]) -> None:
    """Round every linear layer of a float32 model that is no decoder, in place; the rest stays float32.

    Not bfloat16 as in `prepare`: random models of the group-norm form lost half of their labels by it (docs/ctc.md).

    Args:
        head: the layer whose results stay float32.
        probe: runs the model once.

    Raises:
        InvalidArgumentError: the model multiplies by a linear layer's weights itself, as WavLM's attention does.
    """
    _replace_products(
        model,
        lambda weight, bias, layer: Int8Linear(weight, bias, torch.float32 if layer is head else None, few_rows=False),
    )
    try:
        probe()
    except AttributeError as error:
        raise InvalidArgumentError(
            f"dtype='int8' replaces linear layers, but {type(model).__name__} reads the weights of one ({error}); "
            "take 'bfloat16' or 'float32'."
        ) from error


def _simplify(model: nn.Module) -> None:
    from transformers.activations import NewGELUActivation

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def _replace_products(
    model: nn.Module,
    made: Callable[[Tensor, Tensor | None, nn.Module], nn.Module],
    kept: Collection[nn.Module] = (),
) -> None:
    """Put `made(weight [outputs, inputs], bias, layer)` in the place of each linear layer that is not kept."""
    from transformers.pytorch_utils import Conv1D

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child in kept:
                continue
            if isinstance(child, nn.Linear):
                setattr(module, name, made(child.weight, child.bias, child))
            elif isinstance(child, Conv1D):  # GPT-2's linear layer, weights [inputs, outputs]
                setattr(module, name, made(child.weight.t(), child.bias, child))


def _of_recordings(model: Any) -> set[nn.Module]:
    """Layers of an encoder, and those that make keys and values of its output: for many rows torch is as fast."""
    if not model.config.is_encoder_decoder:
        return set()
    crossing = [layer.encoder_attn for layer in model.get_decoder().layers]
    return {*model.get_encoder().modules(), *(own for at in crossing for own in (at.k_proj, at.v_proj))}


def _activation_dtype() -> torch.dtype:
    known = cast("dict[str, Any]", torch.cpu.get_capabilities()) if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if known.get("avx512_bf16") or known.get("amx_bf16") else torch.float32
