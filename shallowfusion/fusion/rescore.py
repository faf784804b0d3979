"""Re-ranking of an n-best list from the parts stored with it (METHODS 8); no model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shallowfusion.config import require
from shallowfusion.fusion.rules import Rule
from shallowfusion.values import Hypothesis

__all__ = ["rescore"]

ACOUSTIC, INTERNAL, CTC = "asr", "ilm", "ctc"


def rescore(
    n_best: Sequence[Hypothesis],
    rule: Rule,
    *,
    length_penalty: float = 1.0,
    length_bonus: float = 0.0,
    ctc_weight: float | None = None,
) -> list[Hypothesis]:
    """Rank hypotheses by total / length ** length_penalty, total = sum_t asr[t] + sum_s weight[t, s] * lm_s[t] + bonus.

    With a ctc_weight, asr[t] above is (1 - ctc_weight) * asr[t] + ctc_weight * ctc[t].

    The end token takes part with the scores stored for it (a neutral end costs what the LM's favourite costs), unless
    rule.end_policy is "asr_only" or "end_factored": then with its acoustic score alone. A `catch_up` rule weighs the
    skipped tokens too. Lists decoded with a normaliser are ranked by the plain sum.

    Args:
        n_best: hypotheses whose tokens hold `parts`; the first part is acoustic, the others language models in order.
        ctc_weight: to be said for lists of joint CTC-attention decoding, whose tokens hold a part "ctc".

    Returns:
        The same hypotheses with new totals and scores, best first; ties keep their order.

    Raises:
        InvalidArgumentError: an empty list, a rule with another number of weights than the list has LM parts, or one
            whose weights depend on more than the list holds; a ctc_weight where it is missing or of no use.
    """
    require(len(n_best) > 0, "n_best must hold at least one hypothesis, got an empty list.")
    require(
        rule.is_linear,
        f"the rule {rule.name} weighs by the models' whole distributions, which an n-best list does not hold; "
        "decode with it, or rescore with a static or piecewise rule.",
    )
    names = [name for name in n_best[0].parts if name not in (ACOUSTIC, INTERNAL, CTC)]
    require(
        not rule.ilm_weight or INTERNAL in n_best[0].parts,
        f"the rule {rule} subtracts the internal LM, of which the list has no scores; decode with internal_lm first.",
    )
    require(
        len(rule.lm_weights) == len(names) or not rule.fuses,
        f"the rule {rule} weighs {len(rule.lm_weights)} language model(s), the list has parts of {len(names)}.",
    )
    has_ctc = CTC in n_best[0].parts
    require(
        has_ctc == (ctc_weight is not None),
        "the list has CTC parts; say which ctc_weight they have, 0 = none."
        if has_ctc
        else f"the list has no CTC parts for ctc_weight={ctc_weight}; decode with a ctc_weight first.",
    )
    scored = [_rescored(hypothesis, rule, names, length_bonus, ctc_weight or 0.0) for hypothesis in n_best]
    scored = [replace(h, score=h.total / max(1, len(h.tokens)) ** length_penalty) for h in scored]
    return sorted(scored, key=lambda hypothesis: -hypothesis.score)


def _rescored(
    hypothesis: Hypothesis, rule: Rule, names: Sequence[str], length_bonus: float, ctc_weight: float
) -> Hypothesis:
    tokens = []
    for step, token in enumerate(hypothesis.tokens):
        is_end = step >= len(hypothesis.token_ids)
        heard = token.parts[ACOUSTIC]
        if ctc_weight:
            heard = (1.0 - ctc_weight) * heard + ctc_weight * token.parts[CTC]
        total = heard + (0.0 if is_end else length_bonus)
        if not is_end or rule.end_policy not in ("asr_only", "end_factored"):
            weights = rule.lm_weights if rule.catch_up else rule.weights_at(step)
            total += sum(weight * token.parts[name] for weight, name in zip(weights, names, strict=False) if weight)
        if rule.ilm_weight:
            total -= rule.ilm_weight * rule.share_at(step) * token.parts[INTERNAL]
        tokens.append(replace(token, total=total))
    return replace(hypothesis, tokens=tuple(tokens), total=sum(token.total for token in tokens))
