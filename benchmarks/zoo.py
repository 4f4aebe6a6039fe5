"""Every member of the proving ground with every method: what is best at the same share of operations.

    python -m benchmarks.zoo [--members cogvideox hunyuan] [--steps 50 30 20] [--prompts N] [--euler] [--quick]

A situation is a member, a number of steps and a scheduler, the member's own or Euler's. In it our budget, plain fewer
steps and the caches of diffusers and cache-dit are run on held-out captions, one video at a time, and their curves are
read at the same speeds, by operations, counted at the first caption. (``benchmarks.compare`` goes by the clock.)
Where a peer does not run, its own words are kept.

Resumable: every video is kept in ``benchmarks/results/zoo.parts`` (not committed), where each situation's report lies,
too. ``--quick`` takes one caption, 50 steps and what is near twice the speed, in a quarter of an hour, and writes
nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import diffusers

import unicp
import zoo
from benchmarks import common, figures
from benchmarks.compare import BUDGET, SPEEDS
from benchmarks.race import OWN_COLOURS
from unicp.bench.peers import Ours
from unicp.bench.results import Row
from unicp.bench.statistics import at_speed
from unicp.demo import scenes

STEPS = (50, 30, 20)
PARTS = common.RESULTS / "zoo.parts"
IMAGES = Path(__file__).parent.parent / "docs" / "images"
METHODS = (
    "budget",
    "fewer-steps=0.67:0.5:0.4:0.33",
    "taylorseer=2:3",
    "seacache=0.1:0.15:0.25",
    "magcache=0.06:0.12",
    "first-block-cache=0.1:0.2",
    "pab=2",
    "fastercache=2",
    "cache-dit-dbcache=0.1:0.2",
    "cache-dit-taylorseer=0.1:0.2",
)
"""What is compared unless other methods are named: ``"budget"`` is ours, by its defaults, without a profile."""
CAPTIONS, OF_SLOW = 8, 4
"""How many captions a member is measured on, and one of :data:`SLOW`, unless another number is asked for."""
QUICK = (
    Ours(BUDGET, {f"{speed:g}x": unicp.BudgetConfig(target_speedup=speed) for speed in (2, 2.5)}),
    "fewer-steps=0.5:0.4",
    "taylorseer=2:3",
)
"""Methods of ``--quick``: what is near twice the speed, on either side."""
SLOW = ("wan-large-frame",)
"""Members that ``--quick`` leaves out, unless they are named: a video takes a minute on one core."""
TITLES = {
    "wan": "Wan (the demo model)",
    "wan-two": "tiny Wan 2.2 (two denoisers)",
    "wan-image": "tiny Wan, image to video",
    "wan-large-frame": "tiny Wan, large frames",
    "cogvideox": "tiny CogVideoX (DDIM)",
    "hunyuan": "tiny HunyuanVideo",
    "latte": "tiny Latte",
    "ltx": "tiny LTX",
    "open-sora": "tiny Open-Sora",
}
COLOURS = {
    "budget": OWN_COLOURS["budget"],
    "fewer-steps": "#444444",
    "taylorseer": "#2b6ca3",
    "seacache": "#2f8f5b",
    "magcache": "#8a63b8",
    "first-block-cache": "#c08a1e",
    "pab": "#7c8a96",
    "fastercache": "#a8b02a",
    "cache-dit-dbcache": "#d26a9c",
    "cache-dit-taylorseer": "#3aa6b0",
}


@dataclass(frozen=True)
class Situation:
    """A member, a number of steps, and whether Euler's scheduler takes the place of its own."""

    member: str
    steps: int
    euler: bool = False

    @property
    def name(self) -> str:
        return f"{self.member}, {self.steps} steps" + ", Euler" * self.euler

    def load(self) -> tuple[Any, dict[str, Any]]:
        """The pipeline, and what its call takes besides the prompt."""
        if self.member == "wan":
            pipe, call = common.pipeline(), common.CALL
        else:
            pipe, call = zoo.load(self.member)
        pipe.set_progress_bar_config(disable=True)
        if self.euler:
            pipe.scheduler = euler(pipe.scheduler)
        return pipe, {**call, "num_inference_steps": self.steps}

    def given(self, scene: scenes.Scene) -> dict[str, Any]:
        """What the call takes for a scene besides its caption: a picture, or nothing."""
        return {} if self.member == "wan" else zoo.inputs(self.member, scene)


