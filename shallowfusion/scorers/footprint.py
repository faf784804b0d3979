"""How many bytes of keys and values searches may come to hold, known before they start."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shallowfusion.scorers.slots import SMALLEST_CAPACITY, roomy

__all__ = ["Demand", "bytes_together", "slot_bytes"]


@dataclass(frozen=True)
class Demand:
    """What one utterance may need of one model.

    Args:
        slots: tokens of its hypotheses, at most.
        slot_bytes: keys and values of one token in all layers.
        fixed_bytes: cross-attention keys and values.
    """

    slots: int
    slot_bytes: int
    fixed_bytes: int = 0


def slot_bytes(model: Any) -> int:
    """Bytes of the keys and values of one token in all decoder layers of a transformers model."""
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        layers, width = config.decoder_layers, config.d_model
    else:
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        layers, width = config.num_hidden_layers, (getattr(config, "num_key_value_heads", None) or heads) * size
    return int(2 * layers * width * model.dtype.itemsize)


def bytes_together(demands: Iterable[Mapping[Hashable, Demand]]) -> int:
    """The most that utterances which run together make their models store.

    The slots of a model's utterances lie in one tensor, as long for all as for the longest, so bytes do not simply
    add up. Keys are models.
    """
    by_model: dict[Hashable, list[Demand]] = defaultdict(list)
    for own in demands:
        for model, demand in own.items():
            by_model[model].append(demand)
    total = 0
    for wanted in by_model.values():
        slots = max(SMALLEST_CAPACITY, roomy(max(demand.slots for demand in wanted)))
        total += roomy(len(wanted)) * max(slots * demand.slot_bytes + demand.fixed_bytes for demand in wanted)
    return total
