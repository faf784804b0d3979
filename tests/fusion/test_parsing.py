"""Rules as text: every constructor can be said, and nothing but constructors and literals is understood."""

from __future__ import annotations

import pytest

from shallowfusion import fusion
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.fusion.parsing import RULE_NAMES, parse_rule

SAME = {
    "static(0.24)": fusion.static(0.24),
    " static((0.3, 0.1)) ": fusion.static((0.3, 0.1)),
    "piecewise(0.3, 2, ramp=4, catch_up=True)": fusion.piecewise(0.3, 2, 4, True),
    "article()": fusion.article(),
    "internal_lm(0.8, 0.2, variant='silence')": fusion.internal_lm(0.8, 0.2, "silence"),
    "internal_lm(weight=[0.8, 0.1], ilm_weight=0.2)": fusion.internal_lm((0.8, 0.1), 0.2),
    "entropy_gate(1, squash='vocabulary', form='advantage')": fusion.entropy_gate(1, "vocabulary", "advantage"),
    "margin_gate(0.8, -1.5, 2)": fusion.margin_gate(0.8, -1.5, 2),
    "by_class(static(0.5), digits=0.2)": fusion.by_class(fusion.static(0.5), digits=0.2),
    "mixture([0.7, 0.3], 0.5, forgetting=0.95)": fusion.mixture([0.7, 0.3], 0.5, 0.95),
    "uadf(end_policy='asr_only')": fusion.uadf("asr_only"),
    "late_fusion(0.4, primary='lm')": fusion.late_fusion(0.4, "lm"),
}


@pytest.mark.parametrize("text", SAME)
def test_text_makes_the_rule_the_constructor_makes(text: str) -> None:
    assert parse_rule(text) == SAME[text]


def test_every_constructor_but_the_one_that_takes_an_object_can_be_said() -> None:
    assert {*RULE_NAMES, "gated"} <= set(fusion.__all__)
    for name in RULE_NAMES:
        with pytest.raises(InvalidArgumentError, match=r"does not fit|refused"):
            parse_rule(f"{name}(nonsense=1)")


REFUSED = {
    "shallow(0.3)": "unknown rule 'shallow'; known are agreement_gate, article",
    "gated(0.3, 1)": "unknown rule 'gated'",
    "fusion.static(0.3)": "unknown rule 'fusion.static'",
    "static": "is no call",
    "0.3": "is no call",
    "static(0.3": "cannot be read",
    "": "must be text",
    "static(weight)": "must be literals",
    "static(__import__('os').getcwd())": "must be literals",
    "static(*[0.3])": "must be literals",
    "static(**{'weight': 0.3})": "must be literals",
    "static(0.1 + 0.2)": "must be literals",
    "static()": r"does not fit static\(weight\)",
    "static(0.3, 2)": "does not fit",
    "static(-0.3)": "is refused: lm_weight must be finite",
    "static('much')": "is refused: weight must be a number",
    "static(None)": "is refused: weight must be a number",
    "evidence_gate(0.3, ilm_weight='x')": "does not fit",
    "internal_lm(0.3, 0.2, variant='deaf')": "is refused: ilm_variant",
    "confidence_gate(0.3, power=0)": "is refused: power",
    "by_class(magic(0.5), digits=0.2)": "must be literals",
    "by_class(0.5, digits=0.2)": "does not fit",
    "by_class(static(-1), digits=0.2)": "is refused: lm_weight",
    "agreement_gate(0.3, top_k=0)": "is refused: top_k",
    "(" * 500 + ")" * 500: "cannot be read",
}


@pytest.mark.parametrize("text", REFUSED)
def test_anything_else_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=REFUSED[text]):
        parse_rule(text)
