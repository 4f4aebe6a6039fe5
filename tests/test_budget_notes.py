"""A budget in runs that its profile was not made for, or that go badly: what it does then, and what it says of it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

import unicp
from tests.contract import quietly
from tests.test_budget import steps
from tests.test_fuzz import BOOK
from tests.tiny import FAMILIES
from unicp import AdaCacheConfig, BudgetConfig, UniCPConfig
from unicp.engine.report import Generation
from unicp.errors import UnicpError
from unicp.policies import Step
from unicp.policies.budget import BudgetPolicy, PlanBook, Priced
from unicp.policies.plans.step_plan import StepPlan, default, growing, resampled
from unicp.tensors import extrapolation

WAN = FAMILIES["wan"]


def book(
    plan: StepPlan, expected: dict[int, tuple[float, float]] | None = None, sigmas: tuple[float, ...] = ()
) -> PlanBook:
    sigmas = sigmas or tuple(1 - i / plan.steps for i in range(plan.steps))
    return PlanBook(sigmas=sigmas, plans=(Priced(plan=plan, speedup=99.0, expected=expected),))


def computed_by(policy: BudgetPolicy, run: list[Step]) -> list[int]:
    return [step.index for step in run if policy.decide(step).action == "compute"]


def of_run(count: int, known: bool = True) -> list[Step]:
    sigmas = tuple(step.sigma for step in steps(count)) if known else None
    return [Step(index=s.index, count=count, position=s.index, sigma=s.sigma, sigmas=sigmas) for s in steps(count)]


# --- carried over -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [30, 40, 77])
@pytest.mark.parametrize("computed", [16, 25, 33])
def test_the_default_plan_of_a_profile_is_the_default_plan_at_other_numbers_of_steps(computed: int, count: int) -> None:
    """Moved step by step, its gaps would not only grow and then only shrink any more."""
    policy = BudgetPolicy(BudgetConfig(target_speedup=1))
    policy.attach({}, (), book(replace(default(50, computed), default=True)))
    share = round(computed * count / 50)
    assert computed_by(policy, of_run(count)) == list(policy.default_plan(of_run(count)[0], share).compute)
    assert f"the profile is of 50 steps at other noise levels than these {count}" in policy.notes()[0]


def test_a_run_that_the_profile_is_of_has_its_plan_and_nothing_is_said() -> None:
    policy = BudgetPolicy(BudgetConfig(target_speedup=1, correct=False))
    policy.attach({}, (), book(growing(50, 20, 7)))
    assert computed_by(policy, of_run(50)) == list(growing(50, 20, 7).compute)
    assert policy.notes() == []


def test_where_nobody_tells_the_noise_levels_a_plan_is_carried_over_by_the_share_of_the_run() -> None:
    plan = growing(50, 20, 7)
    policy = BudgetPolicy(BudgetConfig(target_speedup=1))
    policy.attach({}, (), book(plan))
    even = [[1 - i / n for i in range(n)] for n in (50, 30)]
    assert computed_by(policy, of_run(30, known=False)) == list(resampled(plan, *even).compute)
    assert "carried over" in policy.notes()[0]


@pytest.mark.parametrize("first", [1, 21])
def test_what_begins_in_the_middle_of_a_run_computes_two_steps_first(first: int) -> None:
    """The second of two denoisers, or a video made from another one: one output alone tells no direction."""
    for begin in range(first, first + 6):
        policy = BudgetPolicy(BudgetConfig(target_speedup=4))
        late = [Step(index=i, count=50, position=i - begin, sigma=1 - i / 50) for i in range(begin, 50)]
        assert computed_by(policy, late)[:2] == [begin, begin + 1]
    policy = BudgetPolicy(BudgetConfig(target_speedup=4, warmup_steps=1))
    assert computed_by(policy, steps(50))[1] > 1


def test_what_is_said_of_the_speed_is_what_the_plan_has() -> None:
    """With two steps of 25 the plan of a multistep solver has three: the first two and the last."""
    policy = BudgetPolicy(BudgetConfig(target_speedup=10))
    assert len(computed_by(policy, steps(25, leaps=True))) == 3
    assert any("of 25 steps: 3 are computed, for 8.33x by the steps" in note for note in policy.notes())


@pytest.mark.parametrize("speed", [1.2, 1.5])
def test_levels_that_are_visited_twice_are_no_broken_outputs(speed: float) -> None:
    family = FAMILIES["wan"]
    pipe = family.build()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    with unicp.accelerate(pipe, BudgetConfig(target_speedup=speed)) as session:
        quietly(lambda: family.generate(pipe, steps=20))
        assert not [note for note in session.report().notes if "finite" in note]


def test_first_steps_that_cost_the_target_are_named() -> None:
    policy = BudgetPolicy(BudgetConfig(target_speedup=4, warmup_steps=4))
    assert len(computed_by(policy, steps(8))) == 5
    assert (
        "target_speedup=4 cannot be had of 8 steps with warmup_steps=4: 5 are computed, for 1.6x by the steps; "
        "leave out warmup_steps=4"
    ) in policy.notes()
    policy = BudgetPolicy(BudgetConfig(target_speedup=2, warmup_steps=1000))
    assert len(computed_by(policy, steps(8))) == 8
    assert policy.why_idle() == (
        "its plan computes every step of this run; leave out warmup_steps=1000, or give more steps"
    )
    assert "a target_speedup above 1, or" in BudgetPolicy(BudgetConfig(target_speedup=1)).why_idle()
    assert "above 1" not in BudgetPolicy(BudgetConfig(target_speedup=3)).why_idle()


@pytest.mark.parametrize("speed", [1.5, 2, 3, 4])
def test_a_second_denoiser_costs_no_speed(speed: float) -> None:
    wanted = math.floor(40 / speed)
    for switch in range(8, 30):
        policies = [BudgetPolicy(BudgetConfig(target_speedup=speed)) for _ in range(2)]
        spans = (range(switch), range(switch, 40))
        runs = [[Step(index=i, count=40, position=i - at[0], sigma=1 - i / 40) for i in at] for at in spans]
        high, low = (computed_by(policy, run) for policy, run in zip(policies, runs, strict=True))
        assert low[:2] == [switch, switch + 1] and low[-1] == 39
        assert len(high) + len(low) == wanted


@pytest.mark.parametrize("speed", [1.5, 2, 3, 4])
@pytest.mark.parametrize("first", [8, 20, 30])
def test_a_video_that_begins_in_the_middle_is_as_much_faster(first: int, speed: float) -> None:
    run = [Step(index=i, count=50, position=i - first, sigma=1 - i / 50, began=first) for i in range(first, 50)]
    computed = computed_by(BudgetPolicy(BudgetConfig(target_speedup=speed)), run)
    assert len(computed) == math.floor((50 - first) / speed) and computed[0] == first


@pytest.mark.parametrize(
    ("family", "more", "run", "asked"),
    [("wan2.2", {}, range(40), 20), ("wan-video", {"strength": 0.6}, range(8, 20), 6)],
    ids=["two denoisers", "begun in the middle"],
)
def test_as_many_steps_are_computed_as_were_asked(family: str, more: dict[str, Any], run: range, asked: int) -> None:
    chosen = FAMILIES[family]
    pipe = chosen.build()
    with unicp.accelerate(pipe, BudgetConfig(target_speedup=2)) as session:
        for _ in range(2):
            chosen.run(pipe, lambda each, **call: each(**{**call, **more}), steps=run.stop)
            computed = {r.index for r in session.report().steps if r.action == "compute"}
            assert len(computed) == asked and run.start in computed and computed <= set(run)


# --- two denoisers ----------------------------------------------------------------------------------------------------


def test_two_denoisers_have_one_reserve_between_them() -> None:
    budget = BudgetConfig(target_speedup=3, override_reserve=0.2)
    for config in (budget, UniCPConfig(stack=budget)):
        session = unicp.accelerate(FAMILIES["wan2.2"].build(), config)
        shares = [getattr(each.config, "stack", each.config).reserve for each in session._hooked]
        assert shares == [0.1, 0.1]
    alone = unicp.accelerate(WAN.build(), budget)
    assert alone._hooked[0].config.reserve == 0.2
    assert AdaCacheConfig().shared(2) == AdaCacheConfig()


def test_notes_say_whose_they_are_where_denoisers_differ() -> None:
    family = FAMILIES["wan2.2"]
    pipe = family.build()
    session = unicp.accelerate(pipe, BudgetConfig(target_speedup=3, leap=0.0))
    quietly(lambda: family.generate(pipe))
    said = session.report()
    assert sum("no profile" in note for note in said.notes) == 1
    assert said.notes[1:] == (
        "transformer_2: this denoiser has nothing to forecast from when it begins: 4 of 10 steps are computed, not 3, "
        "for 2.5x by the steps",
    )
    assert said.computed_steps == 4
    assert session.report().computed_fraction < 1
    generation = Generation("budget")
    generation.said = {"transformer": ["warm", "hot"], "transformer_2": ["warm", "cold", "cold"]}
    assert session._notes(generation) == ["warm", "transformer: hot", "transformer_2: cold"]


def test_what_the_second_denoiser_forecasts_is_corrected_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the solver makes of an output is told before its first step, and the second one comes later."""
    # Outputs of a random model turn off at every step, which by itself corrects nothing.
    monkeypatch.setattr(extrapolation, "steadiness", lambda new, *_: torch.ones(len(new), *(1,) * (new.ndim - 1)))
    family = FAMILIES["wan2.2"]
    pipe = family.build()
    made = {}
    for correct in (True, False):
        session = unicp.accelerate(pipe, BudgetConfig(target_speedup=2, correct=correct, leap=0.0))
        known: list[Any] = []
        second = session._hooked[1]
        handle = second.denoiser.register_forward_hook(lambda *_, e=second, k=known: k.append(e.clock.step.weights))
        made[correct] = quietly(lambda: family.generate(pipe))
        handle.remove()
        assert all(weights is not None for weights in known)
    assert not torch.equal(made[True], made[False])


