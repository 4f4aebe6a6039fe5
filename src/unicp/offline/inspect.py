"""Shows what a profile holds: as text for 80 columns, and as figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..engine.slicing.attention import choose_ranks
from ..errors import UnicpError, missing_extra
from ..policies.budget import PlanBook
from ..policies.unicp import UniCPConfig, planned
from ..profiles import Profile
from ..profiles.measured import DenoiserProfile
from ..specs import ATTENTION_KINDS

COLUMNS = 60
"""Most columns of a line of steps; for longer runs, only every second step is shown, or every third, and so on."""
BARS = "▁▂▃▄▅▆▇█"
SIGNS = {"compute": "#", "map": "m", "slice": "s", "reuse": ".", "forecast": "~"}
COLOURS = {"compute": "#1f4e79", "slice": "#e08214", "reuse": "#d9e6f2", "forecast": "#d9e6f2"}
LABELS = {"compute": "in full", "slice": "sliced", "reuse": "kept output", "forecast": "forecast"}


class Inspected:
    """One denoiser of a profile, and what UniCP does with it under the profile's config."""

    def __init__(self, profile: Profile, name: str) -> None:
        if not isinstance(profile.config, UniCPConfig):
            raise UnicpError(f"the profile holds a plan for {profile.config.method}, not what UniCP measures")
        self.name = name
        self.config = profile.config
        self.part: DenoiserProfile = profile.of(name)
        self.units = self.part.units
        sliced = {}
        for unit in self.units:
            moments = self.part.moments(unit)
            ranks = None
            if moments is not None and self.config.pcas:
                table = self.part.slicing(unit)
                ranks = choose_ranks(table, moments[0].shape[-1], self.config.delta_prune)
            if ranks is not None:
                sliced[unit] = table[ranks.qk][0]
        errors = self.part.errors(self.config.statistic, sliced, self.config.fill)
        self.plan = planned(self.config.replace(stack=None, target_speedup=None), errors, self.units)

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(self.units.values()))

    def of_kind(self, kind: str) -> list[str]:
        return [unit for unit, its in self.units.items() if its == kind]

    def neighbours(self, unit: str) -> list[float]:
        """``E[m, t, 1]``: change of the output from every step to the next (one fewer than steps)."""
        return [float(row[0]) for row in self.part.tensors[f"{unit}/cache_{self.config.statistic}"].tolist()][:-1]

    def mean_neighbours(self, kind: str) -> list[float]:
        rows = [self.neighbours(unit) for unit in self.of_kind(kind)]
        return [sum(column) / len(column) for column in zip(*rows, strict=True)]

    def line(self, unit: str) -> str:
        return "".join(SIGNS[step[unit]] for step in self.plan)


def spark(values: Sequence[float], columns: int = COLUMNS) -> str:
    """A curve in one line of text, from zero to the largest value; blank where a value is not finite.

    >>> spark([0.0, 0.5, 1.0])
    '▁▅█'
    """
    values = thinned(values, columns)
    top = max((v for v in values if math.isfinite(v)), default=0.0) or 1.0
    return "".join(BARS[round(v / top * (len(BARS) - 1) + 1e-9)] if math.isfinite(v) else " " for v in values)


