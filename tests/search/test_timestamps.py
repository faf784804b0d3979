"""The rules of timestamps against openai-whisper's and transformers' filters of logits, on random histories."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig
from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.search.timestamps import TimestampRows, TimestampRules, allowed_words
from shallowfusion.search.timestamps_reference import allowed_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PROMPT = 2
FORBIDDEN = float("-inf")


def rows_of(rules: TimestampRules, histories: np.ndarray) -> TimestampRows:
    """State after histories [rows, tokens], each said from a row of its own."""
    rows, own = TimestampRows.fresh(len(histories)), torch.arange(len(histories))
    for column in histories.T:
        rows = rows.followed(rules, own, torch.from_numpy(column.copy()))
    return rows


def unpacked(words: torch.Tensor, vocab: int) -> torch.Tensor:
    bits = words[:, :, None] >> torch.arange(32, device=words.device) & 1
    return bits.reshape(len(words), -1)[:, :vocab] == 1


def by_openai_whisper(rules: TimestampRules, histories: np.ndarray, logits: torch.Tensor) -> torch.Tensor:
    decoding = pytest.importorskip("whisper.decoding")
    names = SimpleNamespace(no_timestamps=rules.begin - 1, timestamp_begin=rules.begin, eot=rules.end_id)
    tokens = torch.from_numpy(np.concatenate([np.zeros((len(histories), PROMPT), int), histories], axis=1))
    filtered = logits.clone()
    decoding.ApplyTimestampRules(names, PROMPT, rules.max_initial).apply(filtered, tokens)
    return filtered


def by_transformers(rules: TimestampRules, histories: np.ndarray, logits: torch.Tensor) -> torch.Tensor:
    settings = GenerationConfig(eos_token_id=rules.end_id)
    settings.no_timestamps_token_id = rules.begin - 1
    settings.max_initial_timestamp_index = rules.max_initial
    tokens = torch.from_numpy(np.concatenate([np.zeros((len(histories), PROMPT), int), histories], axis=1))
    return WhisperTimeStampLogitsProcessor(settings, begin_index=PROMPT)(tokens, logits)


@st.composite
def cases(draw: st.DrawFn) -> tuple[TimestampRules, np.ndarray, torch.Tensor, torch.Tensor]:
    """Rules, histories [rows, tokens] of any kind or as the rules want them, logits and bias."""
    text, special, count = (
        draw(st.integers(1, 70) | st.integers(120, 200)),
        draw(st.integers(1, 5)),
        draw(st.integers(1, 60)),
    )
    most = draw(st.none() | st.integers(0, 60))
    rules = TimestampRules(text + 1 + special, count, text, most)
    seed, length = draw(st.integers(0, 2**31)), draw(st.integers(0, 6))
    generator = np.random.default_rng(seed)
    vocab = rules.stop
    share = generator.choice([0.1, 0.5, 0.9])
    shape = (draw(st.integers(1, 6)), length)
    said = np.where(
        generator.random(shape) < share,
        generator.integers(rules.begin, vocab, shape),
        generator.integers(0, rules.end_id, shape),
    )
    logits = generator.normal(size=(shape[0], vocab)) * generator.choice([0.1, 1.0, 6.0])
    logits[:, rules.begin :] += generator.choice([-9.0, -3.0, 0.0, 2.0])
    bias = np.zeros(vocab)
    bias[generator.random(vocab) < generator.choice([0.0, 0.3])] = FORBIDDEN
    bias[rules.begin - 1] = FORBIDDEN
    return rules, said, torch.from_numpy(logits).float(), torch.from_numpy(bias).float()


@given(cases())
def test_every_mask_equals_that_of_openai_whisper_transformers_and_the_reference(case) -> None:
    rules, said, logits, bias = case
    vocab = logits.shape[1]
    mask = unpacked(allowed_words(rules, rows_of(rules, said), logits, bias), vocab) & (bias == 0)
    suppressed = logits + bias
    assert torch.equal(mask, by_openai_whisper(rules, said, suppressed) > FORBIDDEN)
    assert torch.equal(mask, by_transformers(rules, said, suppressed) > FORBIDDEN)
    forbidden = frozenset((bias < 0).nonzero().view(-1).tolist())
    for row, own in enumerate(said.tolist()):
        assert set(mask[row].nonzero().view(-1).tolist()) == allowed_reference(rules, own, logits[row], forbidden)


@given(cases(), st.sampled_from([0.3, 1.7]))
def test_the_rules_look_at_logits_over_their_temperature(case, temperature: float) -> None:
    rules, said, logits, bias = case
    rows = rows_of(rules, said)
    words = allowed_words(rules, rows, logits, bias, temperature)
    assert torch.equal(words, allowed_words(rules, rows, logits / temperature, bias))
    forbidden = frozenset((bias < 0).nonzero().view(-1).tolist())
    mask = unpacked(words, logits.shape[1]) & (bias == 0)
    for row, own in enumerate(said.tolist()):
        wanted = allowed_reference(rules, own, logits[row], forbidden, temperature)
        assert set(mask[row].nonzero().view(-1).tolist()) == wanted


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_vocabulary_of_whisper_s_size_in_every_dtype(device: str, dtype: torch.dtype) -> None:
    rules = TimestampRules(50364, 1501, 50257)
    begin = rules.begin
    histories = np.array([[begin, 7, begin + 90], [begin + 3, 7, 8], [begin, 9, begin + 1500], [begin, 5, 50257]])
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn((4, 51866), generator=generator).to(dtype)
    rows = rows_of(rules, histories)
    there = TimestampRows(rows.kinds.to(device), rows.latest.to(device))
    mask = unpacked(allowed_words(rules, there, logits.to(device)).cpu(), 51866)
    for row, own in enumerate(histories.tolist()):
        wanted = allowed_reference(rules, own, logits[row].tolist())
        assert set(mask[row].nonzero().view(-1).tolist()) == wanted
    assert not mask[:, rules.stop :].any()


def test_rows_follow_their_parents() -> None:
    rules = TimestampRules(12, 8, 10)
    generator = np.random.default_rng(1)
    histories = np.zeros((4, 0), dtype=np.int64)
    rows = TimestampRows.fresh(4)
    for _ in range(30):
        parents, tokens = generator.integers(0, 4, 4), generator.integers(5, rules.stop, 4)
        rows = rows.followed(rules, torch.from_numpy(parents), torch.from_numpy(tokens))
        histories = np.concatenate([histories[parents], tokens[:, None]], axis=1)
        alone = rows_of(rules, histories)
        assert torch.equal(rows.kinds, alone.kinds)
        assert torch.equal(rows.latest, alone.latest)


def test_a_row_of_nan_or_of_nothing_forces_nothing() -> None:
    rules = TimestampRules(12, 8, 10)
    histories = np.array([[12, 3], [12, 3]])
    logits = torch.full((2, 20), FORBIDDEN)
    logits[0] = float("nan")
    mask = unpacked(allowed_words(rules, rows_of(rules, histories), logits), 20)
    assert mask[:, :12].all()
    assert mask[:, 13:].all()
    assert not mask[:, 12].any()


def test_ids_out_of_order_are_refused() -> None:
    for numbers in ((10, 5, 10), (10, 0, 4), (10, 5, 0)):
        with pytest.raises(InvalidArgumentError, match="timestamps must follow the end token"):
            TimestampRules(*numbers)
    with pytest.raises(InvalidArgumentError, match="max_initial must be"):
        TimestampRules(10, 5, 4, -1)


class Recorder(TorchDispatchMode):
    """Remembers which operations ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.add(str(function))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_step_reads_nothing_back_and_brings_no_number_from_the_host(dtype: torch.dtype) -> None:
    """What a CUDA graph may not hold: numbers read by the host, tensors made of its numbers, sizes that depend."""
    rules = TimestampRules(70, 40, 66)
    rows, bias = TimestampRows.fresh(4), torch.zeros(110).index_fill(0, torch.tensor([3, 69]), FORBIDDEN)
    logits = torch.randn(4, 110).to(dtype)
    parents, tokens = torch.tensor([0, 0, 1, 3]), torch.tensor([70, 5, 66, 109])
    with Recorder() as seen:
        allowed_words(rules, rows.followed(rules, parents, tokens), logits, bias, 1.3)
    unfit = ("_local_scalar_dense", "lift_fresh", "scalar_tensor", "nonzero", "masked_select", "is_nonzero")
    assert not {name for name in seen.names if any(word in name for word in unfit)}
    assert len(seen.names) > 10
