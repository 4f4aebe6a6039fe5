"""What ``torch.compile`` adds to an acceleration: the accelerated denoising loop, compiled over uncompiled.

    python -m benchmarks.compiled [--repeats 5] [--steps 50] [--whole]

Interleaved runs on the demo model, blocks compiled as diffusers does it, or the whole denoiser. The ratio is taken pair
by pair; compiling itself happens in warm-up runs and is not counted. No figure is kept if anything was compiled again
while it was measured.
"""

from __future__ import annotations

import argparse
from typing import Any

from torch._dynamo.utils import counters

import unicp
from benchmarks import common
from unicp import AdaCacheConfig, ScheduleConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=unicp.demo.STEPS)
    parser.add_argument("--whole", action="store_true", help="transformer.compile() instead of its blocks")
    args = parser.parse_args()
    plain, compiled = common.pipeline(), common.pipeline()
    compiled.transformer.compile() if args.whole else compiled.transformer.compile_repeated_blocks(fullgraph=True)
    prompt = unicp.demo.prompts(1)[0]

    def timed(pipe: Any, config: Any) -> float:
        if config is None:
            return common.generate(pipe, prompt, num_inference_steps=args.steps).loop_seconds
        with unicp.accelerate(pipe, config):
            return common.generate(pipe, prompt, num_inference_steps=args.steps).loop_seconds

    configs = {"no method": None, "adacache": AdaCacheConfig(), "schedule": ScheduleConfig(interval=3, fill="linear")}
    pipes = {"": plain, ", compiled": compiled}
    runs = {
        name + suffix: (lambda pipe=pipe, config=config: timed(pipe, config))
        for name, config in configs.items()
        for suffix, pipe in pipes.items()
    }
    for name, config in configs.items():  # compiles what there is to compile for each
        timed(compiled, config)
        print(f"compiled: {name}", flush=True)
    made = counters["stats"]["unique_graphs"]
    seconds = common.interleaved(runs, args.repeats)
    if counters["stats"]["unique_graphs"] != made:
        raise SystemExit("something was compiled again during the measurement; the times mean nothing")
    figures = {name: common.ratios(seconds[name], seconds[f"{name}, compiled"]) for name in configs}
    for name, ratio in figures.items():
        print(f"{name:<12} compiled is {ratio['median']:.3f} times as fast ({ratio['min']:.3f} to {ratio['max']:.3f})")
    common.save(
        "compiled_whole" if args.whole else "compiled",
        {"steps": args.steps, "graphs": made, "ratios": figures, "seconds": seconds},
    )


if __name__ == "__main__":
    main()
