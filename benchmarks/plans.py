"""What each part of the budget is worth, and where its plans still hold, on the demo model.

    python -m benchmarks.plans [--prompts 8] [--part parts|transfer|override|all] [--tuned-on 4 16]

**Parts**: at two costs, held-out captions against the unaccelerated video of the same seed: even steps that reuse, that
forecast, that are corrected, with leaps; gaps that grow; then the plans that real runs chose, with the override, and
with UniCP inside of all their computed steps.
**Transfer**: plans tuned at 50 steps used at 30 and 40; at one size used at another; tuned on 8 captions, on fewer and
on more (at 30 steps).
**Override**: one plan with reserves of different size, and plans that compute as many steps more from the beginning; on
captions with two fast objects under a moving camera, on ones with one slow or still object, and on 32 as they come.
Tunes what it needs on captions of the training side (profiles in benchmarks/results/, kept and used again).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import unicp
from benchmarks import common
from unicp import BudgetConfig, Profile, UniCPConfig
from unicp.policies import Config
from unicp.policies.budget import PlanBook, Priced
from unicp.policies.plans.step_plan import StepPlan, computing, default, growing

STEPS = unicp.demo.STEPS
TUNED_ON = 8
COMPUTED = {2.0: 25, 3.0: 17}
AS_THEY_COME = 32
OTHER_SIZE = {"width": 128}


# --- parts ------------------------------------------------------------------------------------------------------------


def even(computed: int, order: int) -> StepPlan:
    """Computed steps evenly spaced, the second one beside the first so that there is something to extrapolate from."""
    return computing(STEPS, {0, 1, *np.linspace(1, STEPS - 1, computed - 1).round().astype(int).tolist()}, order)


def playing(profile: Profile, plan: StepPlan | Priced, **fields: Any) -> BudgetConfig:
    """A config that plays one plan: a profile that holds nothing else."""
    priced = replace(plan, speedup=1.0) if isinstance(plan, Priced) else Priced(plan=plan, speedup=1.0)
    book = PlanBook(sigmas=tuple(profile.metadata["budget"]["sigmas"]), plans=(priced,))
    path = common.RESULTS / f"plan-{len(list(common.RESULTS.glob('plan-*.safetensors')))}.safetensors"
    metadata = {**profile.metadata, "budget": book.to_dict()}
    Profile(config=profile.config, metadata=metadata).save(path)
    return BudgetConfig(profile=str(path), target_speedup=1.0, **{"override_reserve": 0.0, **fields})


def tuned_plan(profile: Profile, computed: int) -> Priced:
    """The plan of a profile that costs nearest to so many steps."""
    return min(PlanBook.from_dict(profile.metadata["budget"]).plans, key=lambda p: abs(STEPS * p.plan.cost - computed))


def parts(pipe: Any) -> dict[str, Config]:
    profile = Profile.load(common.tuned(pipe, TUNED_ON))
    ways: dict[str, Callable[[int], StepPlan]] = {
        "growing gaps": lambda computed: growing(STEPS, computed, 2),
        "growing gaps, first steps whole (default plan)": lambda computed: default(STEPS, computed),
    }
    windows = {"delta": 0.08, "delta_mlp": 0.08, "edcw": "online"}
    found: dict[str, Config] = {}
    for speed, computed in COMPUTED.items():
        at = f"{speed:g}x: "
        bare = {"correct": False, "leap": 0.0}
        found[at + "even, reused"] = playing(profile, even(computed, 0), **bare)
        found[at + "even, linear forecasts"] = playing(profile, even(computed, 1), **bare)
        found[at + "even, corrected"] = playing(profile, even(computed, 1), leap=0.0)
        found[at + "even, corrected, leaps"] = playing(profile, even(computed, 1))
        for name, way in ways.items():
            found[at + name] = playing(profile, way(computed))
        chosen = tuned_plan(profile, computed)
        watched = playing(profile, chosen, override_reserve=2 / STEPS)
        found[at + "chosen by real runs"] = playing(profile, chosen)
        found[at + "chosen by real runs, override of 2 steps"] = watched
        found[at + "chosen by real runs, override, UniCP inside"] = UniCPConfig(stack=watched, **windows)
    return found


# --- transfer ---------------------------------------------------------------------------------------------------------


def transfers(pipe: Any, counts: list[int]) -> dict[str, tuple[dict[str, Any], dict[str, Config]]]:
    """By name of a situation: how the pipeline is called in it, and the plans that are compared there."""
    at50, at30 = common.tuned(pipe, TUNED_ON), common.tuned(pipe, TUNED_ON, "budget-30", num_inference_steps=30)
    others = {
        f"tuned_on_{count}": common.tuned(pipe, count, f"budget-30-on-{count}", num_inference_steps=30)
        for count in counts
    }

    def both(**profiles: Any) -> dict[str, Config]:
        return {
            f"{name.replace('_', ' ')}, {speed:g}x": BudgetConfig(profile=path, target_speedup=speed)
            for speed in COMPUTED
            for name, path in {**profiles, "default_plan": None}.items()
        }

    return {
        "50 steps": ({}, both(tuned_at_50=at50)),
        "40 steps": ({"num_inference_steps": 40}, both(tuned_at_50=at50)),
        "30 steps": ({"num_inference_steps": 30}, both(tuned_at_50=at50, tuned_on_8=at30, **others)),
        "96x128 pixels": (OTHER_SIZE, both(tuned_at_96x96=at50)),
    }


# --- override ---------------------------------------------------------------------------------------------------------


def groups(count: int) -> dict[str, list[str]]:
    """Held-out captions of which a forecast should be hard, and easy; and without a choice."""
    captions = unicp.demo.prompts(2000)
    busy = [text for text in captions if text.count(" fast") == 2 and "the camera pans" in text]
    calm = [text for text in captions if not any(part in text for part in (" and ", " fast", "the camera pans"))]
    return {
        "two fast objects, moving camera": busy[:count],
        "one object, slow or still": calm[:count],
        "as they come": captions[:AS_THEY_COME],
    }


def reserves(pipe: Any) -> dict[str, Config]:
    profile, computed = Profile.load(common.tuned(pipe, TUNED_ON)), COMPUTED[3.0]
    found: dict[str, Config] = {}
    for extra in (0, 2, 5):
        found[f"reserve of {extra} steps"] = playing(
            profile, tuned_plan(profile, computed), override_reserve=extra / STEPS
        )
    for extra in (1, 2, 5):
        found[f"{extra} more in the plan"] = playing(profile, tuned_plan(profile, computed + extra))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8, help="held-out captions")
    parser.add_argument("--part", choices=("parts", "transfer", "override", "all"), default="all")
    parser.add_argument(
        "--tuned-on", type=int, nargs="*", default=[4, 16], help="numbers of captions to tune on, beside 8"
    )
    args = parser.parse_args()
    pipe = common.pipeline()
    prompts = unicp.demo.prompts(args.prompts)
    if args.part in ("parts", "all"):
        rows = common.measured(pipe, prompts, parts(pipe), fewer=(25, 17))
        table = common.table("method", rows)
        common.save("plans", {"prompts": prompts, "steps": STEPS, "table": table})
    if args.part in ("override", "all"):
        configs, chosen = reserves(pipe), groups(args.prompts)
        rows = {name: common.measured(pipe, captions, configs, fewer=()) for name, captions in chosen.items()}
        tables = {name: common.table(f"plan, {name}", found) for name, found in rows.items()}
        spent = {
            situation: {
                name: [{key: run[key] for key in ("psnr", "fraction")} for run in runs] for name, runs in of.items()
            }
            for situation, of in rows.items()
        }
        common.save("override", {"prompts": chosen, "tables": tables, "per_prompt": spent})
    for leftover in common.RESULTS.glob("plan-*.safetensors"):
        leftover.unlink()
    if args.part in ("transfer", "all"):
        tables = {}
        for name, (call, configs) in transfers(pipe, args.tuned_on).items():
            steps = call.get("num_inference_steps", STEPS)
            fewer = [round(steps / speed) for speed in COMPUTED]
            tables[name] = common.table(f"plan, {name}", common.measured(pipe, prompts, configs, fewer, **call))
        common.save("transfer", {"prompts": prompts, "tables": tables})


if __name__ == "__main__":
    main()
