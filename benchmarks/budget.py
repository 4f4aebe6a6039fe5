"""The budget on the demo model: tuned plans against simpler ways to the same speed.

    python -m benchmarks.budget [--prompts 32]

Tunes on captions of the training side (a profile in benchmarks/results/, kept and used again). Then, on held-out
captions against the unaccelerated video of the same seed: the budget asked for 35 dB, and plans for everybody that cost
about as much: default ones, even ones with linear forecasts, and fewer steps. Speed-ups are wall-clock of the denoising
loop, against unaccelerated runs of the same prompt before and after. What the budget does at a speed is in
benchmarks.compare.
"""

from __future__ import annotations

import argparse
from statistics import mean

import unicp
from benchmarks import common
from unicp import BudgetConfig, Profile, ScheduleConfig
from unicp.policies import Config

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tuning-prompts", type=int, default=8)
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
    common.save(
        "budget",
        {"prompts": prompts, "steps": unicp.demo.STEPS, "tuning_prompts": args.tuning_prompts,
         "chosen": profile.metadata["chosen"], "table": table, "reached_35_db": reached,
         "per_prompt": rows},
    )  # fmt: skip


if __name__ == "__main__":
    main()
