"""Speed, quality and forecast errors to expect of every plan, from real runs of some. Ours, not a paper's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..policies.budget import BudgetConfig, PlanBook, Priced
from ..policies.plans.step_plan import StepPlan, nearest
from ..tensors import extrapolation

MAX_PSNR_DB = 120.0
"""PSNR in dB that stands for identical videos, so that a mean over prompts stays finite."""

Array = NDArray[np.float64]
Expected = dict[int, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class PlanResult:
    """Results of the runs of a plan, prompt by prompt.

    Attributes:
        plan: the plan.
        psnr: PSNR of the videos in dB; empty if there were none.
        forecasts: relative error of the linear forecast, by computed step that measured it.
    """

    plan: StepPlan
    psnr: tuple[float, ...]
    forecasts: tuple[Mapping[int, float], ...]


def book(
    plans: Mapping[int, StepPlan],
    run: Callable[[StepPlan, str], PlanResult],
    speeds: Sequence[float],
    config: BudgetConfig,
    *,
    overhead: float,
    deciding: Array,
    sigmas: Sequence[float],
) -> PlanBook:
    """Plans with what is expected of them, cheapest first.

    Args:
        plans: plans by their cost in steps, including the one that computes everything.
        run: runs a plan on the prompts that judge it, given the plan and its name for the progress bar.
        speeds: costs at which plans are run, as one over the share of computed steps.
        config: if it has a ``min_psnr``, the plan that it selects is run, too.
        overhead: share of a run's time that no skipped step saves, 0 to 1.
        deciding: (P, N, N) inner products of the deciding branch's outputs in P unaccelerated runs.
        sigmas: (N + 1,) noise levels.
    """
    count = max(plans)
    results: dict[float, PlanResult] = {}

    def known() -> PlanBook:
        runs = tuple(results.values())
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
        results[plan.cost] = run(plan, f"plan {number + 1} of {len(speeds)}")
    made = known()
    while config.min_psnr is not None and any(one.safe_psnr >= config.min_psnr for one in made.plans):
        plan = made.choose(config).plan
        if plan.cost in results or plan.cost == 1:
            break
        results[plan.cost] = run(plan, "the plan for min_psnr")
        made = known()
    return made


def _psnr(plan: StepPlan, results: Sequence[PlanResult]) -> tuple[float, ...]:
    """PSNR of every prompt at the plan's cost, between the measured ones; never beyond them."""
    measured = {one.plan.cost: one.psnr for one in results if one.psnr}
    if not measured:
        return ()
    at = sorted(measured)
    count = len(measured[at[0]])
    if plan.cost == 1:
        return (MAX_PSNR_DB,) * count
    if plan.cost < at[0]:
        return (0.0,) * count
    return tuple(float(np.interp(plan.cost, at, [min(measured[c][i], MAX_PSNR_DB) for c in at])) for i in range(count))


def _expected(plan: StepPlan, results: Sequence[PlanResult], deciding: Array, sigmas: Array) -> Expected:
    """Forecast error at each computed step: (mean, deviation) over prompts.

    It is the error in unaccelerated runs, scaled up by how much larger it was in accelerated runs of the plan with the
    nearest cost among those that were run: these forecast from, and towards, outputs that earlier forecasts have
    already changed.
    """
    whole = forecast_errors(deciding, sigmas, plan.compute)
    near = min(results, key=lambda one: abs(one.plan.cost - plan.cost))
    seen = _seen(near)
    if not seen:
        return whole
    before = forecast_errors(deciding, sigmas, near.plan.compute)
    at = sorted(seen)
    more = [seen[step][0] / max(before[step][0], 1e-30) for step in at]
    apart = [seen[step][1] / max(seen[step][0], 1e-30) for step in at]
    means = {step: mean * float(np.interp(step, at, more)) for step, (mean, _) in whole.items()}
    return {step: (mean, mean * float(np.interp(step, at, apart))) for step, mean in means.items()}


def _seen(one: PlanResult) -> Expected:
    """Mean and deviation at the steps that every prompt measured."""
    steps = set.intersection(*(set(found) for found in one.forecasts)) if one.forecasts else set()
    values = {step: np.array([found[step] for found in one.forecasts]) for step in steps & set(one.plan.compute[1:])}
    return {step: (float(value.mean()), float(value.std())) for step, value in values.items()}


def gram(outputs: Array) -> Array:
    """Gram matrix of one run's outputs (N, D), divided by their mean square.

    >>> gram(np.array([[2.0, 0.0], [0.0, 2.0]])).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    products = outputs @ outputs.T
    return np.asarray(products / max(float(np.trace(products)) / len(products), 1e-30))


def forecast_errors(grams: Array, sigmas: Array, compute: Sequence[int]) -> dict[int, tuple[float, float]]:
    """Relative error of a linear forecast at each computed step: (mean, standard deviation) over runs.

    Args:
        grams: (P, N, N) inner products of the outputs of each of P runs.
        sigmas: (N,) noise levels, or more.
        compute: computed steps, rising; the first one cannot be forecast and is left out.

    >>> forecast_errors(np.array([np.outer([2.0, 3.0, 5.0], [2.0, 3.0, 5.0])]), np.array([3.0, 2.0, 1.0]), (0, 1, 2))
    {1: (0.333..., 0.0), 2: (0.2, 0.0)}
    """
    found = {}
    for place, step in enumerate(compute[1:], 1):
        nodes = compute[max(0, place - 2) : place][::-1]
        c = np.zeros(grams.shape[1])
        c[step] = -1.0
        c[list(nodes)] += extrapolation.weights([float(sigmas[n]) for n in nodes], float(sigmas[step]))
        squares = np.maximum(np.einsum("i,pij,j->p", c, grams, c), 0.0) / np.maximum(grams[:, step, step], 1e-30)
        found[step] = (float(np.sqrt(squares).mean()), float(np.sqrt(squares).std()))
    return found
