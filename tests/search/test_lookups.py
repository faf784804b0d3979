"""N-gram models of pieces that look up candidates alone: against the same model in the fused step."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shallowfusion import FusionDecoder, fusion
from shallowfusion.config import BeamSettings
from shallowfusion.demo.shipped import HERE, read_manifest
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.ngrams.model import NgramModel, NgramOrder
from shallowfusion.ngrams.pieces import spell_piece
from shallowfusion.ngrams.table import NgramTable
from shallowfusion.scorers.base import Context
from shallowfusion.scorers.ngram import Lookups, NgramScorer
from shallowfusion.scorers.ngram_lookups import NgramLookups
from shallowfusion.search.lookups import with_ngram_lookups
from shallowfusion.search.loop import SearchPlan, StageClock, search
from shallowfusion.search.sources import Sources
from shallowfusion.text.vocabulary import Vocabulary
from shallowfusion.values import Unmapped
from tests.scorers.test_ngram import character_file
from tests.shipped import ASR, MEDICAL, clip
from tests.tiny import END, NO_TIMESTAMPS, START, random_encoder_output, tiny_whisper

LETTERS = 3  # tokens the search may say, so that every continuation is a candidate
WEIGHT = 0.4


def letters(size: int) -> Vocabulary:
    return Vocabulary((*(bytes([65 + i]) for i in range(END)), *[None] * (size - END)), END, END, "letters")


def letter_model(seed: int) -> NgramModel:
    """Bigrams of letters whose probabilities sum to 1 over the letters and the end, whatever was before."""
    rng = np.random.default_rng(seed)
    words = (*(spell_piece(bytes([65 + i])) for i in range(END)), "</s>", "<s>", "<unk>")
    said = END + 1

    def log_probs() -> np.ndarray:
        scores = rng.normal(0, 2, said)
        return scores - np.log(np.exp(scores).sum())

    unigrams = NgramOrder(
        np.arange(said + 2, dtype=np.int32)[:, None],
        np.array([*log_probs(), -99.0, -99.0], np.float32), np.zeros(said + 2, np.float32),
    )  # fmt: skip
    histories = [*range(LETTERS), END + 1]
    pairs = np.array([(one, other) for one in histories for other in range(said)], np.int32)
    bigrams = NgramOrder(
        pairs, np.concatenate([log_probs() for _ in histories]).astype(np.float32), np.zeros(len(pairs), np.float32)
    )
    return NgramModel(words, (unigrams, bigrams), END + 1, END, END + 2, "letters of the lm")


def sources(seed: int, lookups: Lookups, ending: str, rule: Any = None, device: str = "cpu") -> Sources:
    acoustic = tiny_whisper(seed)
    acoustic.scorer.vocabulary = letters(44)
    model = NgramScorer(letter_model(seed), acoustic.scorer.vocabulary, device, lookups)
    acoustic.scorer.model.to(device)
    policy = Unmapped("floor", 0.0) if ending == "asr_only" else Unmapped("neutral")
    plan = SearchPlan(
        BeamSettings(beam_size=5, end_ids=(END,), max_new_tokens=9),
        rule or fusion.static(WEIGHT),
        (None, torch.tensor([*range(END), END if ending == "lm" else -1, -1, -1, -1]).int()),
        (policy, policy),
        suppressed=tuple(i for i in range(44) if i >= LETTERS and i != END),
    )
    prompts = [[START, NO_TIMESTAMPS]] * 4
    heard = Context(prompts, 5, 9, random_encoder_output(acoustic, 4, seed).to(device))
    contexts = (heard, Context([model.prompt([1, 0])] * 4, 5, 9))
    return Sources((acoustic.scorer, model), contexts, ("asr", "lm"), plan, ("en",) * 4)


def found(own: Sources) -> list[Any]:
    return search(own.scorers, own.contexts, own.names, own.plan, StageClock(), own.late)


@pytest.mark.parametrize("ending", ["neutral", "asr_only", "lm"])
@pytest.mark.parametrize("seed", range(4))
def test_where_every_continuation_is_a_candidate_nothing_changes(seed: int, ending: str) -> None:
    rule = fusion.piecewise(WEIGHT, initial_steps=2, ramp=3) if seed == 3 else None
    rows, few = (sources(seed, lookups, ending, rule) for lookups in ("rows", "candidates"))
    changed = with_ngram_lookups(few)
    assert with_ngram_lookups(rows) is rows
    assert isinstance(changed.late[0], NgramLookups)
    assert (len(changed.scorers), changed.part_names, changed.plan.rule.lm_weights) == (1, ("asr", "lm"), ())
    for ours, theirs in zip(found(changed), found(rows), strict=True):
        assert [h.token_ids for h in ours.hypotheses] == [h.token_ids for h in theirs.hypotheses]
        for one, other in zip(ours.hypotheses, theirs.hypotheses, strict=True):
            assert one.total == pytest.approx(other.total, abs=1e-4)
            np.testing.assert_allclose(one.parts, other.parts, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("ending", ["neutral", "lm"])
def test_on_a_gpu_candidates_are_looked_up_unless_told_otherwise(ending: str) -> None:
    few, rows = (with_ngram_lookups(sources(1, lookups, ending, device="cuda")) for lookups in ("auto", "rows"))
    assert len(few.late) == 1
    assert not rows.late
    for ours, theirs in zip(found(few), found(rows), strict=True):
        assert [h.token_ids for h in ours.hypotheses] == [h.token_ids for h in theirs.hypotheses]
        for one, other in zip(ours.hypotheses, theirs.hypotheses, strict=True):
            assert one.total == pytest.approx(other.total, abs=1e-3)


def test_increments_are_look_ups_and_follow_the_rows() -> None:
    model = letter_model(5)
    scorer = NgramScorer(model, letters(44), lookups="candidates")
    table = NgramTable(model)
    mapping = torch.tensor([*range(END), -1, -1, -1]).int()
    source = NgramLookups(scorer, [[], [1]], mapping, Unmapped("neutral"), 2.0, lambda step: min(1.0, step / 2), "lm")
    tokens = np.array([[0, 2, END, 43, -1], [1, END, 0, 2, -1]])
    states = [table.start_state, int(table.score([table.start_state], [1])[1][0])]
    weights = [source.weight]
    for _ in range(3):
        increments = source.increments(np.where(tokens < 0, -1, 0), tokens)
        for own, row, state in zip(increments, tokens, states, strict=True):
            dense = table.dense([state])[0]
            best = dense[: END + 1].max()
            wanted = [0.0 if t < 0 else best if t >= END else dense[t] for t in row.tolist()]
            np.testing.assert_allclose(own, wanted, rtol=1e-6)
        source.follow(np.zeros((2, 1), np.int64), np.array([[2], [1]]))
        states = [int(table.score([s], [t])[1][0]) for s, t in zip(states, (2, 1), strict=True)]
        weights.append(source.weight)
    assert weights == [0.0, 1.0, 2.0, 2.0]
    source.keep([1])
    only = source.increments(np.zeros((1, 5), np.int64), tokens[1:])
    np.testing.assert_allclose(only[0, 0], table.dense([states[1]])[0, 1], rtol=1e-6)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [entry.text for entry in read_manifest(HERE / "clips")]
    return character_file(tmp_path_factory.mktemp("lm") / "small.arpa.gz", texts)


def test_the_decoder_wires_it(small_file: Path) -> None:
    few = FusionDecoder.from_pretrained(ASR, small_file, device="cpu", ngram_lookups="candidates")
    plain = FusionDecoder.from_pretrained(ASR, small_file, device="cpu")
    paths, table = [clip(0), clip(1)], NgramTable.from_arpa(small_file)
    vocabulary = few.acoustic.scorer.vocabulary
    for ours, theirs in zip(few.transcribe(paths, lm_weight=0.3), plain.transcribe(paths, lm_weight=0.3), strict=True):
        assert ours.text == theirs.text
        best = ours.best
        assert set(best.parts) == {"asr", "lm"}
        assert best.total == pytest.approx(best.parts["asr"] + 0.3 * best.parts["lm"], abs=1e-3)
        state, wanted = table.start_state, []
        for token in best.token_ids:
            scored, states = table.score([state], [table.model.id_of(spell_piece(vocabulary.tokens[token]))])
            wanted.append(float(scored[0]))
            state = int(states[0])
        np.testing.assert_allclose([t.parts["lm"] for t in best.tokens][: len(wanted)], wanted, atol=1e-4)


def test_it_stands_beside_a_neural_model_in_any_order(small_file: Path) -> None:
    both = FusionDecoder.from_pretrained(ASR, [small_file, MEDICAL], device="cpu", ngram_lookups="candidates")
    names = {"rule": fusion.static([0.1, 0.2]), "end_policy": "lm"}
    (result,) = both.transcribe([clip(0)], **names)
    parts = result.best.parts
    assert set(parts) == {"asr", "lm0", "lm1"}
    assert result.best.total == pytest.approx(parts["asr"] + 0.1 * parts["lm0"] + 0.2 * parts["lm1"], abs=1e-3)
    again = both.transcribe([clip(0), clip(1)], **names)[0]
    assert again.best.token_ids == result.best.token_ids


def test_a_rule_that_needs_every_token_is_refused_or_served_from_rows(
    small_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = FusionDecoder.from_pretrained(ASR, small_file, device="cpu", ngram_lookups="candidates")
    for names in ({"rule": fusion.entropy_gate(1.0)}, {"end_policy": "end_factored"}, {"lm_temperature": 2.0}):
        with pytest.raises(InvalidArgumentError, match="ngram_lookups"):
            few.transcribe([clip(0)], **names)
    with pytest.raises(InvalidArgumentError, match="ngram_lookups"):
        FusionDecoder.from_pretrained(ASR, small_file, device="cpu", ngram_lookups="few")  # type: ignore[arg-type]
    own = sources(0, "auto", "neutral", fusion.entropy_gate(1.0))
    own.scorers[1].device = torch.device("meta")  # type: ignore[attr-defined, misc]
    assert with_ngram_lookups(own) is own  # not a GPU
    own.scorers[1].device = torch.device("cuda")  # type: ignore[attr-defined, misc]
    with caplog.at_level(logging.INFO):
        assert with_ngram_lookups(own) is own
    assert "looks at every token" in caplog.text
    plain = dataclasses.replace(own, plan=dataclasses.replace(own.plan, rule=fusion.static(0.2)))
    assert len(with_ngram_lookups(plain).late) == 1
