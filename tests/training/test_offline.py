"""Offline searches: what re-ranking expects is what ranking by the decoder's own rule gives."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shallowfusion import DecodingOptions, fusion
from shallowfusion.evaluation.line_search import best_first
from shallowfusion.evaluation.nbest import ListedHypothesis, NBestList, list_of
from shallowfusion.training.offline import LENGTH, OfflineSearch, pooled
from tests.tiny import DEVICES, decoder_on, random_encoder_output

RANKINGS = {
    "mean": {},
    "half": {"length_penalty": 0.5},
    "sum": {"length_penalty": 0.0},
    "whisper": {"stop_rule": "whisper", "length_penalty": None},
    "GNMT": {"stop_rule": "whisper", "length_penalty": 0.6},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RANKINGS)
@pytest.mark.parametrize("bonus", [0.0, 0.3])
def test_scaled_parts_rank_as_the_decoder_ranks(name: str, bonus: float, device: str) -> None:
    decoder = decoder_on(device, 3)
    encoded = random_encoder_output(decoder.acoustic, 6, seed=5).to(device)
    options = DecodingOptions(
        beam_size=6, n_best=6, max_new_tokens=24, rule=fusion.static(0.6), length_bonus=bonus,
        suppress_tokens=[41, 42, 43], **RANKINGS[name],
    )  # fmt: skip
    compared = 0
    for i, result in enumerate(decoder.decode(encoded, options)):
        kept = replace(result, n_best=tuple(own for own in result.n_best if own.ended))
        if len(kept.n_best) < 2:
            continue
        listed = list_of(kept, str(i))
        (scaled,) = pooled([{str(i): listed}], options)
        ranked = best_first(scaled, {"asr": 1.0, "lm": 0.6, LENGTH: bonus})
        assert [own.text for own in ranked] == [own.text for own in listed.hypotheses]
        compared += 1
    assert compared >= 2


def hypothesis(text: str, asr: float, lm: float, tokens: int = 4) -> ListedHypothesis:
    return ListedHypothesis(text, asr, {"asr": asr, "lm": lm}, tokens)


def test_pools_hold_each_text_once_with_its_likeliest_tokens() -> None:
    one = {"a": NBestList("a", (hypothesis("x", -4, -8), hypothesis("y", -8, -4)), "x")}
    two = {"a": NBestList("a", (hypothesis("x", -2, -9), hypothesis("z", -6, -4)), "x")}
    (found,) = pooled([one, two], DecodingOptions())
    assert [own.text for own in found.hypotheses] == ["x", "y", "z"]
    assert found.hypotheses[0].parts == {"asr": -0.5, "lm": -2.25, LENGTH: 0.75}
    assert found.reference == "x"


def test_ctc_and_attention_share_the_acoustic_weight() -> None:
    listed = ListedHypothesis("x", -4, {"asr": -4.0, "ctc": -8.0, "lm": -2.0}, 4)
    (found,) = pooled([{"a": NBestList("a", (listed,), "x")}], DecodingOptions(ctc_weight=0.25, length_penalty=0.0))
    assert found.hypotheses[0].parts == {"asr": -5.0, "lm": -2.0, LENGTH: 3.0}


def test_the_search_finds_the_weight_at_which_the_right_text_wins() -> None:
    lists = {
        "a": NBestList("a", (hypothesis("wrong", -4, -12), hypothesis("right", -8, -4)), "right"),
        "b": NBestList("b", (hypothesis("good", -4, -8), hypothesis("bad", -12, -4)), "good"),
    }
    search = OfflineSearch(pooled([lists], DecodingOptions()), ["lm"])
    curve = search.curve("lm")
    assert curve.best.errors == 0
    assert (curve.best.low, curve.best.high) == (pytest.approx(0.5), pytest.approx(2.0))
    choice = search.search([{"lm": 0.1}])
    assert choice.errors == 0
    assert 0.5 < choice.weights["lm"] < 2.0
    assert search.search([{"lm": 0.1}], [LENGTH]).errors == 0
