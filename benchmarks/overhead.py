"""What the engine costs when it computes everything: methods that skip nothing against the bare pipeline.

    python -m benchmarks.overhead [--repeats 20]

A difference of a hundredth drowns in the noise of whole runs. So the engine's milliseconds are measured where they are
a larger part: on the demo model with all its blocks idle but the one in the middle, where AdaCache measures. Tensors
have the same sizes, and denoiser and blocks are called as often.
Every run stands beside one of the bare pipeline, and step is compared with step. In every turn the whole model is timed
too, of whose step the share is taken: a machine that is slow for a while is slow for both. The median turn counts.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from itertools import pairwise
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


@contextlib.contextmanager
def hollow(transformer: Any) -> Iterator[None]:
    """Let all blocks but the one in the middle return what they are given."""
    blocks = list(transformer.blocks)
    others = [block for block in blocks if block is not blocks[len(blocks) // 2]]
    for block in others:
        block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        yield
    finally:
        for block in others:
            del block.forward


def turn(pipe: Any, prompt: str, swapped: bool) -> tuple[float, dict[str, float]]:
    """Seconds of the whole model's step, and those that each config adds to one of the hollow model.

    Args:
        swapped: whether the accelerated run is the first of each pair.
    """
    whole = median(step_seconds(pipe, prompt))
    added = {}
    with hollow(pipe.transformer):
        step_seconds(pipe, prompt)  # the first run after the whole model's is slower
        for name, config in CONFIGS.items():
            pair = [step_seconds(pipe, prompt, each) for each in ((config, None) if swapped else (None, config))]
            bare, ours = pair[::-1] if swapped else pair
            added[name] = median(b - a for a, b in zip(bare, ours, strict=True))
    return whole, added


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    pipe = common.pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompt = unicp.demo.prompts(1)[0]
    turns = [turn(pipe, prompt, swapped=bool(number % 2)) for number in range(args.repeats + 1)][1:]  # one warms up
    whole = 1e3 * median(step for step, _ in turns)
    added = {name: 1e3 * median(more[name] for _, more in turns) for name in CONFIGS}
    shares = {name: median(more[name] / step for step, more in turns) for name in CONFIGS}
    print(f"a step of the demo model: {whole:.1f} ms")
    for name, share in shares.items():
        print(f"{name:<18} {added[name]:6.2f} ms a step, {share:.2%} of the demo model's")
    common.save("overhead", {"step_ms": whole, "added_ms": added, "shares": shares})


if __name__ == "__main__":
    main()
