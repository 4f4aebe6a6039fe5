"""What every plan of a profile should do, from real runs of some: speed, quality, forecasts. Ours, not a paper's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..policies.budget import BudgetConfig, PlanBook, Priced
from ..policies.plans.step_plan import StepPlan, nearest
from .search import Array, forecast_errors

MAX_PSNR_DB = 120.0
"""PSNR in dB of what cannot be told apart, so that a mean over prompts stays a number."""

Expected = dict[int, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Played:
    """What the runs of a plan did, prompt by prompt.

    Attributes:
        plan: what was run.
        psnr: of the videos, in dB; empty if there were none.
        forecasts: error of the linear forecast at the computed steps that measured it, relative to the output.
    """

    plan: StepPlan
    psnr: tuple[float, ...]
    forecasts: tuple[Mapping[int, float], ...]


def book(
    plans: Mapping[int, StepPlan],
    run: Callable[[StepPlan, str], Played],
    speeds: Sequence[float],
    config: BudgetConfig,
    *,
    overhead: float,
    deciding: Array,
    sigmas: Sequence[float],
) -> PlanBook:
    """Plans with what they are expected to do, cheapest first.

    Args:
        plans: by their cost in steps, the one that computes everything among them.
        run: runs a plan on the prompts it is judged by; given what to say of it, too.
        speeds: costs at which plans are run, as one over the share of computed steps.
        config: the plan that is played for its ``min_psnr`` is run, too.
        overhead: share of a run's time that no skipped step saves, 0 to 1.
        deciding: (P, N, N) inner products of the deciding branch's outputs in P unaccelerated runs.
        sigmas: (N + 1,) noise levels.
    """
    count = max(plans)
    played: dict[float, Played] = {}

    def known() -> PlanBook:
        runs = tuple(played.values())
        found = [
            Priced(
                plan=plan,
                speedup=1 / (plan.cost * (1 - overhead) + overhead),
                psnr=_psnr(plan, runs),
                expected=_expected(plan, runs, deciding, np.array(sigmas)),
            )
            for _, plan in sorted(plans.items())
        ]
        return PlanBook(sigmas=tuple(sigmas[:-1]), plans=tuple(found))

    for number, speed in enumerate(speeds):
        plan = nearest(plans, count / speed)
        played[plan.cost] = run(plan, f"plan {number + 1} of {len(speeds)}")
    made = known()
    while config.min_psnr is not None and any(one.safe_psnr >= config.min_psnr for one in made.plans):
        plan = made.choose(config).plan
        if plan.cost in played or plan.cost == 1:
            break
        played[plan.cost] = run(plan, "the plan for min_psnr")
        made = known()
    return made


def _psnr(plan: StepPlan, played: Sequence[Played]) -> tuple[float, ...]:
    """PSNR of every prompt at the plan's cost, between the measured ones; never beyond them."""
    measured = {one.plan.cost: one.psnr for one in played if one.psnr}
    if not measured:
        return ()
    at = sorted(measured)
    count = len(measured[at[0]])
    if plan.cost == 1:
        return (MAX_PSNR_DB,) * count
    if plan.cost < at[0]:
        return (0.0,) * count
    return tuple(float(np.interp(plan.cost, at, [min(measured[c][i], MAX_PSNR_DB) for c in at])) for i in range(count))


def _expected(plan: StepPlan, played: Sequence[Played], deciding: Array, sigmas: Array) -> Expected:
    """Forecast error at each computed step: (mean, deviation) over prompts.

    What unaccelerated runs show, times what accelerated ones of the played plan that costs nearest showed more of it:
    those forecast from, and towards, what earlier forecasts have put off the way already.
    """
    whole = forecast_errors(deciding, sigmas, plan.compute)
    near = min(played, key=lambda one: abs(one.plan.cost - plan.cost))
    seen = _seen(near)
    if not seen:
        return whole
    before = forecast_errors(deciding, sigmas, near.plan.compute)
    at = sorted(seen)
    more = [seen[step][0] / max(before[step][0], 1e-30) for step in at]
    apart = [seen[step][1] / max(seen[step][0], 1e-30) for step in at]
    means = {step: mean * float(np.interp(step, at, more)) for step, (mean, _) in whole.items()}
    return {step: (mean, mean * float(np.interp(step, at, apart))) for step, mean in means.items()}


def _seen(one: Played) -> Expected:
    """Mean and deviation at the steps that every prompt measured."""
    steps = set.intersection(*(set(found) for found in one.forecasts)) if one.forecasts else set()
    values = {step: np.array([found[step] for found in one.forecasts]) for step in steps & set(one.plan.compute[1:])}
    return {step: (float(value.mean()), float(value.std())) for step, value in values.items()}
