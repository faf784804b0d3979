"""The systems of `bench.rules` and the numbers that are tried for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from shallowfusion import fusion
from shallowfusion.fusion import Rule
from shallowfusion.fusion.gates import FORMS

__all__ = ["ALONE", "Trial", "medical_trials", "short_trials"]


@dataclass(frozen=True)
class Trial:
    """One system with one choice of its parameters.

    Args:
        decoder: "one" language model, "both", or one and the "source" that is subtracted.
        rerank: of a list decoded with `rule`.
        risk_scale: minimum Bayes risk instead of the best total.
    """

    system: str
    rule: Rule
    asr_temperature: float = 1.0
    decoder: str = "one"
    beam_size: int = 5
    rerank: Rule | None = None
    risk_scale: float | None = None

    @property
    def key(self) -> str:
        """What makes it another trial, as text."""
        extra = [f"T={self.asr_temperature:g}", f"beam={self.beam_size}"]
        extra += [] if self.rerank is None else [f"rerank={self.rerank!r}"]
        extra += [] if self.risk_scale is None else [f"risk={self.risk_scale:g}"]
        return f"{self.system}: {self.rule!r} {' '.join(extra)}"


ALONE = Trial("ASR alone", fusion.static(0.0))


def medical_trials() -> list[Trial]:
    """The grid of every system for a strong language model."""
    found = _sums((0.2, 0.4, 0.6, 0.8, 1.0), (0.6, 0.8, 1.0))
    found += [Trial("article", fusion.article(w, 2)) for w in (0.24, 0.6, 0.8)]
    found += [Trial("uadf, as published", fusion.uadf(), t) for t in (1.0, 2.0)]
    found += [Trial("uadf, ASR primary", fusion.uadf_asr_primary(), t) for t in (1.0, 2.0, 3.0)]
    found += [Trial("late fusion", fusion.late_fusion(w), t) for w in (0.25, 0.5, 1.0) for t in (1.0, 2.0)]
    found += _gates((0.8, 1.5, 3.0), FORMS, (1.0, 2.0))
    found += _internal((0.6, 0.8, 1.0), (0.1, 0.2, 0.3))
    gates = product((0.1, 0.3), (0.7, 0.9, 1.1))
    found += [Trial("evidence gate", fusion.evidence_gate(0.8, 0.2, s, m)) for s, m in gates]
    found += _two(product((0.6, 0.8), (0.05, 0.1, 0.2)), ())
    found += _lists((0.2, 0.4, 0.6, 0.8), 0.8)
    over = list(product((0.8, 1.0), (0.1, 0.2, 0.3)))
    found += [Trial("density ratio", fusion.density_ratio(w, s), decoder="both") for w, s in over]
    return found + [Trial("LODR", fusion.lodr(w, s), decoder="source") for w, s in over]


def short_trials() -> list[Trial]:
    """A thinner grid, with small weights too: for a language model of which nothing is known."""
    found = _sums((0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0), (0.2, 0.4, 0.6))
    found += [Trial("article", fusion.article(w, 2)) for w in (0.24, 0.4, 0.6)]
    found += [Trial("uadf, as published", fusion.uadf())]
    found += [Trial("uadf, ASR primary", fusion.uadf_asr_primary(), t) for t in (1.0, 2.0)]
    found += [Trial("late fusion", fusion.late_fusion(w), 2.0) for w in (0.25, 0.5)]
    found += _gates((0.4, 0.8), ("plain",), (2.0,))
    found += _internal((0.2, 0.4, 0.6), (0.05, 0.1, 0.2))
    gates = product((0.3, 0.6), (0.1, 0.3), (0.3, 0.7))
    found += [Trial("evidence gate", fusion.evidence_gate(w, 0.1, s, m)) for w, s, m in gates]
    found += _two(product((0.2, 0.4, 0.6), (0.05, 0.1)), (0.2, 0.4, 0.6))
    return found + _lists((0.1, 0.2, 0.4, 0.6), 0.4)


def _sums(constants: Sequence[float], weights: Sequence[float]) -> list[Trial]:
    found = [Trial("static", fusion.static(w)) for w in constants]
    found += [Trial("piecewise", fusion.piecewise(w, n)) for w in weights for n in (2, 6)]
    return found + [Trial("piecewise, catch-up", fusion.piecewise(w, 4, catch_up=True)) for w in weights]


def _gates(weights: Sequence[float], forms: Sequence[str], temperatures: Sequence[float]) -> list[Trial]:
    found = []
    for form, weight, temperature in product(forms, weights, temperatures):
        gates = {
            "entropy gate": fusion.entropy_gate(weight, form=form),
            "confidence gate": fusion.confidence_gate(weight, form=form),
            "margin gate": fusion.margin_gate(weight, threshold=3.0, form=form),
            "inverse-entropy gate": fusion.inverse_entropy_gate(weight, form=form),
            "agreement gate": fusion.agreement_gate(weight, top_k=3, form=form),
        }
        found += [Trial(name, rule, temperature) for name, rule in gates.items()]
    return found


def _internal(weights: Sequence[float], ilm_weights: Sequence[float]) -> list[Trial]:
    pairs = product(weights, ilm_weights)
    return [Trial("internal LM", fusion.internal_lm(w, i)) for w, i in pairs]


def _two(pairs: product[tuple[float, float]], mixed: Sequence[float]) -> list[Trial]:
    found = [Trial("two LMs", fusion.static([w, v]), decoder="both") for w, v in pairs]
    rules = [fusion.mixture([0.5, 0.5], w, forgetting=0.95) for w in mixed]
    return found + [Trial("mixture of two LMs", rule, decoder="both") for rule in rules]


def _lists(weights: Sequence[float], searched: float) -> list[Trial]:
    found = []
    for weight in weights:
        ranked = Trial("rescoring, 20-best of ASR alone", ALONE.rule, beam_size=20, rerank=fusion.static(weight))
        found.append(ranked)
        found += [replace(ranked, system="rescoring and MBR", risk_scale=k) for k in (0.3, 1.0)]
    risks = (0.1, 0.3, 1.0)
    return found + [Trial("static and MBR", fusion.static(searched), beam_size=20, risk_scale=k) for k in risks]
