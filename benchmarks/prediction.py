"""How well the error of plans is predicted, on the demo model: random plans, predicted against real runs.

    python -m benchmarks.prediction [--prompts 2] [--plans 20]

Random plans are played on captions that tuning did not see, in three ways: linear forecasts alone; with the correction
at the next computed step; and, as a budget plays them, with the solver's leaps too. What is compared by rank is the
predicted error of the final latents, from the caption's own unaccelerated run, and the real one. Gains are those of the
profile in benchmarks/results/, which is tuned if it is not there.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import mean
from typing import Any

import numpy as np
from rich.progress import track
from scipy.stats import spearmanr

import unicp
from benchmarks import common
from unicp import Profile
from unicp.offline import trials
from unicp.offline.candidates import EFFORTS
from unicp.offline.search import errors, gain_curve
from unicp.policies.plans.step_plan import StepPlan, computing

TUNED_ON = 8
WAYS: dict[str, dict[str, Any]] = {
    "forecasts": {"correct": False, "leap": 0.0},
    "forecasts, corrected": {"leap": 0.0},
    "as played: corrected, and leaps": {},
}


def random_plans(count: int, steps: int, seed: int = 0) -> list[StepPlan]:
    """Plans with random steps and one kind of forecast, from a quarter to three quarters of the steps."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        computed = int(rng.integers(steps // 4, 3 * steps // 4))
        inner = rng.choice(np.arange(3, steps - 1), size=computed - 4, replace=False)
        made.append(computing(steps, {0, 1, 2, steps - 1, *(int(i) for i in inner)}))
    return made


def correlations(pipe: Any, profile: Profile, prompt: str, plans: list[StepPlan]) -> dict[str, dict[str, float]]:
    """Spearman's rank correlation by the way that plans are played and by what is known for predicting."""
    call = {**common.CALL, "output_type": "latent"}
    one = trials.Tuner(pipe, {"transformer": pipe.transformer}, [prompt], call, 0, EFFORTS["low"], None, None)
    one._trajectory(0, lambda *_: None)
    runs, unaccelerated = one._trajectories(), one.takes[0].latents
    curve = gain_curve(list(profile.metadata["gains"].values()), unicp.demo.STEPS)
    known = {
        "Euler's weights": replace(runs, gains=np.ones(0), weights=np.ones(0)),
        "the solver's weights": replace(runs, gains=np.ones(0)),
        "the solver's weights and gains": replace(runs, gains=curve),
    }
    found = {}
    for name, way in WAYS.items():
        made = [one._played(plan, 0, lambda *_: None, **way).latents for plan in plans]
        real = [float((latents - unaccelerated).norm()) for latents in made]
        corrected = [replace(plan, correct=way.get("correct", True)) for plan in plans]
        found[name] = {
            by: float(spearmanr([float(errors(t, plan)[0]) for plan in corrected], real).statistic)
            for by, t in known.items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=2, help="captions")
    parser.add_argument("--plans", type=int, default=20)
    args = parser.parse_args()
    pipe = common.pipeline()
    profile = Profile.load(common.tuned(pipe, TUNED_ON))
    prompts, plans = unicp.demo.prompts(args.prompts, seed=5), random_plans(args.plans, unicp.demo.STEPS)
    found = [correlations(pipe, profile, prompt, plans) for prompt in track(prompts, "captions")]
    table = {way: {by: mean(one[way][by] for one in found) for by in found[0][way]} for way in WAYS}
    for way, row in table.items():
        print(f"{way}: " + ", ".join(f"{value:.2f} with {by}" for by, value in row.items()))
    common.save("prediction", {"prompts": prompts, "plans": args.plans, "table": table, "per_prompt": found})


if __name__ == "__main__":
    main()
