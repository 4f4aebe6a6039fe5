"""What the engine costs when it computes everything: methods that skip nothing against the bare pipeline.

    python -m benchmarks.overhead [--repeats 10]

A difference of a hundredth drowns in the noise of whole runs. So the engine's milliseconds are measured where they are
a larger part: on the demo model with all its blocks idle but the one in the middle, where AdaCache measures. Tensors
have the same sizes, and denoiser and blocks are called as often.
And a machine's speed changes from second to second. So all pipelines run at once and take turns, step by step: each
step of a method stands beside the same step of the bare pipeline, a tenth of a second apart. Another bare pipeline runs
among them, and says how far such figures can be trusted. On one core; pin it.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from threading import Semaphore, Thread
from typing import Any

import torch

import unicp
from benchmarks import common
from unicp import AdaCacheConfig, BudgetConfig, ScheduleConfig
from unicp.policies import Config

CONFIGS: dict[str, Config | None] = {
    "bare": None,
    "adacache": AdaCacheConfig(codebook=((1.0, 1),)),
    "adacache + MoReg": AdaCacheConfig(codebook=((1.0, 1),), moreg=True),
    "schedule": ScheduleConfig(interval=1),
    "budget": BudgetConfig(target_speedup=1.0),
}

Run = Callable[[Callable[[], None]], None]
"""Makes a video, and calls what it is given at the end of each step."""


def video(pipe: Any, prompt: str, config: Config | None = None) -> Run:
    """A run of this pipeline."""

    def run(ended: Callable[[], None]) -> None:
        def step_ended(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            ended()
            return tensors

        call = {**common.CALL, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
        with unicp.accelerate(pipe, config) if config is not None else contextlib.nullcontext():
            pipe(prompt, **call, callback_on_step_end=step_ended)

    return run


def in_turns(runs: Sequence[Run]) -> list[list[float]]:
    """Seconds of each step of each run but its first, all runs taking turns step by step."""
    turns = [Semaphore(number == 0) for number in range(len(runs))]
    seconds: list[list[float]] = [[] for _ in runs]

    def take(number: int) -> None:
        turns[number].acquire()
        began = time.perf_counter()

        def ended() -> None:
            nonlocal began
            seconds[number].append(time.perf_counter() - began)
            turns[(number + 1) % len(runs)].release()
            turns[number].acquire()
            began = time.perf_counter()

        try:
            runs[number](ended)
        finally:
            turns[(number + 1) % len(runs)].release()

    threads = [Thread(target=take, args=(number,)) for number in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len({len(each) for each in seconds}) > 1:
        raise SystemExit("a run broke off")
    return [each[1:] for each in seconds]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    configs = [None, *CONFIGS.values()]
    pipes = [common.pipeline() for _ in configs]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    prompt = unicp.demo.prompts(1)[0]
    whole: list[float] = []
    added: dict[str, list[float]] = {name: [] for name in CONFIGS}
    for number in range(args.repeats + 1):
        pipes = pipes[1:] + pipes[:1]  # no method always has the same
        step = in_turns([video(pipes[0], prompt)])[0]
        with contextlib.ExitStack() as stack:
            for pipe in pipes:
                stack.enter_context(hollow(pipe.transformer))
            runs = [video(pipe, prompt, config) for pipe, config in zip(pipes, configs, strict=True)]
            bare, *others = in_turns(runs)
        if number:  # the first warms up
            whole += step
            for name, seconds in zip(CONFIGS, others, strict=True):
                added[name] += [after - before for before, after in zip(bare, seconds, strict=True)]
    step_ms, added_ms = 1e3 * median(whole), {name: 1e3 * median(each) for name, each in added.items()}
    shares = {name: more / step_ms for name, more in added_ms.items()}
    print(f"a step of the demo model: {step_ms:.1f} ms")
    for name, share in shares.items():
        print(f"{name:<18} {added_ms[name]:6.2f} ms a step, {share:.2%} of the demo model's")
    common.save("overhead", {"step_ms": step_ms, "added_ms": added_ms, "shares": shares})


if __name__ == "__main__":
    main()
