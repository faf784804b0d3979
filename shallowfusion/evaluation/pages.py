"""Reports as one HTML file: no script, no network, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.evaluation.alignment import align

__all__ = ["Cell", "cards", "difference_html", "page", "section", "table", "write_page"]

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --panel: #f4f5f7; --ink: #1b1f24; --quiet: #5b6570;
  --line: #d5dae0; --accent: #1f5fae; --second: #b3541e; --third: #3c7d3a; --good: #1d6b32; --bad: #b3261e;
  --good-ground: #dff3e3; --bad-ground: #fde4e1; --band: rgba(31, 95, 174, .16); }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --panel: #1d2228; --ink: #e6e9ed; --quiet: #9aa5b1;
  --line: #353c45; --accent: #7db4f5; --second: #f0a36e; --third: #86c983; --good: #8fd6a0; --bad: #ff9c93;
  --good-ground: #17341f; --bad-ground: #43201d; --band: rgba(125, 180, 245, .2); } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 80rem; background: var(--ground); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .35rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p { margin: .4rem 0; max-width: 52rem; } .quiet { color: var(--quiet); }
code { font: .9em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; margin: .5rem 0; }
th, td { text-align: left; padding: .32rem .42rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--quiet); font-weight: 600; vertical-align: bottom; } .item { white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; } td.number { white-space: nowrap; }
tr.chosen td { background: var(--panel); font-weight: 600; } tr.mark td { background: var(--bad-ground); }
ins { background: var(--good-ground); color: var(--good); text-decoration: none; border-radius: 3px; padding: 0 .2em; }
del { background: var(--bad-ground); color: var(--bad); border-radius: 3px; padding: 0 .2em; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .9rem; }
.card b { display: block; font-size: 1.35rem; } .card span { color: var(--quiet); font-size: .85rem; }
svg { width: 100%; max-width: 56rem; height: auto; display: block; }
svg text { fill: var(--quiet); font: 12px system-ui, sans-serif; }
svg .axis { stroke: var(--line); } svg .strong { fill: var(--ink); font-weight: 600; }
"""


class Cell(str):
    """Text of a cell that is HTML already."""


def page(title: str, lead: str, sections: Sequence[str]) -> str:
    """A whole document; `sections` are HTML, title and lead are text."""
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<p class="quiet">{escape(lead)}</p>\n{body}\n</body>\n</html>\n'
    )


def section(title: str, *parts: str) -> str:
    """A headed part; `parts` are HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def table(head: Sequence[str], rows: Sequence[Sequence[object]], marked: dict[int, str] | None = None) -> str:
    """A table; numbers, and text that begins with a digit or sign, stand to the right.

    Args:
        rows: numbers, text, or `Cell` where it is HTML.
        marked: CSS class of rows by number, "chosen" or "mark".
    """
    numeric = [bool(rows) and all(_is_number(row[c]) for row in rows) for c in range(len(head))]
    css = [' class="number"' if own else "" for own in numeric]
    lines = ["<tr>" + "".join(f"<th{own}>{escape(name)}</th>" for name, own in zip(head, css, strict=True)) + "</tr>"]
    for number, row in enumerate(rows):
        kind = (marked or {}).get(number)
        cells = "".join(f"<td{own}>{_cell(value)}</td>" for value, own in zip(row, css, strict=True))
        lines.append(f"<tr{f' class={kind!r}' if kind else ''}>{cells}</tr>")
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def cards(entries: Sequence[tuple[str, str]]) -> str:
    """Large figures with a line of text each."""
    shown = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(text)}</span></div>' for value, text in entries
    )
    return f'<div class="cards">{shown}</div>'


def difference_html(reference: str, text: str) -> Cell:
    """A text with its differences from a reference: what is missing struck out, what is new underlaid."""
    own, theirs = reference.split(), text.split()
    shown: list[str] = []
    for step in align(own, theirs):
        if step.kind in ("delete", "substitute"):
            shown.append(f"<del>{escape(own[step.reference])}</del>")
        if step.kind in ("insert", "substitute"):
            shown.append(f"<ins>{escape(theirs[step.hypothesis])}</ins>")
        if step.kind == "equal":
            shown.append(escape(own[step.reference]))
    return Cell(" ".join(shown))


def write_page(path: Path, text: str) -> None:
    """Raises InvalidArgumentError if the file cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(f"{path} cannot be written ({error}); name another file.") from error


def _cell(value: object) -> str:
    return str(value) if isinstance(value, Cell) else escape(str(value))


def _is_number(value: object) -> bool:
    text = str(value)
    return not isinstance(value, Cell) and (text == "" or text[0] in "0123456789+-\u2212." or text in ("inf", "n/a"))
