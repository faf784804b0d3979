"""Rules that may give a language model up: equal to the fused decoder or to the plain one, utterance by utterance."""

from __future__ import annotations

from functools import cache

import pytest

from shallowfusion import FusionDecoder, fusion
from shallowfusion.demo.shipped import model_directory
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.results import Transcription
from shallowfusion.scorers.loading import load_causal_lm
from shallowfusion.trusting import DISTRUSTED, Evidence, trust_floor
from tests.shipped import clip, decoder

RULE = fusion.internal_lm(0.8, 0.2)
NUMBERS = (2, 5, 7, 11)


@cache
def heard(floor: float | None, memory: float = 0.0, batch_size: int = 8) -> list[Transcription]:
    rule = RULE if floor is None else fusion.trusted(RULE, floor, memory)
    return decoder().transcribe([clip(i) for i in NUMBERS], rule=rule, beam_size=3, batch_size=batch_size)


def plain() -> list[Transcription]:
    return decoder(False).transcribe([clip(i) for i in NUMBERS], beam_size=3)


def same(one: Transcription, other: Transcription) -> bool:
    return one.best.token_ids == other.best.token_ids and one.best.total == pytest.approx(other.best.total, abs=1e-3)


def test_a_low_floor_is_the_fused_decoder() -> None:
    for own, fused in zip(heard(-50.0), heard(None), strict=True):
        assert same(own, fused)
        assert DISTRUSTED not in own.flags


def test_a_high_floor_is_the_plain_decoder_and_says_so() -> None:
    for own, alone in zip(heard(-0.001), plain(), strict=True):
        assert same(own, alone)
        assert DISTRUSTED in own.flags
        assert own.rule is not None
        assert not own.rule.fuses


def means() -> list[float]:
    return [own.best.parts["lm"] / len(own.best.tokens) for own in heard(None)]


def test_between_them_each_utterance_is_judged_for_itself() -> None:
    floor = sum(sorted(means())[1:3]) / 2
    results = heard(round(floor, 6), batch_size=2)
    assert [DISTRUSTED in own.flags for own in results] == [mean <= floor for mean in means()]
    for own, fused, alone in zip(results, heard(None), plain(), strict=True):
        assert same(own, alone if DISTRUSTED in own.flags else fused)


def test_a_session_remembers_over_batches_and_over_calls() -> None:
    floor, memory = round(sum(sorted(means())[1:3]) / 2, 6), 0.7
    at_once = [own.flags for own in heard(floor, memory)]
    assert [own.flags for own in heard(floor, memory, batch_size=1)] == at_once
    rule = fusion.trusted(RULE, floor, memory)
    evidence, flags = Evidence(), []
    for i in NUMBERS:
        encoded = decoder().encode([clip(i)])
        flags += [own.flags for own in decoder().decode(encoded, rule=rule, beam_size=3, evidence=evidence)]
    assert flags == at_once
    nats = 0.0
    for own in heard(None):
        nats = memory * nats + own.best.parts["lm"] - floor * len(own.best.tokens)
    assert evidence.nats == pytest.approx(nats, abs=1e-2)


def test_a_model_of_another_domain_falls_below_the_floor_of_the_right_one() -> None:
    floor = trust_floor(heard(None), 0.0)
    assert floor == pytest.approx(min(means()))
    wrong = load_causal_lm(str(model_directory("lm_general")), decoder().acoustic.scorer.device, decoder_dtype())
    other = FusionDecoder(decoder().acoustic, [wrong])
    results = other.transcribe([clip(i) for i in NUMBERS], rule=fusion.trusted(RULE, floor), beam_size=3)
    assert sum(DISTRUSTED in own.flags for own in results) >= 3


def decoder_dtype():
    return decoder().acoustic.scorer.model.dtype


def test_lists_without_a_language_model_have_no_floor() -> None:
    with pytest.raises(InvalidArgumentError, match="has no scores of a language model"):
        trust_floor(plain())


def test_stored_lists_cannot_be_ranked_by_trust() -> None:
    with pytest.raises(InvalidArgumentError, match="which an n-best list does not hold"):
        heard(None)[0].rerank(fusion.trusted(fusion.static(0.5), -1.0))
