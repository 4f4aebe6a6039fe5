"""Writes the report of a :class:`~unicp.bench.comparison.Comparison`: one self-contained HTML file."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..files.whole import staged
from .charts import COLOURS, Curve, Dot, lines, scatter, timeline
from .quality import CAPTION, MAX_PSNR_DB, MEASURES, Measure
from .results import Compared, Point, Row
from .sprites import layout
from .statistics import Estimate

MAX_EMBEDDED_BYTES = 24 * 2**20
"""Most bytes of embedded videos; beyond that, points farthest from :data:`FEATURED_SPEEDUP` have figures only."""
FEATURED_SPEEDUP = 2.0
"""Speed-up at which one point of each method is shown first."""
SPEEDS = (1.5, 2.0, 3.0)
"""Speed-ups at which methods are ranked."""
FEWER_STEPS_COLOUR = 11
"""Colour of the curve of fewer steps."""


@dataclass(frozen=True)
class _Cell:
    """A cell of the table: its text, and the small print below it."""

    text: str
    small: tuple[str, ...] = ()


def write(comparison: Compared, path: Path, *, fps: float) -> Path:
    """Write the page whole or not at all.

    Raises:
        UnicpError: the folder cannot be written to.
    """
    page = html(comparison, fps=fps)
    with staged(path) as part:
        part.write_text(page, "utf-8")
    return path


def html(comparison: Compared, *, fps: float) -> str:
    """The page."""
    import jinja2
    from markupsafe import Markup

    templates = jinja2.PackageLoader("unicp.bench", "templates")
    environment = jinja2.Environment(loader=templates, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    colours = _colours(comparison)
    curves = comparison.curves()
    shown = forward(comparison)
    measures = [m for m in MEASURES if any(row.quality.get(m.name) for row in comparison.rows())]
    kinds = (("loop_speedup", "denoising loop"), ("total_speedup", "whole call"))
    return environment.get_template("report.html").render(
        unicp=__version__,
        comparison=comparison,
        model=_model(comparison),
        legend=[(name, colours[name], rows[0].ours) for name, rows in curves.items()],
        measures=measures,
        kinds=kinds,
        colours=COLOURS,
        charts={
            (m.name, kind): Markup(_chart(curves, colours, m, kind, title)) for m in measures for kind, title in kinds
        },
        rankings=rankings(comparison),
        columns=[(measure, measure in measures) for measure in MEASURES],
        rows=[(row, colours[row.method], _cells(row)) for row in comparison.rows()],
        caption=_caption(comparison),
        caption_names=CAPTION,
        timelines=[
            (point, colours[point.method], point.name in shown.values(), Markup(svg))
            for point in comparison.points
            if (svg := _timeline(point))
        ],
        changes=Markup(_changes(comparison.baseline)),
        sources={point.method: point for point in comparison.points},
        script_data=Markup(_json(_players(comparison, shown, colours, fps))),
        provenance=_flat(comparison.provenance),
        bytes=_bytes,
    )


def _json(values: Any) -> str:
    # Inside a script element only "</" and "<!--" could end it or change how it is read.
    return json.dumps(values, ensure_ascii=False).replace("<", "\\u003c")


def _model(comparison: Compared) -> str:
    return str(comparison.provenance.get("model", {}).get("pipeline", "pipeline"))


def _colours(comparison: Compared) -> dict[str, int]:
    """A colour for each method, ours first; fewer steps is grey."""
    names = list(dict.fromkeys(point.method for point in comparison.points))
    ordered = sorted(names, key=lambda name: not any(p.ours for p in comparison.points if p.method == name))
    rest = [name for name in ordered if name != "fewer-steps"]
    found = {
        name: number + number // FEWER_STEPS_COLOUR for number, name in enumerate(rest)
    }  # never the grey one's number
    return {**found, **({"fewer-steps": FEWER_STEPS_COLOUR} if "fewer-steps" in names else {})}


def forward(comparison: Compared) -> dict[str, str]:
    """By method, the name of its point that is nearest to :data:`FEATURED_SPEEDUP`."""
    return {
        name: min(rows, key=lambda row: abs(row.loop_speedup.value - FEATURED_SPEEDUP)).name
        for name, rows in comparison.curves().items()
    }


def _chart(
    curves: Mapping[str, list[Row]],
    colours: Mapping[str, int],
    measure: Measure,
    kind: str,
    title: str,
) -> str:
    drawn = []
    for name, rows in curves.items():
        dots = []
        for row in rows:
            value, speed = row.quality.get(measure.name), getattr(row, kind)
            if value is not None:
                said = f"{row.name}: {speed.value:.2f}× as fast, {measure.title} {_figure(value.value, measure)}"
                off = "psnr" in measure.name and value.value >= MAX_PSNR_DB
                dots.append(Dot(speed.value, value.value, value.low, value.high, said, off))
        if dots:
            drawn.append(Curve(name, dots, colours[name], rows[0].ours, name == "fewer-steps"))
    unit = f" ({measure.unit})" if measure.unit else ""
    said = f"{measure.title} over speed"
    across, upwards = f"speed-up of the {title}, wall-clock", measure.title + unit
    # Two sizes: a chart that is readable on a desktop is too small on a phone.
    wide = scatter(drawn, across, upwards, label=said, kind_of="for-desk")
    return wide + scatter(drawn, across, upwards, width=400, height=340, label=said, kind_of="for-phone")


def _figure(value: float, measure: Measure) -> str:
    if "psnr" in measure.name and value >= MAX_PSNR_DB:
        return "identical"
    return f"{value:.{measure.digits}f}" + (f" {measure.unit}" if measure.unit else "")


def rankings(comparison: Compared) -> list[tuple[float, list[tuple[str, float, bool]]]]:
    """The methods by PSNR at each of :data:`SPEEDS`, best first (:meth:`Comparison.at_speedup`)."""
    ours = {point.method for point in comparison.points if point.ours}
    found = []
    for speed in SPEEDS:
        at = [(name, value, name in ours) for name, value in comparison.at_speedup(speed).items() if value is not None]
        if at:
            found.append((speed, sorted(at, key=lambda entry: -entry[1])))
    return found


def _interval(value: Estimate, digits: int) -> tuple[str, ...]:
    return () if value.low is None or value.high is None else (f"{value.low:.{digits}f}–{value.high:.{digits}f}",)


def _cells(row: Row) -> list[_Cell]:
    loop, total = row.loop_speedup, row.total_speedup
    cells = [
        _Cell(f"{loop.value:.2f}×", _interval(loop, 2)),
        _Cell(f"{total.value:.2f}×", _interval(total, 2)),
        _Cell("?" if row.computed_fraction is None else f"{row.computed_fraction:.0%}"),
    ]
    for measure in MEASURES:
        value = row.quality.get(measure.name)
        if value is None:
            cells.append(_Cell("–"))
            continue
        text = _figure(value.value, measure).removesuffix(f" {measure.unit}")
        small = () if row.identical else _interval(value, min(3, measure.digits))
        if measure.name in ("psnr", "ssim") and value.count > 1 and not row.identical:
            small += (f"worst {value.worst:.{min(3, measure.digits)}f}",)
        cells.append(_Cell(text, small))
    return cells + [_Cell(_bytes(row.peak_bytes)), _Cell(_bytes(row.cache_bytes))]


def _bytes(count: int | None) -> str:
    if count is None:
        return "–"
    size, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if size >= 100 or units[0] == "B" else f"{size:.1f} {units[0]}"


def _caption(comparison: Compared) -> list[tuple[str, dict[str, float]]]:
    shown = forward(comparison).values()
    points = [comparison.baseline, *(point for point in comparison.points if point.name in shown)]
    return [(point.name, right) for point in points if (right := point.caption_right()) is not None]


def _timeline(point: Point) -> str:
    """Rows of branches and, where a call may run only some of the blocks, rows of blocks below them."""
    calls, blocks = point.observed.get("calls", []), point.observed.get("blocks", [])
    if not calls:
        return ""
    branches = sorted({call["branch"] for call in calls})
    rows = [(f"call {b + 1}", [call["share"] for call in calls if call["branch"] == b]) for b in branches]
    svg = timeline(rows, label=f"{point.name}: computed share of each denoiser call, by step")
    partial = any(0.02 < share < 0.98 for call in calls for share in call["blocks"]) or any(
        0.05 < sum(call["blocks"]) / max(1, len(call["blocks"])) < 0.95 for call in calls
    )
    if partial and blocks:
        first = [call for call in calls if call["branch"] == 0]
        units = [(name.rpartition(".")[2], [_share(call, n) for call in first]) for n, name in enumerate(blocks)]
        svg += f"<p class='quiet'>its blocks, first call of each step</p>{timeline(units, label='share of each block')}"
    return svg


def _share(call: Mapping[str, Any], block: int) -> float:
    """How much of a block ran in a call: nothing, if it is another denoiser's."""
    shares, place = call["blocks"], block - call.get("first", 0)
    return shares[place] if 0 <= place < len(shares) else 0.0


def _changes(baseline: Point) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    for call in baseline.observed.get("calls", []):
        if call["change"] is not None:
            series.setdefault(f"call {call['branch'] + 1}", []).append((call["step"] + 1, call["change"]))
    titles = ("denoising step", "relative L1 change")
    return lines(series, *titles, kind_of="for-desk") + lines(series, *titles, width=400, kind_of="for-phone")


def _players(comparison: Compared, shown: Mapping[str, str], colours: Mapping[str, int], fps: float) -> dict[str, Any]:
    """The videos for the page's script: sheets of frames by point and prompt, within :data:`MAX_EMBEDDED_BYTES`."""
    order = sorted(comparison.points, key=lambda point: (point.name not in shown.values(), not point.ours))
    videos: dict[str, dict[int, str]] = {}
    figures: dict[str, dict[int, dict[str, Any]]] = {}
    left = MAX_EMBEDDED_BYTES
    counts = range(len(comparison.prompts))
    shape: tuple[int, ...] | None = None
    # First every method's featured point, prompt by prompt; then as many others as there is room for.
    ahead = [point for point in order if point.name in shown.values()]
    wanted = [(point, n) for n in counts for point in (comparison.baseline, *ahead)]
    wanted += [(point, n) for n in counts for point in order if point not in ahead]
    for point, number in wanted:
        result = next((r for r in point.results if r.prompt == number and r.repeat == 0), None)
        if result is None or result.video is None or len(result.video) * 4 / 3 > left:
            continue
        left -= int(len(result.video) * 4 / 3)
        shape = shape or result.shape
        data = base64.b64encode(result.video).decode()
        videos.setdefault(point.name, {})[number] = f"data:image/webp;base64,{data}"
        figures.setdefault(point.name, {})[number] = {
            "seconds": round(result.loop_seconds, 3),
            "speedup": round(comparison.beside(result)["loop_seconds"] / result.loop_seconds, 2),
            "psnr": None if not result.quality else min(MAX_PSNR_DB, float(result.quality["psnr"] or 0)),
        }
    names = [comparison.baseline.name, *(p.name for p in comparison.points if p.name in videos)]
    by_name = {point.name: point for point in comparison.points}
    return {
        "prompts": [prompt or f"prompt {number + 1}" for number, prompt in enumerate(comparison.prompts)],
        "layout": None if shape is None else layout(*shape[:3]).to_dict(),
        "fps": fps / (1 if shape is None else layout(*shape[:3]).stride),
        "baseline": comparison.baseline.name,
        "points": [
            {
                "name": name,
                "method": by_name[name].method if name in by_name else name,
                "label": by_name[name].label if name in by_name else "",
                "colour": colours[by_name[name].method] % COLOURS if name in by_name else -1,
                "forward": name in shown.values(),
                "ours": name in by_name and by_name[name].ours,
            }
            for name in names
        ],
        "videos": videos,
        "figures": figures,
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found += _flat(value, f"{name} · ")
        else:
            found.append((name, "–" if value is None else str(value)))
    return found
