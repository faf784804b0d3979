"""How scores are weighed and summed: rules, and the one fused step."""

from shallowfusion.fusion.rescore import rescore
from shallowfusion.fusion.rules import Rule, article, piecewise, static
from shallowfusion.fusion.step import fused_step, row_statistics

__all__ = ["Rule", "article", "fused_step", "piecewise", "rescore", "row_statistics", "static"]
