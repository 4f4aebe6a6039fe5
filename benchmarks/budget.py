"""The budget on the demo model: tuned plans against simpler ways to the same speed, and how well plans are predicted.

    python -m benchmarks.budget [--prompts 32]

Tunes on captions of the training side (a profile in benchmarks/results/, kept and used again). Then, on held-out
captions against the unaccelerated video of the same seed: the budget asked for 35 dB, and plans for everybody that cost
about as much: default ones, even ones with linear forecasts, and fewer steps. Speed-ups are wall-clock of the denoising
loop, against unaccelerated runs of the same prompt before and after. Last, random plans: predicted against real error.
What the budget does at a speed is in benchmarks.compare.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import mean
from typing import Any

import numpy as np
import torch
from rich.progress import track
from scipy.stats import spearmanr

import unicp
from benchmarks import common
from unicp import BudgetConfig, Profile, ScheduleConfig
from unicp.engine.replay import Player
from unicp.planning import Trajectories, errors, gain_curve, gram
from unicp.policies import Config
from unicp.step_plans import StepPlan, computing

PROFILE = common.RESULTS / "budget-50.safetensors"
OURS = f"budget, min_psnr={common.MIN_PSNR:g}"
SPEEDS = (3.0, 3.5, 4.0)


def methods() -> dict[str, Config]:
    found: dict[str, Config] = {OURS: BudgetConfig(profile=str(PROFILE), min_psnr=common.MIN_PSNR)}
    for speed in SPEEDS:
        found[f"budget, default plan, {speed:g}x"] = BudgetConfig(target_speedup=speed)
    for interval in (3, 4):
        found[f"every {interval}. step, linear forecast"] = ScheduleConfig(
            interval=interval, warmup_steps=5, fill="linear"
        )
    return found


def random_plans(count: int, steps: int, seed: int = 0) -> list[StepPlan]:
    """Plans with random steps and one kind of forecast, from a quarter to three quarters of the steps."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        computed = int(rng.integers(steps // 4, 3 * steps // 4))
        inner = rng.choice(np.arange(3, steps - 1), size=computed - 4, replace=False)
        made.append(computing(steps, {0, 1, 2, steps - 1, *(int(i) for i in inner)}))
    return made


def prediction(pipe: Any, profile: Profile, count: int) -> dict[str, Any]:
    """Rank correlation of predicted and real error of random plans, on one caption that tuning did not see."""
    prompt = unicp.demo.prompts(1, seed=5)[0]
    player = Player(pipe, {"transformer": pipe.transformer})
    call = {"prompt": prompt, **common.CALL, "output_type": "latent"}
    take = player.run({**call, "generator": torch.Generator().manual_seed(0)}, record=True)
    curve = gain_curve(list(profile.metadata["gains"].values()), unicp.demo.STEPS)
    outputs = np.stack([t.double().numpy().ravel() for t in take.given])
    known = {"sigmas": np.array(take.sigmas), "grams": gram(outputs)[None]}
    weights = np.array(take.weights)
    ways = {
        "Euler's weights": Trajectories(**known),
        "the solver's weights": Trajectories(**known, weights=weights),
        "the solver's weights and gains": Trajectories(**known, weights=weights, gains=curve),
    }
    predicted: dict[str, list[float]] = {name: [] for name in ways}
    real = []
    for plan in track(random_plans(count, unicp.demo.STEPS), "random plans"):
        for name, t in ways.items():
            predicted[name].append(float(errors(t, replace(plan, correct=False))[0]))
        config = ScheduleConfig(compute=plan.compute, warmup_steps=1, fill="linear")
        with unicp.accelerate(pipe, config):
            made = Player(pipe, {}).run({**call, "generator": torch.Generator().manual_seed(0)})
        real.append(float((made.latents - take.latents).norm() / take.latents.norm()))
    return {
        "plans": count,
        "spearman": {name: float(spearmanr(values, real).statistic) for name, values in predicted.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tuning-prompts", type=int, default=8)
    parser.add_argument("--random-plans", type=int, default=20)
    parser.add_argument("--fresh", action="store_true", help="tune again")
    args = parser.parse_args()
    if args.fresh:
        PROFILE.unlink(missing_ok=True)
    pipe = common.pipeline()
    profile = Profile.load(common.tuned(pipe, args.tuning_prompts))
    configs = methods()
    prompts = unicp.demo.prompts(args.prompts)
    rows = common.measured(pipe, prompts, configs, fewer=(17, 14))
    table = common.table("method", rows)
    reached = {name: mean(row["psnr"] >= common.MIN_PSNR for row in collected) for name, collected in rows.items()}
    print(f"{OURS}: reached by {reached[OURS]:.0%} of the prompts")
    predicted = prediction(pipe, profile, args.random_plans)
    for name, value in predicted["spearman"].items():
        print(f"predicted against real error of {predicted['plans']} random plans, {name}: Spearman {value:.2f}")
    common.save(
        "budget",
        {"prompts": prompts, "steps": unicp.demo.STEPS, "tuning_prompts": args.tuning_prompts,
         "chosen": profile.metadata["chosen"], "table": table, "reached_35_db": reached, "prediction": predicted,
         "per_prompt": rows},
    )  # fmt: skip


if __name__ == "__main__":
    main()
