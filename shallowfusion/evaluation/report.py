"""An evaluation as a table for people and as plain data for machines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from shallowfusion.evaluation.failures import ChangedUtterance
from shallowfusion.evaluation.scoring import Evaluation, SystemScores
from shallowfusion.evaluation.terms import term_bands
from shallowfusion.evaluation.word_errors import WordErrors

__all__ = ["as_data", "changed_lines", "table_lines"]


def as_data(found: Evaluation, term_counts: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Every figure, every transcript and every changed utterance, worst first.

    Args:
        term_counts: occurrences of the listed terms in a training text, for bands.
    """
    test_set = found.test_set
    data: dict[str, Any] = {
        "utterances": len(test_set.ids),
        "words": sum(found.baseline.raw_words.lengths),
        "words_normalised": sum(found.baseline.words.lengths),
        "normaliser": str(test_set.normalise),
        "resampled": "utterances" if test_set.groups is None else "speakers",
        "systems": [_system_data(found, system, term_counts) for system in found.systems],
    }
    if test_set.terms is not None and found.baseline.terms is not None:
        absent = found.baseline.terms.absent
        data["term_list"] = {
            "terms": len(test_set.terms.terms),
            "fingerprint": test_set.terms.fingerprint,
            "absent": list(absent),
        }
    return data


def table_lines(found: Evaluation, term_counts: Mapping[str, int] | None = None) -> list[str]:
    """Error rates with counts and intervals, tests against the baseline, terms and failures of each system."""
    test_set, width = found.test_set, max(len(system.name) for system in found.systems)
    drawn = "utterances" if test_set.groups is None else "speakers"
    lines = [
        f"{len(test_set.ids)} utterances, {sum(found.baseline.raw_words.lengths)} words, "
        f"{sum(found.baseline.words.lengths)} after normalisation; normaliser {test_set.normalise}; intervals: 95 %, "
        f"bootstrap over {drawn}",
        f"{'':{width}}  {'WER':>7}  {'interval':>16}  {'errors':>6}  {'sub':>5} {'del':>5} {'ins':>5}  {'CER':>7}  "
        f"{'WER raw':>7}  {'CER raw':>7}",
    ]
    for system in found.systems:
        low, high = system.interval
        counts = system.words
        kinds = " ".join(f"{sum(k):5d}" for k in (counts.substitutions, counts.deletions, counts.insertions))
        lines.append(
            f"{system.name:{width}}  {_percent(counts.rate)}  {_percent(low)} .. {_percent(high, 5)}  "
            f"{sum(counts.errors):6d}  {kinds}  {_percent(system.characters.rate)}  "
            f"{_percent(system.raw_words.rate)}  {_percent(system.raw_characters.rate)}"
        )
    lines += [line for system in found.systems[1:] for line in _test_lines(found, system)]
    lines += [_failure_line(system, width) for system in found.systems]
    if found.baseline.terms is not None:
        lines += _term_lines(found, width, term_counts)
    return lines


def changed_lines(found: Evaluation, system: SystemScores, most: int) -> list[str]:
    """Utterances the system changed, those that lost most first, then at most as many that won most."""
    if system.comparison is None or not system.comparison.changed:
        return []
    changed = system.comparison.changed
    worst = [change for change in changed if change.errors >= change.baseline_errors][:most]
    best = [change for change in reversed(changed) if change.errors < change.baseline_errors][:most]
    lines = [f"{system.name}: {len(changed)} utterances changed; worst first, then best"]
    return lines + [_changed_line(found, change) for change in (*worst, *best)]


def _changed_line(found: Evaluation, change: ChangedUtterance) -> str:
    style = " (style only)" if change.is_style_only else ""
    name = found.test_set.ids[change.position]
    return f"  {name}: {change.baseline_errors} -> {change.errors} errors{style}: {change.difference}"


def _test_lines(found: Evaluation, system: SystemScores) -> list[str]:
    comparison, tests = system.comparison, system.tests
    assert comparison is not None
    assert tests is not None
    base = found.baseline.words.rate
    bootstrap, segments = tests.bootstrap, tests.segments
    relative = f" ({100 * bootstrap.difference / base:+.1f} % relative)" if base else ""
    several = f", {tests.p_corrected:.4f} after Holm's correction" if len(found.systems) > 2 else ""
    doubt = "" if segments.enough else f" (only {segments.num_segments} segments, wanted 50)"
    return [
        f"{system.name} against {found.baseline.name}: {100 * bootstrap.difference:+.2f} points{relative}, interval "
        f"{100 * bootstrap.low:+.2f} .. {100 * bootstrap.high:+.2f}, better in "
        f"{100 * bootstrap.probability_of_improvement:.1f} % of resamples",
        f"  {comparison.wins} wins, {comparison.losses} losses, {comparison.ties} ties; permutation p = "
        f"{tests.p_value:.4f}{several}, one-sided {tests.p_better:.4f}; MAPSSWE p = {segments.p_value:.4f}{doubt}",
        f"  changed {100 * comparison.change_rate:.1f} % of utterances, in style only "
        f"{100 * comparison.style_drift_rate:.1f} %; WER raw minus normalised "
        f"{100 * comparison.style_gap:+.1f} points ({found.baseline.name}: {100 * comparison.baseline_style_gap:+.1f})",
    ]