# --- notes ------------------------------------------------------------------------------------------------------------


def spent(reserve: float) -> tuple[Any, Any]:
    """A pipeline and a session whose forecasts fail at every step."""
    pipe = WAN.build()
    session = unicp.accelerate(pipe, BudgetConfig(target_speedup=1, override_reserve=reserve))
    pipe.scheduler.set_timesteps(10)
    sigmas = tuple(float(sigma) for sigma in pipe.scheduler.sigmas[:-1])
    for hooked in session._hooked:
        hooked.parts.book = book(growing(10, 5, 2), dict.fromkeys(range(10), (0.0, 0.0)), sigmas)
    return pipe, session


def test_what_was_spent_and_what_was_missing_is_in_the_report_of_its_own_video_alone() -> None:
    pipe, session = spent(0.1)
    quietly(lambda: WAN.generate(pipe))
    said = session.report().notes
    assert any("1 of 1 steps of the reserve were spent where forecasts failed" in note for note in said)
    assert any("forecasts failed at" in note and "override_reserve gives more" in note for note in said)
    during: list[list[str]] = []

    def after(_: Any, index: int, *__: Any) -> dict[str, Any]:
        if index == 0:
            during.append(list(session.report().notes))
        return {}

    WAN.run(pipe, lambda each, **call: each(**call), callback_on_step_end=after)
    assert not any("forecasts failed" in note for note in during[0])


