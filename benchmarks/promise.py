"""Is the default plan ever worse than plain fewer steps? Schedulers, step counts and calls, one cell each.

    python -m benchmarks.promise [--quick] [--prompts 16] [--only euler unipc] [--steps 50 30]

A cell is a scheduler, a number of steps, a speed and what else is asked of the call (guidance, flow shift, strength, a
list of sigmas). In it the budget without a profile, AdaCache with forecasts, and fewer steps that evaluate the denoiser
as often, each against the unaccelerated video of the same scheduler, caption and seed. Evaluations are counted, nothing
is timed. Heun evaluates the denoiser twice a step, so half as many of its steps cost the same.

Resumable: what was measured lies in benchmarks/results/promise.parts, one file a situation, and two processes with
different ``--only`` or ``--steps`` can share the work. ``--quick`` measures a few situations on four captions, and
writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import diffusers
import torch

import unicp
import zoo
from benchmarks import common, figures
from benchmarks.zoo import euler, flow_shift
from unicp import AdaCacheConfig, BudgetConfig
from unicp.demo import scenes
from unicp.policies import Config
from unicp.policies.adacache import CODEBOOKS, rescale
from unicp.tensors import metrics

SPEEDS = (1.5, 2.0, 2.5, 3.0)
STEPS = (50, 30, 20, 12, 8)
AT_ONCE = 8
"""Captions in a batch."""
DISTILLED = (1.0, 0.993, 0.987, 0.981, 0.975, 0.909, 0.725, 0.422)
"""The noise levels of LTX's distilled model, as diffusers documents them."""
STEEP = (1.0, 0.99, 0.97, 0.94, 0.9, 0.84, 0.76, 0.66, 0.54, 0.4, 0.25, 0.1)
SAME = 120.0
"""Decibels that stand for "the same to the last bit"."""
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "promise.png"
PARTS = common.RESULTS / "promise.parts"
ADACACHE = {f"adacache-forecast x {factor:g}": factor for factor in (1.0, 2.5)}