def _failure_line(system: SystemScores, width: int) -> str:
    failures = system.failures
    silence = "" if system.silence is None else f", words in {100 * system.silence[0]:.1f} % of silent recordings"
    return (
        f"{system.name:{width}}  truncated {100 * failures.truncation_rate:.1f} %, loops "
        f"{100 * failures.loop_rate:.1f} %, length {failures.length_ratio:.2f} of the references', "
        f"{failures.insertions_per_100_words:.1f} insertions per 100 words{silence}"
    )


def _term_lines(found: Evaluation, width: int, counts: Mapping[str, int] | None) -> list[str]:
    terms, own = found.test_set.terms, found.baseline.terms
    assert terms is not None
    assert own is not None
    absent = f", {len(own.absent)} in no reference" if own.absent else ""
    lines = [f"{len(terms.terms)} listed terms (list {terms.fingerprint}){absent}"]
    for system in found.systems:
        errors = system.terms
        assert errors is not None
        precision = "none written" if errors.precision is None else f"precision {100 * errors.precision:.1f} %"
        bands = ""
        if counts is not None:
            shares = (f"{band}: {hit}/{said}" for band, (said, hit) in term_bands(errors, counts).items())
            bands = f"; recalled by times seen in training {', '.join(shares)}"
        lines.append(
            f"{system.name:{width}}  recall {100 * errors.recall:.1f} % ({errors.recalled}/{errors.spoken}), "
            f"{precision}, B-WER {_rate(errors.inside)}, U-WER {_rate(errors.outside)}{bands}"
        )
    return lines


def _system_data(found: Evaluation, system: SystemScores, counts: Mapping[str, int] | None) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": system.name,
        "wer": _errors_data(system.words) | {"interval": list(system.interval), "mean_rate": system.words.mean_rate},
        "cer": _errors_data(system.characters),
        "wer_raw": _errors_data(system.raw_words),
        "cer_raw": _errors_data(system.raw_characters),
        "failures": {
            "truncation_rate": system.failures.truncation_rate,
            "truncated": [found.test_set.ids[i] for i in system.failures.truncated],
            "loop_rate": system.failures.loop_rate,
            "looping": [found.test_set.ids[i] for i in system.failures.looping],
            "tail_deletions": system.failures.tail_deletions,
            "length_ratio": system.failures.length_ratio,
            "insertions_per_100_words": system.failures.insertions_per_100_words,
            "silence_with_words": None if system.silence is None else system.silence[0],
        },
        "texts": dict(zip(found.test_set.ids, system.texts, strict=True)),
        "errors": dict(zip(found.test_set.ids, system.words.errors, strict=True)),
    }
    if system.terms is not None:
        data["terms"] = _terms_data(system, counts)
    if system.comparison is not None and system.tests is not None:
        comparison = asdict(system.comparison)
        changed = [{"id": found.test_set.ids[c.pop("position")], **c} for c in comparison.pop("changed")]
        rates = {
            "change_rate": system.comparison.change_rate,
            "style_drift_rate": system.comparison.style_drift_rate,
        }
        data["against"] = found.baseline.name
        data["comparison"] = comparison | rates | {"changed": changed}
        data["tests"] = asdict(system.tests)
        if not math.isfinite(system.tests.segments.statistic):  # segments that all differ alike; JSON has no infinity
            data["tests"]["segments"]["statistic"] = None
    return data


def _terms_data(system: SystemScores, counts: Mapping[str, int] | None) -> dict[str, Any]:
    errors = system.terms
    assert errors is not None
    data: dict[str, Any] = {name: getattr(errors, name) for name in ("spoken", "recalled", "written", "correct")}
    data |= {name: getattr(errors, name) for name in ("recall", "precision", "f1", "term_error_rate")}
    data |= {"b_wer": _errors_data(errors.inside), "u_wer": _errors_data(errors.outside)}
    data["by_term"] = {name: list(pair) for name, pair in errors.by_term.items()}
    if counts is not None:
        data["bands"] = {band: list(pair) for band, pair in term_bands(errors, counts).items()}
    return data


def _errors_data(errors: WordErrors) -> dict[str, Any]:
    return {
        "rate": errors.rate,
        "errors": sum(errors.errors),
        "substitutions": sum(errors.substitutions),
        "deletions": sum(errors.deletions),
        "insertions": sum(errors.insertions),
        "reference": sum(errors.lengths),
    }


def _rate(errors: WordErrors) -> str:
    return f"{100 * errors.rate:.1f} % ({sum(errors.errors)}/{sum(errors.lengths)})"


def _percent(share: float, width: int = 5) -> str:
    return f"{100 * share:{width}.1f} %"
