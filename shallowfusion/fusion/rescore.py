"""Re-ranking of an n-best list from the parts stored with it (METHODS 8); no model runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from shallowfusion.config import require
from shallowfusion.fusion.rules import Rule
from shallowfusion.values import Hypothesis

__all__ = ["rescore"]

ACOUSTIC, INTERNAL = "asr", "ilm"


def rescore(
    n_best: Sequence[Hypothesis], rule: Rule, *, length_penalty: float = 1.0, length_bonus: float = 0.0
) -> list[Hypothesis]:
    """Rank hypotheses by total / length ** length_penalty, total = sum_t asr[t] + sum_s weight[t, s] * lm_s[t] + bonus.

    The end token takes part with the scores stored for it (a neutral end costs what the LM's favourite costs), unless
    rule.end_policy is "asr_only" or "end_factored": then with its acoustic score alone. A `catch_up` rule weighs the
    skipped tokens too. Lists decoded with a normaliser are ranked by the plain sum.

    Args:
        n_best: hypotheses whose tokens hold `parts`; the first part is acoustic, the others language models in order.

    Returns:
        The same hypotheses with new totals and scores, best first; ties keep their order.

    Raises:
        InvalidArgumentError: an empty list, a rule with another number of weights than the list has LM parts, or one
            whose weights depend on more than the list holds.
    """
    require(len(n_best) > 0, "n_best must hold at least one hypothesis, got an empty list.")
    require(
        rule.is_linear,
        f"the rule {rule.name} weighs by the models' whole distributions, which an n-best list does not hold; "
        "decode with it, or rescore with a static or piecewise rule.",
    )
    names = [name for name in n_best[0].parts if name not in (ACOUSTIC, INTERNAL)]
    require(
        not rule.ilm_weight or INTERNAL in n_best[0].parts,
        f"the rule {rule} subtracts the internal LM, of which the list has no scores; decode with internal_lm first.",
    )
    require(
        len(rule.lm_weights) == len(names) or not rule.fuses,
        f"the rule {rule} weighs {len(rule.lm_weights)} language model(s), the list has parts of {len(names)}.",
    )
    scored = [_rescored(hypothesis, rule, names, length_penalty, length_bonus) for hypothesis in n_best]
    return sorted(scored, key=lambda hypothesis: -hypothesis.score)


def _rescored(
    hypothesis: Hypothesis, rule: Rule, names: Sequence[str], length_penalty: float, length_bonus: float
) -> Hypothesis:
    tokens = []
    for step, token in enumerate(hypothesis.tokens):
        is_end = step >= len(hypothesis.token_ids)
        total = token.parts[ACOUSTIC] + (0.0 if is_end else length_bonus)
        if not is_end or rule.end_policy not in ("asr_only", "end_factored"):
            weights = rule.lm_weights if rule.catch_up else rule.weights_at(step)
            total += sum(weight * token.parts[name] for weight, name in zip(weights, names, strict=False) if weight)
        if rule.ilm_weight:
            total -= rule.ilm_weight * rule.share_at(step) * token.parts[INTERNAL]
        tokens.append(dataclasses.replace(token, total=total))
    total = sum(token.total for token in tokens)
    score = total / max(1, len(tokens)) ** length_penalty
    return dataclasses.replace(hypothesis, tokens=tuple(tokens), total=total, score=score)
