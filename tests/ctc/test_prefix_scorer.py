"""Joint CTC-attention decoding: against torch's CTC loss, exhaustive search, and the plain decoder."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from shallowfusion import fusion
from shallowfusion.config import BeamSettings
from shallowfusion.ctc.prefix_scorer import CTCPrefixScorer, token_labels
from shallowfusion.ctc.prefix_scores import END, NOTHING, PrefixScores
from shallowfusion.ctc.prefix_scores_reference import ReferencePrefixScores
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.scorers.base import Context
from shallowfusion.search.loop import SearchPlan, StageClock, search
from shallowfusion.values import Unmapped
from tests import tiny
from tests.ctc.conftest import random_log_probs
from tests.ctc.joint import ctc_log_prob, joint_decoder
from tests.shipped import clip
from tests.shipped import decoder as shipped_decoder

UTTERANCES = 4
SPECIAL = (tiny.START, tiny.NO_TIMESTAMPS, 43)
FAST = {"beam_size": 4, "max_new_tokens": 16, "batch_size": UTTERANCES, "suppress_tokens": SPECIAL}


def states(decoder: Any, count: int = UTTERANCES) -> torch.Tensor:
    return tiny.random_encoder_output(decoder.acoustic, count)


def attention_log_prob(decoder: Any, encoder_output: torch.Tensor, tokens: list[int]) -> float:
    """Teacher-forced by transformers, the end token included; blank suppression is the caller's business."""
    prompt = [tiny.START, tiny.NO_TIMESTAMPS]
    ids = torch.tensor([[*prompt, *tokens]])
    with torch.inference_mode():
        logits = decoder.acoustic.scorer.model(encoder_outputs=(encoder_output,), decoder_input_ids=ids).logits[0]
    log_probs = torch.log_softmax(logits[len(prompt) - 1 :].double(), dim=1)
    return float(log_probs[torch.arange(len(tokens) + 1), [*tokens, tiny.END]].sum())


def test_ctc_parts_sum_to_the_loss_that_torch_computes() -> None:
    decoder = joint_decoder()
    encoded = states(decoder)
    seen = 0
    for utterance, result in enumerate(decoder.decode(encoded, n_best=4, ctc_weight=0.4, **FAST)):
        for hypothesis in result.n_best:
            if hypothesis.ended:
                wanted = ctc_log_prob(decoder, encoded[utterance : utterance + 1], list(hypothesis.token_ids))
                assert hypothesis.parts["ctc"] == pytest.approx(wanted, abs=1e-4)
                seen += 1
    assert seen > UTTERANCES


@pytest.mark.parametrize("lm", [False, True])
def test_totals_are_the_weighted_parts(lm: bool) -> None:
    decoder = joint_decoder(lm=lm)
    weights = {"asr": 0.7, "ctc": 0.3, "lm": 0.5}
    options = {"lm_weight": 0.5, "end_policy": "lm"} if lm else {}
    for result in decoder.decode(states(decoder), n_best=4, ctc_weight=0.3, length_bonus=0.2, **options, **FAST):
        for hypothesis in result.n_best:
            assert set(hypothesis.parts) == ({"asr", "ctc", "lm"} if lm else {"asr", "ctc"})
            wanted = sum(weights[name] * part for name, part in hypothesis.parts.items())
            assert hypothesis.total == pytest.approx(wanted + 0.2 * len(hypothesis.token_ids), abs=1e-3)


@pytest.mark.parametrize("stop_rule", ["hf", "whisper", "espnet"])
def test_every_stop_rule_keeps_the_books(stop_rule: Any) -> None:
    decoder = joint_decoder(seed=5)
    encoded = states(decoder)
    options = {**FAST, "no_repeat_ngram_size": 2, "stop_rule": stop_rule}
    seen = 0
    for utterance, result in enumerate(decoder.decode(encoded, n_best=2, ctc_weight=0.3, **options)):
        for hypothesis in result.n_best:
            if hypothesis.tokens[-1].id == tiny.END:
                wanted = ctc_log_prob(decoder, encoded[utterance : utterance + 1], list(hypothesis.token_ids))
                assert hypothesis.parts["ctc"] == pytest.approx(wanted, abs=1e-4)
                seen += 1
    assert seen >= UTTERANCES


