"""The decisions of a run as a picture: a row for each guidance branch, a cell for each step, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..engine.report import StepRecord

WORDS = {
    "compute": "computed",
    "partial": "computed in part",
    "forecast": "forecast",
    "leap": "leapt over",
    "reuse": "reused",
}
"""Actions in the words of the page; the style sheet has a colour for each."""
WIDTH, ROW, GAP, CURVE, LEFT, FOOT = 1000, 26, 6, 92, 74, 22


def timeline(records: Sequence[StepRecord], total: int) -> str:
    """An SVG of ``total`` steps; steps without a record are empty.

    The curve is the measured relative change if the method measures one, else the noise level.
    """
    rows: dict[str, dict[int, StepRecord]] = {}
    for record in records:
        rows.setdefault(record.branch, {})[record.index] = record
    rows = rows or {"": {}}
    total = max(total, 1, *(record.index + 1 for record in records)) if records else max(total, 1)
    cell = (WIDTH - LEFT) / total
    parts: list[str] = []
    for number, (branch, done) in enumerate(rows.items()):
        top = number * (ROW + GAP)
        parts.append(f'<text class="name" x="0" y="{top + ROW * 0.68:.1f}">{escape(branch)}</text>')
        for index in range(total):
            found = done.get(index)
            kind = found.action if found is not None else "empty"
            about = _about(found) if found is not None else f"step {index + 1}: not yet"
            parts.append(
                f'<rect class="{kind}" x="{LEFT + index * cell:.2f}" y="{top}" width="{max(cell - 1.5, 1):.2f}" '
                f'height="{ROW}" rx="2"><title>{escape(about)}</title></rect>'
            )
    top = len(rows) * (ROW + GAP)
    title, points = _curve(next(iter(rows.values())))
    height = top
    if len(points) > 1:
        highest = max(value for _, value in points) or 1.0
        height = top + CURVE + FOOT
        spots = [(LEFT + (i + 0.5) * cell, top + CURVE - 0.86 * CURVE * value / highest) for i, value in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts += [
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH}" y1="{top + CURVE}" y2="{top + CURVE}"/>',
            f'<polyline class="curve" points="{line}"/>',
            *(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4"><title>step {i + 1}: {value:.4g}</title></circle>'
                for (x, y), (i, value) in zip(spots, points, strict=True)
            ),
            f'<text class="tick" x="{LEFT - 8}" y="{top + 0.2 * CURVE:.1f}" text-anchor="end">{highest:.3g}</text>',
            f'<text class="tick" x="{LEFT - 8}" y="{top + CURVE}" text-anchor="end">0</text>',
            f'<text class="tick" x="{LEFT}" y="{height - 4}">step 1</text>',
            f'<text class="tick" x="{(LEFT + WIDTH) / 2}" y="{height - 4}" text-anchor="middle">{title}</text>',
            f'<text class="tick" x="{WIDTH}" y="{height - 4}" text-anchor="end">{total}</text>',
        ]
    used = [kind for kind in WORDS if any(record.action == kind for record in records)]
    keys = "".join(f'<span><i class="{kind}"></i>{WORDS[kind]}</span>' for kind in used)
    label = f"{len(records)} calls of the denoiser in {total} steps"
    return (
        f'<div class="unicp-scroll"><svg class="unicp-timeline" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg></div><div class="unicp-keys">{keys}</div>'
    )


def _about(record: StepRecord) -> str:
    said = [f"step {record.index + 1}: {WORDS[record.action]}", f"σ {record.sigma:.3f}"]
    if record.metric is not None:
        said.append(f"change {record.metric:.4g}")
    if record.motion is not None:
        said.append(f"motion {record.motion:.3g}")
    return ", ".join(said)


def _curve(done: dict[int, StepRecord]) -> tuple[str, list[tuple[int, float]]]:
    measured = [(index, record.metric) for index, record in sorted(done.items()) if record.metric is not None]
    measured = [(index, value) for index, value in measured if value == value and abs(value) != float("inf")]
    if len(measured) > 1:
        return "measured change since the last computed step", measured
    return "noise level σ", [(index, record.sigma) for index, record in sorted(done.items())]
