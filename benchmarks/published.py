"""AdaCache as it was published, on a small model of the architecture that it was published on (STDiT3, Open-Sora).

    python -m benchmarks.published [--prompts 8]

The published codebooks at 30 and at 100 steps, each without and with Motion Regularization; beside them fewer steps
and our budget. It is another model than the paper's: 5 million parameters, 13 frames of 96 x 96 pixels. So the paper's
speed-ups, which the table repeats, are no yardstick for ours.
"""

from __future__ import annotations

import argparse
from typing import Any

import zoo
from benchmarks import common
from unicp import AdaCacheConfig, BudgetConfig
from unicp.demo import scenes
from unicp.policies import Config

METHODS: dict[int, dict[str, Config]] = {
    30: {
        "adacache, opensora-30-slow": AdaCacheConfig(codebook="opensora-30-slow"),
        "adacache, opensora-30-fast": AdaCacheConfig(codebook="opensora-30-fast"),
        "adacache, opensora-30-fast, MoReg": AdaCacheConfig(codebook="opensora-30-fast", moreg=True),
        "budget, 1.5x": BudgetConfig(target_speedup=1.5),
        "budget, 2x": BudgetConfig(target_speedup=2.0),
        "budget, 3x": BudgetConfig(target_speedup=3.0),
    },
    100: {
        "adacache, opensora-100-fast": AdaCacheConfig(codebook="opensora-100-fast"),
        "adacache, opensora-100-fast, MoReg": AdaCacheConfig(codebook="opensora-100-fast", moreg=True),
        "budget, 4x": BudgetConfig(target_speedup=4.0),
        "budget, 5x": BudgetConfig(target_speedup=5.0),
    },
}
FEWER = {30: (20, 15, 10), 100: (25, 20)}
PAPER = {
    "adacache, opensora-30-slow": "1.46x at 30.0 dB (480p)",
    "adacache, opensora-30-fast, MoReg": "2.10x at 25.8 dB (480p)",
    "adacache, opensora-100-fast": "4.7x (720p)",
}
"""What arXiv 2411.02397 reports of Open-Sora itself, on one GPU, under these codebooks."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    args = parser.parse_args()
    pipe, call = zoo.load("open-sora")
    pipe.set_progress_bar_config(disable=True)
    tables: dict[str, list[dict[str, Any]]] = {}
    for steps, configs in METHODS.items():
        here = {**call, "num_inference_steps": steps}
        rows = common.measured(pipe, scenes.prompts(args.prompts), configs, FEWER[steps], **here)
        tables[str(steps)] = common.table("method", rows)
    common.save("published", {"captions": args.prompts, "paper": PAPER, "tables": tables})


if __name__ == "__main__":
    main()
