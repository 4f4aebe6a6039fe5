"""What the engine costs when it computes everything: always-compute AdaCache against the bare pipeline.

    python -m benchmarks.overhead [--repeats 9]

Interleaved runs of the denoising loop on the demo model; the ratio is taken pair by pair.
"""

from __future__ import annotations

import argparse

import unicp
from benchmarks import common
from unicp import AdaCacheConfig, ScheduleConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    pipe = common.pipeline()
    prompt = unicp.demo.prompts(1)[0]

    def timed(config: AdaCacheConfig | ScheduleConfig | None) -> float:
        if config is None:
            return common.generate(pipe, prompt).loop_seconds
        with unicp.accelerate(pipe, config):
            return common.generate(pipe, prompt).loop_seconds

    seconds = common.interleaved(
        {
            "none": lambda: timed(None),
            "adacache, computing all": lambda: timed(AdaCacheConfig(codebook=((1.0, 1),))),
            "adacache + MoReg, computing all": lambda: timed(AdaCacheConfig(codebook=((1.0, 1),), moreg=True)),
            "schedule, computing all": lambda: timed(ScheduleConfig(interval=1)),
        },
        args.repeats,
    )
    figures = {name: common.ratios(values, seconds["none"]) for name, values in seconds.items() if name != "none"}
    for name, ratio in figures.items():
        print(f"{name:<34} {ratio['median']:.4f} of the bare loop ({ratio['min']:.3f} to {ratio['max']:.3f})")
    common.save("overhead", {"ratios": figures, "seconds": seconds})


if __name__ == "__main__":
    main()