def flow_shift(config: Mapping[str, Any]) -> float | None:
    """The shift that a scheduler's configuration has for flow matching; ``None`` if it is for something else."""
    matched = config.get("prediction_type", "flow_prediction") == "flow_prediction"
    return config.get("flow_shift", config.get("shift", 3.0)) if matched else None


def euler(scheduler: Any) -> Any:
    """Euler's scheduler for a model that was trained with another one."""
    shift = flow_shift(scheduler.config)
    if shift is not None:
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    return diffusers.EulerDiscreteScheduler.from_config(scheduler.config, timestep_spacing="trailing")


def members() -> tuple[str, ...]:
    """The demo model, and what the proving ground has besides."""
    return ("wan", *zoo.names())


def reading(rows: Sequence[Row], speed: float, measure: str = "psnr", worst: bool = False) -> float | None:
    """A figure of a method's curve at a speed by operations, as :func:`at_speed` reads it."""
    points = []
    for row in rows:
        figure = row.quality.get(measure)
        if figure is not None and row.computed_fraction and not row.identical:
            points.append((1 / row.computed_fraction, figure.worst if worst else figure.value))
    return at_speed(points, speed)


def readings(comparison: unicp.Comparison) -> list[dict[str, Any]]:
    """What is committed of a comparison: every method at every speed that it reaches."""
    found = []
    for name, rows in comparison.curves().items():
        for speed in SPEEDS:
            psnr = reading(rows, speed)
            if name == "control" or psnr is None:
                continue
            near = min(rows, key=lambda row: abs(1 / (row.computed_fraction or 1) - speed))
            found.append(
                {
                    "method": name,
                    "ours": rows[0].ours,
                    "speed": speed,
                    "psnr": _to(psnr, 1),
                    "worst": _to(reading(rows, speed, worst=True), 1),
                    "ssim": _to(reading(rows, speed, "ssim"), 3),
                    "motion_ratio": _to(reading(rows, speed, "motion_ratio"), 3),
                    "caption": _to(mean(near.caption.values()) if near.caption else None, 3),
                }
            )
    return found


def _to(value: float | None, places: int) -> float | None:
    return None if value is None else round(value, places)


def found_in(situation: str, comparison: unicp.Comparison) -> dict[str, Any]:
    """A situation's readings, what its unaccelerated videos are worth, and what did not run."""
    right = comparison.baseline.caption_right()
    broken: dict[str, str] = {}
    for failure in comparison.failures:
        broken.setdefault(failure.method, failure.error)
    return {
        "situation": situation,
        "captions": len(comparison.prompts),
        "caption_unaccelerated": mean(right.values()) if right else None,
        "readings": readings(comparison),
        "broken": broken,
    }


def measured(situation: Situation, prompts: list[str], methods: Sequence[Any], keep: bool) -> dict[str, Any]:
    """What a situation is measured to be."""
    pipe, call = situation.load()
    path = PARTS / situation.name.replace(", ", "_").replace(" ", "-")

    def compared(captions: list[str], **more: Any) -> unicp.Comparison:
        return unicp.compare(
            pipe,
            methods,
            captions,
            results=path.with_suffix(".sqlite") if keep else None,
            calibration_prompt=common.training_prompts(1)[0],
            **call,
            **more,
        )

    pictures = [situation.given(scene) for scene in scenes.held_out_scenes(len(prompts))]
    if any(pictures):  # each caption has its own: a comparison for each of them
        parts = [compared([text], **more) for text, more in zip(prompts, pictures, strict=True)]
        comparison = together(parts)
    else:
        comparison = compared(prompts)
    if keep:
        comparison.report(path.with_suffix(".html"), fps=unicp.demo.FPS)
    return found_in(situation.name, comparison)


