"""What every plan of a profile should do, from the runs of some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.tiny import FAMILIES
from unicp import BudgetConfig
from unicp.offline import candidates, trials
from unicp.offline.expectation import PlanResult, book, forecast_errors, gram
from unicp.policies.budget import PlanBook
from unicp.policies.plans.step_plan import StepPlan, growing

STEPS = 20
SIGMAS = [1 - i / STEPS for i in range(STEPS + 1)]
PLANS = {number: growing(STEPS, number, 2) for number in range(4, STEPS + 1)}
DECIDING = np.stack([gram(np.random.default_rng(i).normal(size=(STEPS, 40)).cumsum(0)) for i in range(3)])
"""Of three runs."""


def booked(psnr: Callable[[int, int], float], config: BudgetConfig | None = None) -> tuple[PlanBook, list[int]]:
    """A book from runs on three prompts that make a PSNR of their own, and the costs in steps that were run."""
    ran: list[int] = []

    def run(plan: StepPlan, what: str) -> PlanResult:
        ran.append(len(plan.compute))
        errors = forecast_errors(DECIDING, np.array(SIGMAS), plan.compute)
        more = 2 if ran[-1] > 7 else 3
        return PlanResult(
            plan=plan,
            psnr=tuple(psnr(len(plan.compute), prompt) for prompt in range(3)),
            forecasts=tuple({s: more * mean * (1 + 0.1 * p) for s, (mean, _) in errors.items()} for p in (-1, 0, 1)),
        )

    config = config or BudgetConfig(target_speedup=2)
    known = {"overhead": 0.0, "deciding": DECIDING, "sigmas": SIGMAS}
    return book(PLANS, run, (2.0, 4.0), config, **known), ran


def test_between_plans_that_were_run_quality_is_interpolated_and_never_beyond() -> None:
    made, ran = booked(lambda computed, prompt: 3.0 * computed + prompt)
    assert ran == [10, 5]
    assert made.plans[7 - min(PLANS)].psnr == pytest.approx((21, 22, 23))
    assert made.plans[0].psnr == (0, 0, 0)
    assert made.plans[-2].psnr == (30, 31, 32) and made.plans[-1].psnr == (120, 120, 120)


@example(quality=[20.0] * 10 + [60.0] * 11, wanted=50.0)  # what lies between turns out worse
@given(quality=st.lists(st.floats(20, 60), min_size=STEPS + 1, max_size=STEPS + 1), wanted=st.floats(20, 60))
def test_the_plan_for_a_quality_was_run(quality: list[float], wanted: float) -> None:
    """Whatever the others turn out to be, the one that is taken reached it; and no plan is run twice."""
    config = BudgetConfig(profile="x", min_psnr=wanted)
    made, ran = booked(lambda computed, _: quality[computed], config)
    taken = made.choose(config)
    assert len(taken.plan.compute) in {*ran, STEPS} and len(set(ran)) == len(ran)
    assert taken.plan.cost == 1 or quality[len(taken.plan.compute)] >= wanted


def test_forecasts_are_expected_to_be_as_bad_as_in_accelerated_runs() -> None:
    made, _ = booked(lambda *_: 30.0)
    for priced in made.plans:
        whole = forecast_errors(DECIDING, np.array(SIGMAS), priced.plan.compute)
        assert set(priced.expected or {}) == set(whole)
        for step, (mean, deviation) in (priced.expected or {}).items():
            more = 2 if len(priced.plan.compute) > 7 else 3  # as of the nearest one of those with 5 and 10 steps
            assert mean == pytest.approx(more * whole[step][0])
            assert deviation == pytest.approx(mean * 0.1 * (2 / 3) ** 0.5)


def test_without_videos_and_measured_forecasts_it_knows_what_unaccelerated_runs_show() -> None:
    def run(plan: StepPlan, what: str) -> PlanResult:
        return PlanResult(plan=plan, psnr=(), forecasts=({}, {}))

    known: dict[str, Any] = {"overhead": 0.5, "deciding": DECIDING, "sigmas": SIGMAS}
    made = book(PLANS, run, (2.0,), BudgetConfig(profile="x", min_psnr=30), **known)
    for priced in made.plans:
        assert priced.expected == forecast_errors(DECIDING, np.array(SIGMAS), priced.plan.compute)
        assert priced.psnr == () and priced.speedup == pytest.approx(2 / (1 + priced.plan.cost))


@pytest.mark.parametrize("kept", [True, False], ids=["default kept", "another one chosen"])
def test_plans_are_judged_by_prompts_that_they_were_not_made_to_fit(kept: bool) -> None:
    pipe = FAMILIES["wan"].build()
    run = trials.Tuner(pipe, {}, ["a", "b", "c", "d", "e"], {}, 0, candidates.EFFORTS["low"], None)
    run.chosen = {"1.5x": "default", "2x": "default" if kept else "first 0%, last 1"}
    assert list(run._judged()) == ([0, 1, 2, 3, 4] if kept else [4])


def test_the_error_of_a_forecast_is_that_of_the_vectors() -> None:
    rng = np.random.default_rng(0)
    sigmas = np.array([1.0, 0.8, 0.5, 0.4, 0.1])
    runs = rng.normal(size=(3, 5, 7)).cumsum(1)
    found = forecast_errors(np.stack([run @ run.T for run in runs]), sigmas, (0, 1, 3, 4))
    for step, before in ((3, (1, 0)), (4, (3, 1))):
        near, far = before
        slope = (runs[:, near] - runs[:, far]) / (sigmas[near] - sigmas[far])
        made = runs[:, near] + slope * (sigmas[step] - sigmas[near])
        off = np.linalg.norm(made - runs[:, step], axis=1) / np.linalg.norm(runs[:, step], axis=1)
        assert found[step] == pytest.approx((off.mean(), off.std()))
    off = np.linalg.norm(runs[:, 0] - runs[:, 1], axis=1) / np.linalg.norm(runs[:, 1], axis=1)
    assert found[1] == pytest.approx((off.mean(), off.std()))
