"""How scores are weighed and summed: rules, and the one fused step."""

from shallowfusion.fusion.catalogue import (
    agreement_gate,
    article,
    by_class,
    confidence_gate,
    delayed,
    density_ratio,
    entropy_gate,
    evidence_gate,
    gated,
    internal_lm,
    inverse_entropy_gate,
    late_fusion,
    learned,
    lodr,
    margin_gate,
    mixture,
    piecewise,
    static,
    trusted,
    uadf,
    uadf_asr_primary,
)
from shallowfusion.fusion.parsing import parse_rule
from shallowfusion.fusion.rescore import rescore
from shallowfusion.fusion.rules import Rule
from shallowfusion.fusion.step import fused_step, row_statistics

__all__ = [
    "Rule",
    "agreement_gate",
    "article",
    "by_class",
    "confidence_gate",
    "delayed",
    "density_ratio",
    "entropy_gate",
    "evidence_gate",
    "fused_step",
    "gated",
    "internal_lm",
    "inverse_entropy_gate",
    "late_fusion",
    "learned",
    "lodr",
    "margin_gate",
    "mixture",
    "parse_rule",
    "piecewise",
    "rescore",
    "row_statistics",
    "static",
    "trusted",
    "uadf",
    "uadf_asr_primary",
]