def together(comparisons: Sequence[unicp.Comparison]) -> unicp.Comparison:
    """Comparisons of one caption each, of the same methods, as one of all captions."""
    first = comparisons[0]

    def point(places: Sequence[Any]) -> Any:
        results = [replace(result, prompt=i) for i, place in enumerate(places) for result in place.results]
        return replace(places[0], results=tuple(results))

    points = []
    for place in first.points:
        key = (place.method, place.label)
        same = [one for each in comparisons for one in each.points if (one.method, one.label) == key]
        if len(same) == len(comparisons):
            points.append(point(same))
    return replace(
        first,
        baseline=point([each.baseline for each in comparisons]),
        points=tuple(points),
        failures=tuple(failure for each in comparisons for failure in each.failures),
        prompts=tuple(text for each in comparisons for text in each.prompts),
    )


def margin(found: Mapping[str, Any], speed: float, which: str = "psnr", method: str = BUDGET) -> float | None:
    """How far a method of ours is above the best of those that are not ours, in dB; ``None`` beyond its curve."""
    own, peer = _at(found, speed, which, method)
    return None if own is None or peer is None else own[which] - peer[which]


def _at(found: Mapping[str, Any], speed: float, which: str = "psnr", method: str = BUDGET) -> tuple[Any, Any]:
    """What a method of ours, and the best of those that are not, reach at a speed; ``None`` beyond their curves."""
    at = [one for one in found["readings"] if one["speed"] == speed]
    own = next((one for one in at if one["method"] == method), None)
    return own, max((one for one in at if not one["ours"]), key=lambda one: one[which], default=None)


def table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: the budget's margin over the best peer, a line a situation; of the mean and of the worst caption.

    A situation that was measured on fewer captions than others has their number beside it.
    """
    most = max(found["captions"] for found in results)
    speeds = " | ".join(f"{speed:g}x" for speed in SPEEDS)
    lines = [
        f"| situation | {speeds} | best peer at 2x | motion at 2x | captions right at 2x |",
        "|---|" + "---:|" * len(SPEEDS) + "---|---:|---:|",
    ]
    for found in results:
        cells = []
        for speed in SPEEDS:
            over, worst = (margin(found, speed, which) for which in ("psnr", "worst"))
            cells.append("–" if over is None or worst is None else f"{over:+.1f} / {worst:+.1f}")
        own, peer = _at(found, 2.0)
        cells.append("–" if peer is None else f"{peer['method']} {peer['psnr']:.1f} / {peer['worst']:.1f}")
        cells.append("–" if own is None else f"{own['motion_ratio']:.3f}")
        plain = found["caption_unaccelerated"]
        cells.append("–" if own is None or plain is None else f"{own['caption']:.0%} ({plain:.0%} unaccelerated)")
        few = f" ({found['captions']} captions)" if found["captions"] < most else ""
        lines.append(f"| {found['situation']}{few} | {' | '.join(cells)} |")
    return lines


def over_all(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: the margins in the mean over members, a line for each number of steps, and how many are behind."""
    lines = ["| mean over models | " + " | ".join(f"{speed:g}x" for speed in SPEEDS) + " |"]
    lines.append("|---|" + "---:|" * len(SPEEDS))
    for steps in dict.fromkeys(found["situation"].split(", ", 1)[1] for found in results):
        group = [found for found in results if found["situation"].split(", ", 1)[1] == steps]
        cells = []
        for speed in SPEEDS:
            sides = [[margin(found, speed, which) for found in group] for which in ("psnr", "worst")]
            known = [[value for value in side if value is not None] for side in sides]
            behind = " / ".join(str(sum(value < -0.05 for value in side)) for side in known)
            cells.append(f"{mean(known[0]):+.1f} ({behind} of {len(known[0])})" if known[0] else "–")
        lines.append(f"| {steps} | {' | '.join(cells)} |")
    return lines


