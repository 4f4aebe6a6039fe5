"""The budget: its policy, its profiles, tuning on real pipelines with tiny weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from scipy.stats import binom

import unicp
from tests.contract import plain, quietly
from tests.tiny import FAMILIES
from unicp import BudgetConfig, Profile
from unicp.errors import UnicpError
from unicp.offline import candidates, trials
from unicp.offline.replay import Player
from unicp.policies import Step
from unicp.policies.budget import BudgetPolicy, PlanBook, Priced
from unicp.policies.plans.step_plan import Segment, StepPlan, growing, untuned

WAN = FAMILIES["wan"]
PLANNED = ("wan", "wan2.2", "ltx", "cogvideox", "latte", "mochi")
"""Multistep and single-step solvers, schedulers with and without sigmas, timesteps that fall and that rise."""


def tuned(family: str = "wan", pipe: Any = None, **more: Any) -> Profile:
    chosen = FAMILIES[family]
    more = {"effort": "low", "progress": False, "target_speedup": 2.0, **more}
    profile: Profile = chosen.run(pipe or chosen.build(), lambda run, **call: unicp.tune(run, None, **call), **more)
    return profile


def interrupt(what: str, step: int, count: int) -> None:
    """As progress of a tuning: breaks it off in the middle of its real runs."""
    if "plan 2" in what:
        raise KeyboardInterrupt


def steps(count: int, leaps: bool = True) -> list[Step]:
    return [Step(index=i, count=count, position=i, sigma=1 - i / count, leaps=leaps) for i in range(count)]


# --- the policy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("speed", "compute"),
    [
        (1.0, range(50)),
        (1.42, sorted(set(range(50)) - set(range(18, 47, 2)))),  # 35 of them
        (1.5, growing(50, 33, 18, 3).compute),
        (2.0, growing(50, 25, 10, 3).compute),
        (2.5, growing(50, 20, 6, 3).compute),
        (3.0, growing(50, 16, 5, 3).compute),
        (5.0, growing(50, 10, 3, 2).compute),
    ],
)
def test_without_a_profile_the_default_plan_is_played(speed: float, compute: Sequence[int]) -> None:
    policy = BudgetPolicy(BudgetConfig(target_speedup=speed))
    done = [policy.decide(step).action for step in steps(50)]
    assert [i for i, action in enumerate(done) if action == "compute"] == list(compute)
    assert len(compute) == int(50 / speed)


def test_where_a_run_begins_with_short_steps_the_solver_leaps_at_once() -> None:
    levels = tuple(3 * left / (50 + 2 * left) for left in range(50, 0, -1))
    policy = BudgetPolicy(BudgetConfig(target_speedup=3.0))
    done = [policy.decide(dataclasses.replace(step, sigma=levels[step.index], sigmas=levels)) for step in steps(50)]
    assert [i for i, one in enumerate(done) if one.action == "compute"] == list(growing(50, 16, 1, 3).compute)
    assert (done[0].until, done[1].action) == (2, "leap")


def test_a_speed_that_a_number_of_steps_makes_exactly_is_that_number() -> None:
    assert 33 / 1.1 < 30  # as computers divide
    policy = BudgetPolicy(BudgetConfig(target_speedup=1.1))
    assert sum(policy.decide(step).action == "compute" for step in steps(33)) == 30


def computed_by(policy: BudgetPolicy, count: int, errors: dict[int, float], leaps: bool = True) -> list[int]:
    """The steps that a policy computes in a run, if its forecasts are off by so much there."""
    computed = []
    for step in steps(count, leaps):
        if policy.decide(step).action == "compute":
            computed.append(step.index)
            policy.observe(step, errors[step.index], None)
    return computed


def played(errors: dict[int, float], reserve: float, leaps: bool = False) -> list[int]:
    """The steps that are computed of a plan whose forecasts are off by 0.02, but where it is said otherwise."""
    expected = dict.fromkeys(range(40), (0.02, 0.002))
    book = PlanBook(sigmas=tuple(s.sigma for s in steps(40)), plans=(Priced(plan=PLAN, speedup=3, expected=expected),))
    policy = BudgetPolicy(BudgetConfig(target_speedup=2, override_reserve=reserve, override_zscore=3.0))
    policy.attach({}, (), book)
    return computed_by(policy, 40, {**dict.fromkeys(range(40), 0.02), **errors}, leaps)


PLAN = growing(40, 14, 4)
BAD = PLAN.compute[7]
MIDDLE = (BAD + PLAN.compute[8]) // 2
ALWAYS = dict.fromkeys(range(40), 0.5)


def test_where_forecasts_fail_the_gap_is_halved_until_the_reserve_is_spent() -> None:
    assert played({}, 0.1) == played({BAD: 0.5}, 0.0) == list(PLAN.compute)
    assert played({BAD: 0.023}, 0.1) == list(PLAN.compute)  # within three standard deviations
    assert BAD < MIDDLE < PLAN.compute[8]
    assert played({BAD: 0.5}, 0.1) == sorted({*PLAN.compute, MIDDLE})
    assert len(played(ALWAYS, 0.1)) == len(PLAN.compute) + 4
    # The solver has leapt over that gap by the time the error is known: it is the next one then.
    following = (PLAN.compute[8] + PLAN.compute[9]) // 2
    assert played({BAD: 0.5}, 0.1, leaps=True) == sorted({*PLAN.compute, following})


def test_by_default_a_quality_that_is_asked_for_has_a_reserve_and_a_speed_has_none() -> None:
    quality, speed = BudgetConfig(profile="x", min_psnr=30), BudgetConfig(target_speedup=2)
    assert (quality.reserve, speed.reserve, quality.replace(override_reserve=0).reserve) == (0.1, 0, 0)


@pytest.mark.parametrize(("error", "more"), [(0.19, 0), (0.21, 1)])
def test_without_a_profile_forecasts_fail_that_are_twice_as_bad_as_any_before(error: float, more: int) -> None:
    policy = BudgetPolicy(BudgetConfig(target_speedup=3.0, override_reserve=0.02))
    plan = untuned([1 - i / 50 for i in range(50)], 16, leaps=True)
    first = dict(zip(plan.compute, (0.02, 0.1, 0.04, 0.03, error), strict=False))
    computed = computed_by(policy, 50, {**dict.fromkeys(range(50), 0.05), **first})
    assert len(computed) == len(plan.compute) + more
    assert (plan.compute[4] + 1 not in plan.compute and set(computed) > set(plan.compute)) or not more


def test_a_target_takes_the_dearest_plan_that_is_fast_enough() -> None:
    def priced(computed: int, speed: float, psnr: float) -> Priced:
        return Priced(plan=growing(20, computed, 2), speedup=speed, psnr=(psnr, psnr - 8, *[psnr] * 12))

    book = PlanBook(sigmas=(1.0,), plans=(priced(6, 3.0, 30), priced(9, 2.1, 38), priced(10, 1.9, 41)))
    assert book.choose(BudgetConfig(target_speedup=2)).speedup == 2.1
    assert book.choose(BudgetConfig(target_speedup=1.9)).speedup == 1.9
    # Ten of twenty steps: as near as estimates are.
    assert book.choose(BudgetConfig(target_speedup=1.95)).speedup == 1.9
    assert book.choose(BudgetConfig(target_speedup=1.96)).speedup == 2.1
    assert book.choose(BudgetConfig(target_speedup=2.16)).speedup == 2.1
    assert book.choose(BudgetConfig(target_speedup=2.17)).speedup == 3.0
    whole = PlanBook(sigmas=(1.0,), plans=(priced(6, 3.3, 30), priced(7, 20 / 7, 38)))
    assert whole.choose(BudgetConfig(target_speedup=2.88)).speedup == 20 / 7
    assert whole.choose(BudgetConfig(target_speedup=2.9)).speedup == 3.3  # its steps alone do not make it
    assert book.choose(BudgetConfig(min_psnr=37)).speedup == 2.1
    assert book.choose(BudgetConfig(min_psnr=41)).speedup == 1.9
    with pytest.raises(UnicpError, match=r"target_speedup=4: the profile's fastest plan has 3.00"):
        book.choose(BudgetConfig(target_speedup=4))
    with pytest.raises(UnicpError, match=r"min_psnr=45: the profile's best plan reached 41.0 dB"):
        book.choose(BudgetConfig(min_psnr=45))


@pytest.mark.parametrize("count", [1, 4, 7, 8, 13, 14, 20, 21, 40])
def test_a_quality_counts_as_reached_if_four_of_five_prompts_surely_reach_it(count: int) -> None:
    """Of prompts a fifth of which fails, so few of those that were tried fail one time in five at most."""
    psnr = tuple(float(i) for i in range(count))
    below = Priced(plan=growing(20, 10, 2), speedup=2, psnr=psnr).safe_psnr
    assert binom.cdf(below, count, 0.2) <= 0.2 or (count < 8 and below == 0)
    assert binom.cdf(below + 1, count, 0.2) > 0.2


def test_a_book_survives_json() -> None:
    segments = (Segment(after=1, until=4, order=1, damping=0.85), Segment(after=4, until=7, order=0, damping=1.0))
    plan = StepPlan(steps=8, compute=(0, 1, 4, 7), segments=segments)
    sigmas = tuple(s.sigma for s in steps(8))
    book = PlanBook(sigmas=sigmas, plans=(Priced(plan=plan, speedup=2, psnr=(30.0,), expected={1: (0.1, 0.0)}),))
    assert PlanBook.from_dict(book.to_dict()) == book


def test_what_is_no_number_is_never_a_reason_to_forecast() -> None:
    policy = BudgetPolicy(BudgetConfig(target_speedup=2, override_reserve=0.01))
    for step in steps(30, leaps=False):
        assert policy.decide(step).action == "compute"
        policy.observe(step, None, None)
    assert "29 measurements were not finite numbers" in policy.notes()[-1]


def test_behind_what_is_no_number_no_leap_begins() -> None:
    policy = BudgetPolicy(BudgetConfig(target_speedup=3, override_reserve=0.1))
    actions = []
    for step in steps(30):
        decided = policy.decide(step)
        actions.append(decided.action)
        if decided.action == "compute":
            policy.observe(step, None, None)
    assert actions == ["compute", "compute", *["leap"] * (actions.index("compute", 2) - 2)] + ["compute"] * (
        30 - actions.index("compute", 2)
    )


# --- tuning -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("by_steps")
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in ("wan2.2", "latte") else pytest.mark.slow) for name in PLANNED]
)
def test_tuning_leaves_the_pipeline_as_it_was_and_its_plans_are_played(family: str, tmp_path: Path) -> None:
    chosen = FAMILIES[family]
    pipe = chosen.build()
    profile = tuned(family, pipe)
    assert torch.equal(chosen.generate(pipe), plain(family))
    assert "step" not in pipe.scheduler.__dict__
    path = tmp_path / "plans.safetensors"
    profile.save(path)
    book = PlanBook.from_dict(Profile.load(path).metadata["budget"])
    session = unicp.accelerate(pipe, path)
    quietly(lambda: chosen.generate(pipe))
    wanted = book.choose(BudgetConfig(target_speedup=2.0)).plan
    report = quietly(session.report)
    for denoiser in chosen.denoisers:
        mine = [r for r in report.steps if r.denoiser == denoiser and r.branch == chosen.branches[0]]
        first = mine[0].index  # a second denoiser computes its own first step
        ran = {r.index for r in mine if r.action == "compute"} - {first}
        assert ran <= set(wanted.compute) | set(range(first, first + 3))
    assert 0 < report.computed_fraction < 1


def test_unicp_acts_inside_the_steps_that_the_budget_computes() -> None:
    runs = {}
    for delta in (0.0, 5.0):
        pipe = WAN.build()
        stack = BudgetConfig(target_speedup=1.4, warmup_steps=2)
        session = unicp.accelerate(pipe, unicp.UniCPConfig(stack=stack, delta=delta, edcw="online"))
        quietly(lambda pipe=pipe: WAN.generate(pipe, steps=20))
        runs[delta] = quietly(session.report)
    skipped = [[r.index for r in report.steps if r.action == "leap"] for report in runs.values()]
    assert skipped[0] == skipped[1] != []
    assert runs[5.0].computed_fraction < runs[0.0].computed_fraction


def test_nothing_of_the_denoiser_runs_at_a_skipped_step() -> None:
    pipe = WAN.build()
    calls: list[int] = []
    pipe.transformer.patch_embedding.register_forward_hook(lambda *_: calls.append(1))
    session = unicp.accelerate(pipe, BudgetConfig(target_speedup=2, warmup_steps=2))
    WAN.generate(pipe)
    assert len(calls) == sum(r.action == "compute" for r in session.report().steps) < 20


def test_playing_a_recorded_run_back_gives_its_latents() -> None:
    pipe = WAN.build()

    def check(run: Any, **call: Any) -> None:
        player = Player(run, {"transformer": run.transformer})
        call = {**call, "generator": torch.Generator().manual_seed(0)}
        first = player.run(call, record=True)
        ran: list[int] = []
        handle = run.transformer.patch_embedding.register_forward_hook(lambda *_: ran.append(1))
        again = player.run({**call, "generator": torch.Generator().manual_seed(0)}, replay=True)
        handle.remove()
        assert torch.equal(first.latents, again.latents)
        assert not ran and 0 < again.seconds < first.seconds
        assert first.given == len(first.deciding) == 10

    WAN.run(pipe, check)
    assert torch.equal(WAN.generate(pipe), plain("wan"))


def test_an_interrupted_tuning_goes_on(tmp_path: Path) -> None:
    whole = tuned()
    checkpoint = tmp_path / "part.json"

    pipe = WAN.build()
    pipe.scheduler.register_to_config(_use_default_values=["solver_order", "beta_start"])
    with pytest.raises(KeyboardInterrupt):
        tuned(pipe=pipe, checkpoint=checkpoint, progress=interrupt)
    assert checkpoint.exists()
    assert torch.equal(WAN.generate(pipe), plain("wan"))
    again = WAN.build()  # in another process diffusers has these in another order
    again.scheduler.register_to_config(_use_default_values=["beta_start", "solver_order"])
    rest = tuned(pipe=again, checkpoint=checkpoint)
    assert not checkpoint.exists()
    plans = [[p["compute"] for p in made.metadata["budget"]["plans"]] for made in (whole, rest)]
    assert plans[0] == plans[1]
    with pytest.raises(KeyboardInterrupt):
        tuned(checkpoint=checkpoint, progress=interrupt)
    with pytest.raises(UnicpError, match="unfinished tuning of another model, prompts or arguments"):
        tuned(checkpoint=checkpoint, seed=3)


@pytest.mark.parametrize("count", [4, 12])
def test_at_each_cost_the_kind_of_plan_that_does_best_is_taken(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own = trials.Tuner._real
    runs: list[tuple[StepPlan, float]] = []

    def watched(self: Any, plan: StepPlan, index: int, show: Any) -> Any:
        found = own(self, plan, index, show)
        runs.append((plan, found[0]))
        return found

    monkeypatch.setattr(trials.Tuner, "_real", watched)
    monkeypatch.setattr(candidates, "doubt", lambda _: 0.0)  # a single prompt would keep the default plan
    book = tuned(effort="medium", steps=count).metadata
    made = {tuple(entry["compute"]) for entry in book["budget"]["plans"]}
    for speed in candidates.CHOICE_SPEEDUPS:
        tried = [(error, plan.compute) for plan, error in runs if len(plan.compute) == round(count / speed)]
        assert not tried or min(tried)[1] in made, f"{speed}: {book['chosen']}"
    assert len({plan.compute for plan, _ in runs}) > 4 or count == 4


def test_the_default_plan_loses_its_place_only_to_what_is_better_beyond_doubt() -> None:
    usual, lucky, better = [-40.0, -50.0, -45.0, -30.0], [-60.0, -50.0, -45.0, -30.0], [-41.0, -51.1, -46.0, -30.9]
    worse, default = [0.0] * 4, candidates.DEFAULT_KIND
    ranked = candidates.ranked({"lucky": lucky, default: usual, "better": better, "worse": worse})
    assert ranked == ["better", default, "lucky", "worse"]
    assert candidates.ranked({"lucky": lucky, default: usual}) == [default, "lucky"]
    assert candidates.ranked({"lucky": lucky, "better": better}) == [
        "lucky",
        "better",
    ]  # of few steps it may be missing
    assert candidates.ranked({default: [-40.0], "one prompt": [-49.0]}) == [default, "one prompt"]
    three = {default: [-40.0, -41.0, -42.0], "by two standard errors": [-45.0, -43.0, -44.5]}
    assert candidates.ranked(three) == [default, "by two standard errors"]


@pytest.mark.usefixtures("by_steps")
def test_a_target_that_no_plan_reaches_is_said_at_the_end_of_tuning_and_the_profile_is_there() -> None:
    with pytest.warns(unicp.UnicpWarning, match=r"the profile is made, but target_speedup=50: .* has \d\.\d+"):
        profile = tuned(target_speedup=50.0)
    assert PlanBook.from_dict(profile.metadata["budget"]).choose(BudgetConfig(target_speedup=2.0)).speedup >= 2


def test_what_cannot_be_tuned_is_refused(tmp_path: Path) -> None:
    pipe = WAN.build()
    pipe.scheduler = HeunDiscreteScheduler()
    with pytest.raises(UnicpError, match="HeunDiscreteScheduler does not take one step for each noise level"):
        tuned(pipe=pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(UnicpError, match="draws noise; tune needs a deterministic one"):
        tuned(pipe=pipe)
    with pytest.raises(UnicpError, match=r"there is no profile plans\.safetensors; make one with: .* unicp tune"):
        unicp.accelerate(pipe, unicp.UniCPConfig(stack=BudgetConfig(profile="plans.safetensors")))
    with pytest.raises(UnicpError, match="min_psnr needs a profile"):
        unicp.accelerate(WAN.build(), BudgetConfig(min_psnr=30))
    path = tmp_path / "plans.safetensors"
    tuned().save(path)
    with pytest.raises(UnicpError, match="made on a WanTransformer3DModel, this is a LTXVideoTransformer3DModel"):
        unicp.accelerate(FAMILIES["ltx"].build(), path)
    with pytest.raises(UnicpError, match="fastest plan"):
        unicp.accelerate(WAN.build(), BudgetConfig(profile=str(path), target_speedup=50))
