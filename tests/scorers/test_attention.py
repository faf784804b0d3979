"""One contract, three backends; and every kind of model through each of them: cached scores equal uncached ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.scorers.attention import (
    ATTENTION,
    Backend,
    frame_attention,
    set_slot_attention,
    slot_attention,
    table_backend,
)
from shallowfusion.scorers.base import Context
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.scorers.packed_rows import PackedRows
from shallowfusion.scorers.token_tree import TokenTree
from shallowfusion.scorers.whisper import WhisperScorer
from tests.kernels.attention_cases import Sizes, assert_in_budget, exact_slots, frame_call, slot_call
from tests.scorers.test_cached_scorers import run_random_search
from tests.tiny import END, NO_TIMESTAMPS, START, random_encoder_output, tiny_lm, tiny_whisper, vocabulary

BACKENDS: tuple[Backend, ...] = ("reference", "sdpa", "triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = Sizes(4, 2, 16, 5, slots=40)


def lm(seed: int, backend: Backend | None, **changes: int) -> CausalLMScorer:
    """A tiny LM on the device where kernels run; None = with transformers' own attention."""
    made = tiny_lm(seed, **changes)
    scorer = CausalLMScorer(made.model.to(DEVICE), made.vocabulary)
    scorer.model.set_attn_implementation("sdpa" if backend is None else f"{ATTENTION}_{backend}")
    return scorer


def whisper(seed: int, backend: Backend | None) -> WhisperScorer:
    made = tiny_whisper(seed).scorer
    scorer = WhisperScorer(made.model.to(DEVICE), made.vocabulary)
    scorer.model.set_attn_implementation("sdpa" if backend is None else f"{ATTENTION}_{backend}")
    return scorer


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree_over_slots(backend: str) -> None:
    call = slot_call(SIZES)
    found = slot_attention(*(part.to(DEVICE) for part in call), 0.25, backend=backend).cpu()
    exact = exact_slots(*call, 0.25)
    assert_in_budget(found, exact, exact.float())
    assert not found[1].any()  # no entries


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_lengths", [False, True])
def test_backends_agree_over_frames(backend: str, with_lengths: bool) -> None:
    *call, lengths = (part.to(DEVICE) for part in frame_call(SIZES, 90))
    lengths = lengths if with_lengths else None
    found = frame_attention(*call, lengths, 0.25, backend=backend)
    exact = frame_attention(*(part.double().float() for part in call), lengths, 0.25, backend="reference")
    torch.testing.assert_close(found, exact, atol=2e-6, rtol=0)
    assert not with_lengths or not found[1].any()