class Listed(diffusers.FlowMatchEulerDiscreteScheduler):
    """Euler over a list of noise levels; fewer steps are every so many of them."""

    levels: tuple[float, ...] = DISTILLED

    def set_timesteps(self, num_inference_steps: int | None = None, **more: Any) -> None:
        count, every = num_inference_steps or len(self.levels), len(self.levels)
        super().set_timesteps(sigmas=[self.levels[i * every // count] for i in range(count)], device=more.get("device"))


class Steep(Listed):
    """The same over a list that falls ever faster."""

    levels = STEEP


MEMBERS = ("hunyuan", "latte", "ltx", "open-sora")
"""Models of the proving ground that are tried too: under Euler in short runs, and under multistep solvers. Of the
defaults under Euler, the plans of 8 and 12 steps at 1.5x were chosen on the first three of these, and few even steps
(2.5x and 3x of 8, 2.5x of 12, 3x of 20) on all four, each on captions of the training side. Under multistep solvers,
those of Latte were chosen on it; it is the only one here that was not trained by flow matching."""
MULTISTEP_OF_MEMBERS = (
    *(("unipc", 20, member) for member in MEMBERS),
    ("unipc", 50, "latte"),
    ("dpm++", 20, "latte"),
    ("dpm++", 50, "latte"),
)
"""Multistep solvers, the number of steps and the member that they are tried with. HunyuanVideo's and LTX's pipelines
choose their own sigmas, which DPM-Solver++ does not take."""

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "unipc-3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "ddim": ("CogVideoXDDIMScheduler", {}),
    "cogvideox-dpm": ("CogVideoXDPMScheduler", {}),
}


@dataclass(frozen=True)
class Situation:
    """What is asked of the pipeline, but for the captions."""

    scheduler: str
    steps: int
    guidance: float = unicp.demo.GUIDANCE
    shift: float = 3.0
    strength: float = 1.0
    levels: str = ""
    member: str = ""

    @property
    def model(self) -> str:
        """The member of the proving ground that makes the videos; empty for the demo model."""
        return "cogvideox" if self.scheduler in ("ddim", "cogvideox-dpm") else self.member

    @property
    def name(self) -> str:
        more = {"guidance": unicp.demo.GUIDANCE, "shift": 3.0, "strength": 1.0, "levels": "", "member": ""}
        said = [f"{key} {getattr(self, key)}" for key, usual in more.items() if getattr(self, key) != usual]
        return ", ".join([f"{self.scheduler}, {self.steps} steps", *said])

    def make(self, kinds: dict[str, Any]) -> Any:
        """The scheduler."""
        config: Any = kinds[self.member].scheduler.config if self.member else {"shift": self.shift}
        shift = flow_shift(config)
        if self.member and self.scheduler == "euler":
            return euler(kinds[self.member].scheduler)
        if self.levels:
            return {"distilled": Listed, "steep": Steep}[self.levels](shift=1.0)
        kind, more = SCHEDULERS[self.scheduler]
        found = getattr(diffusers, kind)
        if shift is None:
            return found.from_config(config, timestep_spacing="trailing", **more)
        if self.scheduler in ("ddim", "cogvideox-dpm"):
            return found.from_config(kinds["cogvideox"].scheduler.config)
        if kind.startswith("FlowMatch"):
            return found(shift=shift)
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
        return found(**flow, **more)


def situations() -> list[Situation]:
    """All that is measured: the grid, then one thing at a time changed."""
    found = [Situation(scheduler, steps) for steps in reversed(STEPS) for scheduler in SCHEDULERS]
    for scheduler in ("euler", "unipc"):
        found += [Situation(scheduler, 20, guidance=guidance) for guidance in (1.0, 7.0)]
        found += [Situation(scheduler, 20, shift=shift) for shift in (1.0, 5.0, 8.0)]
        found += [Situation(scheduler, 50, strength=strength) for strength in (0.3, 0.6)]
    found += [Situation("unipc", 50, shift=shift) for shift in (1.0, 5.0, 8.0)]
    found += [Situation("euler", 8, levels="distilled"), Situation("euler", 12, levels="steep")]
    found += [Situation("euler", steps, member=member) for member in MEMBERS for steps in (20, 12, 8)]
    return [*found, *(Situation(name, steps, member=member) for name, steps, member in MULTISTEP_OF_MEMBERS)]


def psnrs(made: Any, wanted: Any) -> list[float]:
    """PSNR in dB of each of these videos (N, F, C, H, W) against its own."""
    return [min(float(metrics.psnr(a, b)), SAME) for a, b in zip(made, wanted, strict=True)]


def gain(before: list[float], after: list[float]) -> tuple[float, float]:
    """What one has over the other, in dB: in the mean over captions, and in the worst caption of each."""
    return mean(after) - mean(before), min(after) - min(before)


class Maker:
    """Makes videos of captions, and remembers the plain ones of the situation at hand."""

    def __init__(self, prompts: list[str]) -> None:
        self.prompts = prompts
        self.pipes: dict[str, Any] = {}
        self.calls: dict[str, dict[str, Any]] = {}
        self._plain: dict[tuple[Situation, int], Any] = {}

    def pipe(self, situation: Situation) -> Any:
        kind = situation.model
        if kind not in self.pipes:
            self.pipes[kind], self.calls[kind] = zoo.load(kind) if kind else (common.pipeline(), common.CALL)
            self.pipes[kind].set_progress_bar_config(disable=True)
        pipe = self.pipes[kind]
        pipe.scheduler = situation.make(self.pipes)
        if situation.strength < 1:
            parts = {name: part for name, part in pipe.components.items() if name != "transformer_2"}
            made = diffusers.WanVideoToVideoPipeline(**parts)
            for name in ("vae_scale_factor_spatial", "vae_scale_factor_temporal", "video_processor"):
                setattr(made, name, getattr(pipe, name))  # it takes those of Wan's own VAE for granted
            return made
        return pipe

    def videos(self, situation: Situation, steps: int, config: Config | None = None) -> tuple[Any, Any]:
        """Frames (N, F, C, H, W) from 0 to 1 of all captions, and the report of the last batch."""
        pipe, made, report = self.pipe(situation), [], None
        pipe.set_progress_bar_config(disable=True)
        for first in range(0, len(self.prompts), AT_ONCE):
            prompts = self.prompts[first : first + AT_ONCE]
            call = {**self.calls[situation.model], "num_inference_steps": steps, "guidance_scale": situation.guidance}
            if situation.strength < 1:
                del call["num_frames"]
                drawn = [scenes.render(scenes.sample_scene(30_000_000 + first + i)) for i in range(len(prompts))]
                call |= {"video": [list(video) for video in drawn], "strength": situation.strength}
            seeds = [torch.Generator().manual_seed(0) for _ in prompts]
            if situation.strength < 1 or situation.scheduler == "cogvideox-dpm":
                seeds = torch.Generator().manual_seed(first)  # type: ignore[assignment]  # they take one
            call |= {"prompt": prompts, "generator": seeds, "output_type": "pt"}
            if config is None:
                made.append(pipe(**call).frames)
            else:
                with unicp.accelerate(pipe, config) as session:
                    made.append(pipe(**call).frames)
                    report = session.report()
        return torch.cat(made).float(), report

    def plain(self, situation: Situation, steps: int) -> Any:
        if (situation, steps) not in self._plain:
            self._plain = {key: value for key, value in self._plain.items() if key[0] == situation}
            self._plain[situation, steps] = self.videos(situation, steps)[0]
        return self._plain[situation, steps]

    def row(self, situation: Situation, method: str, config: Config) -> dict[str, Any]:
        """What a method makes of a situation, and what fewer steps do at its cost."""
        wanted = self.plain(situation, situation.steps)
        frames, report = self.videos(situation, situation.steps, config)
        visits = report.count / (situation.steps * situation.strength)  # of the denoiser, a step
        fewer = max(1, round((report.computed_steps + (visits > 1.5)) / (2 if visits > 1.5 else 1)))
        asked = max(1, round(fewer / situation.strength))
        ends = {"psnr": frames, "fewer": self.plain(situation, asked)}
        return {
            "situation": situation.name,
            "method": method,
            "evaluations": [report.computed_steps, report.count],
            "fewer_steps": asked,
            **{name: [round(value, 2) for value in psnrs(made, wanted)] for name, made in ends.items()},
        }


def configs(steps: int) -> dict[str, Config]:
    """What is tried in every situation."""
    found: dict[str, Config] = {f"budget {speed:g}x": BudgetConfig(target_speedup=speed) for speed in SPEEDS}
    book = CODEBOOKS["demo-50"]
    entries = rescale(book.entries, book.steps, steps)
    for name, factor in ADACACHE.items():
        scaled = tuple((threshold * factor, rate) for threshold, rate in entries)
        found[name] = AdaCacheConfig(codebook=scaled, fill="forecast")
    return found


def margins(row: dict[str, Any]) -> tuple[float, float]:
    """Above fewer steps, in dB: in the mean, and of the worst caption of each."""
    return gain(row["fewer"], row["psnr"])


def steps_of(row: dict[str, Any]) -> int:
    """The number of steps in a row's situation."""
    return int(row["situation"].split(", ")[1].split()[0])


def shown(row: dict[str, Any]) -> str:
    """A line for a row."""
    over, worst = margins(row)
    computed, count = row["evaluations"]
    return (
        f"{row['situation']:<34} {row['method']:<24} {computed:>3} of {count:<3} {mean(row['psnr']):6.1f} /"
        f"{min(row['psnr']):5.1f}   fewer ({row['fewer_steps']}) {mean(row['fewer']):5.1f} /{min(row['fewer']):5.1f}"
        f"   {over:+6.1f} /{worst:+6.1f}"
    )


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The budget's margins, a line a situation, in Markdown: of the mean over captions and of the worst one.

    A situation that was measured on fewer captions than others has their number beside it.
    """
    most = max(len(row["psnr"]) for row in rows)
    budgets = {(row["situation"], row["method"]): row for row in rows if row["method"].startswith("budget")}
    heads = [f"budget {speed:g}x" for speed in SPEEDS]
    lines = [
        "| situation | " + " | ".join(f"{head.split()[1]}" for head in heads) + " |",
        "|---|" + "---:|" * len(heads),
    ]
    for situation in dict.fromkeys(row["situation"] for row in rows):
        counts = {len(row["psnr"]) for row in rows if row["situation"] == situation} - {most}
        cells = []
        for head in heads:
            row = budgets.get((situation, head))
            over, worst = margins(row) if row is not None else (0.0, 0.0)
            cells.append("–" if row is None else f"{over + 0.0:+.1f} / {worst + 0.0:+.1f}")
        few = f" ({max(counts)} captions)" if counts else ""
        lines.append(f"| {situation}{few} | " + " | ".join(cells) + " |")
    return lines


def committed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is kept in the repository, to a tenth of a decibel; of AdaCache the situations in which it skips."""
    acted = [row for row in rows if row["method"] not in ADACACHE or row["evaluations"][0] < row["evaluations"][1]]
    return [{**row, **{name: [round(value, 1) for value in row[name]] for name in ("psnr", "fewer")}} for row in acted]


def adacache_table(rows: list[dict[str, Any]]) -> list[str]:
    """AdaCache's margins, a line a situation in which it skips anything, in Markdown: with the share it computed.

    Args:
        rows: as :func:`committed` keeps them.
    """
    found = {(row["situation"], row["method"]): row for row in rows if row["method"] in ADACACHE}
    lines = [
        "| situation | " + " | ".join(f"thresholds x {factor:g}" for factor in ADACACHE.values()) + " |",
        "|---|" + "---:|" * len(ADACACHE),
    ]
    for situation in dict.fromkeys(situation for situation, _ in found):
        cells = []
        for method in ADACACHE:
            if (situation, method) not in found:
                cells.append("–")
                continue
            row = found[situation, method]
            (computed, count), (over, worst) = row["evaluations"], margins(row)
            cells.append(f"{computed / count:.0%}: {over:+.1f} / {worst:+.1f}")
        lines.append(f"| {situation} | " + " | ".join(cells) + " |")
    return lines


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A picture of the budget's margins: a cell for each situation and speed."""
    names = list(dict.fromkeys(row["situation"] for row in rows))
    found = {(row["situation"], row["method"]): margins(row) for row in rows}
    sides = {
        title: [[found.get((name, f"budget {speed:g}x"), (None, None))[which] for speed in SPEEDS] for name in names]
        for title, which in (("mean over captions", 0), ("worst caption", 1))
    }
    common.margins_drawn(names, SPEEDS, sides, "fewer steps", path)


def measure(situation: Situation, maker: Maker, methods: dict[str, Config], path: Path | None) -> list[dict[str, Any]]:
    """The rows of a situation: those that were measured before, and the others, each kept as soon as it is there."""
    rows = figures.read(path)["rows"] if path is not None and path.exists() else []
    for method, config in methods.items():
        if all(row["method"] != method for row in rows):
            rows.append(maker.row(situation, method, config))
            print(shown(rows[-1]), flush=True)
            if path is not None:
                figures.write(path, {"rows": rows})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--only", nargs="+", help="schedulers; the table is written when all of them are measured")
    parser.add_argument("--steps", nargs="+", type=int, help="the same for numbers of steps")
    parser.add_argument("--collect", action="store_true", help="measure nothing: write the table of what is there")
    parser.add_argument("--budget-only", action="store_true", help="leave AdaCache out for now")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    chosen = situations()
    if args.quick:
        chosen = [Situation(scheduler, steps) for scheduler in ("euler", "unipc") for steps in (20, 8)]
    maker = Maker(scenes.prompts(4 if args.quick else args.prompts))
    PARTS.mkdir(parents=True, exist_ok=True)
    rows, left = [], 0
    for situation in chosen:
        path = None if args.quick else PARTS / f"{situation.name.replace(', ', '_').replace(' ', '-')}.json"
        methods = configs(situation.steps)
        if args.budget_only or situation.member:
            methods = {name: config for name, config in methods.items() if name.startswith("budget")}
        wanted = situation.scheduler in (args.only or SCHEDULERS) and situation.steps in (args.steps or STEPS)
        if args.collect or not wanted:
            found = figures.read(path)["rows"] if path is not None and path.exists() else []
            left += len(found) < len(methods)
            rows += found
        else:
            rows += measure(situation, maker, methods, path)
    if not args.quick:
        kept = [dataclasses.asdict(situation) for situation in chosen]
        made_by = "python -m benchmarks.promise" + " --budget-only" * args.budget_only
        found = {"prompts": maker.prompts, "situations": kept, "results": committed(rows), "missing": left}
        common.save("promise", found, made_by)
        draw(rows, PICTURE)


if __name__ == "__main__":
    main()
