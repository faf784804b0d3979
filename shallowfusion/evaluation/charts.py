"""Line charts as SVG text, in the colours of a page's style sheet; no package is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from shallowfusion.config import require

__all__ = ["Series", "line_chart", "ticks"]

WIDTH, HEIGHT = 760, 320
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 34, 44
COLOURS = ("accent", "second", "third")


@dataclass(frozen=True)
class Series:
    """One line.

    Args:
        points: (x, y), ascending x.
        intervals: (low, high) of y at each point, drawn as a band; empty = none.
        is_step: y holds from its point to the next.
    """

    name: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float]] = ()
    is_step: bool = False


def line_chart(series: Sequence[Series], x_label: str, y_label: str, level: tuple[str, float] | None = None) -> str:
    """An SVG element with axes, legend and up to three lines.

    Args:
        level: name and height of a dashed line across, for instance a baseline.

    Raises:
        InvalidArgumentError: no points, or numbers that are not finite.
    """
    heights = [y for own in series for _, y in own.points] + [
        y for own in series for pair in own.intervals for y in pair
    ]
    places = [x for own in series for x, _ in own.points]
    heights += [] if level is None else [level[1]]
    require(bool(places) and all(map(math.isfinite, places + heights)), "a chart needs points with finite numbers.")
    scale = _Scale(min(places), max(places), min(0.0, *heights) if min(heights) < 0 else 0.0, max(heights) or 1.0)
    parts = [_axes(scale, x_label, y_label)]
    for number, own in enumerate(series):
        parts.append(_drawn(own, COLOURS[number % len(COLOURS)], scale))
    if level is not None:
        y = scale.y(level[1])
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--quiet)" '
            f'stroke-dasharray="5 4"/><text x="{WIDTH - RIGHT}" y="{y - 5:.1f}" text-anchor="end">'
            f"{escape(level[0])}</text>"
        )
    parts.append(_legend(series))
    label = escape(f"{y_label} against {x_label}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` + 1 round numbers from low to high, 1, 2 or 5 times a power of ten apart."""
    if high <= low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class _Scale:
    """From numbers to places in the picture."""

    low_x: float
    high_x: float
    low_y: float
    high_y: float

    def x(self, value: float) -> float:
        span = (self.high_x - self.low_x) or 1.0
        return LEFT + (value - self.low_x) / span * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        span = (self.high_y - self.low_y) * 1.05 or 1.0
        return HEIGHT - BOTTOM - (value - self.low_y) / span * (HEIGHT - TOP - BOTTOM)


def _axes(scale: _Scale, x_label: str, y_label: str) -> str:
    parts = []
    for value in ticks(scale.low_y, scale.high_y * 1.05):
        y = scale.y(value)
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(scale.low_x, scale.high_x, 8):
        x = scale.x(value)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    half = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="14" y="{half:.0f}" text-anchor="middle" transform="rotate(-90 14 {half:.0f})">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def _drawn(series: Series, colour: str, scale: _Scale) -> str:
    points = [(scale.x(x), scale.y(y)) for x, y in series.points]
    parts = []
    if series.intervals:
        upper = [f"{x:.1f},{scale.y(high):.1f}" for (x, _), (_, high) in zip(points, series.intervals, strict=True)]
        lower = [f"{x:.1f},{scale.y(low):.1f}" for (x, _), (low, _) in zip(points, series.intervals, strict=True)]
        parts.append(f'<polygon fill="var(--band)" points="{" ".join([*upper, *reversed(lower)])}"/>')
    path = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for x, y in points[1:]:
        path.append(f"H{x:.1f}V{y:.1f}" if series.is_step else f"L{x:.1f} {y:.1f}")
    width = 1.4 if series.is_step else 2.2
    parts.append(f'<path d="{"".join(path)}" fill="none" stroke="var(--{colour})" stroke-width="{width}"/>')
    if not series.is_step:
        for (x, y), (place, height) in zip(points, series.points, strict=True):
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" fill="var(--{colour})"><title>{place:g}: {height:.2f}'
                "</title></circle>"
            )
    return "".join(parts)


def _legend(series: Sequence[Series]) -> str:
    parts, x = [], float(LEFT)
    for number, own in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<rect x="{x:.0f}" y="8" width="14" height="10" rx="2" fill="var(--{colour})"/>')
        parts.append(f'<text x="{x + 20:.0f}" y="17">{escape(own.name)}</text>')
        x += 34 + 6.6 * len(own.name)
    return "".join(parts)
