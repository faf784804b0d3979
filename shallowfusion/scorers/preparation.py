"""What is changed in a loaded model so that it runs faster here: int8 products on the CPU, float32 logits.

Only models this library loaded itself are changed; a model handed to a scorer stays as it is.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.scorers.row_rounding import round_rows, scale_rows

__all__ = ["Float32Head", "Int8Linear", "check_int8", "loading_dtype", "prepare", "prepare_encoder"]

_ALIGNMENT = 64  # rows; logits then begin at multiples of 256 bytes


class Int8Linear(nn.Module):
    """A linear layer whose weights are int8, one scale per output, and whose input rows become int8 as they come.

    y[r] = x_scale[r] * w_scale * (int8(x[r] / x_scale[r]) . int8(W / w_scale)) + bias, the product exact in int32. Each
    row has its own scale, so a row's result does not depend on its neighbours in the batch.

    Price: a quarter of float32's bytes per pass; relative error of an output about 1 % (measured on Gaussian numbers).

    Args:
        weight: [outputs, inputs], any float dtype.
        bias: [outputs] or None.
        output_dtype: of the result; None = as the input.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, output_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        weight = weight.detach().float()
        # Plain attributes: Module.to must turn neither the scales nor the packed weights into bfloat16.
        whole, scales = round_rows(weight)  # dense: the packing reads a transposed view as if it were not one
        self._scales = scales[:, 0]
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)
        self._packed = torch.ops.onednn.qlinear_prepack(whole, None)
        self._bias = None if bias is None else bias.detach().float().clone()
        self._output_dtype = output_dtype
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, self.in_features)
        whole, scales = round_rows(rows)
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            whole, 1.0, 0, self._packed, self._scales, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        result = scale_rows(product, scales, self._bias, self._output_dtype or inputs.dtype)
        return result.view(*inputs.shape[:-1], self.out_features)

    @property
    def num_bytes(self) -> int:
        """What a pass reads of it."""
        return self.in_features * self.out_features + self._scales.nbytes

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, int8"


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

    Args:
        dtype: torch.int8: every linear layer becomes an `Int8Linear`, the head with float32 logits, and what stays
            (norms, convolutions, embeddings, keys and values) bfloat16 where the CPU computes with it, else float32.
            Half precision: the head gives float32 logits. float32: nothing.
    """
    head = model.get_output_embeddings()
    if dtype == torch.int8:
        _make_int8(model, head)
        model.to(_activation_dtype())
    elif dtype != torch.float32 and isinstance(head, nn.Linear):
        model.set_output_embeddings(Float32Head(head.weight, head.bias))


def prepare_encoder(model: nn.Module, head: nn.Module | None, probe: Callable[[], object]) -> None:
    """Round every linear layer of a float32 model that is no decoder, in place; the rest stays float32.

    bfloat16, which `prepare` takes for the rest, cost a random wav2vec2 half of its labels, int8 alone 3 of 465.

    Args:
        head: the layer whose results stay float32.
        probe: runs the model once.

    Raises:
        InvalidArgumentError: the model multiplies by a linear layer's weights itself, as WavLM's attention does.
    """
    _make_int8(model, head)
    try:
        probe()
    except AttributeError as error:
        raise InvalidArgumentError(
            f"dtype='int8' replaces linear layers, but {type(model).__name__} reads the weights of one ({error}); "
            "take 'bfloat16' or 'float32'."
        ) from error


def _make_int8(model: nn.Module, head: nn.Module | None) -> None:
    from transformers.pytorch_utils import Conv1D

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                output = torch.float32 if child is head else None
                setattr(module, name, Int8Linear(child.weight, child.bias, output))
            elif isinstance(child, Conv1D):  # GPT-2's linear layer, weights [inputs, outputs]
                setattr(module, name, Int8Linear(child.weight.t(), child.bias))


def _activation_dtype() -> torch.dtype:
    known = cast("dict[str, Any]", torch.cpu.get_capabilities()) if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if known.get("avx512_bf16") or known.get("amx_bf16") else torch.float32
