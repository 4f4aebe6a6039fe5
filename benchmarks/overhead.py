"""What the engine costs when it computes everything: methods that skip nothing against the bare pipeline.

    python -m benchmarks.overhead [--repeats 20]

A difference of a hundredth drowns in the noise of whole runs. So the engine's milliseconds are measured where they are
a larger part: on the demo model with all its blocks idle but the one in the middle, where AdaCache measures. Tensors
have the same sizes, and denoiser and blocks are called as often.
Runs are interleaved, and of each denoising step the shortest time over all runs counts: other processes can only make
a step longer. The result is given as a share of the whole demo model's step, measured in the same way.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from itertools import pairwise
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


def least(runs: list[list[float]]) -> float:
    """Milliseconds of a step: of each step the shortest run, and the mean over the steps."""
    steps = [min(times) for times in zip(*runs, strict=True)]
    return 1e3 * sum(steps) / len(steps)


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
    whole = least([step_seconds(pipe, prompt) for _ in range(max(3, args.repeats // 4))])
    hollow(pipe.transformer)
    runs: dict[str, list[list[float]]] = {name: [] for name in ("none", *CONFIGS)}
    for turn in range(args.repeats + 1):
        for name in runs:
            steps = step_seconds(pipe, prompt, CONFIGS.get(name))
            if turn:  # the first turn warms up
                runs[name].append(steps)
    cut = {name: least(times) for name, times in runs.items()}
    shares = {name: (cut[name] - cut["none"]) / whole for name in CONFIGS}
    print(f"a step of the demo model: {whole:.1f} ms, with one block that works: {cut['none']:.1f} ms")
    for name, share in shares.items():
        print(f"{name:<18} {cut[name] - cut['none']:6.2f} ms a step, {share:.2%} of the demo model's")
    common.save("overhead", {"step_ms": whole, "one_block_ms": cut, "shares": shares})


if __name__ == "__main__":
    main()
