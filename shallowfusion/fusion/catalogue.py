"""The fusion rules by name; each constructor states its formula and where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shallowfusion.config import require
from shallowfusion.fusion.delays import Delay, ProxyForm, ScoreSpan, SpellingUnit, Tail, Trigger
from shallowfusion.fusion.gates import (
    AgreementGate,
    ConfidenceGate,
    EntropyGate,
    EvidenceGate,
    Form,
    Gate,
    InverseEntropyGate,
    MarginGate,
)
from shallowfusion.fusion.learned_gate import LearnedGate
from shallowfusion.fusion.mixtures import Mixture
from shallowfusion.fusion.rules import EndPolicy, IlmVariant, Rule, as_weights
from shallowfusion.fusion.trust import Trust

__all__ = [
    "agreement_gate",
    "article",
    "by_class",
    "confidence_gate",
    "delayed",
    "density_ratio",
    "entropy_gate",
    "evidence_gate",
    "gated",
    "internal_lm",
    "inverse_entropy_gate",
    "late_fusion",
    "learned",
    "lodr",
    "margin_gate",
    "mixture",
    "piecewise",
    "static",
    "trusted",
    "uadf",
    "uadf_asr_primary",
]

Weight = float | Sequence[float]


def static(weight: Weight) -> Rule:
    """Shallow fusion with a constant weight: asr + weight * lm (METHODS 1.2; 1503.03535, 1712.01996)."""
    return Rule("static", as_weights(weight))


def piecewise(weight: Weight, initial_steps: int, ramp: int = 0, catch_up: bool = False) -> Rule:
    """Acoustic scores alone for the first `initial_steps` tokens, then `static` (METHODS 1.4).

    Hypotheses that finish before `initial_steps` carry no LM cost: keep a length penalty above 0 or set
    min_new_tokens = initial_steps.
    """
    return Rule("piecewise", as_weights(weight), initial_steps, ramp, catch_up)


def article(weight: float = 0.24, initial_steps: int = 2) -> Rule:
    """The published Whisper + GPT-2 recipe: piecewise, the end token without any LM term (METHODS 1.3, 1.4).

    That end policy favours stopping early the more, the larger the weight and the wider the beam (METHODS 1.5).
    """
    return Rule("article", as_weights(weight), initial_steps, end_policy="asr_only")


def gated(weight: Weight, gate: Gate, form: Form = "local", initial_steps: int = 0) -> Rule:
    """asr + weight * gate(row) * lm with any gate, also one of your own (METHODS 11.2).

    Args:
        form: "local" renormalises each fused row, "advantage" measures the LM from its favourite, "plain" does
            neither, and then a hypothesis may dodge the LM by passing through rows in which the gate is shut.
    """
    return Rule("gated", as_weights(weight), initial_steps, gate=gate, form=form)


def entropy_gate(weight: Weight, squash: str = "sigmoid", form: Form = "local") -> Rule:
    """Weight * (2 sigmoid(H_asr) - 1), or weight * H_asr / ln(vocab) with squash="vocabulary" (METHODS 11.2)."""
    return Rule("entropy_gate", as_weights(weight), gate=EntropyGate(squash), form=form)  # type: ignore[arg-type]


def confidence_gate(weight: Weight, power: float = 1.0, form: Form = "local") -> Rule:
    """Weight * (1 - max P_asr) ** power (METHODS 11.2)."""
    return Rule("confidence_gate", as_weights(weight), gate=ConfidenceGate(power), form=form)


def margin_gate(weight: Weight, threshold: float = 2.0, width: float = 1.0, form: Form = "local") -> Rule:
    """Weight * sigmoid((threshold - margin) / width), margin between the two best acoustic tokens in nats."""
    return Rule("margin_gate", as_weights(weight), gate=MarginGate(threshold, width), form=form)


def inverse_entropy_gate(weight: Weight, form: Form = "local") -> Rule:
    """Weight * H_asr / (H_asr + H_lm): the LM counts where it is sure and the acoustic model is not (METHODS 11.2)."""
    return Rule("inverse_entropy_gate", as_weights(weight), gate=InverseEntropyGate(), form=form)


def agreement_gate(weight: Weight, top_k: int = 10, form: Form = "local") -> Rule:
    """Weight where the LM's favourite is among the acoustic model's best `top_k` tokens, else 0 (METHODS 11.2)."""
    return Rule("agreement_gate", as_weights(weight), gate=AgreementGate(top_k), form=form)


def evidence_gate(
    weight: Weight,
    ilm_weight: float = 0.2,
    scale: float = 0.5,
    margin: float = 0.0,
    variant: IlmVariant = "zero_context",
) -> Rule:
    """`internal_lm`, both weights times sigmoid(scale * (log P_lm - log P_ilm - margin * tokens)) of what was said.

    For language models that may be of the wrong domain: see `gates.EvidenceGate`.
    """
    require(ilm_weight > 0, f"ilm_weight must be above 0, got {ilm_weight!r}; the gate compares with the internal LM.")
    gate = EvidenceGate(scale, margin)
    return Rule(
        "evidence_gate", as_weights(weight), gate=gate, form="plain", ilm_weight=ilm_weight, ilm_variant=variant
    )


def mixture(priors: Sequence[float], weight: float, forgetting: float | None = None) -> Rule:
    """asr + weight * log sum_k prior_k * P_k: several language models as one distribution (METHODS 11.3).

    With `forgetting` (0.9 to 1) the priors follow the text: the model that predicts a hypothesis best gains weight.
    """
    return Rule("mixture", (weight,), lm_mixture=tuple(priors), forgetting=forgetting)


def by_class(rule: Rule, **factors: float) -> Rule:
    """`rule` with its language-model weights multiplied by a factor for some tokens: by_class(static(0.5), digits=0.2).

    Args:
        factors: end, timestamps, digits, word_initial; where classes overlap the factors multiply.
    """
    known = ("end", "timestamps", "digits", "word_initial")
    unknown = sorted(set(factors) - set(known))
    require(not unknown, f"unknown token class {', '.join(unknown)}; known are {', '.join(known)}.")
    return replace(rule, class_factors=tuple(sorted(factors.items())))


def uadf(end_policy: EndPolicy = "lm") -> Rule:
    """Uncertainty-aware dynamic fusion as published: P_lm + (sigmoid(H_lm) - 0.5) * P_asr (2402.05457, eq. 10).

    The language model is primary and must know what was said, for instance from an n-best prompt; calibrate both
    temperatures first. Divided by 1 + w for beam search; greedy search (beam_size=1) is the published decoder.
    """
    return Rule("uadf", (1.0,), end_policy=end_policy, mixture=Mixture("lm"))


def uadf_asr_primary(end_policy: EndPolicy = "neutral") -> Rule:
    """UADF with swapped roles, for an LM that is deaf: P_asr + (sigmoid(H_asr) - 0.5) * P_lm (METHODS 3.4)."""
    return Rule("uadf_asr_primary", (1.0,), end_policy=end_policy, mixture=Mixture("asr"))


def late_fusion(weight: float, primary: str = "asr", end_policy: EndPolicy = "neutral") -> Rule:
    """P_primary + weight * P_other with a constant weight: the baseline that UADF has to beat (METHODS 3.6)."""
    return Rule("late_fusion", (1.0,), end_policy=end_policy, mixture=Mixture(primary, weight))  # type: ignore[arg-type]


def internal_lm(weight: Weight, ilm_weight: float, variant: IlmVariant = "zero_context") -> Rule:
    """asr + weight * lm - ilm_weight * ilm: the acoustic decoder's own language model is taken out (METHODS 6).

    Nothing is subtracted from the end and special tokens; the internal log-prob is kept above -20.

    Args:
        variant: "zero_encoder" (encoder output 0), "zero_context" (no cross-attention), "mean_context" (the mean over
            the recording's frames), "silence" (the encoder's output for silence), "trained" (a vector per layer),
            "source_lm" (the last language model that is loaded, see `density_ratio`).
    """
    return Rule("internal_lm", as_weights(weight), ilm_weight=ilm_weight, ilm_variant=variant)


def density_ratio(weight: Weight, source_weight: float) -> Rule:
    """asr + weight * lm - source_weight * source: the domain's text over that of the acoustic model (2002.11268).

    `source` is the last language model that is loaded: one of the acoustic model's training transcripts. As with
    `internal_lm` nothing is subtracted from the end and special tokens, and its log-prob is kept above -20.
    """
    return _over_source("density_ratio", weight, source_weight)


def lodr(weight: Weight, source_weight: float) -> Rule:
    """`density_ratio` with a model of low order as the source: a bigram, `build-ngram --order 2` (2203.16776)."""
    return _over_source("lodr", weight, source_weight)


def _over_source(name: str, weight: Weight, source_weight: float) -> Rule:
    require(source_weight > 0, f"source_weight must be above 0, got {source_weight!r}; without it the rule is static.")
    return Rule(name, as_weights(weight), ilm_weight=source_weight, ilm_variant="source_lm")


def trusted(rule: Rule, floor: float, memory: float = 0.0) -> Rule:
    """`rule`, but the acoustic model alone where log P_lm(fused transcript) <= floor * tokens (see `trust.Trust`).

    For language models that may be of the wrong domain. Price: utterances that are given up are decoded twice.

    Args:
        floor: nats per token, below 0; `trusting.trust_floor` or `shallowfusion tune --trust` has it from recordings
            that fit.
        memory: 0 = every utterance for itself; above, up to below 1, the recordings of one call are one session, in
            which evidence adds up and fades by this factor an utterance.
    """
    require(rule.fuses, f"the rule {rule} gives no language model a say, so there is none to trust.")
    return replace(rule, trust=Trust(floor, memory))


def delayed(
    weight: float,
    trigger: Trigger = "interval",
    interval: int | None = 8,
    score_span: ScoreSpan = "all",
    *,
    proxy_weight: float | None = None,
    proxy_form: ProxyForm = "replace",
    unit: SpellingUnit = "auto",
    tail: Tail | None = None,
    lower: bool = False,
) -> Rule:
    """asr + weight * lm of the words so far, asked only of what survived, on any tokenizer (2501.09258; METHODS 4).

    For models that are dear or tokenise otherwise. The total of a finished hypothesis is that of `static`; on the way
    it lacks what the language model was not asked yet. With the same tokenizer and interval=1 this is shallow fusion
    that prunes first; with interval=None it is rescoring of the final beam. See `Delay` for the other names.

    Args:
        proxy_weight: of a second language model, on the acoustic tokens, that scores every step; None = there is none.
        tail: see `Delay`; None = "free" where a second model's scores stand in for it, else "mean".
    """
    if tail is None:
        tail = "mean" if proxy_weight is None or proxy_form == "add" else "free"
    weights = (weight,) if proxy_weight is None else (weight, proxy_weight)
    delay = Delay(trigger, interval, score_span, unit, tail, lower, proxy_form)
    return Rule("delayed", weights, delay=delay)


def learned(path: str | Path, form: Form | None = None) -> Rule:
    """A gate trained by `shallowfusion train-gate`: weight of each LM in each row by a small network (METHODS 11.3).

    Args:
        path: directory of the gate; it is refused by other models than it was trained for.
        form: None = the one it was trained in.
    """
    gate = LearnedGate.load(path)
    weights = (gate.settings.largest_weight,) * gate.settings.num_models
    return Rule("learned", weights, gate=gate, form=gate.form if form is None else form)
