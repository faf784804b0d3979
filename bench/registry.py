"""The cases of the bench: what is measured and which tests must be green before its speed is printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench import (
    attention,
    bridge,
    ctc,
    ctc_batch,
    ctc_joint,
    ctc_lexicon,
    ctc_prefix,
    ctc_texts,
    decode,
    delayed,
    end_to_end,
    fused_step,
    fused_step_graph,
    internal_lm,
    ngram,
    peers,
    phrases,
    products,
    rescoring,
    session,
    stages,
    step_ladder,
    timestamps,
    tuning,
)
from bench.timing import Measurement

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """One family of measurements.

    Args:
        name: used on the command line.
        run: (device, quick) -> rows, a list after each shape, so that a run cut short keeps what it measured.
        tests: files that must pass first; on CUDA their tests marked `gpu`, of which there must be some.
        devices: where it can run.
    """

    name: str
    run: Callable[[str, bool], Iterator[list[Measurement]]]
    tests: tuple[str, ...]
    devices: tuple[str, ...] = ("cpu", "cuda")


CASES = (
    Case("fused_step", fused_step.run, ("tests/fusion/test_native_step.py", "tests/kernels/test_fused_step_triton.py")),
    Case("fused_step_graph", fused_step_graph.run, ("tests/kernels/test_fused_step_triton.py",), ("cuda",)),
    Case(
        "attention",
        attention.run,
        ("tests/scorers/test_attention.py", "tests/kernels/test_beam_attention_triton.py"),
    ),
    Case("decode", decode.run, ("tests/search/test_generate_parity.py",)),
    Case(
        "step_ladder",
        step_ladder.run,
        ("tests/search/test_device_loop.py", "tests/search/test_beam_mirror.py", "tests/kernels/test_beam_advance.py"),
    ),
    Case(
        "end_to_end",
        end_to_end.run,
        ("tests/search/test_device_loop.py", "tests/search/test_generate_parity.py", "tests/scorers/test_loading.py"),
        ("cuda",),
    ),
    Case("peers", peers.run, ("tests/search/test_generate_parity.py", "tests/scorers/test_preparation.py"), ("cpu",)),
    Case("products", products.run, ("tests/scorers/test_preparation.py",), ("cpu",)),
    Case("stages", stages.run, ("tests/search/test_generate_parity.py",)),
    Case("ctc", ctc.run, ("tests/ctc/test_search.py", "tests/compat/test_pyctcdecode.py"), devices=("cpu",)),
    Case(
        "ctc_batch",
        ctc_batch.run,
        ("tests/ctc/test_device_search.py", "tests/ctc/test_search.py", "tests/compat/test_pyctcdecode.py"),
    ),
    Case(
        "ctc_texts",
        ctc_texts.run,
        ("tests/ctc/test_device_texts.py", "tests/ctc/test_device_lexicon.py", "tests/phrases/test_device_tables.py"),
    ),
    Case("ctc_lexicon", ctc_lexicon.run, ("tests/compat/test_torchaudio.py",), ("cpu",)),
    Case("phrases", phrases.run, ("tests/ctc/test_hotwords.py", "tests/phrases/test_automaton.py"), ("cpu",)),
    Case("ctc_joint", ctc_joint.run, ("tests/ctc/test_spelled_scorer.py",), devices=("cpu",)),
    Case("ctc_prefix", ctc_prefix.run, ("tests/ctc/test_prefix_scores.py",), devices=("cpu",)),
    Case("rescoring", rescoring.run, ("tests/test_rescoring.py",)),
    Case("ngram", ngram.run, ("tests/ngrams/test_table.py", "tests/phrases/test_automaton.py"), ("cpu",)),
    Case(
        "bridge",
        bridge.run,
        ("tests/scorers/test_token_ranges.py", "tests/scorers/test_byte_bridge.py"),
    ),
    Case("internal_lm", internal_lm.run, ("tests/scorers/test_internal_lm.py",)),
    Case("timestamps", timestamps.run, ("tests/search/test_timestamps.py", "tests/search/test_timestamp_decoding.py")),
    Case("tuning", tuning.run, ("tests/training/test_offline.py",)),
    Case("delayed", delayed.run, ("tests/search/test_delayed.py", "tests/scorers/test_token_trees.py")),
    Case(
        "session",
        session.run,
        ("tests/session/test_front.py", "tests/session/test_device.py", "tests/search/test_running.py"),
    ),
)