def thinned(values: Sequence[Any], columns: int = COLUMNS) -> Sequence[Any]:
    """Every n-th value, with the smallest n for which they fit into the columns."""
    stride = -(-len(values) // columns)
    return values[::stride]


def u_shape(values: Sequence[float]) -> tuple[float, float, float]:
    """A curve's mean over its first tenth, its lowest tenth anywhere, and its last tenth.

    >>> u_shape([4.0, 1.0, 1.0, 3.0])
    (4.0, 1.0, 3.0)
    """
    part = max(1, len(values) // 10)
    lowest = sorted(values)[:part]
    return sum(values[:part]) / part, sum(lowest) / part, sum(values[-part:]) / part


def text(profile: Profile) -> str:
    """A profile as text, in lines of at most 80 columns."""
    about = profile.metadata
    if isinstance(about.get("budget"), dict):
        return _plans(profile)
    lines = [
        f"{about.get('pipeline')} with {about.get('scheduler')}, {about.get('steps')} steps, "
        f"{about.get('prompts')} prompts"
    ]
    for name in about.get("denoisers", {}):
        inspected = Inspected(profile, name)
        lines += ["", f"{name}: change of the outputs from step to step (first, lowest, last)"]
        for kind in inspected.kinds:
            curve = inspected.mean_neighbours(kind)
            first, lowest, last = u_shape(curve)
            lines.append(f"  {kind:<20} {first:.3f}  {lowest:.3f}  {last:.3f}")
            lines.append(f"  {spark(curve)}")
        lines += _slicing_lines(inspected)
        lines += ["", f"plan at delta {inspected.config.delta:g}, delta_prune {inspected.config.delta_prune:g}"]
        for unit in inspected.units:
            line = thinned(inspected.line(unit))
            lines.append(f"  {unit[-18:]:<18}{line if isinstance(line, str) else ''.join(line)}")
        lines.append("  # in full   s sliced   ~ forecast   . kept output")
    return "\n".join(lines)


def _plans(profile: Profile) -> str:
    """The plans of a budget, one line each."""
    about = profile.metadata
    book = PlanBook.from_dict(about["budget"])
    lines = [
        f"{about.get('pipeline')} with {about.get('scheduler')}, {about.get('steps')} steps",
        f"{about.get('prompts')} prompts, of which {max(len(priced.psnr) for priced in book.plans)} judged the plans",
        "",
        "speed-up  PSNR of four in five  plan",
    ]
    for priced in book.plans:
        signs = ["#"] * priced.plan.steps
        for segment in priced.plan.segments:
            for step in range(segment.after + 1, segment.until):
                signs[step] = "~" if segment.order else "."
        psnr = f"{priced.safe_psnr:8.1f} dB" if priced.psnr else " " * 11
        lines.append(f"{priced.speedup:7.2f}x {psnr}  {''.join(thinned(signs, 56))}")
    lines += [
        "# computed   ~ forecast   . reused",
        "a solver that can take longer steps leaps over some of the latter two",
    ]
    return "\n".join(lines)


def _slicing_lines(inspected: Inspected) -> list[str]:
    tables = {
        unit: inspected.part.slicing(unit) for unit in inspected.units if inspected.part.moments(unit) is not None
    }
    if not tables:
        return []
    lines = ["", "slicing error by rank, mean of the attention modules (all, q and k, v)"]
    ranks = sorted({rank for table in tables.values() for rank in table})
    for rank in ranks:
        rows = [table[rank] for table in tables.values() if rank in table]
        means = [sum(row[i] for row in rows) / len(rows) for i in range(3)]
        lines.append(f"  {rank:>4}  " + "  ".join(f"{value:8.4f}" for value in means))
    return lines


def draw(profile: Profile, folder: Path, stem: str, suffix: str = ".png") -> list[Path]:
    """Write the figures of a profile: error curves over the plan, a map of errors, slicing errors by rank.

    Returns:
        The files, for each denoiser ``STEM[-NAME]-curves``, ``-errors`` and, where slicing was measured, ``-slicing``.

    Raises:
        UnicpError: matplotlib is not installed.
    """
    if isinstance(profile.metadata.get("budget"), dict):
        return []  # a plan is text
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "plots", "figures") from error
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    denoisers = list(profile.metadata.get("denoisers", {}))
    for name in denoisers:
        inspected = Inspected(profile, name)
        base = stem if len(denoisers) == 1 else f"{stem}-{name}"
        figures = {"curves": _curves(Figure, inspected), "errors": _errors(Figure, inspected)}
        slicing = _slicing(Figure, inspected)
        if slicing is not None:
            figures["slicing"] = slicing
        for what, figure in figures.items():
            path = folder / f"{base}-{what}{suffix}"
            figure.savefig(path, dpi=150)
            written.append(path)
    return written


def _curves(figure_type: Any, inspected: Inspected) -> Any:
    """A figure of how much outputs change from step to step, by kind, and of what UniCP does with every module."""
    figure = figure_type(figsize=(9, 4 + 0.11 * len(inspected.units)), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, max(1.5, 0.09 * len(inspected.units))])
    for kind in inspected.kinds:
        rows = [inspected.neighbours(unit) for unit in inspected.of_kind(kind)]
        mean = inspected.mean_neighbours(kind)
        steps = range(1, len(mean) + 1)
        (line,) = above.plot(steps, mean, label=kind.replace("_", " "))
        low, high = [min(c) for c in zip(*rows, strict=True)], [max(c) for c in zip(*rows, strict=True)]
        above.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    above.set_ylabel("relative change since\nthe step before")
    above.set_ylim(bottom=0)
    above.legend(frameon=False, title="mean; band: least to most")
    _plan_map(below, inspected)
    return figure


