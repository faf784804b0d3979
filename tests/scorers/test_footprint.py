"""Bytes reckoned before a search are at least those it comes to hold."""

from __future__ import annotations

import numpy as np
import torch

from shallowfusion import DecodingOptions
from shallowfusion.scorers.footprint import Demand, bytes_together, slot_bytes
from shallowfusion.search.loop import StageClock
from shallowfusion.search.running import RunningSearches
from tests.tiny import random_encoder_output, tiny_decoder, tiny_lm, tiny_whisper


def test_slot_bytes_are_keys_and_values_of_all_layers() -> None:
    assert slot_bytes(tiny_whisper().scorer.model) == 2 * 2 * 32 * 4
    assert slot_bytes(tiny_lm().model) == 2 * 2 * 32 * 4


def test_the_longest_sets_the_slots_of_all() -> None:
    one, two = {"m": Demand(100, 10, 7)}, {"m": Demand(640, 10, 7), "n": Demand(64, 1)}
    assert bytes_together([one]) == 112 * 10 + 7
    assert bytes_together([one, two]) == 2 * (640 * 10 + 7) + 64


def test_searches_hold_no_more_than_was_reckoned() -> None:
    decoder = tiny_decoder(1)
    planner, generator = decoder._planner, np.random.default_rng(0)
    states = random_encoder_output(decoder.acoustic, 8)
    running, demands = RunningSearches(StageClock()), []
    for i in range(6):
        options = DecodingOptions.of(
            beam_size=int(generator.integers(1, 6)), max_new_tokens=30, min_new_tokens=29, suppress_tokens=None
        )
        own = planner.sources(states[i : i + 1], options, StageClock())
        running.admit(own.scorers, own.contexts, own.names, own.plan, own.late)
        demands.append(planner.demands(options))
        running.step()
        assert held_bytes(running) <= bytes_together(demands)
    while running.num_running:
        running.step()
        assert held_bytes(running) <= bytes_together(demands)


def held_bytes(running: RunningSearches) -> int:
    total = 0
    for batch in running._batches.values():
        cache = batch.state.cache
        for layer in getattr(cache, "self_attention_cache", cache).layers:
            total += size_of(layer.keys) + size_of(layer.values)
        for layer in getattr(getattr(cache, "cross_attention_cache", None), "layers", []):
            keys, values = layer._stored or (layer.keys, layer.values)
            total += size_of(keys) + size_of(values)
    return total


def size_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
