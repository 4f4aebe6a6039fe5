"""Steps at which only the conditional guidance branch is computed: what runs, what fills in, and who offers them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import unicp
from tests.contract import quietly
from tests.tiny import FAMILIES
from unicp import BudgetConfig, Profile, UniCPConfig
from unicp.offline import trials
from unicp.policies import Config, Step
from unicp.policies.budget import BudgetPolicy, PlanBook, Priced
from unicp.policies.plans.step_plan import DAMPING, Segment, StepPlan, alternating, growing, resampled
from unicp.policies.unicp import UniCPPolicy
from unicp.tensors.extrapolation import extrapolate, share, steadiness, weights

PLAN = replace(growing(10, 10, 10, 0), conditional=(3, 5, 6, 8))  # all steps are computed, four of them by halves
SKIPPING = StepPlan(
    steps=10,
    compute=(0, 1, 2, 4, 7, 9),
    segments=tuple(Segment(after=a, until=b, order=1, damping=0.85) for a, b in ((2, 4), (4, 7), (7, 9))),
    conditional=(4,),
)
CONFIG = BudgetConfig(target_speedup=1.0, override_reserve=0.0, correct=False, leap=0.0)


@contextmanager
def playing(pipe: Any, plan: StepPlan, config: Config = CONFIG) -> Iterator[unicp.Session]:
    """The pipeline, accelerated with this in place of the default plan."""
    with (
        patch("unicp.policies.plans.step_plan.untuned", lambda *_, **__: plan),
        unicp.accelerate(pipe, config) as session,
    ):
        yield session


# --- what is computed and what fills in -------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [PLAN, SKIPPING], ids=["all", "skipping"])
@pytest.mark.parametrize("family", ["wan", "hunyuan-video-1.5"])
def test_each_branch_is_forecast_from_its_own_outputs(family: str, plan: StepPlan) -> None:
    """Bit for bit what the same is by hand, on the pipeline without us."""
    chosen = FAMILIES[family]
    pipe = chosen.build()
    plain = pipe.transformer.forward
    kept: tuple[list[Any], list[Any]] = ([], [])  # (sigma, output, steadiness) of each branch, newest first
    calls = 0

    def by_hand(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        (step, branch), calls = divmod(calls, 2), calls + 1
        sigma = float(pipe.scheduler.sigmas[step])
        if step not in plan.compute or (branch and step in plan.conditional):
            (one, last, steady), (other, before, _) = kept[branch][:2]
            part = torch.tensor(0.0) if steady is None else share(steady)
            return (extrapolate([last, before], weights([one, other], sigma, DAMPING), part),)
        output = plain(*args, **kwargs)
        known = [tensor for _, tensor, _ in kept[branch][:2]]
        steady = steadiness(output[0], *known) if len(known) > 1 else None
        kept[branch].insert(0, (sigma, output[0].clone(), steady))
        return output

    pipe.transformer.forward = by_hand
    wanted = chosen.generate(pipe)
    del pipe.transformer.forward
    assert calls == 20
    with playing(pipe, plan) as session:
        made = chosen.generate(pipe)
        report = session.report()
    assert torch.equal(made, wanted)
    cond, uncond = chosen.branches
    ran = {(r.index, r.branch) for r in report.steps if r.action == "compute"}
    assert ran == {(i, b) for i in plan.compute for b in (cond, uncond)} - {(i, uncond) for i in plan.conditional}
    assert report.computed_fraction == pytest.approx(plan.cost) == {PLAN: 0.8, SKIPPING: 0.55}[plan]


@pytest.mark.parametrize("family", ["ltx", "mochi"])
def test_branches_that_are_called_together_are_computed_together(family: str) -> None:
    chosen = FAMILIES[family]
    pipe = chosen.build()
    with playing(pipe, PLAN) as session:
        chosen.generate(pipe)
        assert {record.action for record in quietly(session.report).steps} == {"compute"}


def test_longer_steps_of_the_solver_are_not_corrected_by_weights_of_its_short_ones() -> None:
    """Of a step by halves in the part of the run where the solver leaps, there is nothing to make good."""
    noted = []
    for leap in (0.0, 1.0):
        pipe = FAMILIES["wan"].build()
        with playing(pipe, PLAN, CONFIG.replace(correct=True, leap=leap)) as session:
            (hooked,) = session._hooked

            def look(run: Any, step: int, t: Any, kwargs: Any, hooked: Any = hooked) -> Any:
                noted.append(len(hooked.run._fills["uncond"].kept.forecasts) if step == 6 else 0)
                return kwargs

            FAMILIES["wan"].generate(pipe, callback=look)
    assert noted == [0] * 6 + [2] + [0] * 13  # steps 5 and 6, of the run without leaps


def test_the_second_of_two_denoisers_begins_with_both_branches() -> None:
    chosen = FAMILIES["wan2.2"]
    pipe = chosen.build()
    with playing(pipe, replace(PLAN, conditional=(4, 5, 6, 7))) as session:
        chosen.generate(pipe)
        steps = session.report().steps
    first = min(r.index for r in steps if r.denoiser == "transformer_2")
    halves = {r.index for r in steps if r.action != "compute"}
    assert first in (4, 5) and halves == {4, 5, 6, 7} - {first}


def test_after_what_is_no_number_both_branches_are_computed() -> None:
    def actions(change: float | None) -> list[str]:
        policy = BudgetPolicy(CONFIG.replace(override_reserve=0.1))
        book = PlanBook(sigmas=(0.0,) * 10, plans=(Priced(plan=PLAN, speedup=2.0),))
        policy.attach({}, (), book)
        done = []
        for index in range(6):
            step = Step(index=index, count=10, position=index, sigma=1 - index / 10)
            done.append(policy.decide(step).action)
            policy.observe(step, change if index == 2 else 0.1, None)
        return done

    whole, half = "compute", "conditional"
    assert actions(0.1) == [whole, whole, whole, half, whole, half]
    assert actions(None) == [whole, whole, whole, whole, whole, half]


# --- plans ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 8), st.integers(0, 3))
def test_alternating_plans_cost_what_is_asked(steps: int, computed: int, warmup: int, cooldown: int) -> None:
    plan = alternating(steps, computed, warmup, cooldown)
    whole = set(plan.compute) - set(plan.conditional)
    assert set(plan.conditional) <= set(plan.compute)
    assert {*range(min(warmup, steps)), *range(max(steps - cooldown, warmup), steps)} <= whole
    inner = [step for step in plan.compute if warmup <= step < steps - cooldown]
    assert all(step in plan.conditional for step in inner[::2]) and all(step in whole for step in inner[1::2])
    if len(plan.compute) < steps:
        least = min(steps, warmup + cooldown)
        assert plan.cost * steps == pytest.approx(max(min(computed, steps), least), abs=0.84)


def test_for_other_sigmas_they_move_with_the_plan() -> None:
    plan = alternating(50, 25, 3)
    sigmas, others = np.linspace(1, 0.02, 50), np.linspace(1, 1 / 30, 30)
    moved = resampled(plan, sigmas, others)
    assert set(moved.conditional) <= set(moved.compute[1:])
    assert moved.cost == pytest.approx(plan.cost, abs=0.03)
    assert 0.5 < len(moved.conditional) / 30 / (len(plan.conditional) / 50) < 2


def test_a_profile_keeps_them_and_one_that_is_damaged_is_refused() -> None:
    book = PlanBook(sigmas=(0.0,) * 10, plans=(Priced(plan=PLAN, speedup=2.0, expected={}),))
    assert PlanBook.from_dict(book.to_dict()) == book
    older = book.to_dict()
    del older["plans"][0]["conditional"]
    assert PlanBook.from_dict(older).plans[0].plan == replace(PLAN, conditional=())
    for wrong in ([0], [11], ["x"]):
        damaged = book.to_dict()
        damaged["plans"][0]["conditional"] = wrong
        with pytest.raises(unicp.UnicpError, match="the plans of the profile are damaged"):
            PlanBook.from_dict(damaged)


# --- who offers them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "apart"), [("wan", True), pytest.param("ltx", False, marks=pytest.mark.slow)])
def test_tune_tries_them_where_the_branches_are_called_apart(
    family: str, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[StepPlan] = []
    own = trials.Tuner._real

    def watched(self: Any, plan: StepPlan, index: int, show: Any) -> Any:
        tried.append(plan)
        error, *more = own(self, plan, index, show)
        return (0.0 if plan.conditional else error), *more  # they win, where they are offered

    monkeypatch.setattr(trials.Tuner, "_real", watched)
    chosen = FAMILIES[family]
    more = {"effort": "medium", "progress": False, "target_speedup": 2.0}
    profile = chosen.run(chosen.build(), lambda run, **call: unicp.tune(run, None, **call), steps=20, **more)
    assert any(plan.conditional for plan in tried) == apart
    named = any("conditional branch alone" in name for name in profile.metadata["chosen"].values())
    assert named == apart == any(entry["conditional"] for entry in profile.metadata["budget"]["plans"])


@pytest.mark.usefixtures("by_steps")
def test_unicp_acts_inside_the_steps_of_a_tuned_plan(tmp_path: Path) -> None:
    chosen = FAMILIES["wan"]
    path = tmp_path / "plans.safetensors"
    more = {"effort": "low", "progress": False, "target_speedup": 1.5}
    profile = chosen.run(chosen.build(), lambda run, **call: unicp.tune(run, None, **call), steps=20, **more)
    profile.save(path)
    budget = BudgetConfig(profile=str(path), target_speedup=1.5)
    runs = []
    for config in (budget, UniCPConfig(stack=budget, delta=5.0, edcw="online")):
        pipe = chosen.build()
        session = unicp.accelerate(pipe, config)
        chosen.generate(pipe, steps=20)
        runs.append(session.report())
    alone, inside = ({r.index for r in report.steps if r.action in ("forecast", "leap", "reuse")} for report in runs)
    assert alone == inside != set()
    assert runs[1].computed_fraction < 0.8 * runs[0].computed_fraction
    assert not any("no profile" in note for note in runs[1].notes)
    session = unicp.accelerate(chosen.build(), UniCPConfig(stack=budget, delta=0, pcas=False))  # nothing to do inside
    assert session._hooked[0].parts.book is not None
    inside = Profile(config=UniCPConfig(stack=budget), metadata={})
    inside.save(tmp_path / "inside.safetensors")
    with pytest.raises(unicp.UnicpError, match="names another profile in its stack"):
        unicp.accelerate(chosen.build(), tmp_path / "inside.safetensors")


def test_unicp_leaves_a_step_by_halves_alone() -> None:
    """It is computed in full, and windows end when they would without it: the other branch kept what it had."""
    windows = {"fill": "reuse", "windows": "unit", "edcw": "online", "max_window": 1}
    stacked = UniCPConfig(stack=CONFIG, delta=5.0, **windows, warmup_steps=1, cooldown_steps=0)
    policy = UniCPPolicy(stacked)
    policy.attach({"unit": "attention"}, (), None)
    due = []
    with patch("unicp.policies.plans.step_plan.untuned", lambda *_, **__: PLAN):
        for index in range(5):
            step = Step(index=index, count=10, position=index, sigma=1 - index / 10)
            plan = policy.decide(step)
            if "reuse" not in plan.units.values():
                policy.observe_units(step, {"unit": (min(index, 1), 0.01)})
            due.append((plan.action, policy.window["unit"].due))
    assert due == [("compute", 2), ("partial", 2), ("compute", 4), ("conditional", 4), ("compute", 6)]
