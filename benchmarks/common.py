"""What the benchmark scripts share: the demo pipeline, fair timing, and provenance beside every figure."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from diffusers import WanPipeline
from rich.progress import track

import unicp
from benchmarks import figures as committed
from unicp.bench import harness
from unicp.bench.harness import Made
from unicp.bench.provenance import command, processor
from unicp.demo import scenes
from unicp.policies import Config
from unicp.tensors import metrics

RESULTS = Path(__file__).parent / "results"
CALL: dict[str, Any] = {
    "height": unicp.demo.HEIGHT,
    "width": unicp.demo.WIDTH,
    "num_frames": unicp.demo.FRAMES,
    "num_inference_steps": unicp.demo.STEPS,
    "guidance_scale": unicp.demo.GUIDANCE,
}
"""What the demo model was trained for."""

MIN_PSNR = 35.0
"""What plans are tuned for, in dB."""


def pipeline() -> WanPipeline:
    """The demo model in float32, without a progress bar."""
    if not (unicp.demo.path() / "model_index.json").exists():
        raise SystemExit("the demo model's folder is missing; train it with: make train-demo")
    pipe = WanPipeline.from_pretrained(unicp.demo.path(), dtype=torch.float32)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def training_scenes(count: int) -> list[scenes.Scene]:
    """Scenes from the side of the split that the model was trained on: for calibration only."""
    return [scenes.sample_scene(20_000_000 + i) for i in range(count)]


def training_prompts(count: int) -> list[str]:
    """Their captions."""
    return [scene.caption() for scene in training_scenes(count)]


def generate(pipe: Any, prompt: str, **call: Any) -> Made:
    """One video as the demo model is meant to make it, but for what ``call`` says; timed."""
    return harness.generate(pipe, {"prompt": prompt, **CALL, **call}, seed=0)


def tuned(pipe: Any, count: int, name: str = "budget-50", **call: Any) -> Path:
    """A profile tuned on captions of the training side; made, if it is not there."""
    path = RESULTS / f"{name}.safetensors"
    if not path.exists():
        RESULTS.mkdir(exist_ok=True)
        unfinished = path.with_suffix(".part.json")
        profile = unicp.tune(
            pipe, training_prompts(count), min_psnr=MIN_PSNR, checkpoint=unfinished, **{**CALL, **call}
        )
        profile.save(path)
    return path


def quality(made: Made, baseline: Made) -> dict[str, float]:
    """Distances of a video from the unaccelerated one of the same prompt and seed."""
    return {
        "psnr": metrics.psnr(made.frames, baseline.frames),
        "ssim": metrics.ssim(made.frames, baseline.frames),
        "motion_ratio": metrics.motion_ratio(made.frames, baseline.frames),
    }


def measured(
    pipe: Any, prompts: list[str], configs: Mapping[str, Config], fewer: Sequence[int], **call: Any
) -> dict[str, list[dict[str, Any]]]:
    """Figures of every method on every prompt, in turn, and of ``fewer`` steps; against the unaccelerated video.

    That one is made before and after them, and the mean of the two times counts.
    """
    steps = call.get("num_inference_steps", unicp.demo.STEPS)
    rows: dict[str, list[dict[str, Any]]] = {}
    generate(pipe, prompts[0], **{**call, "num_inference_steps": 4})  # warm-up
    for prompt in track(prompts, f"{len(configs)} methods, {steps} steps"):
        baseline, runs = generate(pipe, prompt, **call), []
        for name, config in configs.items():
            with unicp.accelerate(pipe, config) as session:
                run = generate(pipe, prompt, **call)
                report = session.report()
            runs.append((name, run, report.computed_fraction, report.unit_counts()))
        for count in fewer:
            run = generate(pipe, prompt, **{**call, "num_inference_steps": count})
            runs.append((f"fewer steps ({count})", run, count / steps, {}))
        seconds = mean([baseline.loop_seconds, generate(pipe, prompt, **call).loop_seconds])
        for name, run, fraction, units in runs:
            row = {"fraction": fraction, "speedup": seconds / run.loop_seconds, "units": units}
            rows.setdefault(name, []).append({**quality(run, baseline), **row})
    return rows


def over_prompts(collected: list[dict[str, Any]]) -> dict[str, float]:
    """What a table says of a method: means over the prompts, the worst PSNR among them."""
    return {
        "computed_fraction": mean(row["fraction"] for row in collected),
        "psnr": mean(row["psnr"] for row in collected),
        "psnr_worst": min(row["psnr"] for row in collected),
        "ssim": mean(row["ssim"] for row in collected),
        "motion_ratio": mean(row["motion_ratio"] for row in collected),
    }


def table(title: str, rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The lines of a table, printed: of each method, under ``title``, the figures of all prompts taken together."""
    width = max(map(len, rows)) + 2
    print(f"{title:<{width}}{'computed':>9}{'speed-up':>9}{'PSNR':>6}{'worst':>6}{'SSIM':>7}{'motion':>7}")
    lines = []
    for name, collected in rows.items():
        line = {title: name, "speedup": median(row["speedup"] for row in collected), **over_prompts(collected)}
        lines.append(line)
        print(
            f"{name:<{width}}{line['computed_fraction']:>9.0%}{line['speedup']:>8.2f}x{line['psnr']:>6.1f}"
            f"{line['psnr_worst']:>6.1f}{line['ssim']:>7.3f}{line['motion_ratio']:>7.3f}"
        )
    return lines


def interleaved(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each of several things, measured in turn, so that a machine that drifts is fair to all."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # warm-up, not counted
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(run())
    return seconds


def ratios(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Pairwise ratios: median, least and most."""
    pairs = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": median(pairs), "min": min(pairs), "max": max(pairs)}


def margins_drawn(
    names: Sequence[str],
    speeds: Sequence[float],
    margins: Mapping[str, Sequence[Sequence[float | None]]],
    over: str,
    path: Path,
) -> None:
    """A picture of margins: a line for each situation, a column for each speed, a side for each way of reading them.

    Args:
        names: of the situations.
        speeds: at which the margins were read.
        margins: by what a side shows, a line for each situation: a margin for each speed in dB, or ``None``.
        over: what they are margins over.
        path: where the picture goes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (9, 0.6 + 0.24 * len(names))
    figure, sides = pyplot.subplots(1, len(margins), figsize=size, sharey=True, layout="constrained")
    for side, (title, cells) in zip(sides, margins.items(), strict=True):
        shades = [[float("nan") if value is None else value for value in line] for line in cells]
        side.imshow(shades, cmap="RdBu", vmin=-10, vmax=10, aspect="auto")
        for y, line in enumerate(cells):
            for x, value in enumerate(line):
                if value is not None:
                    dark = abs(value) > 6
                    side.text(x, y, f"{value:+.1f}", ha="center", va="center", fontsize=7, color="w" if dark else "k")
        side.set_xticks(range(len(speeds)), [f"{speed:g}x" for speed in speeds])
        side.set_title(f"{title}, dB above {over}", fontsize=9)
    sides[0].set_yticks(range(len(names)), names, fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def save(name: str, figures: dict[str, Any], made_by: str | None = None) -> Path:
    """Write figures with machine, versions and command to ``benchmarks/results/NAME.json``.

    Args:
        made_by: the command that makes them, if it is not this process's own: of work that several shared.
    """
    import diffusers
    import transformers

    RESULTS.mkdir(exist_ok=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    provenance = {
        "command": made_by or command(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu},
        "versions": {
            "unicp": unicp.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    path = committed.write(RESULTS / f"{name}.json", {"provenance": provenance, **figures})
    print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path
