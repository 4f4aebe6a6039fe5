"""What the engine costs when it computes everything: methods that skip nothing against the bare pipeline.

    python -m benchmarks.overhead [--repeats 20]

A difference of a hundredth drowns in the noise of whole runs. So the engine's milliseconds are measured where they are
a larger part: on the demo model with all its blocks idle but the one in the middle, where AdaCache measures. Tensors
have the same sizes, and denoiser and blocks are called as often.
Every run stands beside one of the bare pipeline, and step is compared with step: the median over all runs and steps
counts. The result is given as a share of the whole demo model's step.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from itertools import chain, pairwise
from statistics import median
from typing import Any

import torch

import unicp
from benchmarks import common
from unicp import AdaCacheConfig, BudgetConfig, ScheduleConfig
from unicp.policies import Config

CONFIGS: dict[str, Config] = {
    "adacache": AdaCacheConfig(codebook=((1.0, 1),)),
    "adacache + MoReg": AdaCacheConfig(codebook=((1.0, 1),), moreg=True),
    "schedule": ScheduleConfig(interval=1),
    "budget": BudgetConfig(target_speedup=1.0),
}


def step_seconds(pipe: Any, prompt: str, config: Config | None = None) -> list[float]:
    """Seconds of each denoising step but the first, which has no end of a step before it."""
    ends = []

    def ended(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        ends.append(time.perf_counter())
        return tensors

    call = {**common.CALL, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    with unicp.accelerate(pipe, config) if config is not None else contextlib.nullcontext():
        pipe(prompt, **call, callback_on_step_end=ended)
    return [after - before for before, after in pairwise(ends)]


def hollow(transformer: Any) -> None:
    """Let all blocks but the one in the middle return what they are given."""
    blocks = list(transformer.blocks)
    for block in blocks:
        if block is not blocks[len(blocks) // 2]:
            block.forward = lambda hidden_states, *args, **kwargs: hidden_states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    pipe = common.pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompt = unicp.demo.prompts(1)[0]
    whole = 1e3 * median(chain(*[step_seconds(pipe, prompt) for _ in range(max(3, args.repeats // 4))]))
    hollow(pipe.transformer)
    more: dict[str, list[float]] = {name: [] for name in CONFIGS}
    for turn in range(args.repeats + 1):
        for name, config in CONFIGS.items():
            first = turn % 2  # either is the first of the two equally often
            pair = [step_seconds(pipe, prompt, each) for each in ((None, config) if first else (config, None))]
            bare, ours = pair if first else pair[::-1]
            if turn:  # the first turn warms up
                more[name] += [1e3 * (b - a) for a, b in zip(bare, ours, strict=True)]
    added = {name: median(differences) for name, differences in more.items()}
    shares = {name: milliseconds / whole for name, milliseconds in added.items()}
    print(f"a step of the demo model: {whole:.1f} ms")
    for name, share in shares.items():
        print(f"{name:<18} {added[name]:6.2f} ms a step, {share:.2%} of the demo model's")
    common.save("overhead", {"step_ms": whole, "added_ms": added, "shares": shares})


if __name__ == "__main__":
    main()