def draw(results: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Two pictures: the budget's margins over the best peer, a cell for each situation and speed; and quality against
    speed, a panel for each member.
    """
    sides = {
        title: [[margin(found, speed, which) for speed in SPEEDS] for found in results]
        for title, which in (("mean over captions", "psnr"), ("worst caption", "worst"))
    }
    names = [found["situation"] for found in results]
    common.margins_drawn(names, SPEEDS, sides, "the best peer", folder / "zoo.png")
    shown = [found for found in results if found["situation"].endswith(f", {STEPS[0]} steps")]
    curves(shown, folder / "zoo-curves.svg")


def curves(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Mean PSNR against speed, a panel for each member."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    across = min(3, len(results))  # narrow screens are there, too
    down = -(-len(results) // across)
    pyplot.rcParams |= {"svg.hashsalt": "unicp", "svg.fonttype": "path", "font.size": 9}
    size = (2.2 * across, 1.9 * down + 0.6)
    figure, grid = pyplot.subplots(down, across, figsize=size, squeeze=False, layout="constrained", facecolor="white")
    drawn: dict[str, Any] = {}
    for place, panel in enumerate(grid.flat):
        if place >= len(results):
            panel.set_axis_off()
            continue
        found = results[place]
        for name, colour in reversed(COLOURS.items()):  # ours on top
            points = [(one["speed"], one["psnr"]) for one in found["readings"] if one["method"] == name]
            if points:
                ours, dashed = name == BUDGET, name == "fewer-steps"
                style = {"linewidth": 2.4 if ours else 1.2, "linestyle": "--" if dashed else "-", "markersize": 3}
                (drawn[name],) = panel.plot(*zip(*points, strict=True), marker="o", color=colour, **style)
        panel.set_title(TITLES[found["situation"].split(",")[0]], fontsize=9)
        panel.set_xlim(SPEEDS[0] - 0.1, SPEEDS[-1] + 0.1)
        panel.set_xticks(SPEEDS, [f"{speed:g}×" for speed in SPEEDS])
        panel.grid(alpha=0.25)
        for spine in ("top", "right"):
            panel.spines[spine].set_visible(False)
    for row in grid:
        row[0].set_ylabel("PSNR (dB)")
    names = [name for name in COLOURS if name in drawn]
    figure.legend(
        [drawn[name] for name in names], names, loc="outside lower center", ncols=4, frameon=False, fontsize=8
    )
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", nargs="+", choices=members(), help="by default all of them")
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS)
    parser.add_argument(
        "--prompts", type=int, help=f"held-out captions (default {CAPTIONS}, or {OF_SLOW} on {' and '.join(SLOW)})"
    )
    parser.add_argument("--methods", nargs="+", default=METHODS, help="as for unicp compare")
    parser.add_argument("--euler", action="store_true", help="under Euler's scheduler")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    methods: Sequence[Any] = args.methods
    steps = args.steps
    chosen = args.members or members()
    if args.quick:
        methods, steps = QUICK, STEPS[:1]
        chosen = args.members or tuple(name for name in members() if name not in SLOW)
    PARTS.mkdir(parents=True, exist_ok=True)
    path = common.RESULTS / "zoo.json"
    known = {one["situation"]: one for one in figures.read(path)["situations"]} if path.exists() else {}
    new = []
    for situation in [Situation(member, each, args.euler) for member in chosen for each in steps]:
        usual = OF_SLOW if situation.member in SLOW else CAPTIONS
        count = args.prompts or (1 if args.quick else usual)
        new.append(measured(situation, scenes.prompts(count), methods, keep=not args.quick))
        print("\n".join(table(new[-1:])), flush=True)
        for name, words in new[-1]["broken"].items():
            print(f"did not run: {name} ({words})")
        if not args.quick:
            known[situation.name] = new[-1]
            ordered = sorted(known.values(), key=lambda one: members().index(one["situation"].split(",")[0]))
            # Members may be measured one after another, each by a command of its own.
            made_by = f"python -m benchmarks.zoo --steps {' '.join(map(str, steps))}" + " --euler" * args.euler
            made_by += f" --prompts {args.prompts}" if args.prompts else ""
            common.save("zoo", {"situations": ordered}, made_by)
            draw(ordered, IMAGES)


if __name__ == "__main__":
    main()
