"""What `tune` tried and chose, as one HTML page and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shallowfusion.evaluation.charts import Series, line_chart
from shallowfusion.evaluation.pages import Cell, cards, difference_html, page, section, table
from shallowfusion.evaluation.report import as_data
from shallowfusion.evaluation.scoring import Evaluation, SystemScores
from shallowfusion.fusion.parsing import parse_rule
from shallowfusion.training.decoder_file import saved_options
from shallowfusion.training.session import TunedSet
from shallowfusion.training.tuning import Tried, Tuning

__all__ = ["tuning_data", "tuning_page"]


def tuning_data(found: Tuning, dev: TunedSet, test: Evaluation | None) -> dict[str, Any]:
    """Every rule tried with its errors and tests, the exact curves, and the test set's evaluation."""
    return {
        "normaliser": str(dev.normalise),
        "utterances": len(dev.recordings),
        "words": sum(found.baseline.errors.lengths),
        "baseline": _tried_data(found.baseline),
        "oracle_errors": found.oracle,
        "tried": [_tried_data(own) for own in found.tried],
        "curves": {
            name: [[piece.low, piece.high, piece.errors] for piece in curve.intervals]
            for name, curve in found.curves.items()
        },
        "chosen": _tried_data(found.chosen),
        "best_static": _tried_data(found.best_static),
        "test": None if test is None else as_data(test),
    }


def tuning_page(found: Tuning, dev: TunedSet, chosen_on_dev: Evaluation, test: Evaluation | None) -> str:
    """The page of a tuning: error rates by weight, everything tried, and each utterance the choice changed."""
    words, base = sum(found.baseline.errors.lengths), found.baseline
    lead = (
        f"{len(dev.recordings)} development utterances, {words} words; normaliser {dev.normalise}; "
        f"models {', '.join((dev.decoder.acoustic.name, *(lm.vocabulary.name for lm in dev.decoder.language_models)))}"
    )
    figures = [
        (_percent(base.errors.rate), "word errors, acoustic model alone (development)"),
        (_percent(found.chosen.errors.rate), f"word errors, {found.chosen.rule} (development)"),
        (_percent(found.oracle / max(1, words)), "best possible choice from all lists of the grid"),
    ]
    if test is not None:
        figures.append((_percent(test.systems[-1].words.rate), "word errors, chosen rule (test)"))
    sections = [
        cards(figures),
        _curve_section(found),
        section(
            "On the development set",
            '<p class="quiet">The choice was made here, so these figures flatter it; the test set is what counts.</p>',
            _systems_table(chosen_on_dev),
        ),
    ]
    if test is None:
        sections.append(section("On a test set", "<p>None was given: name one with --test before you trust this.</p>"))
    else:
        sections.append(section("On the test set", _systems_table(test), _test_note(test)))
        sections.append(_changed_section("Changed utterances of the test set", test))
    sections.append(_changed_section("Changed utterances of the development set", chosen_on_dev))
    sections.append(_tried_section(found))
    return page("Tuning report", lead, sections)


def _curve_section(found: Tuning) -> str:
    note = (
        '<p class="quiet">Decoded: real searches with a constant weight; the band is the 95 % bootstrap interval over '
        "utterances. Offline: the same hypotheses, pooled and re-ranked, exact for every weight; it cannot find what "
        "no search offered, and it forgets what the beam would have lost.</p>"
    )
    words = max(1, sum(found.baseline.errors.lengths))
    several = len(found.curves) > 1
    charts = []
    for place, (name, curve) in enumerate(found.curves.items()):
        grid = sorted(
            ((_weight_of(own, place), own) for own in found.tried if own.origin == "grid"), key=lambda p: p[0]
        )
        alone = [(weight, own) for weight, own in grid if not several or _is_alone(own, place)]
        points = [(0.0, found.baseline), *alone]
        decoded = Series(
            "decoded",
            [(weight, 100 * own.errors.rate) for weight, own in points],
            [(100 * low, 100 * high) for low, high in (own.errors.interval() for _, own in points)],
        )
        most = max(weight for weight, _ in points) * 1.15
        pieces = [(piece.low, 100 * piece.errors / words) for piece in curve.intervals if piece.low < most]
        offline = Series("offline, exact", [*pieces, (most, pieces[-1][1])], is_step=True)
        level = ("acoustic model alone", 100 * found.baseline.errors.rate)
        title = f"<p>weight of {name}, the others 0</p>" if several else ""
        charts.append(title + line_chart([decoded, offline], f"weight of {name}", "word error rate, %", level))
    return section("Word errors by weight", note, *charts)