@pytest.mark.parametrize("backend", [*BACKENDS, "native"])
def test_rows_laid_end_to_end_are_attended_to_as_in_utterances_of_their_own(backend: str) -> None:
    if backend == "native" and DEVICE.type == "cuda":
        pytest.skip("is for the CPU")
    call, taken = frame_call(SIZES, 90), np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 1, 0]], dtype=bool)
    query, keys, values, lengths = (part.to(DEVICE) for part in call)
    rows = PackedRows.of(taken, DEVICE)
    found = frame_attention(rows.gathered(query), keys, values, lengths, 0.25, backend=backend, rows=rows)
    wanted = rows.gathered(frame_attention(query, keys, values, lengths, 0.25, backend="reference"))
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=0)
    with pytest.raises(InvalidArgumentError, match=r"packed queries must be \[1, 9, heads, dim\]"):
        frame_attention(query, keys, values, lengths, 0.25, rows=rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_beams_of_several_sizes_equal_uncached_ones(backend: Backend) -> None:
    states = random_encoder_output(tiny_whisper(3), 3).to(DEVICE)
    prompts = [[START, NO_TIMESTAMPS]] * 3
    run_random_search(whisper(3, backend), prompts, states, seed=3, uncached=whisper(3, None), steps=5, beams=[1, 5, 2])
    scorer = lm(4, backend, positions=8)  # some outgrow their window
    prompts = [scorer.prompt(), scorer.prompt([3] * 4), scorer.prompt()]
    run_random_search(scorer, prompts, None, seed=4, uncached=lm(4, None, positions=8), steps=7, beams=[3, 1, 4])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("utterances", [1, 2])
def test_whisper_scores_equal_uncached_ones(backend: Backend, utterances: int) -> None:
    rng = np.random.default_rng(utterances)
    prompts = [[*rng.integers(0, 40, 2 * i).tolist(), START, NO_TIMESTAMPS] for i in range(utterances)]
    states = random_encoder_output(tiny_whisper(utterances), utterances).to(DEVICE)
    scorer, plain = whisper(utterances, backend), whisper(utterances, None)
    run_random_search(scorer, prompts, states, seed=utterances, uncached=plain, steps=5)


def test_whisper_without_a_cache_attends_to_frames_as_well() -> None:
    states = random_encoder_output(tiny_whisper(1), 1).to(DEVICE)
    ids = torch.tensor([[START, NO_TIMESTAMPS, 3, 4]], device=DEVICE)
    with torch.inference_mode():
        found, expected = (
            scorer.model.model.decoder(input_ids=ids, encoder_hidden_states=states, use_cache=False).last_hidden_state
            for scorer in (whisper(1, "triton"), whisper(1, None))
        )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("utterances", [1, 3])
def test_lm_scores_equal_uncached_ones(backend: Backend, utterances: int) -> None:
    scorer = lm(utterances, backend)
    prompts = [scorer.prompt([3] * (5 * i)) for i in range(utterances)]
    run_random_search(scorer, prompts, None, seed=utterances, uncached=lm(utterances, None), steps=7)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_lm_rows_beyond_the_window_keep_its_last_half(backend: Backend) -> None:
    scorer = lm(2, backend, positions=8)
    prompts = [scorer.prompt([3] * (4 * i)) for i in range(2)]
    run_random_search(scorer, prompts, None, seed=2, uncached=lm(2, None, positions=8), steps=7)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("heads", [(4, 2), (6, 1)], ids=str)
def test_grouped_heads_and_rotary_positions_equal_uncached_ones(kind: str, heads: tuple[int, int]) -> None:
    torch.manual_seed(5)
    config = AutoConfig.for_model(
        kind, vocab_size=41, hidden_size=8 * heads[0], intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], max_position_embeddings=64, bos_token_id=END,
        eos_token_id=END, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().to(DEVICE)
    scorer = CausalLMScorer(model, vocabulary(41, END, kind))
    set_slot_attention(model, "triton")
    prompts = [scorer.prompt(), scorer.prompt([1, 2, 3])]
    run_random_search(scorer, prompts, None, seed=3, steps=6)
    run_random_search(scorer, prompts, None, seed=4, steps=3, beams=[2, 3])


def test_trees_of_tokens_read_tables_too() -> None:
    """More queries than a word holds, and utterances that keep places of their own."""
    plain, kernel = lm(3, None), lm(3, "triton")
    prompts = [plain.prompt([1] * 40), plain.prompt([2])]
    trees = [TokenTree(scorer, prompts) for scorer in (plain, kernel)]
    for tree in trees:
        node = tree.child(0, tree.roots[0], 7)
        tree.child(0, node, 8), tree.child(0, node, 9), tree.child(1, tree.roots[1], 5)
        tree.read()
    found = [[child.log_prob for root in tree.roots for child in root.children.values()] for tree in trees]
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_a_model_off_the_gpu_reads_masks_unless_told_otherwise() -> None:
    scorer = tiny_lm()
    assert scorer.model.config._attn_implementation == "sdpa"
    assert table_backend(ATTENTION, torch.device("cpu")) is None
    assert table_backend(ATTENTION, torch.device("cuda")) == "triton"
    assert table_backend("eager", torch.device("cuda")) is None
    scorer.model.set_attn_implementation(ATTENTION)
    run_random_search(scorer, [scorer.prompt([3])], None, seed=1)


def test_each_step_launches_the_kernels_and_nothing_else_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    from shallowfusion.kernels import beam_attention

    names: list[str] = []
    run = beam_attention.Launch.run
    monkeypatch.setattr(beam_attention.Launch, "run", lambda self: (names.append(self.kernel.__name__), run(self)))
    scorer = whisper(0, "triton")
    states = random_encoder_output(tiny_whisper(), 1).to(DEVICE)
    state = scorer.start(Context([[START, NO_TIMESTAMPS]], 3, 4, states))
    state = scorer.fork(state, np.zeros((1, 3), dtype=np.int64))
    names.clear()
    scorer.score(state, np.array([[1, 2, 3]]))
    assert names == ["write_slots", "attend_slots", "attend_frames"] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "backend must be one of"),
        ({"query": torch.zeros(3, 5, 16)}, "4 axes"),
        ({"query": torch.zeros(3, 5, 3, 16)}, "multiple of key heads"),
        ({"query": torch.zeros(3, 5, 4, 8)}, "head sizes must be equal"),
        ({"query": torch.zeros(3, 5, 4, 16, dtype=torch.float64)}, "float32, float16, bfloat16"),
        ({"query": torch.zeros(3, 33, 4, 16)}, r"int32 \[3, 4, width\]"),
        ({"table": torch.zeros(3, 3, 48)}, "int32"),
    ],
)
def test_what_is_not_in_the_contract_is_refused(change: dict[str, object], message: str) -> None:
    query, keys, values, table = slot_call(SIZES)
    given = {"query": query, "keys": keys, "values": values, "table": table, "scale": 1.0, **change}
    with pytest.raises(InvalidArgumentError, match=message):
        slot_attention(**given)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["whisper", "gpt2"])
def test_searches_on_the_gpu_equal_uncached_scores(kind: str) -> None:
    """Scorers of models on a CUDA device choose the kernels by themselves."""
    if kind == "gpt2":
        made = tiny_lm(2)
        language = CausalLMScorer(made.model.cuda(), made.vocabulary)
        assert language.model.config._attn_implementation == ATTENTION
        run_random_search(language, [language.prompt([3]), language.prompt()], None, seed=2, uncached=lm(2, None))
    else:
        model = tiny_whisper(2)
        acoustic = WhisperScorer(model.scorer.model.cuda(), model.scorer.vocabulary)
        assert acoustic.model.config._attn_implementation == ATTENTION
        states = random_encoder_output(model, 2).cuda()
        run_random_search(acoustic, [[START, NO_TIMESTAMPS]] * 2, states, seed=2, uncached=whisper(2, None))
