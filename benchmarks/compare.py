"""Every method and peer on the demo model: the committed comparison.

    python -m benchmarks.compare [--prompts 32] [--steps 50] [--methods NAME,...] [--repeats 1] [--keep FILE.json]

Run it once with ``--steps 50`` and once with ``--steps 30``. With ``--keep FILE.json`` the points of an earlier
comparison are taken over where a method is not measured anew; every speed-up is over unaccelerated runs of its own
comparison. It may be interrupted: every run is kept in
``benchmarks/results/compare-STEPS.sqlite`` (not committed), and the same command goes on from there. What is committed
is ``compare-STEPS.json``, every run's time and what the tables say of its quality (:mod:`benchmarks.figures`); the
report, with all measures and videos, lies beside it as ``.html``.
The prompts are captions that the demo model was not trained on; MagCache is calibrated on one from the training side.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import unicp
from benchmarks import common, figures
from unicp.bench.results import Row
from unicp.bench.statistics import interpolate
from unicp.profiles.identity import without_private

SPEEDS = (1.5, 2.0, 2.5, 3.0)
BUDGET = unicp.BudgetConfig.method
HOW = ("command", "date", "environment")
"""What is said of methods that are taken over from another comparison."""


class _Curves:
    """The curves of a comparison, read at :data:`SPEEDS`: methods by PSNR at 2x, the best one first."""

    def __init__(self, comparison: unicp.Comparison) -> None:
        self.rows = {name: rows for name, rows in comparison.curves().items() if name != "control"}
        self.mean = [comparison.at_speedup(speed) for speed in SPEEDS]
        self.worst = [comparison.at_speedup(speed, worst=True) for speed in SPEEDS]
        self.names = sorted(self.rows, key=self._height, reverse=True)

    def _height(self, name: str) -> tuple[float, ...]:
        figures = (self.mean[SPEEDS.index(2.0)][name], self.mean[0][name])
        return tuple(float("-inf") if value is None else value for value in figures)


def table(comparison: unicp.Comparison) -> str:
    """Markdown: PSNR of every method at the same speed, ours in bold, a dash where its curve does not reach.

    Where its slowest point is faster than that, it counts as it is, its speed beside it.
    """
    curves = _Curves(comparison)
    further = [comparison.at_speedup(2.0, measure) for measure in ("ssim", "motion_ratio")]
    at = " | ".join(f"{speed:g}×" for speed in SPEEDS)
    lines = [
        f"| PSNR (dB), mean / worst, at | {at} | SSIM at 2× | motion ratio at 2× | fastest |",
        "|---|" + "---:|" * (len(SPEEDS) + 3),
    ]
    for name in curves.names:
        rows = curves.rows[name]
        pairs = [(high[name], low[name]) for high, low in zip(curves.mean, curves.worst, strict=True)]
        cells = ["–" if high is None or low is None else f"{high:.1f} / {low:.1f}" for high, low in pairs]
        slowest = min((row.loop_speedup.value for row in rows if not row.identical), default=0.0)
        cells = [f"{cell} ({slowest:.2f}×)" if slowest > x else cell for cell, x in zip(cells, SPEEDS, strict=True)]
        cells += ["–" if (value := figures[name]) is None else f"{value:.3f}" for figures in further]
        cells.append(f"{rows[-1].loop_speedup.value:.2f}×")
        lines.append(f"| {f'**{name}**' if rows[0].ours else name} | {' | '.join(cells)} |")
    lines += ["", *margins(comparison)]
    broken: dict[str, str] = {}
    for failure in comparison.failures:
        broken.setdefault(failure.method, failure.error)
    where = comparison.provenance
    lines += ["", *(f"Did not run: {name} ({error})." for name, error in broken.items())]
    lines += [f"{note}." for note in comparison.notes]
    lines += [
        "",
        f"{len(comparison.prompts)} captions the model never saw, {comparison.steps} steps; speed-up is wall-clock of "
        f"the denoising loop. {_how(where)}",
    ]
    for one in where.get("kept", []):
        lines[-1] += f" Taken over from before: {', '.join(one['methods'])}. {_how(one)}"
    return "\n".join(lines)


def margins(comparison: unicp.Comparison) -> list[str]:
    """Markdown: how far ours are ahead of the best peer at the same speed, or behind."""
    curves = _Curves(comparison)
    peers = [name for name, rows in curves.rows.items() if not rows[0].ours]

    def margin(name: str, figures: dict[str, float | None]) -> str:
        own, others = figures[name], [value for peer in peers if (value := figures[peer]) is not None]
        return "–" if own is None or not others else f"{own - max(others):+.1f}"

    lines = [
        f"| ours minus the best peer there (dB), mean / worst, at | {' | '.join(f'{speed:g}×' for speed in SPEEDS)} |",
        "|---|" + "---:|" * len(SPEEDS),
    ]
    for name in curves.names:
        if name not in peers:
            pairs = zip(curves.mean, curves.worst, strict=True)
            cells = [f"{margin(name, high)} / {margin(name, low)}" for high, low in pairs]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        if name == BUDGET:
            rows = curves.rows[name]
            cells = [
                f"{margin(name, {**high, name: _allowed(rows, speed)})} / "
                f"{margin(name, {**low, name: _allowed(rows, speed, worst=True)})}"
                for speed, high, low in zip(SPEEDS, curves.mean, curves.worst, strict=True)
            ]
            lines.append(f"| {name}, read as no faster than its steps allow | {' | '.join(cells)} |")
    return lines


def _allowed(rows: Sequence[Row], speed: float, worst: bool = False) -> float | None:
    """PSNR at a speed, where a point counts as no faster than its share of steps: timings vary by some percent.

    For plans that are the same at every prompt: the share is the first prompt's.
    """
    points = []
    for row in rows:
        quality = row.quality["psnr"]
        if quality is not None and row.computed_fraction:
            value = quality.worst if worst else quality.value
            points.append((min(row.loop_speedup.value, 1 / row.computed_fraction), value))
    return interpolate(points, speed)


def _how(provenance: dict[str, Any]) -> str:
    device, cores = (provenance["environment"][name] for name in ("device", "cores"))
    return f"`{provenance['command']}`, {provenance['date']}, {device}, {cores} cores."


def joined(new: unicp.Comparison, old: unicp.Comparison) -> unicp.Comparison:
    """The new comparison, and of the old one the methods that it has not.

    Their runs keep the time of the unaccelerated runs that were made beside them: machines differ.
    """
    other = [name for name in ("model", "scheduler", "call", "seed") if _about(new, name) != _about(old, name)]
    other += [name for name in ("prompts", "repeats") if getattr(new, name) != getattr(old, name)]
    if other:
        raise SystemExit(f"--keep: that comparison is of another {' and '.join(other)}; leave it out")
    measured = {point.method for point in new.points} | {failure.method for failure in new.failures}
    points = [
        replace(point, results=tuple(replace(result, beside=old.beside(result)) for result in point.results))
        for point in old.points
        if point.method not in measured
    ]
    taken = dict.fromkeys(point.method for point in points)
    earlier = old.provenance.get("kept", [])
    of_earlier = {name for one in earlier for name in one["methods"]}
    own = {
        **{name: old.provenance[name] for name in HOW},
        "methods": [name for name in taken if name not in of_earlier],
    }
    kept = [{**one, "methods": [name for name in one["methods"] if name in taken]} for one in (own, *earlier)]
    failures = [failure for failure in old.failures if failure.method not in measured]
    return replace(
        new,
        points=(*new.points, *points),
        failures=(*new.failures, *failures),
        provenance={**new.provenance, "kept": [one for one in kept if one["methods"]]},
    )


def _about(comparison: unicp.Comparison, name: str) -> Any:
    """What a comparison is of, without what diffusers keeps for itself, which older ones have too."""
    value = comparison.provenance[name]
    return without_private(value) if name == "scheduler" else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32, help="held-out captions")
    parser.add_argument("--steps", type=int, default=unicp.demo.STEPS, help="denoising steps")
    parser.add_argument("--methods", help="names with commas between; by default all")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", default=None, help="name of the results, without ending; by default compare-STEPS")
    parser.add_argument("--keep", help="a comparison (JSON) whose methods are taken over where they are not measured")
    args = parser.parse_args()
    prompts = unicp.demo.prompts(args.prompts)
    old = figures.read_comparison(Path(args.keep)) if args.keep else None  # before it is written over
    if old is not None and (old.prompts, old.steps, old.repeats) != (tuple(prompts), args.steps, args.repeats):
        parser.error(f"--keep {args.keep}: it has {len(old.prompts)} prompts, {old.steps} steps, {old.repeats} repeats")
    common.RESULTS.mkdir(exist_ok=True)
    place = common.RESULTS / (args.out or f"compare-{args.steps}")
    comparison = unicp.compare(
        common.pipeline(),
        args.methods.split(",") if args.methods else None,
        prompts,
        repeats=args.repeats,
        results=place.with_suffix(".sqlite"),
        calibration_prompt=common.training_prompts(1)[0],
        **{**common.CALL, "num_inference_steps": args.steps},
    )
    if old is not None:
        comparison = joined(comparison, old)
    print(comparison)
    print(table(comparison))
    print(f"written: {figures.write_comparison(place.with_suffix('.json'), comparison).name}")
    print(f"written: {comparison.report(place.with_suffix('.html'), fps=unicp.demo.FPS).name}")


if __name__ == "__main__":
    main()