def _plan_map(axes: Any, inspected: Inspected) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    actions = list(COLOURS)
    ordered = [unit for kind in inspected.kinds for unit in inspected.of_kind(kind)]
    grid = [[actions.index(step[unit]) for step in inspected.plan] for unit in ordered]
    axes.imshow(
        grid, aspect="auto", cmap=ListedColormap(list(COLOURS.values())), vmin=-0.5, vmax=len(actions) - 0.5,
        interpolation="nearest",
    )  # fmt: skip
    axes.set_xlabel("denoising step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    place, middles = 0, []
    for kind in inspected.kinds:
        count = len(inspected.of_kind(kind))
        axes.axhline(place - 0.5, color="black", linewidth=0.8)
        middles.append(place + count / 2 - 0.5)
        place += count
    axes.set_yticks(middles, [kind.replace("_", " ") for kind in inspected.kinds])
    axes.tick_params(axis="y", length=0)
    used = {action for step in inspected.plan for action in step.values()}
    handles = [Patch(color=COLOURS[action], label=LABELS[action]) for action in actions if action in used]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=len(handles), frameon=False)


def _errors(figure_type: Any, inspected: Inspected) -> Any:
    """A figure that maps the change of every module's output from step to step."""
    figure = figure_type(figsize=(9, 2 + 0.12 * len(inspected.units)), layout="constrained")
    axes = figure.subplots()
    ordered = [unit for kind in inspected.kinds for unit in inspected.of_kind(kind)]
    image = axes.imshow(
        [inspected.neighbours(unit) for unit in ordered], aspect="auto", cmap="viridis", interpolation="nearest"
    )
    place = 0
    for kind in inspected.kinds:
        count = len(inspected.of_kind(kind))
        axes.axhline(place - 0.5, color="white", linewidth=1)
        axes.text(0, place + 0.2, kind.replace("_", " "), color="white", fontsize=7, va="top")
        place += count
    axes.set_xlabel("denoising step")
    axes.set_ylabel("module, first block above")
    figure.colorbar(image, label="relative change to the next step")
    return figure


def _slicing(figure_type: Any, inspected: Inspected) -> Any:
    tables: Mapping[str, Any] = {
        unit: inspected.part.slicing(unit)
        for unit, kind in inspected.units.items()
        if kind in ATTENTION_KINDS and inspected.part.moments(unit) is not None
    }
    if not tables:
        return None
    figure = figure_type(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    ranks = sorted({rank for table in tables.values() for rank in table})
    for column, (label, colour) in enumerate(
        [("queries, keys and values", "#1f4e79"), ("queries and keys", "#e08214"), ("values", "#4d9221")]
    ):
        rows = [[table[rank][column] for rank in ranks] for table in tables.values()]
        mean = [sum(c) / len(c) for c in zip(*rows, strict=True)]
        axes.plot(ranks, mean, marker="o", color=colour, label=label)
        low, high = [min(c) for c in zip(*rows, strict=True)], [max(c) for c in zip(*rows, strict=True)]
        axes.fill_between(ranks, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(inspected.config.delta_prune, color="gray", linestyle=":", label="delta_prune")
    axes.set_xlabel(f"rank (head size {ranks[-1]})")
    axes.set_ylabel("relative change of the output")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure
