"""Explanations: the numbers add up to the search's own, and the place where the paths part is the right one."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import cache

import pytest
import torch

from shallowfusion import DecodingOptions, FusionDecoder, fusion
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.training.explanation import Explanation, explain
from shallowfusion.training.explanation_page import explanation_data, explanation_lines, explanation_page
from tests.shipped import clip, decoder
from tests.tiny import tiny_decoder

RULES = {
    "static": fusion.static(0.8),
    "internal LM": fusion.internal_lm(0.7, 0.1),
    "catch up": fusion.piecewise(0.8, 3, catch_up=True),
    "gate": fusion.margin_gate(1.0, form="local"),
    "advantage": fusion.confidence_gate(1.0, 0.5, form="advantage"),
    "evidence": fusion.evidence_gate(0.8, 0.2),
    "mixture": fusion.uadf_asr_primary(),
}


@cache
def explained(name: str) -> Explanation:
    return explain(decoder(), clip(2), DecodingOptions(beam_size=3, rule=RULES[name], length_bonus=0.1))


@pytest.mark.parametrize("name", RULES)
def test_increments_add_up_to_the_total_the_search_found(name: str) -> None:
    found = explained(name)
    best = found.result.best
    assert "".join(step.text for step in found.steps[:-1]).strip() == best.text
    assert found.steps[-1].text == "<end>"
    if name == "evidence":  # its weights follow the best hypothesis of the beam, not this path
        return
    for step, token in zip(found.steps, best.tokens, strict=True):
        assert step.increment == pytest.approx(token.total, abs=1e-3)
        assert step.parts == pytest.approx(dict(token.parts), abs=1e-3)
    assert found.totals["fused"]["total"] == pytest.approx(best.total, abs=5e-3)
    assert found.totals["fused"]["score"] == pytest.approx(best.score, abs=1e-3)


def test_the_paths_part_where_the_tokens_differ_and_the_better_score_won() -> None:
    found = explained("static")
    assert found.result.text != found.alone.text
    divergence = found.divergence
    assert divergence is not None
    own, other = found.result.best.token_ids, found.alone.best.token_ids
    assert own[: divergence.position] == other[: divergence.position]
    assert divergence.fused.id == own[divergence.position] != other[divergence.position] == divergence.alone.id
    assert divergence.fused.weights == divergence.alone.weights == {"asr": 1.0, "lm": pytest.approx(0.8)}
    assert found.totals["fused"]["score"] > found.totals["alone"]["score"]
    assert found.totals["alone"]["asr"] >= found.totals["fused"]["asr"]


def test_contributions_and_what_else_there_was_make_the_total() -> None:
    found = explained("static")
    for totals in found.totals.values():
        assert totals["asr"] + totals["lm"] + totals["other"] == pytest.approx(totals["total"])
    assert found.totals["fused"]["other"] == pytest.approx(0.1 * (len(found.steps) - 1), abs=1e-3)


def test_alternatives_are_the_best_tokens_each_model_has_words_for() -> None:
    for step in explained("internal LM").steps:
        assert set(step.alternatives) == {"asr", "lm", "ilm", "fused"}
        for name, best in step.alternatives.items():
            scores = [own.score for own in best]
            assert scores == sorted(scores, reverse=True)
            assert all(own.text for own in best)
            if name in ("lm", "ilm"):  # under the neutral end neither has a word for it
                assert "<end>" not in [own.text for own in best]


def test_a_language_model_that_changes_nothing_is_told_so() -> None:
    found = explain(decoder(), clip(2), DecodingOptions(beam_size=2, rule=fusion.static(0.001)))
    assert found.divergence is None
    assert found.result.text == found.alone.text
    assert "changed nothing" in "\n".join(explanation_lines(found))
    assert "Nowhere" in explanation_page(found, "clip")


def test_lines_page_and_data_tell_the_same(capsys) -> None:
    found = explained("static")
    said = "the patient does drink alcohol and also uses illicit drugs"
    lines = explanation_lines(found, said)
    assert lines[0] == f"said   {said}"
    assert sum(line.startswith(">") for line in lines) == 1
    data = json.loads(json.dumps(explanation_data(found, said), allow_nan=False))
    assert data["divergence"]["position"] == found.divergence.position
    assert len(data["tokens"]) == len(found.steps)
    page = explanation_page(found, "a < b.flac", said)
    assert "a &lt; b.flac" in page
    assert "<del>" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_a_forbidden_token_has_an_increment_of_minus_infinity_and_json_says_null() -> None:
    found = explained("static")
    forbidden = dataclasses.replace(found.steps[0], increment=-math.inf)
    data = explanation_data(dataclasses.replace(found, steps=(forbidden, *found.steps[1:])))
    assert data["tokens"][0]["increment"] is None


def test_without_a_say_there_is_nothing_to_explain() -> None:
    for own, options in ((FusionDecoder(tiny_decoder().acoustic), {}), (tiny_decoder(), {"lm_weight": 0.0})):
        with pytest.raises(InvalidArgumentError, match=r"under .* none has one"):
            explain(own, torch.zeros(16000), DecodingOptions(**options))


def test_ctc_weights_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="ctc_weight"):
        explain(decoder(), clip(2), DecodingOptions(rule=fusion.static(0.8), ctc_weight=0.2))
