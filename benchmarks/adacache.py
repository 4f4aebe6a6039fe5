"""AdaCache on the demo model: quality over held-out prompts, wall-clock of the denoising loop.

    python -m benchmarks.adacache [--prompts 16] [--repeats 5]

Quality is measured against the unaccelerated video of the same prompt and seed; "fewer steps" is the unaccelerated
pipeline with as many steps as the methods compute. Timings are interleaved; ratios are taken pair by pair.
"""

from __future__ import annotations

import argparse
from statistics import mean, median
from typing import Any

from rich.progress import track

import unicp
from benchmarks import common
from unicp import AdaCacheConfig

METHODS: dict[str, AdaCacheConfig] = {
    "adacache": AdaCacheConfig(),
    "adacache + MoReg": AdaCacheConfig(moreg=True),
    "adacache, fill=forecast (ours)": AdaCacheConfig(fill="forecast"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--moreg-scale", type=float, help="motion score that MoReg takes as normal; see codebook.py")
    args = parser.parse_args()
    methods = dict(METHODS)
    if args.moreg_scale:
        methods["adacache + MoReg"] = AdaCacheConfig(moreg=True, moreg_scale=args.moreg_scale)

    pipe = common.pipeline()
    prompts = unicp.demo.prompts(args.prompts)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    timelines: dict[str, dict[str, str]] = {}
    fewer: dict[int, list[dict[str, Any]]] = {25: [], 20: []}
    for prompt in track(prompts, "quality"):
        baseline = common.generate(pipe, prompt)
        for name, config in methods.items():
            with unicp.accelerate(pipe, config) as session:
                run = common.generate(pipe, prompt)
                report = session.report()
            figures = common.quality(run, baseline)
            rows[name].append({**figures, "computed_steps": report.computed_steps, "fraction": report.computed_fraction,
                               "cache_bytes": report.cache_bytes})  # fmt: skip
            timelines[name] = report.timeline()
        for steps, collected in fewer.items():
            run = common.generate(pipe, prompt, num_inference_steps=steps)
            collected.append({**common.quality(run, baseline), "computed_steps": steps,
                              "fraction": steps / unicp.demo.STEPS, "cache_bytes": 0})  # fmt: skip
    rows.update({f"fewer steps ({steps})": collected for steps, collected in fewer.items()})

    prompt = prompts[0]

    def timed(config: AdaCacheConfig | None, steps: int | None = None) -> float:
        if config is None:
            return common.generate(pipe, prompt, num_inference_steps=steps).loop_seconds
        with unicp.accelerate(pipe, config):
            return common.generate(pipe, prompt).loop_seconds

    runs = {"none": lambda: timed(None)}
    runs.update({name: (lambda config=config: timed(config)) for name, config in methods.items()})  # type: ignore[misc]
    runs.update({f"fewer steps ({steps})": (lambda steps=steps: timed(None, steps)) for steps in fewer})  # type: ignore[misc]
    seconds = common.interleaved(runs, args.repeats)

    table = []
    print(f"\n{'method':<32} {'computed':>8} {'speed-up':>9} {'PSNR':>6} {'worst':>6} {'SSIM':>6} {'motion':>7}")
    for name, collected in rows.items():
        line = {
            "method": name,
            "computed_steps": mean(row["computed_steps"] for row in collected),
            "speedup": common.ratios(seconds["none"], seconds[name]),
            "loop_seconds": median(seconds[name]),
            **common.over_prompts(collected),
            "cache_bytes": max(row["cache_bytes"] for row in collected),
        }
        table.append(line)
        print(
            f"{name:<32} {line['computed_steps'] / unicp.demo.STEPS:>8.0%} {line['speedup']['median']:>8.2f}x "
            f"{line['psnr']:>6.1f} {line['psnr_worst']:>6.1f} {line['ssim']:>6.3f} {line['motion_ratio']:>7.3f}"
        )
    common.save(
        "adacache",
        {"prompts": prompts, "steps": unicp.demo.STEPS, "guidance": unicp.demo.GUIDANCE, "timed_prompt": prompt,
         "table": table, "seconds": seconds, "per_prompt": rows, "timelines_of_last_prompt": timelines},
    )  # fmt: skip


if __name__ == "__main__":
    main()
