"""Every method and peer on the demo model: the committed comparison.

    python -m benchmarks.compare [--prompts 32] [--steps 50] [--methods NAME,...] [--repeats 1] [--keep FILE.json]

Run it once with ``--steps 50`` and once with ``--steps 30``. With ``--keep FILE.json`` the points of an earlier
comparison are taken over where a method is not measured anew; every speed-up is over unaccelerated runs of its own
comparison. It may be interrupted: every run is kept in
``benchmarks/results/compare-STEPS.sqlite`` (not committed), and the same command goes on from there. What is committed
is ``compare-STEPS.json``, all figures without the videos, and ``compare-STEPS.md``, the methods at the same speed. The
report, with videos, lies beside them as ``.html``.
The prompts are captions that the demo model was not trained on; MagCache is calibrated on one from the training side.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import unicp
from benchmarks import common

SPEEDS = (1.5, 2.0, 2.5, 3.0)


def table(comparison: unicp.Comparison) -> str:
    """Markdown: PSNR of every method at the same speed, ours in bold, a dash where its curve does not reach.

    Where its slowest point is faster than that, it counts as it is, its speed beside it.
    """
    curves = {name: rows for name, rows in comparison.curves().items() if name != "control"}
    mean = [comparison.at_speedup(speed) for speed in SPEEDS]
    worst = [comparison.at_speedup(speed, worst=True) for speed in SPEEDS]

    def height(name: str) -> tuple[float, ...]:
        figures = (mean[SPEEDS.index(2.0)][name], mean[0][name])
        return tuple(float("-inf") if value is None else value for value in figures)

    further = [comparison.at_speedup(2.0, measure) for measure in ("ssim", "motion_ratio")]
    at = " | ".join(f"{speed:g}×" for speed in SPEEDS)
    lines = [
        f"| PSNR (dB), mean / worst, at | {at} | SSIM at 2× | motion ratio at 2× | fastest |",
        "|---|" + "---:|" * (len(SPEEDS) + 3),
    ]
    for name in sorted(curves, key=height, reverse=True):
        pairs = [(high[name], low[name]) for high, low in zip(mean, worst, strict=True)]
        cells = ["–" if high is None or low is None else f"{high:.1f} / {low:.1f}" for high, low in pairs]
        slowest = min((row.loop_speedup.value for row in curves[name] if not row.identical), default=0.0)
        cells = [f"{cell} ({slowest:.2f}×)" if slowest > x else cell for cell, x in zip(cells, SPEEDS, strict=True)]
        cells += ["–" if (value := figures[name]) is None else f"{value:.3f}" for figures in further]
        cells.append(f"{curves[name][-1].loop_speedup.value:.2f}×")
        lines.append(f"| {f'**{name}**' if curves[name][0].ours else name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"| ours minus the best peer there (dB), mean / worst, at | {at} |",
        "|---|" + "---:|" * len(SPEEDS),
    ]
    peers = [name for name in curves if not curves[name][0].ours]

    def margin(name: str, figures: dict[str, float | None]) -> str:
        own, others = figures[name], [value for peer in peers if (value := figures[peer]) is not None]
        return "–" if own is None or not others else f"{own - max(others):+.1f}"

    for name in sorted(curves.keys() - set(peers), key=height, reverse=True):
        margins = [f"{margin(name, high)} / {margin(name, low)}" for high, low in zip(mean, worst, strict=True)]
        lines.append(f"| {name} | {' | '.join(margins)} |")
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
    if "kept" in where:
        lines[-1] += f" Taken over from before: {', '.join(where['kept']['points'])}. {_how(where['kept'])}"
    return "\n".join(lines)


def _how(provenance: dict[str, Any]) -> str:
    device, cores = (provenance["environment"][name] for name in ("device", "cores"))
    return f"`{provenance['command']}`, {provenance['date']}, {device}, {cores} cores."


def joined(new: unicp.Comparison, old: unicp.Comparison) -> unicp.Comparison:
    """The new comparison, and of the old one the methods that it has not.

    Their runs keep the time of the unaccelerated runs that were made beside them: machines differ.
    """
    same = ("prompts", "steps", "seed", "repeats")
    other = [name for name in same if getattr(new, name) != getattr(old, name)]
    if other or old.provenance["model"] != new.provenance["model"]:
        raise SystemExit(f"--keep: that comparison has other {', '.join(other) or 'weights'}; leave it out")
    measured = {point.method for point in new.points}
    points = [
        replace(point, results=tuple(replace(result, beside=old.beside(result)) for result in point.results))
        for point in old.points
        if point.method not in measured
    ]
    kept = {**old.provenance, "points": list(dict.fromkeys(point.method for point in points))}
    failures = [failure for failure in old.failures if failure.method not in measured]
    return replace(
        new,
        points=(*new.points, *points),
        failures=(*new.failures, *failures),
        provenance={**new.provenance, "kept": kept},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32, help="held-out captions")
    parser.add_argument("--steps", type=int, default=unicp.demo.STEPS, help="denoising steps")
    parser.add_argument("--methods", help="names with commas between; by default all")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", default=None, help="name of the results, without ending; by default compare-STEPS")
    parser.add_argument("--keep", help="a comparison (JSON) whose methods are taken over where they are not measured")
    args = parser.parse_args()
    old = unicp.Comparison.load(args.keep) if args.keep else None  # before it is written over
    common.RESULTS.mkdir(exist_ok=True)
    place = common.RESULTS / (args.out or f"compare-{args.steps}")
    comparison = unicp.compare(
        common.pipeline(),
        args.methods.split(",") if args.methods else None,
        unicp.demo.prompts(args.prompts),
        repeats=args.repeats,
        results=place.with_suffix(".sqlite"),
        calibration_prompt=common.training_prompts(1)[0],
        **{**common.CALL, "num_inference_steps": args.steps},
    )
    if old is not None:
        comparison = joined(comparison, old)
    print(comparison)
    place.with_suffix(".md").write_text(table(comparison) + "\n", "utf-8")
    print(f"written: {comparison.save(place.with_suffix('.json')).name}")
    print(f"written: {comparison.report(place.with_suffix('.html'), fps=unicp.demo.FPS).name}")


if __name__ == "__main__":
    main()
