"""What each part of the budget is worth, and where its plans still hold, on the demo model.

    python -m benchmarks.plans [--prompts 8] [--part parts|transfer|all]

**Parts**: at two numbers of computed steps, held-out captions against the unaccelerated video of the same seed: even
steps that reuse, that forecast, that are corrected; then plans by search, with gains, with a choice of orders; then
the plans that real runs chose, watched by the override; and UniCP's windows inside of the computed steps of the
default plan. **Transfer**: plans tuned at 50 steps used at 30 and 40; at one size used at another; tuned on 4 captions
and on 16.
Tunes what it needs on captions of the training side (profiles in benchmarks/results/, kept and used again).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rich.progress import track

import unicp
from benchmarks import common
from benchmarks.budget import tuned
from unicp import BudgetConfig, Profile, UniCPConfig, planning
from unicp.bench import harness
from unicp.engine.replay import Player
from unicp.planning import Limits, Segment, StepPlan, Trajectories, gram, nearest
from unicp.policies import Config
from unicp.policies.budget import PlanBook, Priced

STEPS = unicp.demo.STEPS
COMPUTED = {"2x": 25, "3x": 17}
OTHER_SIZE = {"width": 128}


# --- parts ------------------------------------------------------------------------------------------------------------


def even(computed: int, order: int) -> StepPlan:
    """Computed steps evenly spaced, the second one beside the first so that there is something to extrapolate from."""
    compute = sorted({0, 1, *np.linspace(1, STEPS - 1, computed - 1).round().astype(int).tolist()})
    segments = tuple(
        Segment(after=a, until=b, order=min(order, a), damping=0.85) for a, b in pairwise(compute) if b > a + 1
    )
    return StepPlan(steps=STEPS, compute=tuple(compute), segments=segments)


def trajectories(pipe: Any, profile: Profile, count: int) -> Trajectories:
    """Of the captions that the profile was tuned on, with its gains."""
    player = Player(pipe, {"transformer": pipe.transformer})
    grams, weights, sigmas = [], None, []
    for index, prompt in enumerate(track(common.training_prompts(count), "trajectories")):
        call = {"prompt": prompt, **common.CALL, "output_type": "latent"}
        take = player.run({**call, "generator": torch.Generator().manual_seed(index)}, record=index == 0)
        weights, sigmas = weights or take.weights, take.sigmas
        grams.append(gram(np.stack([t.double().numpy().ravel() for t in take.given])))
    curves = []
    for points in profile.metadata["gains"].values():
        if points:
            at, gain = np.array(points).T
            curves.append(np.interp(np.arange(STEPS), at, np.log(gain)))
    return Trajectories(
        sigmas=np.array(sigmas), grams=np.array(grams), gains=np.exp(np.mean(curves, 0)), weights=np.array(weights)
    )


def playing(profile: Profile, plan: StepPlan, **fields: Any) -> BudgetConfig:
    """A config that plays one plan: a profile that holds nothing else."""
    book = PlanBook(sigmas=tuple(profile.metadata["budget"]["sigmas"]), plans=(Priced(plan=plan, speedup=1.0),))
    path = common.RESULTS / f"plan-{len(list(common.RESULTS.glob('plan-*.safetensors')))}.safetensors"
    Profile(config=profile.config, metadata={**profile.metadata, "budget": book.to_dict()}).save(path)
    return BudgetConfig(profile=str(path), target_speedup=1.0, **{"override_reserve": 0.0, **fields})


def parts(pipe: Any, profile: Profile, tuning_prompts: int) -> dict[str, Config]:
    known = trajectories(pipe, profile, tuning_prompts)

    def searched(limits: Limits, fills: tuple[tuple[int, float], ...] = planning.FILLS) -> Callable[[int], StepPlan]:
        with patch.object(planning, "FILLS", fills):
            found = planning.plans(known, limits)
        return lambda computed: nearest(found, computed)

    linear = ((1, 0.85),)
    found: dict[str, Config] = {}
    ways = {
        "search, linear forecasts": searched(Limits(warmup=2), linear),
        "search, gains": searched(Limits(warmup=2, tempering=0.5), linear),
        "search, gains, choice of orders": searched(Limits(warmup=2, tempering=0.5)),
    }
    book = PlanBook.from_dict(profile.metadata["budget"])
    plans = {len(priced.plan.compute): priced.plan for priced in book.plans}
    for speed, computed in COMPUTED.items():
        found[f"{speed}: even, reused"] = playing(profile, even(computed, 0), correct=False)
        found[f"{speed}: even, linear forecast"] = playing(profile, even(computed, 1), correct=False)
        found[f"{speed}: even, linear forecast, corrected"] = playing(profile, even(computed, 1))
        for name, way in ways.items():
            found[f"{speed}: {name}"] = playing(profile, way(computed))
        found[f"{speed}: chosen by real runs"] = playing(profile, nearest(plans, computed))
        watched = BudgetConfig(profile=profile_path(), target_speedup=float(speed[:-1]))
        found[f"{speed}: chosen by real runs, override (5% reserve)"] = watched
        plain = BudgetConfig(target_speedup=float(speed[:-1]))
        found[f"{speed}: default plan"] = plain
        inside = {"delta": 0.08, "delta_mlp": 0.08, "edcw": "online", "shared_windows": True}
        found[f"{speed}: default plan, UniCP inside"] = UniCPConfig(stack=plain, **inside)
    return found


def profile_path() -> str:
    return str(common.RESULTS / "budget-50.safetensors")


# --- transfer ---------------------------------------------------------------------------------------------------------


def tuned_at(pipe: Any, name: str, count: int, **call: Any) -> str:
    """The path of a profile, which is made if it is not there."""
    path = common.RESULTS / f"{name}.safetensors"
    if not path.exists():
        made = unicp.tune(
            pipe,
            common.training_prompts(count),
            target_speedup=2.0,
            checkpoint=path.with_suffix(".part.json"),
            **{**common.CALL, **call},
        )
        made.save(path)
    return str(path)


def transfers(pipe: Any) -> dict[str, tuple[dict[str, Any], dict[str, Config]]]:
    """By name of a situation: how the pipeline is called in it, and the plans that are compared there."""
    few, many = tuned_at(pipe, "budget-50-few", 4), tuned_at(pipe, "budget-50-many", 16)
    thirty = tuned_at(pipe, "budget-30", 8, num_inference_steps=30)

    def both(**profiles: str | None) -> dict[str, Config]:
        return {
            f"{name.replace('_', ' ')}, {speed:g}x": BudgetConfig(profile=path, target_speedup=speed)
            for speed in (2.0, 3.0)
            for name, path in profiles.items()
        }

    at50 = profile_path()
    return {
        "50 steps": ({}, both(tuned_on_4=few, tuned_on_8=at50, tuned_on_16=many, default_plan=None)),
        "40 steps": ({"num_inference_steps": 40}, both(tuned_at_50=at50, default_plan=None)),
        "30 steps": ({"num_inference_steps": 30}, both(tuned_at_50=at50, tuned_at_30=thirty, default_plan=None)),
        "96x128": (OTHER_SIZE, both(tuned_at_96x96=at50, default_plan=None)),
    }


# --- runs -------------------------------------------------------------------------------------------------------------


def measured(pipe: Any, prompts: list[str], configs: dict[str, Config], **call: Any) -> dict[str, list[dict[str, Any]]]:
    """Every method on every prompt, and fewer steps for the same speeds."""
    steps = call.get("num_inference_steps", STEPS)
    fewer = {f"fewer steps ({n})": n for n in (round(steps / 2), round(steps / 3))}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in [*configs, *fewer]}

    def made(prompt: str, count: int = steps) -> harness.Made:
        return harness.generate(pipe, {"prompt": prompt, **common.CALL, **call, "num_inference_steps": count}, seed=0)

    made(prompts[0], 4)  # warm-up
    for prompt in track(prompts, f"{steps} steps"):
        base = made(prompt)
        runs: dict[str, tuple[harness.Made, float]] = {}
        for name, config in configs.items():
            with unicp.accelerate(pipe, config) as session:
                runs[name] = (made(prompt), session.report().computed_fraction)
        for name, count in fewer.items():
            runs[name] = (made(prompt, count), count / steps)
        for name, (run, fraction) in runs.items():
            speedup = base.loop_seconds / run.loop_seconds
            rows[name].append({**common.quality(run, base), "fraction": fraction, "speedup": speedup})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8, help="held-out captions")
    parser.add_argument("--part", choices=("parts", "transfer", "all"), default="all")
    args = parser.parse_args()
    pipe = common.pipeline()
    prompts = unicp.demo.prompts(args.prompts)
    profile = tuned(pipe, 8)
    if args.part != "transfer":
        rows = measured(pipe, prompts, parts(pipe, profile, 8))
        table = common.table("method", rows)
        common.save("plans", {"prompts": prompts, "steps": STEPS, "table": table, "per_prompt": rows})
        for leftover in Path(common.RESULTS).glob("plan-*.safetensors"):
            leftover.unlink()
    if args.part != "parts":
        tables = {}
        for name, (call, configs) in transfers(pipe).items():
            tables[name] = common.table(f"method, {name}", measured(pipe, prompts, configs, **call))
        common.save("transfer", {"prompts": prompts, "tables": tables})


if __name__ == "__main__":
    main()
