"""Options and rules refuse what they cannot mean, in one sentence."""

from __future__ import annotations

import pytest

from shallowfusion import DecodingOptions, fusion
from shallowfusion.errors import InvalidArgumentError

BAD = {
    "beam_size must": {"beam_size": 0},
    "beam_size must be an": {"num_beams": -2},
    "n_best must be at most": {"beam_size": 2, "n_best": 3},
    "n_best must be an": {"n_best": 0},
    "lm_weight must be finite and >= 0, got -0.3; to subtract an LM use ilm_weight": {"lm_weight": -0.3},
    "lm_weight must be finite": {"lm_weight": float("nan")},
    "initial_steps must be an integer": {"lm_weight": 0.3, "initial_steps": -1},
    "give either rule or lm_weight": {"rule": fusion.static(0.1), "lm_weight": 0.2},
    "rule must be a fusion rule": {"rule": 0.3},
    "end_policy must be one of": {"end_policy": "never"},
    "end_threshold must be": {"end_threshold": 0.5},
    "stop_rule must be": {"stop_rule": "google"},
    "early_stopping must be": {"early_stopping": "sometimes"},
    "length_penalty must be a finite": {"length_penalty": float("inf")},
    "None is for stop_rule='whisper'": {"length_penalty": None},
    "patience must be": {"patience": 0.0},
    "length_bonus must be finite": {"length_bonus": float("nan")},
    "max_new_tokens must be": {"max_new_tokens": 0},
    "min_new_tokens must be": {"min_new_tokens": -1},
    "task must be": {"task": "summarise"},
    "without_timestamps must be": {"without_timestamps": "no"},
    "max_initial_timestamp must be": {"max_initial_timestamp": -0.5},
    "lm_temperature must be": {"lm_temperature": 0.0},
    "batch_size must be": {"batch_size": 0},
    "unknown option beamsize; known are": {"beamsize": 3},
}


@pytest.mark.parametrize("words", BAD)
def test_bad_options_are_refused_with_a_reason(words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        DecodingOptions.of(**BAD[words])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((-1.0,), "lm_weight must be finite and >= 0"),
        ((float("inf"),), "finite"),
        (("0.3",), "number or a sequence"),
        (([0.1, "x"],), "lm_weight must be finite"),
    ],
)
def test_bad_weights_are_refused(arguments: tuple, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        fusion.static(*arguments)


def test_a_rule_must_fit_the_number_of_models() -> None:
    with pytest.raises(InvalidArgumentError, match="weighs 1 language model"):
        DecodingOptions(lm_weight=0.3).resolved_rule(0)
    with pytest.raises(InvalidArgumentError, match="weighs 2 language model"):
        DecodingOptions(rule=fusion.static([0.1, 0.2])).resolved_rule(1)
    assert DecodingOptions(lm_weight=0.0).resolved_rule(0).lm_weights == ()
    assert DecodingOptions().resolved_rule(0).lm_weights == ()
    assert DecodingOptions().resolved_rule(1).lm_weights == (0.24,)


def test_a_rule_shows_what_it_resolved_to() -> None:
    shown = repr(DecodingOptions(lm_weight=0.3, initial_steps=2).resolved_rule(1))
    assert "piecewise" in shown
    assert "0.3" in shown
    assert "initial_steps=2" in shown
    assert fusion.article().end_policy == "asr_only"


def test_num_beams_is_beam_size() -> None:
    assert DecodingOptions(num_beams=7) == DecodingOptions(beam_size=7)
