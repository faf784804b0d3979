"""An explanation as lines for a terminal, as plain data and as an HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from shallowfusion.evaluation.charts import Series, line_chart
from shallowfusion.evaluation.pages import Cell, difference_html, page, section, table
from shallowfusion.evaluation.word_errors import marked_words, word_difference
from shallowfusion.training.explanation import FUSED, Alternative, Explanation, ScoredToken

__all__ = ["explanation_data", "explanation_lines", "explanation_page"]

_SHOWN_LOWEST = -15.0  # nats, in the chart


def explanation_data(found: Explanation, reference: str | None = None) -> dict[str, Any]:
    """Everything as plain data; JSON knows no infinity, so a forbidden token has increment null."""
    divergence = found.divergence
    return {
        "text": found.result.text,
        "text_alone": found.alone.text,
        "reference": reference,
        "rule": repr(found.result.rule),
        "flags": list(found.result.flags),
        "totals": {path: {k: _finite(v) for k, v in own.items()} for path, own in found.totals.items()},
        "divergence": None
        if divergence is None
        else {
            "position": divergence.position,
            "prefix": divergence.prefix,
            "fused": _token_data(divergence.fused),
            "alone": _token_data(divergence.alone),
        },
        "tokens": [_token_data(step) for step in found.steps],
    }


def explanation_lines(found: Explanation, reference: str | None = None) -> list[str]:
    """Both transcripts, where they part and why, and one line per token."""
    names = list(found.steps[0].weights)
    lines = [*([f"said   {reference}"] if reference else [])]
    shown = found.result.text if reference is None else marked_words(reference, found.result.text)
    alone = found.alone.text if reference is None else marked_words(reference, found.alone.text)
    lines += [
        f"fused  {shown}",
        f"alone  {alone}",
        f"rule   {found.result.rule}",
        "",
        *_divergence_lines(found),
        "",
    ]
    lines.append(
        f"{'':4} {'token':8} "
        + " ".join(f"{name:>8} {'weight':>6}" for name in names)
        + f" {FUSED:>8}   best of each model"
    )
    mark = -1 if found.divergence is None else found.divergence.position
    for number, step in enumerate(found.steps):
        cells = " ".join(f"{step.parts[name]:8.2f} {step.weights[name]:6.3f}" for name in names)
        best = "   ".join(f"{name}: {_alternatives(step.alternatives[name])}" for name in (*names, FUSED))
        arrow = ">" if number == mark else " "
        lines.append(f"{arrow}{number:3d} {_visible(step.text):8} {cells} {step.increment:8.2f}   {best}")
    return lines


def explanation_page(found: Explanation, source: str, reference: str | None = None) -> str:
    """One self-contained page."""
    sections = [_texts_section(found, reference), _divergence_section(found)]
    names = list(found.steps[0].weights)
    series = [
        Series(name, [(float(i), max(_SHOWN_LOWEST, step.parts[name])) for i, step in enumerate(found.steps)])
        for name in names[:3]
    ]
    note = f'<p class="quiet">Log-prob of each token of the fused transcript, cut at {_SHOWN_LOWEST:g} nats.</p>'
    sections.append(section("Token by token", note, line_chart(series, "token", "log-prob, nats"), _token_table(found)))
    return page("Why this transcript", f"{source}; rule {found.result.rule}", sections)


def _divergence_lines(found: Explanation) -> list[str]:
    divergence = found.divergence
    if divergence is None:
        return ["the language model changed nothing: both transcripts are the same"]
    totals = found.totals
    lines = [
        f"changed: {word_difference(found.alone.text, found.result.text)}",
        f"the transcripts part at token {divergence.position}, after {divergence.prefix!r}:",
    ]
    for title, own in (("fused takes", divergence.fused), ("alone takes", divergence.alone)):
        gave = ", ".join(f"{name} {value:+.2f}" for name, value in own.contributions.items())
        lines.append(f"  {title} {own.text!r:10} {gave}; fused increment {own.increment:.2f}")
    for path, title in ((FUSED, "fused transcript"), ("alone", "transcript of the acoustic model")):
        gave = ", ".join(f"{name} {value:+.2f}" for name, value in totals[path].items())
        lines.append(f"  {title} in all: {gave}")
    return lines


def _texts_section(found: Explanation, reference: str | None) -> str:
    rows: list[Sequence[object]] = []
    if reference is not None:
        rows.append(["said", reference])
    base = reference if reference is not None else found.alone.text
    rows.append(["acoustic model alone", difference_html(base, found.alone.text)])
    rows.append(["fused", difference_html(base, found.result.text)])
    flags = f"<p>Flags: {escape(', '.join(found.result.flags))}</p>" if found.result.flags else ""
    against = "what was said" if reference is not None else "the acoustic model alone"
    return section("Transcripts", f'<p class="quiet">Differences from {against}.</p>', table(["", "text"], rows), flags)


def _divergence_section(found: Explanation) -> str:
    divergence = found.divergence
    if divergence is None:
        return section("Where the language model decided", "<p>Nowhere: both transcripts are the same.</p>")
    names = list(divergence.fused.weights)
    rows: list[Sequence[object]] = []
    for title, own in (("fused takes", divergence.fused), ("alone takes", divergence.alone)):
        shares = [f"{own.parts[name]:.2f} × {own.weights[name]:.3f} = {own.contributions[name]:+.2f}" for name in names]
        rows.append([title, _visible(own.text), *shares, f"{own.increment:.2f}"])
    lead = (
        f"<p>The transcripts part at token {divergence.position}, after “{escape(divergence.prefix.strip())}”. What "
        "each model gave the two tokens there, log-prob × weight, in nats:</p>"
    )
    totals = found.totals
    keys = list(totals[FUSED])
    whole = [
        [title, *(f"{totals[path][key]:.2f}" for key in keys)]
        for path, title in ((FUSED, "fused transcript"), ("alone", "acoustic model's transcript"))
    ]
    return section(
        "Where the language model decided",
        lead,
        table(["", "token", *names, "fused"], rows),
        "<p>What each model gave the whole transcripts; the higher score wins (total over tokens to the power of the "
        "length penalty):</p>",
        table(["", *keys], whole, {0: "chosen"}),
    )


def _token_table(found: Explanation) -> str:
    names = list(found.steps[0].weights)
    rows: list[Sequence[object]] = []
    for number, step in enumerate(found.steps):
        row: list[object] = [number, Cell(f"<code>{escape(_visible(step.text))}</code>")]
        for name in names:
            row += [f"{step.parts[name]:.2f}", f"{step.weights[name]:.3f}"]
        row += [f"{step.increment:.2f}"]
        rows.append([*row, *(_alternative_cell(step.alternatives[name]) for name in (*names, FUSED))])
    head = ["", "token", *(title for name in names for title in (name, "weight")), FUSED]
    head += [f"best of {name}" for name in (*names, FUSED)]
    marked = {} if found.divergence is None else {found.divergence.position: "mark"}
    return table(head, rows, marked)


def _alternatives(best: Sequence[Alternative]) -> str:
    return " ".join(f"{_visible(own.text)} {own.score:.1f}" for own in best)


def _alternative_cell(best: Sequence[Alternative]) -> Cell:
    items = (f'<span class="item">{escape(_visible(own.text))} {own.score:.1f}</span>' for own in best)
    return Cell(" &nbsp; ".join(items))


def _visible(text: str) -> str:
    return text.replace(" ", "␣").replace("\n", "⏎") or "∅"


def _token_data(step: ScoredToken) -> dict[str, Any]:
    data = asdict(step)
    data["increment"] = _finite(step.increment)
    data["contributions"] = step.contributions
    return data


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
