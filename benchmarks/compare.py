"""Every method and peer on the demo model: the committed comparison.

    python -m benchmarks.compare [--prompts 32] [--steps 50] [--methods NAME,...] [--repeats 1]

Run it once with ``--steps 50`` and once with ``--steps 30``. It may be interrupted: every run is kept in
``benchmarks/results/compare-STEPS.sqlite`` (not committed), and the same command goes on from there. What is committed
is ``compare-STEPS.json``, all figures without the videos, and ``compare-STEPS.md``, the methods at the same speed. The
report, with videos, lies beside them as ``.html``.
The prompts are captions that the demo model was not trained on; MagCache is calibrated on one from the training side.
"""

from __future__ import annotations

import argparse

import unicp
from benchmarks import common
from unicp.bench.comparison import Row
from unicp.bench.statistics import interpolate

SPEEDS = (1.5, 2.0, 2.5, 3.0)


def at_speedups(rows: list[Row]) -> list[tuple[float, float] | None]:
    """PSNR of a curve at :data:`SPEEDS`, mean and worst prompt, on the lines between its points."""
    points = [(row.loop_speedup.value, psnr) for row in rows if (psnr := row.quality["psnr"]) and not row.identical]
    found: list[tuple[float, float] | None] = []
    for speed in SPEEDS:
        mean = interpolate([(at, psnr.value) for at, psnr in points], speed)
        worst = interpolate([(at, psnr.worst) for at, psnr in points], speed)
        found.append(None if mean is None or worst is None else (mean, worst))
    return found


def table(comparison: unicp.Comparison) -> str:
    """Markdown: PSNR of every method at the same speed, ours in bold, a dash where its curve does not reach."""
    curves = {name: rows for name, rows in comparison.curves().items() if name != "control"}
    at = {name: at_speedups(rows) for name, rows in curves.items()}

    def height(name: str) -> float:
        found = [each[0] for each in at[name] if each is not None]
        return sum(found) / len(found) if found else float("-inf")

    lines = [
        "| PSNR (dB), mean / worst, at | " + " | ".join(f"{speed:g}×" for speed in SPEEDS) + " | fastest |",
        "|---|" + "---:|" * (len(SPEEDS) + 1),
    ]
    for name in sorted(curves, key=height, reverse=True):
        cells = ["–" if each is None else f"{each[0]:.1f} / {each[1]:.1f}" for each in at[name]]
        cells.append(f"{curves[name][-1].loop_speedup.value:.2f}×")
        lines.append(f"| {f'**{name}**' if curves[name][0].ours else name} | {' | '.join(cells)} |")
    broken: dict[str, str] = {}
    for failure in comparison.failures:
        broken.setdefault(failure.method, failure.error)
    where = comparison.provenance
    lines += ["", *(f"Did not run: {name} ({error})." for name, error in broken.items())]
    lines += [f"{note}." for note in comparison.notes]
    lines += [
        "",
        f"{len(comparison.prompts)} captions the model never saw, {comparison.steps} steps; speed-up is wall-clock of "
        f"the denoising loop. `{where['command']}`, {where['date']}, {where['environment']['device']}, "
        f"{where['environment']['cores']} cores.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32, help="held-out captions")
    parser.add_argument("--steps", type=int, default=unicp.demo.STEPS, help="denoising steps")
    parser.add_argument("--methods", help="names with commas between; by default all")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", default=None, help="name of the results, without ending; by default compare-STEPS")
    args = parser.parse_args()
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
    print(comparison)
    place.with_suffix(".md").write_text(table(comparison) + "\n", "utf-8")
    print(f"written: {comparison.save(place.with_suffix('.json')).name}")
    print(f"written: {comparison.report(place.with_suffix('.html'), fps=unicp.demo.FPS).name}")


if __name__ == "__main__":
    main()
