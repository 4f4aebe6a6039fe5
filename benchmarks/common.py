"""What the benchmark scripts share: the demo pipeline, fair timing, and provenance beside every figure."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from diffusers import WanPipeline

import unicp
from unicp import metrics
from unicp.demo import scenes

RESULTS = Path(__file__).parent / "results"


def pipeline() -> WanPipeline:
    """The demo model in float32, without a progress bar."""
    if not (unicp.demo.path() / "model_index.json").exists():
        raise SystemExit("the demo model's folder is missing; train it with: make train-demo")
    pipe = WanPipeline.from_pretrained(unicp.demo.path(), torch_dtype=torch.float32)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def training_prompts(count: int) -> list[str]:
    """Captions from the side of the split that the model was trained on: for calibration only."""
    return [scenes.sample_scene(20_000_000 + i).caption() for i in range(count)]


class Run:
    """One generated video: its frames and latents, and the seconds its denoising loop and the whole call took."""

    def __init__(self, pipe: Any, prompt: str, *, seed: int = 0, steps: int | None = None) -> None:
        marks: list[float] = []

        def mark(*_: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

        def ended(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            mark()
            self.latents = tensors["latents"]
            return tensors

        # The loop runs from the first call of the denoiser to the end of the last scheduler step.
        handle = pipe.transformer.register_forward_pre_hook(lambda *_: None if marks else mark())
        began = time.perf_counter()
        try:
            output = pipe(
                prompt,
                height=unicp.demo.HEIGHT,
                width=unicp.demo.WIDTH,
                num_frames=unicp.demo.FRAMES,
                num_inference_steps=steps or unicp.demo.STEPS,
                guidance_scale=unicp.demo.GUIDANCE,
                generator=torch.Generator().manual_seed(seed),
                callback_on_step_end=ended,
                output_type="np",
            )
        finally:
            handle.remove()
        self.frames = torch.from_numpy(output.frames[0])  # (F, H, W, 3) in [0, 1]
        self.loop_seconds = marks[-1] - marks[0]
        self.seconds = time.perf_counter() - began


def quality(run: Run, baseline: Run) -> dict[str, float]:
    """Distances of a video from the unaccelerated one of the same prompt and seed."""
    return {
        "psnr": metrics.psnr(run.frames, baseline.frames),
        "ssim": metrics.ssim(run.frames, baseline.frames),
        "motion_ratio": metrics.motion_ratio(run.frames, baseline.frames),
        "temporal_psnr": metrics.temporal_psnr(run.frames, baseline.frames),
    }


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


def save(name: str, figures: dict[str, Any]) -> Path:
    """Write figures with machine, versions and command to ``benchmarks/results/NAME.json``."""
    import diffusers
    import transformers

    RESULTS.mkdir(exist_ok=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    provenance = {
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu},
        "versions": {
            "unicp": unicp.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"provenance": provenance, **figures}, indent=1) + "\n")
    print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path
