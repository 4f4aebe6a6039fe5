"""Figures as inline SVG that takes its colours from the page, so that they follow its light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 16
"""Number of colours that the page defines: ``--c0`` to ``--c15``."""
SHAPES = ("circle", "square", "diamond", "triangle")


@dataclass(frozen=True)
class Dot:
    """A point of a curve: its place, its intervals, and its tooltip."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    title: str = ""
    off: bool = False
    """Beyond the scale (an identical video has no PSNR): drawn at the top edge, not joined to the others."""


@dataclass(frozen=True)
class Curve:
    name: str
    dots: Sequence[Dot]
    colour: int
    ours: bool = False
    dashed: bool = False


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers that cover a range.

    >>> ticks(1.0, 3.2)
    [1.0, 1.5, 2.0, 2.5, 3.0]
    """
    if not high > low:
        high = low + 1
    raw = (high - low) / about
    step = 10 ** math.floor(math.log10(raw))
    step = next(step * m for m in (1, 2, 5, 10) if step * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 10) for n in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Axes:
    """A drawing area of ``width`` x ``height`` units with data ranges."""

    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    left: float = 52
    bottom: float = 42
    top: float = 20
    right: float = 14

    def px(self, value: float) -> float:
        inner = self.width - self.left - self.right
        return round(self.left + inner * (value - self.x[0]) / (self.x[1] - self.x[0]), 2)

    def py(self, value: float) -> float:
        inner = self.height - self.top - self.bottom
        return round(self.height - self.bottom - inner * (value - self.y[0]) / (self.y[1] - self.y[0]), 2)

    def frame(self, x_title: str, y_title: str, x_suffix: str = "") -> list[str]:
        """Grid, ticks and titles."""
        parts = []
        for value in ticks(*self.y):
            y = self.py(value)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{self.width - self.right}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text class="tick" x="{self.left - 7}" y="{y + 4}" text-anchor="end">{value:g}</text>')
        for value in ticks(*self.x, 8 if self.width > 500 else 5):
            x = self.px(value)
            parts.append(f'<line class="grid" y1="{self.top}" y2="{self.height - self.bottom}" x1="{x}" x2="{x}"/>')
            y = self.height - self.bottom + 16
            parts.append(f'<text class="tick" x="{x}" y="{y}" text-anchor="middle">{value:g}{x_suffix}</text>')
        middle = (self.left + self.width - self.right) / 2
        high = (self.top + self.height - self.bottom) / 2
        for place, title in (
            (f"translate({middle} {self.height - 6})", x_title),
            (f"translate(13 {high}) rotate(-90)", y_title),
        ):
            parts.append(f'<text class="axis" transform="{place}" text-anchor="middle">{escape(title)}</text>')
        return parts


def _mark(x: float, y: float, shape: str, size: float) -> str:
    if shape == "square":
        return f'<rect x="{x - size}" y="{y - size}" width="{2 * size}" height="{2 * size}"/>'
    if shape == "diamond":
        s = size * 1.3
        return f'<path d="M{x} {y - s}L{x + s} {y}L{x} {y + s}L{x - s} {y}Z"/>'
    if shape == "triangle":
        s = size * 1.25
        return f'<path d="M{x} {y - s}L{x + s} {y + s * 0.8}L{x - s} {y + s * 0.8}Z"/>'
    return f'<circle cx="{x}" cy="{y}" r="{size}"/>'


def _svg(kind: str, width: float, height: float, label: str, body: str) -> str:
    said = f'role="img" aria-label="{escape(label)}"'
    return f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" {said}>{body}</svg>'


def _padded(values: Sequence[float], margin: float = 0.06) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * margin or max(abs(high) * margin, 0.5)
    return low - room, high + room


def scatter(
    curves: Sequence[Curve],
    x_title: str,
    y_title: str,
    *,
    width: float = 760,
    height: float = 430,
    label: str = "",
    kind_of: str = "",
) -> str:
    """Curves of dots with intervals: speed to the right, quality upwards."""
    dots = [dot for curve in curves for dot in curve.dots]
    if not dots:
        return '<p class="quiet">nothing to draw</p>'
    heights = [v for dot in dots if not dot.off for v in (dot.y, dot.low, dot.high) if v is not None] or [0.0, 1.0]
    across = _padded([dot.x for dot in dots] + [1.0], 0.04)
    axes = Axes(width, height, across, _padded(heights))
    parts = axes.frame(x_title, y_title, "×")
    if any(dot.off for dot in dots):
        parts.append(f'<text class="tick" x="{width - 6}" y="{axes.top - 4}" text-anchor="end">identical</text>')
    if across[0] < 1 < across[1]:
        parts.append(
            f'<line class="one" x1="{axes.px(1)}" x2="{axes.px(1)}" y1="{axes.top}" y2="{height - axes.bottom}"/>'
        )
    # Ours are drawn last, on top.
    for curve in sorted(curves, key=lambda curve: curve.ours):
        style = f"--c:var(--c{curve.colour % COLOURS})"
        kind = "curve ours" if curve.ours else "curve"
        parts.append(f'<g class="{kind}" data-method="{escape(curve.name)}" style="{style}">')
        ordered = sorted(curve.dots, key=lambda dot: dot.x)
        way = " ".join(f"{axes.px(dot.x)},{axes.py(dot.y)}" for dot in ordered if not dot.off)
        dashes = ' stroke-dasharray="5 4"' if curve.dashed else ""
        parts.append(f'<polyline points="{way}"{dashes}/>')
        for dot in ordered:
            x, y = axes.px(dot.x), axes.top if dot.off else axes.py(dot.y)
            parts.append(f"<g><title>{escape(dot.title)}</title>")
            if dot.low is not None and dot.high is not None and not dot.off:
                parts.append(
                    f'<line class="interval" x1="{x}" x2="{x}" y1="{axes.py(dot.low)}" y2="{axes.py(dot.high)}"/>'
                )
            parts.append(_mark(x, y, SHAPES[curve.colour % len(SHAPES)], 4.6))
            parts.append("</g>")
        parts.append("</g>")
    body = "".join(parts)
    return _svg(f"chart {kind_of}".strip(), width, height, label or y_title, body)


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_title: str,
    y_title: str,
    *,
    width: float = 760,
    kind_of: str = "",
) -> str:
    """Plain lines, one per branch; the y axis begins at zero."""
    points = [point for values in series.values() for point in values]
    if not points:
        return ""
    height = 240.0
    xs = [x for x, _ in points]
    top = max(y for _, y in points) * 1.08 or 1.0
    axes = Axes(width, height, (min(xs), max(max(xs), min(xs) + 1)), (0.0, top))
    parts = axes.frame(x_title, y_title)
    for number, (name, values) in enumerate(series.items()):
        way = " ".join(f"{axes.px(x)},{axes.py(y)}" for x, y in values)
        parts.append(
            f'<g class="curve" style="--c:var(--c{number})"><title>{escape(name)}</title><polyline points="{way}"/></g>'
        )
    return _svg(f"chart {kind_of}".strip(), width, height, y_title, "".join(parts))


def timeline(rows: Sequence[tuple[str, Sequence[float]]], *, label: str) -> str:
    """What was computed: rows of cells with one cell per step, which is darker the more of it ran (0 to 1)."""
    steps = max((len(cells) for _, cells in rows), default=0)
    if not steps:
        return ""
    left, cell, tall = 64.0, 700.0 / steps, 14.0 if len(rows) < 5 else 7.0
    width, height = left + cell * steps, tall * len(rows) + (len(rows) - 1) + 2
    parts = []
    for number, (name, cells) in enumerate(rows):
        y = number * (tall + 1)
        if len(rows) < 5 or number % max(1, len(rows) // 4) == 0:
            parts.append(
                f'<text class="tick" x="{left - 6}" y="{y + tall - 2.5}" text-anchor="end">{escape(name)}</text>'
            )
        for step, share in enumerate(cells):
            x = left + step * cell
            shade = 0.08 + 0.92 * max(0.0, min(1.0, share))
            parts.append(
                f'<rect class="cell" x="{x:.1f}" y="{y:.1f}" width="{max(0.6, cell - 0.8):.1f}" height="{tall:g}" '
                f'fill-opacity="{shade:.2f}"><title>step {step + 1}: {share:.0%} computed</title></rect>'
            )
    return _svg("timeline", width, height, label, "".join(parts))
