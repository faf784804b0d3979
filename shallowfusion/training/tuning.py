"""The choice of a rule and its numbers on a development set: offline where exact, by decoding where not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from shallowfusion.config import require
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.evaluation.line_search import ErrorCurve
from shallowfusion.evaluation.nbest import NBestList
from shallowfusion.evaluation.significance import holm, sign_flip_test
from shallowfusion.evaluation.word_errors import WordErrors
from shallowfusion.fusion.parsing import parse_rule
from shallowfusion.fusion.trust import floor_of, likelihood
from shallowfusion.options import DecodingOptions
from shallowfusion.training.families import DEFAULT_FAMILIES, drawn_rule
from shallowfusion.training.offline import INTERNAL, LENGTH, OfflineChoice, OfflineSearch, pooled
from shallowfusion.training.session import TunedSet
from shallowfusion.trusting import alone_options

__all__ = ["Tried", "Tuning", "TuningSettings", "tune"]

END_THRESHOLDS = (1.2, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class TuningSettings:
    """How much is tried.

    Args:
        grid: weights decoded with `static`; the lists that the offline search works on.
        families: rules whose numbers are drawn.
        num_trials: drawn rules that are decoded.
        seed: of the draws.
        rules: further rules, as text, decoded as they are.
        with_internal_lm: search internal_lm offline too; two more decodings.
        trust: the chosen rule is guarded by `fusion.trusted` with the floor that this share of the development
            transcripts is below; None = it is left as it is.
    """

    grid: tuple[float, ...] = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
    families: tuple[str, ...] = DEFAULT_FAMILIES
    num_trials: int = 16
    seed: int = 0
    rules: tuple[str, ...] = ()
    with_internal_lm: bool = True
    trust: float | None = None

    def __post_init__(self) -> None:
        require(
            len(self.grid) >= 2 and len(set(self.grid)) == len(self.grid) and min(self.grid) > 0,
            f"grid must hold at least two different weights above 0, got {self.grid}; the baseline is weight 0.",
        )
        require(self.num_trials >= 0, f"num_trials must be at least 0, got {self.num_trials}.")
        require(self.trust is None or 0 <= self.trust < 1, f"trust must be at least 0 and below 1, got {self.trust!r}.")
        require(bool(self.families) or self.num_trials == 0, "families must name at least one rule to draw.")
        for family in self.families:
            drawn_rule(family, _Lowest(), 1)
        for rule in self.rules:
            parse_rule(rule)


@dataclass(frozen=True)
class Tried:
    """A rule that was decoded on the development set.

    Args:
        rule: as text.
        options: with the rule.
        origin: "grid", "offline", "drawn", "given" or "trusted".
        predicted: word errors the offline search expected, if it chose the rule.
        p_value: sign-flip test against the acoustic model alone, two-sided; `p_corrected` after Holm's correction for
            everything tried.
    """

    rule: str
    options: DecodingOptions
    origin: str
    errors: WordErrors
    texts: tuple[str, ...]
    predicted: int | None = None
    p_value: float = 1.0
    p_corrected: float = 1.0

    @property
    def num_errors(self) -> int:
        return sum(self.errors.errors)


@dataclass(frozen=True)
class Tuning:
    """All that was tried on the development set, and the choice.

    Args:
        baseline: the acoustic model alone.
        tried: in the order of decoding.
        curves: exact errors of the pooled lists by the weight of each language model, by its part's name.
        chosen: the fewest errors; among equals the first, that is the simplest. With trust, that rule with its floor.
    """

    baseline: Tried
    tried: tuple[Tried, ...]
    curves: Mapping[str, ErrorCurve]
    oracle: int
    chosen: Tried

    @property
    def best_static(self) -> Tried:
        """The best constant weight, which any other rule has to beat."""
        return min((own for own in self.tried if own.rule.startswith("static(")), key=lambda own: own.num_errors)


def tune(dev: TunedSet, base: DecodingOptions, settings: TuningSettings) -> Tuning:
    """Choose a rule with its numbers for one or more language models.

    First `static` with every weight of the grid is decoded. On those lists, pooled, the weights and a length bonus are
    searched exactly, and with two more decodings the weight of the internal LM. What that chose is decoded. Then rules
    of the families are drawn (Optuna's TPE), together with end thresholds, each decoded. The fewest word errors win.

    Args:
        base: options without a rule; n_best is set to beam_size.

    Raises:
        InvalidArgumentError: no language model is loaded.
    """
    names = dev.decoder.source_names[1:]
    require(bool(names), "tune weighs language models, and none is loaded; give one with --lm.")
    base = replace(base, n_best=base.beam_size, rule=None, lm_weight=None, initial_steps=0)
    work = _Work(dev, base, names)
    baseline = work.alone()
    for weights in _grid(settings.grid, len(names)):
        work.decode(static_text(weights), base, "grid")
    lists = pooled(list(work.lists.values()), base)
    offline = OfflineSearch(lists, names, dev.normalise)
    curves = {name: offline.curve(name) for name in names}
    choices = work.offline(offline, settings)
    for text, options, predicted in choices:
        work.decode(text, options, "offline", predicted)
    for rule in settings.rules:
        work.decode(rule, base, "given")
    _draw(work, settings)
    guarded = None if settings.trust is None else work.trust(settings.trust)
    tried = _tested(baseline, list(work.tried.values()))
    from shallowfusion.evaluation.nbest import oracle_errors

    oracle = sum(oracle_errors(lists, dev.normalise).errors)
    chosen = min((own for own in tried if guarded in (None, own.rule)), key=lambda own: own.num_errors)
    return Tuning(baseline, tuple(tried), curves, oracle, chosen)


def static_text(weights: Sequence[float]) -> str:
    """A `static` rule as text."""
    shown = [f"{weight:.3g}" for weight in weights]
    return f"static({shown[0]})" if len(shown) == 1 else f"static(({', '.join(shown)}))"


@dataclass
class _Work:
    """What was decoded so far, each rule with its options once."""

    dev: TunedSet
    base: DecodingOptions
    names: Sequence[str]
    tried: dict[tuple[str, str], Tried] = field(default_factory=dict)
    lists: dict[str, Mapping[str, NBestList]] = field(default_factory=dict)

    def alone(self) -> Tried:
        plain = alone_options(self.base)
        found = self.dev.decode(plain, "acoustic model alone", fuses=False)
        return self._tried("", plain, "baseline", found, None)

    def decode(self, rule: str, options: DecodingOptions, origin: str, predicted: int | None = None) -> Tried:
        own = replace(options, rule=parse_rule(rule))
        key = (rule, repr(replace(options, rule=None)))
        if key not in self.tried:
            found = self.dev.decode(own, rule)
            if origin == "grid":
                self.lists[rule] = found
            self.tried[key] = self._tried(rule, own, origin, found, predicted)
        return self.tried[key]

    def offline(self, search: OfflineSearch, settings: TuningSettings) -> list[tuple[str, DecodingOptions, int]]:
        """What the offline search chooses: a constant weight, one with a length bonus, one with the internal LM."""
        starts = [dict(zip(self.names, weights, strict=True)) for weights in _grid(settings.grid, len(self.names))]
        plain = search.search(starts)
        bonus = search.search([*starts, plain.weights], [LENGTH])
        found = [self._rule_of(plain), self._rule_of(bonus)]
        if settings.with_internal_lm:
            runs = []
            for share in (0.15, 0.5):
                weights = [round(plain.weights[name] * (1 + share / 2), 3) or 0.1 for name in self.names]
                rule = f"internal_lm({_weights_text(weights)}, {max(0.02, round(share * max(weights), 3)):g})"
                self.decode(rule, self.base, "offline")
                own = replace(self.base, rule=parse_rule(rule))
                runs.append(self.dev.decode(own, rule))
            internal = OfflineSearch(pooled(runs, self.base), self.names, search.normalise)
            first = {**plain.weights, INTERNAL: -0.1}
            found.append(self._rule_of(internal.search([plain.weights, first], [INTERNAL, LENGTH])))
        return found

    def trust(self, share: float) -> str:
        """The text of the best rule so far, guarded by a floor; finding that needs no model of another domain."""
        plain = [own for own in self.tried.values() if own.options.rule and own.options.rule.trust is None]
        best = min(plain, key=lambda own: own.num_errors)
        assert best.options.rule is not None
        names = [name for name in self.dev.decoder.names_under(best.options.rule)[1:] if name != "ilm"]
        firsts = [own.first for own in self.dev.decode(best.options, best.rule).values()]
        weights = best.options.rule.lm_weights
        floor = floor_of(
            [likelihood(own.parts, names, weights) for own in firsts], [own.num_tokens or 1 for own in firsts], share
        )
        return self.decode(f"trusted({best.rule}, {floor:.4g})", best.options, "trusted").rule

    def _rule_of(self, choice: OfflineChoice) -> tuple[str, DecodingOptions, int]:
        weights = [choice.weights[name] for name in self.names]
        bonus = round(choice.weights.get(LENGTH, 0.0), 3)
        options = replace(self.base, length_bonus=bonus) if bonus else self.base
        internal = round(-choice.weights.get(INTERNAL, 0.0), 3)
        text = f"internal_lm({_weights_text(weights)}, {internal:g})" if internal > 0 else static_text(weights)
        return text, options, choice.errors

    def _tried(
        self, rule: str, options: DecodingOptions, origin: str, lists: Mapping[str, NBestList], predicted: int | None
    ) -> Tried:
        return Tried(rule, options, origin, self.dev.errors(lists), tuple(self.dev.texts(lists)), predicted)


def _draw(work: _Work, settings: TuningSettings) -> None:
    """Rules drawn by TPE, from what all earlier ones made; the same seed and lists draw the same again."""
    if settings.num_trials == 0:
        return
    try:
        import optuna
    except ImportError as error:
        raise InvalidArgumentError(
            "drawing rules needs the package optuna; install shallowfusion[eval], or ask for no trials."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=settings.seed, n_startup_trials=min(8, settings.num_trials // 2))
    study = optuna.create_study(direction="minimize", sampler=sampler)
    for _ in range(settings.num_trials):
        trial = study.ask()
        family = trial.suggest_categorical("family", list(settings.families))
        rule = drawn_rule(family, trial, len(work.names), work.dev.decoder.internal_context is not None)
        threshold = trial.suggest_categorical("end_threshold", list(END_THRESHOLDS))
        found = work.decode(rule, replace(work.base, end_threshold=threshold), "drawn")
        study.tell(trial, found.num_errors)


def _tested(baseline: Tried, tried: Sequence[Tried]) -> list[Tried]:
    pairs = [zip(baseline.errors.errors, own.errors.errors, strict=True) for own in tried]
    p_values = [sign_flip_test([new - old for old, new in pair]) for pair in pairs]
    return [
        replace(own, p_value=p, p_corrected=corrected)
        for own, p, corrected in zip(tried, p_values, holm(p_values), strict=True)
    ]


def _grid(weights: Sequence[float], num_models: int) -> list[tuple[float, ...]]:
    """The weights for one model; for several, shared out evenly and for each model alone."""
    if num_models == 1:
        return [(weight,) for weight in weights]
    even = [(weight / num_models,) * num_models for weight in weights]
    alone = [
        tuple(weight if k == own else 0.0 for k in range(num_models)) for own in range(num_models) for weight in weights
    ]
    return even + alone


def _weights_text(weights: Sequence[float]) -> str:
    return static_text(weights)[len("static(") : -1]


class _Lowest:
    """The lowest of every range, to check a family's name and text."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return low

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return low

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return choices[0]