def _systems_table(found: Evaluation) -> str:
    rows = []
    for system in found.systems:
        low, high = system.interval
        kinds = system.words
        row: list[object] = [system.name, _percent(kinds.rate), f"{_percent(low)} .. {_percent(high)}"]
        row += [sum(kinds.errors), sum(kinds.substitutions), sum(kinds.deletions), sum(kinds.insertions)]
        rows.append(row + _against(system))
    head = ["system", "WER", "95 % interval", "errors", "sub", "del", "ins"]
    return table([*head, "wins", "losses", "difference, points", "p", "p, Holm"], rows, {len(rows) - 1: "chosen"})


def _against(system: SystemScores) -> list[object]:
    if system.comparison is None or system.tests is None:
        return ["", "", "", "", ""]
    bootstrap = system.tests.bootstrap
    interval = f"{100 * bootstrap.difference:+.2f} ({100 * bootstrap.low:+.2f} .. {100 * bootstrap.high:+.2f})"
    p_values = [f"{system.tests.p_value:.4f}", f"{system.tests.p_corrected:.4f}"]
    return [system.comparison.wins, system.comparison.losses, interval, *p_values]


def _test_note(test: Evaluation) -> str:
    rates = [(system.name, system.failures) for system in test.systems]
    shown = "; ".join(
        f"{name}: {100 * own.truncation_rate:.1f} % truncated, {100 * own.loop_rate:.1f} % looping"
        for name, own in rates
    )
    return f'<p class="quiet">{shown}.</p>'


def _changed_section(title: str, found: Evaluation) -> str:
    system = found.systems[-1]
    comparison = system.comparison
    if comparison is None or not comparison.changed:
        return section(title, "<p>None.</p>")
    changed, normalise, rows, marked = comparison.changed, found.test_set.normalise, [], {}
    for number, change in enumerate(changed):
        said, before, after = (normalise(text) for text in (change.reference, change.baseline, change.text))
        if change.errors > change.baseline_errors:
            marked[number] = "mark"
        shown = Cell(
            f'{difference_html(said, before)}<br><span class="quiet">fused:</span> {difference_html(said, after)}'
        )
        rows.append([found.test_set.ids[change.position], f"{change.baseline_errors} → {change.errors}", shown])
    note = (
        f'<p class="quiet">{len(changed)} of {comparison.num_utterances} utterances, '
        "worst first. First line: the acoustic model alone; second: fused. <del>said but missing</del> "
        "<ins>heard instead</ins>.</p>"
    )
    return section(title, note, table(["utterance", "errors", "against what was said"], rows, marked))


def _tried_section(found: Tuning) -> str:
    ordered = sorted(found.tried, key=lambda own: own.num_errors)
    rows: list[Sequence[object]] = []
    for own in ordered:
        predicted = "" if own.predicted is None else own.predicted
        kinds = own.errors
        row: list[object] = [own.rule, _options_text(own), own.origin, own.num_errors, _percent(kinds.rate), predicted]
        row += [sum(kinds.substitutions), sum(kinds.deletions), sum(kinds.insertions)]
        rows.append([*row, f"{own.p_value:.4f}", f"{own.p_corrected:.4f}"])
    note = (
        f'<p class="quiet">{len(found.tried)} rules were decoded on the development set. p: sign-flip test against the '
        "acoustic model alone, then after Holm's correction for all of them. Predicted: errors the offline search "
        "expected.</p>"
    )
    head = ["rule", "options", "from", "errors", "WER", "predicted", "sub", "del", "ins", "p", "p, Holm"]
    return section("Everything tried", note, table(head, rows, {ordered.index(found.chosen): "chosen"}))


def _tried_data(own: Tried) -> dict[str, Any]:
    kinds = own.errors
    return {
        "rule": own.rule,
        "options": saved_options(own.options),
        "from": own.origin,
        "errors": own.num_errors,
        "rate": kinds.rate,
        "interval": list(kinds.interval()),
        "substitutions": sum(kinds.substitutions),
        "deletions": sum(kinds.deletions),
        "insertions": sum(kinds.insertions),
        "predicted": own.predicted,
        "p_value": own.p_value,
        "p_corrected": own.p_corrected,
    }


def _options_text(own: Tried) -> str:
    shown = {name: value for name, value in saved_options(own.options).items() if name != "beam_size"}
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in shown.items()
    )


def _weight_of(own: Tried, place: int) -> float:
    return parse_rule(own.rule).lm_weights[place]


def _is_alone(own: Tried, place: int) -> bool:
    return all((weight > 0) == (k == place) for k, weight in enumerate(parse_rule(own.rule).lm_weights))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