def test_weight_zero_changes_no_bit() -> None:
    with_head = joint_decoder(lm=True)
    without = joint_decoder(lm=True)
    without.acoustic = dataclasses.replace(without.acoustic, ctc_head=None)
    encoded = states(with_head)
    pairs = [decoder.decode(encoded, n_best=4, lm_weight=0.3, **FAST) for decoder in (with_head, without)]
    for one, other in zip(*pairs, strict=True):
        assert one.n_best == other.n_best
        assert "ctc" not in one.best.parts


def test_a_wide_joint_search_is_exhaustive() -> None:
    decoder = joint_decoder(seed=2)
    encoded = states(decoder, 2)
    others = [token for token in range(tiny.ACOUSTIC_VOCAB) if token > 2 and token != tiny.END]
    results = decoder.decode(
        encoded, beam_size=150, max_new_tokens=5, suppress_tokens=others, suppress_blank=False, ctc_weight=0.45,
        length_penalty=0.0,
    )  # fmt: skip
    for utterance, result in enumerate(results):
        own = encoded[utterance : utterance + 1]
        best = max(
            0.55 * attention_log_prob(decoder, own, list(text)) + 0.45 * ctc_log_prob(decoder, own, list(text))
            for length in range(5)
            for text in itertools.product(range(3), repeat=length)
        )
        ended = [hypothesis for hypothesis in result.n_best if hypothesis.ended]
        assert ended[0].total == pytest.approx(best, abs=1e-3)


def test_the_twin_finds_the_same() -> None:
    decoder = joint_decoder(seed=3)
    encoded = states(decoder)
    acoustic, head = decoder.acoustic.scorer, decoder.acoustic.ctc_head
    assert head is not None
    labels = token_labels(acoustic.vocabulary, head.label_tokens)
    settings = BeamSettings(beam_size=4, end_ids=(tiny.END,), max_new_tokens=16)
    plan = SearchPlan(
        settings, fusion.static(()), (None,), (Unmapped("neutral"),), suppressed=SPECIAL, acoustic_weight=0.6
    )
    context = Context([[tiny.START, tiny.NO_TIMESTAMPS]] * UTTERANCES, 4, 16, encoded)
    found = []
    for make in (PrefixScores, ReferencePrefixScores):
        late = CTCPrefixScorer(make(head.log_probs(encoded), blank=head.blank), labels, 0.4)
        found.append(search([acoustic], [context], ["asr"], plan, StageClock(), [late]))
    for one, other in zip(*found, strict=True):
        assert [h.token_ids for h in one.hypotheses] == [h.token_ids for h in other.hypotheses]
        assert [h.total for h in one.hypotheses] == pytest.approx([h.total for h in other.hypotheses], abs=1e-6)
    front = decoder.decode(encoded, ctc_weight=0.4, suppress_blank=False, **FAST)
    assert [r.best.token_ids for r in front] == [r.hypotheses[0].token_ids for r in found[0]]


def test_batches_do_not_change_results() -> None:
    decoder = joint_decoder(seed=4)
    encoded = states(decoder, 6)
    together = decoder.decode(encoded, ctc_weight=0.4, **FAST)
    alone = [decoder.decode(encoded[i : i + 1], ctc_weight=0.4, **FAST)[0] for i in range(6)]
    assert [result.best.token_ids for result in together] == [result.best.token_ids for result in alone]
    assert len({len(result.best.tokens) for result in together}) > 1


def test_lists_are_ranked_again_from_their_parts() -> None:
    decoder = joint_decoder(lm=True)
    rule = fusion.static(0.3)
    for result in decoder.decode(states(decoder), n_best=4, rule=rule, ctc_weight=0.4, **FAST):
        again = result.rerank(rule, ctc_weight=0.4)
        assert [h.total for h in again.n_best] == pytest.approx([h.total for h in result.n_best], abs=1e-3)
        attention = result.rerank(fusion.static(0.0), ctc_weight=0.0)
        assert attention.best.total == pytest.approx(attention.best.parts["asr"], abs=1e-4)
        with pytest.raises(InvalidArgumentError, match="ctc_weight"):
            result.rerank(rule)
    plain = decoder.decode(states(decoder), rule=rule, **FAST)[0]
    with pytest.raises(InvalidArgumentError, match="ctc_weight"):
        plain.rerank(rule, ctc_weight=0.4)


