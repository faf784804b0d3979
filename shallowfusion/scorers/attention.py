"""Attention for beams: checks a call once and hands it to the backend that fits its tensors; transformers calls it.

A pass has one batch row per utterance and its hypotheses as queries, or all hypotheses of all utterances as queries of
one batch row (`PackedRows`). Over slots, each query sees its own history, as bits of a slot table say; over frames, all
queries of an utterance see the same, which is read once for all of them.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from shallowfusion.config import require
from shallowfusion.scorers.frame_attention import frame_attention_native, is_native
from shallowfusion.scorers.packed_rows import PackedRows
from shallowfusion.scorers.slot_tables import HEADER, WORD

__all__ = ["ATTENTION", "frame_attention", "set_slot_attention", "slot_attention", "table_backend", "write_slots"]

logger = logging.getLogger(__name__)

Backend = Literal["auto", "reference", "sdpa", "triton"]
FrameBackend = Literal["auto", "reference", "sdpa", "triton", "native"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "sdpa", "triton")
ATTENTION = "shallowfusion"  # as transformers knows it; with _triton, _sdpa or _reference behind it that backend always
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_QUERIES = 64  # beyond, a pass over frames is bound by arithmetic, and plain attention is as good
MOST_NATIVE_ROWS = 12  # the same on the CPU, rows of one key head (mean); measured, docs/speed.md


def slot_attention(
    query: Tensor, keys: Tensor, values: Tensor, table: Tensor, scale: float, *, backend: Backend = "auto"
) -> Tensor:
    """softmax(scale * query . key) over the entries of its table that each query sees, times their values.

    A query that sees nothing gives zeros. Slots that nobody sees are not read as numbers.

    Price: the live keys and values of each utterance once per key head and 32 queries (Triton); a gathered copy of them
    and a boolean mask (sdpa).

    Args:
        query: [utterances, queries, heads, dim], float32 | float16 | bfloat16.
        keys, values: [places, slots, key_heads, dim], any strides; query heads are grouped by neighbours.
        table: int32 [utterances, 2 + ceil(queries / 32), width], see `slot_table`.
        backend: "auto" takes Triton for CUDA tensors whose heads it can hold, else sdpa.

    Returns:
        [utterances, queries, heads, dim] in the dtype of the queries.

    Raises:
        InvalidArgumentError: a shape or dtype outside this contract, or heads that the Triton backend cannot hold.
    """
    _check("slot_attention", query, keys, values, backend)
    words = -(-query.shape[1] // WORD)
    fits = table.dim() == 3 and table.shape[:2] == (query.shape[0], HEADER + words) and table.stride(2) == 1
    require(
        fits and table.dtype == torch.int32 and table.stride(1) == table.shape[2],
        f"table must be contiguous int32 [{query.shape[0]}, {HEADER + words}, width], "
        f"got {table.dtype} {list(table.shape)}; make it with slot_table.",
    )
    chosen = _choose(backend, query, keys)
    if chosen == "triton":
        from shallowfusion.kernels.beam_attention import slot_attention_triton

        found: Tensor = slot_attention_triton(_rows(query), _rows(keys), _rows(values), table, scale)
        return found
    if chosen == "reference":
        from shallowfusion.kernels.beam_attention_reference import slot_attention_reference

        exact: Tensor = slot_attention_reference(query, keys, values, table, scale)
        return exact
    return _slots_sdpa(query, keys, values, table, scale)


def frame_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor | None,
    scale: float,
    *,
    backend: FrameBackend = "auto",
    rows: PackedRows | None = None,
) -> Tensor:
    """softmax(scale * query . key) over the frames [0, lengths[utterance]), times their values; none gives zeros.

    Price: keys and values of each utterance once per 32 to 64 rows (query, head) that share a key head (Triton), once
    (native). With `rows` the native backend computes those alone; the others spread them and compute the gaps, too.

    Args:
        query: [utterances, queries, heads, dim]; with `rows` [1, rows, heads, dim].
        keys, values: [utterances, frames, key_heads, dim], any strides.
        lengths: int32 [utterances]; None = all frames.
        backend: as for `slot_attention`; or "native", C++ on the CPU, which "auto" takes there for few rows.
        rows: whose queries they are, if they are laid end to end.

    Returns:
        As the queries, in their dtype.

    Raises:
        InvalidArgumentError: a shape or dtype outside this contract, or heads that the Triton backend cannot hold.
    """
    _check("frame_attention", query, keys, values, backend)
    utterances = _num_utterances(query, rows)
    require(
        keys.shape[0] == utterances,
        f"frame_attention: keys must be of {utterances} utterances as the queries, got {keys.shape[0]}.",
    )
    require(
        lengths is None or (lengths.shape == (utterances,) and lengths.dtype == torch.int32),
        f"lengths must be int32 [{utterances}] or None, got {lengths}.",
    )
    chosen = _choose_for_frames(backend, query, keys)
    if chosen == "native":
        require(
            is_native(query, keys) and is_native(query, values),
            f"the native backend takes dense heads of a multiple of 16 up to 256 on the CPU, got {list(query.shape)}.",
        )
        starts = None if rows is None else rows.starts
        return frame_attention_native(query, keys, values, lengths, scale, starts=starts)
    if rows is not None:
        return rows.gathered(frame_attention(rows.spread(query), keys, values, lengths, scale, backend=backend))
    if chosen == "triton":
        from shallowfusion.kernels.beam_attention import frame_attention_triton

        found: Tensor = frame_attention_triton(_rows(query), _rows(keys), _rows(values), lengths, scale)
        return found
    if chosen == "reference":
        from shallowfusion.kernels.beam_attention_reference import frame_attention_reference

        exact: Tensor = frame_attention_reference(query, keys, values, lengths, scale)
        return exact
    if lengths is None:
        return _sdpa(query, keys, values, None, scale)
    inside = torch.arange(keys.shape[1], device=keys.device) < lengths[:, None]
    return _sdpa(query, keys, values, inside[:, None, None].expand(-1, 1, query.shape[1], -1), scale)


def write_slots(
    new_keys: Tensor, new_values: Tensor, keys: Tensor, values: Tensor, slots: Tensor, places: Tensor, backend: str
) -> None:
    """Stores new keys and values [utterances, queries, key_heads, dim] at keys[places[u], slots[u, q]]; one launch."""
    if backend == "triton":
        from shallowfusion.kernels.beam_attention import write_slots_triton

        write_slots_triton(_rows(new_keys), _rows(new_values), keys, values, slots, places)
    else:
        keys.index_put_((places[:, None], slots), new_keys)
        values.index_put_((places[:, None], slots), new_values)


def set_slot_attention(model: Any, backend: Backend = "auto") -> None:
    """Lets the model attend through this module; "auto": if it attends as with "sdpa".

    Whisper models that `from_pretrained` loads on the CPU do. On CUDA nobody calls this unasked: the kernels are proved
    without a GPU, but none has run them yet.

    Raises:
        InvalidArgumentError: no such backend.
    """
    require(backend in BACKENDS, f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if backend != "auto":
        model.set_attn_implementation(f"{ATTENTION}_{backend}")
    elif model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)


def table_backend(implementation: str | None, device: torch.device) -> Backend | None:
    """The backend with which a model of that attention implementation reads slot tables; None = it reads masks."""
    if implementation == ATTENTION:
        return "triton" if device.type == "cuda" else None
    for backend in BACKENDS[1:]:
        if implementation == f"{ATTENTION}_{backend}":
            return backend
    return None


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    backend: Backend,
    scaling: float | None = None,
    packed_rows: PackedRows | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: [utterances, heads, queries, dim] -> [utterances, queries, heads, dim].

    An int32 mask is a slot table, [utterances, 1, rows, width]. Queries over frames, few and without a mask, are cross-
    attention. All else (encoders, prompts of other callers) is as with "sdpa". With packed rows there is one batch row
    of queries, while masks, keys and values are of utterances as ever.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    own = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    if packed_rows is not None:
        if attention_mask is None and _choose_for_frames(backend, own[0], own[1]) == "native":
            return frame_attention(*own, None, scale, rows=packed_rows), None
        spread = packed_rows.spread(own[0]).transpose(1, 2)
        attended, _ = _attend(module, spread, key, value, attention_mask, backend=backend, scaling=scaling, **options)
        return packed_rows.gathered(attended), None
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        return slot_attention(*own, attention_mask[:, 0], scale, backend=backend), None
    is_causal = options.get("is_causal")
    is_cross = not (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    few = query.shape[2] <= MOST_QUERIES and query.shape[2] < key.shape[2]
    dropped = options.get("dropout", 0.0) > 0.0
    ours = is_cross and few and attention_mask is None and not dropped
    if ours and _choose_for_frames(backend, own[0], own[1]) != "sdpa":
        return frame_attention(*own, None, scale, backend=backend), None
    found: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **options
    )
    return found


def _num_utterances(query: Tensor, rows: PackedRows | None) -> int:
    if rows is None:
        return query.shape[0]
    require(
        query.shape[:2] == (1, len(rows.owners)),
        f"packed queries must be [1, {len(rows.owners)}, heads, dim], got {list(query.shape)}.",
    )
    return rows.num_utterances


def _check(name: str, query: Tensor, keys: Tensor, values: Tensor, backend: str) -> None:
    known = (*BACKENDS, "native") if name == "frame_attention" else BACKENDS
    require(backend in known, f"backend must be one of {', '.join(known)}, got {backend!r}.")
    require(
        query.dim() == 4 and keys.dim() == 4 and keys.shape == values.shape,
        f"{name} takes query, keys and values of 4 axes and keys shaped as values, "
        f"got {list(query.shape)}, {list(keys.shape)}, {list(values.shape)}.",
    )
    require(
        query.shape[3] == keys.shape[3] and keys.shape[2] > 0 and query.shape[2] % keys.shape[2] == 0,
        f"{name}: head sizes must be equal and query heads a multiple of key heads, "
        f"got {list(query.shape[2:])} and {list(keys.shape[2:])}.",
    )
    require(
        query.dtype in DTYPES and query.dtype == keys.dtype == values.dtype,
        f"{name} takes one of float32, float16, bfloat16 for all, got {query.dtype}, {keys.dtype}, {values.dtype}.",
    )


def _choose(backend: Backend, query: Tensor, keys: Tensor) -> str:
    if backend != "auto":
        return backend
    if not query.is_cuda:
        return "sdpa"
    reason = _refusal(query.shape[2] // keys.shape[2], query.shape[3], keys.dtype)
    return "triton" if reason is None else "sdpa"


def _choose_for_frames(backend: FrameBackend, query: Tensor, keys: Tensor) -> str:
    if backend == "native":
        return backend
    if backend != "auto" or query.is_cuda:
        return _choose(backend, query, keys)
    rows = query.shape[0] * query.shape[1] * query.shape[2]  # of all key heads, be they packed or not
    few = rows <= MOST_NATIVE_ROWS * keys.shape[0] * keys.shape[2]
    return "native" if few and is_native(query, keys) else "sdpa"


@functools.cache
def _refusal(group: int, dim: int, dtype: torch.dtype) -> str | None:
    """Why Triton cannot take these heads, said once."""
    from shallowfusion.kernels.beam_attention import refusal

    reason: str | None = refusal(group, dim, dtype)
    if reason is not None:
        logger.warning("%s; plain attention over gathered slots takes its place.", reason)
    return reason


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _slots_sdpa(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, scale: float) -> Tensor:
    """Gathers the entries of each utterance; those that nobody sees count as zeros, whatever lies there."""
    queries = query.shape[1]
    inside = torch.arange(table.shape[2], device=table.device) < table[:, 0, 1:2]
    number = torch.arange(queries, device=table.device)
    visible = ((table[:, HEADER + number // WORD] >> (number % WORD)[:, None]) & 1).bool() & inside[:, None]
    live = visible.any(dim=1)
    slots = torch.where(live, table[:, 1], 0).long()
    place = table[:, 0, :1].long()
    dead = ~live[:, :, None, None]
    own_keys, own_values = (part[place, slots].masked_fill(dead, 0.0) for part in (keys, values))
    return _sdpa(query, own_keys, own_values, visible[:, None], scale)


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Plain attention; rows that see nothing give zeros."""
    q, k, v = (part.transpose(1, 2) for part in (query, keys, values))
    grouped = query.shape[2] != keys.shape[2]
    found = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, scale=scale, enable_gqa=grouped
    )
    if visible is not None:
        found = torch.where(visible.any(dim=3)[..., None], found, 0.0)
    return found.transpose(1, 2)


def _register() -> None:
    for backend in BACKENDS:
        name = ATTENTION if backend == "auto" else f"{ATTENTION}_{backend}"
        AttentionInterface.register(name, functools.partial(_attend, backend=backend))
        AttentionMaskInterface.register(name, sdpa_mask)


_register()