def test_without_a_reserve_forecasts_are_watched_and_nothing_more_is_computed() -> None:
    pipe, session = spent(0.0)
    quietly(lambda: WAN.generate(pipe))
    report = session.report()
    assert any("forecasts failed at" in note for note in report.notes)
    assert any(r.metric is not None for r in report.steps)
    assert sorted({r.index for r in report.steps if r.action == "compute"}) == list(growing(10, 5, 2).compute)


def test_after_what_is_no_number_the_next_step_is_computed() -> None:
    """With a reserve. Without one, nothing is told before the end, and nothing follows from it."""
    wanted = default(30, 10).compute
    for reserve in (0.1, 0.0):
        policy, done = BudgetPolicy(BudgetConfig(target_speedup=3, override_reserve=reserve)), []
        for step in steps(30):
            done.append(policy.decide(replace(step, leaps=False)).action)
            if done[-1] == "compute":
                policy.observe(step, math.nan if step.index == 1 else 0.1, None)
        again = {2} if reserve else set()
        assert 2 not in wanted
        assert [i for i, action in enumerate(done) if action == "compute"] == sorted({*wanted, *again})
        assert any("not finite numbers" in note for note in policy.notes())


@pytest.mark.parametrize(("noisy", "told"), [(False, False), (True, True)])
def test_that_forecasts_were_not_corrected_is_said(noisy: bool, told: bool) -> None:
    pipe = WAN.build()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=noisy)
    torch.manual_seed(0)
    session = unicp.accelerate(pipe, BudgetConfig(target_speedup=2))
    quietly(lambda: WAN.generate(pipe))
    assert any("forecasts were not corrected" in note for note in session.report().notes) == told


def test_why_nothing_was_skipped_names_what_was_asked_for() -> None:
    speed, quality = BudgetConfig(target_speedup=1), BudgetConfig(profile="x", min_psnr=30)
    assert "ask for a target_speedup above 1" in BudgetPolicy(speed).why_idle()
    assert "ask for a lower min_psnr" in BudgetPolicy(quality).why_idle()


# --- damaged plans ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"compute": []},
        {"compute": [], "segments": []},
        {"segments": []},
        {"segments": [[1, 3, 1, 0.7]]},
        {"segments": [[1, 3, 1, 0.7], [3, 5, 2, 1.0]]},
        {"segments": [[1, 4, 1, 0.7], [3, 5, 0, 1.0]]},
    ],
)
def test_plans_whose_gaps_nothing_fills_are_refused(changes: dict[str, Any]) -> None:
    values = copy.deepcopy(BOOK)
    values["plans"][0] |= changes  # type: ignore[index]
    with pytest.raises(UnicpError, match="the plans of the profile are damaged"):
        PlanBook.from_dict(values)