def test_what_ctc_cannot_join_is_refused() -> None:
    without = tiny.tiny_decoder(lm=False)
    with pytest.raises(InvalidArgumentError, match="CTC head"):
        without.decode(states(without), ctc_weight=0.3, **FAST)
    decoder = joint_decoder(lm=True)
    for options in ({"rule": fusion.uadf()}, {"end_policy": "end_factored"}, {"rule": fusion.entropy_gate(0.5)}):
        with pytest.raises(InvalidArgumentError, match="normalize"):
            decoder.decode(states(decoder), ctc_weight=0.3, **FAST, **options)
    for weight in (-0.1, 1.0, float("nan"), "0.3"):
        with pytest.raises(InvalidArgumentError, match="ctc_weight"):
            decoder.decode(states(decoder), ctc_weight=weight)


def test_a_failed_encoder_is_flagged_alone() -> None:
    decoder = joint_decoder()
    encoded = states(decoder)
    broken = encoded.clone()
    broken[1] = float("nan")
    wanted = decoder.decode(encoded, ctc_weight=0.3, **FAST)
    found = decoder.decode(broken, ctc_weight=0.3, **FAST)
    assert "nan" in found[1].flags
    assert [found[i].best.token_ids for i in (0, 2, 3)] == [wanted[i].best.token_ids for i in (0, 2, 3)]


def test_tokens_become_labels() -> None:
    vocabulary = tiny.vocabulary(tiny.ACOUSTIC_VOCAB)
    tokens = np.array([-1, 0, 2, 7])  # blank, then three labels
    for policy, other in (("forbid", -3), ("neutral", NOTHING)):
        labels = token_labels(vocabulary, tokens, policy)  # type: ignore[arg-type]
        assert labels[[0, 2, 7, 1]].tolist() == [1, 2, 3, other]
        assert labels[[tiny.END, tiny.START, tiny.NO_TIMESTAMPS]].tolist() == [END, NOTHING, NOTHING]
    with pytest.raises(InvalidArgumentError, match="without_label"):
        token_labels(vocabulary, tokens, "floor")  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["forbid", "neutral"])
def test_tokens_without_a_label(policy: Any) -> None:
    labels = token_labels(tiny.vocabulary(tiny.ACOUSTIC_VOCAB), np.array([-1, 0, 2]), policy)
    log_probs = random_log_probs(0, (1, 6, 3))
    scorer = CTCPrefixScorer(PrefixScores(log_probs), labels, 0.5)
    found = scorer.increments(np.array([[0, 0, 0, -1]]), np.array([[0, 1, tiny.START, -1]]))[0]
    assert found[0] == PrefixScores(log_probs).scores([[0]], [[1]])[0, 0]
    assert found[1] == (-np.inf if policy == "forbid" else 0.0)
    assert found[2:].tolist() == [0.0, 0.0]
    scorer.follow(np.array([[0]]), np.array([[1]]))
    after = scorer.increments(np.array([[0]]), np.array([[0]]))[0, 0]
    assert after == (-np.inf if policy == "forbid" else found[0])


def test_the_shipped_model_has_a_head_that_hears_the_recording() -> None:
    decoder = shipped_decoder(with_lm=False)
    result = decoder.transcribe([clip(2)], beam_size=2, ctc_weight=0.3)[0]
    plain = decoder.transcribe([clip(2)], beam_size=2)[0]
    assert result.text
    other = decoder.transcribe([clip(5)], beam_size=2, ctc_weight=0.3)[0]
    assert result.best.parts["ctc"] > -2.0 * len(result.best.tokens)
    assert plain.text.split()[0] == result.text.split()[0]
    assert result.text != other.text
