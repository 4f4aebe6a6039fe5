"""Computed steps at which UniCP acts inside, as an action of plans: what runs, who plays them, who offers them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import unicp
from tests.test_conditional import CONFIG, playing
from tests.tiny import FAMILIES
from unicp import AdaCacheConfig, BudgetConfig, Profile, UniCPConfig, UnicpError, cli
from unicp.cli import measuring
from unicp.offline import candidates, inspect, trials
from unicp.offline.replay import Take
from unicp.policies import Step, config_from_dict
from unicp.policies.budget import BudgetPolicy, PlanBook, Priced
from unicp.policies.plans.step_plan import StepPlan, alternating, computing, growing, halved, resampled
from unicp.profiles.identity import fingerprint
from unicp.specs import find_spec

WAN = FAMILIES["wan"]
INSIDE = UniCPConfig(delta=50.0, delta_mlp=0, fill="reuse", edcw="online", pcas=False)
"""Keeps the output of every attention module as long as it may."""
PLAN = replace(computing(10, {0, 1, 2, 4, 5, 6, 8, 9}), inside=(5, 8), inside_cost=0.5)


# --- what is computed -------------------------------------------------------------------------------------------------


def test_units_are_left_out_at_the_steps_that_the_plan_names_and_nowhere_else() -> None:
    """Bit for bit what the same is by hand, with modules of the pipeline that give what they gave before."""
    pipe = WAN.build()
    described = find_spec(pipe.transformer)
    assert described is not None
    units = [unit for unit in described.units(pipe.transformer) if "attention" in unit.kind]
    kept: dict[tuple[str, int], Any] = {}
    calls = 0
    plain = pipe.transformer.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        output = plain(*args, **kwargs)
        calls += 1
        return output

    def by_hand(name: str, forward: Any) -> Any:
        def act(*args: Any, **kwargs: Any) -> Any:
            step, branch = divmod(calls, 2)
            if step not in PLAN.inside:
                kept[name, branch] = forward(*args, **kwargs)
            return kept[name, branch]

        return act

    every = replace(growing(10, 10, 10, 0), inside=PLAN.inside, inside_cost=0.5)
    pipe.transformer.forward = counted
    for unit in units:
        unit.module.forward = by_hand(unit.name, unit.module.forward)
    wanted = WAN.generate(pipe)
    pipe = WAN.build()
    with playing(pipe, every, INSIDE.replace(stack=CONFIG)) as session:
        made = WAN.generate(pipe)
        steps = session.report().steps
    assert torch.equal(made, wanted)
    assert {record.index for record in steps if record.action == "partial"} == set(PLAN.inside)


@pytest.mark.parametrize("family", ["wan", "ltx", "hunyuan-video-1.5"])
def test_skipped_steps_are_filled_as_ever(family: str) -> None:
    chosen = FAMILIES[family]
    pipe = chosen.build()
    with playing(pipe, PLAN, INSIDE.replace(stack=CONFIG)) as session:
        chosen.generate(pipe)
        actions = {record.index: record.action for record in session.report().steps}
    assert [index for index, action in actions.items() if action == "partial"] == [5, 8]
    assert [index for index, action in actions.items() if action == "forecast"] == [3, 7]


def test_a_plan_that_names_no_such_steps_leaves_it_to_unicp() -> None:
    """What somebody stacks by hand acts inside of all computed steps, as before."""
    pipe = WAN.build()
    with playing(pipe, replace(PLAN, inside=()), INSIDE.replace(stack=CONFIG)) as session:
        WAN.generate(pipe)
        assert {record.index for record in session.report().steps if record.action == "partial"} - {*PLAN.inside}


def test_after_what_is_no_number_nothing_is_left_out() -> None:
    def whole(change: float | None) -> list[bool]:
        policy = BudgetPolicy(CONFIG.replace(override_reserve=0.1))
        policy.attach({}, (), PlanBook(sigmas=(0.0,) * 10, plans=(Priced(plan=PLAN, speedup=2.0),)))
        done = []
        for index in range(9):
            step = Step(index=index, count=10, position=index, sigma=1 - index / 10)
            done.append(policy.decide(step).whole)
            policy.observe(step, change if index == 4 else 0.1, None)
        return done

    assert [i for i, all_of_it in enumerate(whole(0.1)) if not all_of_it] == [3, 5, 7, 8]  # 3 and 7 are skipped
    assert [i for i, all_of_it in enumerate(whole(None)) if not all_of_it] == [3, 7, 8]


# --- plans ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 8), st.floats(0.1, 1.0))
def test_alternating_plans_cost_what_is_asked(steps: int, computed: int, warmup: int, share: float) -> None:
    plan = alternating(steps, computed, warmup, inside_cost=share)
    inner = [step for step in plan.compute if warmup <= step < steps - 1]
    assert plan.inside == tuple(inner[::2]) and not plan.conditional
    if len(plan.compute) < steps:
        assert plan.cost * steps == pytest.approx(max(min(computed, steps), min(steps, warmup + 1)), abs=1)


def test_such_steps_move_with_a_plan_and_outlive_its_changes() -> None:
    plan = alternating(50, 25, 3, inside_cost=0.6)
    moved = resampled(plan, np.linspace(1, 0.02, 50), np.linspace(1, 1 / 30, 30))
    assert set(moved.inside) <= set(moved.compute[1:]) and moved.inside_cost == 0.6
    assert moved.cost == pytest.approx(plan.cost, abs=0.03)
    assert halved(PLAN, 2).inside == PLAN.inside


def test_a_profile_keeps_them_and_one_that_is_damaged_is_refused() -> None:
    book = PlanBook(sigmas=(0.0,) * 10, plans=(Priced(plan=PLAN, speedup=2.0, expected={}),))
    assert PlanBook.from_dict(book.to_dict()) == book
    older = book.to_dict()
    del older["plans"][0]["inside"], older["plans"][0]["inside_cost"]
    assert PlanBook.from_dict(older).plans[0].plan == replace(PLAN, inside=(), inside_cost=1.0)
    wrong: dict[str, Any]
    for wrong in ({"inside": [0]}, {"inside": [3]}, {"inside": ["x"]}, {"inside_cost": 0}, {"conditional": [5]}):
        damaged = book.to_dict()
        damaged["plans"][0] |= wrong
        with pytest.raises(UnicpError, match="the plans of the profile are damaged"):
            PlanBook.from_dict(damaged)


# --- who plays them ---------------------------------------------------------------------------------------------------


@pytest.fixture
def calibrated(tmp_path: Path) -> Path:
    """UniCP's measurements, at another number of steps than plans are tuned at."""
    path = tmp_path / "calibrated.safetensors"
    more = {"config": INSIDE.replace(edcw="profiled", pcas=True), "progress": False}
    WAN.run(WAN.build(), lambda run, **call: unicp.calibrate(run, None, **call), steps=8, **more).save(path)
    return path


def tuned(inside: Any, pipe: Any = None, **more: Any) -> Profile:
    more = {"effort": "medium", "progress": False, "target_speedup": 1.5, "inside": inside, **more}
    profile: Profile = WAN.run(pipe or WAN.build(), lambda run, **call: unicp.tune(run, None, **call), steps=20, **more)
    return profile


@pytest.fixture
def winning(monkeypatch: pytest.MonkeyPatch, by_steps: None) -> None:
    """In ``tune`` plans with UniCP inside are the best ones, and such a step costs six tenths."""
    own = trials.Tuner._real

    def real(self: Any, plan: StepPlan, index: int, show: Any) -> Any:
        error, *more = own(self, plan, index, show)
        return (0.0 if plan.inside else error), *more

    monkeypatch.setattr(trials.Tuner, "_real", real)
    monkeypatch.setattr(trials.Tuner, "_inside_cost", lambda *_: 0.6)


@pytest.mark.usefixtures("winning")
@pytest.mark.parametrize("measured", [pytest.param(False, marks=pytest.mark.slow), True], ids=["online", "calibrated"])
def test_tune_offers_them_and_the_budget_plays_them(measured: bool, calibrated: Path, tmp_path: Path) -> None:
    profile = tuned(str(calibrated) if measured else INSIDE)
    assert any("UniCP inside" in name for name in profile.metadata["chosen"].values())
    calibrated.unlink()  # what was measured is in the profile
    assert profile.of("transformer").steps == (8 if measured else 20)
    path = tmp_path / "plans.safetensors"
    profile.save(path)
    config = BudgetConfig(profile=str(path), target_speedup=1.5, override_reserve=0.0)
    wanted = PlanBook.from_dict(profile.metadata["budget"]).choose(config).plan.inside
    pipe = WAN.build()
    plain = WAN.generate(pipe, steps=20)
    with unicp.accelerate(pipe, config) as session:
        made = WAN.generate(pipe, steps=20)
        report = session.report()
    assert session.config == config and report.method == "budget"
    partial = {record.index for record in report.steps if record.action == "partial"}
    assert partial and partial <= set(wanted)
    assert torch.equal(WAN.generate(pipe, steps=20), plain)  # restored
    assert "u UniCP inside" in inspect.text(profile)
    inside = config_from_dict(profile.metadata["inside"])
    other = inside.replace(profile=str(path) if measured else None, stack=config)
    with unicp.accelerate(pipe, other):
        assert torch.equal(WAN.generate(pipe, steps=20), made)


def test_a_target_whose_plan_has_none_leaves_the_modules_alone(tmp_path: Path) -> None:
    path = tmp_path / "plans.safetensors"
    pipe = WAN.build()
    sigmas = tuple(float(sigma) for sigma in pipe.scheduler.sigmas[:10])
    plans = (Priced(plan=PLAN, speedup=1.5, expected={}), Priced(plan=replace(PLAN, inside=()), speedup=1.2))
    about = {"class": "WanTransformer3DModel", "fingerprint": fingerprint(pipe.transformer), "sigmas": list(sigmas)}
    metadata = {
        "scheduler": type(pipe.scheduler).__name__,
        "denoisers": {"transformer": about},
        "budget": PlanBook(sigmas=sigmas, plans=plans).to_dict(),
        "inside": INSIDE.to_dict(),
    }
    Profile(config=BudgetConfig(target_speedup=1.5), metadata=metadata).save(path)
    for speed, acts in ((1.5, True), (1.1, False)):
        with unicp.accelerate(pipe, BudgetConfig(profile=str(path), target_speedup=speed)) as session:
            (hooked,) = session._hooked
            assert (hooked.parts.units is not None) == acts
    Profile(config=BudgetConfig(), metadata={**metadata, "inside": AdaCacheConfig().to_dict()}).save(path)
    with pytest.raises(UnicpError, match="is damaged: what acts inside is 'adacache'; tune again"):
        unicp.accelerate(pipe, BudgetConfig(profile=str(path), target_speedup=1.5))


# --- who offers them --------------------------------------------------------------------------------------------------


def test_what_such_a_step_costs_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole step takes 200 operations, one with UniCP inside 140; of one prompt, all is twice as long."""
    run = trials.Tuner(WAN.build(), {}, [None], {}, 0, candidates.EFFORTS["medium"], INSIDE, None)
    run.state["seconds"] = {str(i): [41.0, 2.0] for i in range(3)}
    seen: list[StepPlan] = []

    def played(plan: StepPlan, index: int, show: Any, leap: float) -> Any:
        seen.append(plan)
        costs = {step: 140 if step in plan.inside else 200 for step in plan.compute}
        costs[plan.inside[1]] = 170  # one at which less was reused
        return Take(operations={step: (2 if index == 1 else 1) * cost for step, cost in costs.items()})

    monkeypatch.setattr(run, "_run_under", played)
    assert run._inside_cost(20, lambda *_: None) == pytest.approx(0.7)
    assert run._inside_cost(20, lambda *_: None) == pytest.approx(0.7) and len(seen) == 3  # kept, to go on from
    run.state["inside"] = 1.3
    assert run._inside_cost(20, lambda *_: None) == 1.0


def test_real_runs_have_it_inside() -> None:
    pipe = WAN.build()
    call = WAN.run(pipe, lambda run, **call: call)
    run = trials.Tuner(
        pipe, {"transformer": pipe.transformer}, [None], call, 0, candidates.EFFORTS["medium"], INSIDE, None
    )
    run.state["sigmas"] = run.player.run(run.arguments(0)).sigmas
    every, began = growing(10, 10, 10, 0), time.perf_counter()
    whole, inside = (run._run_under(plan, 0, lambda *_: None) for plan in (every, replace(every, inside=PLAN.inside)))
    assert torch.equal(whole.latents, run.player.run(run.arguments(0)).latents)
    assert not torch.equal(inside.latents, whole.latents)
    assert 0 < whole.seconds < whole.ends[-1] - began and len(whole.ends) == 10


@pytest.mark.slow
def test_where_it_saves_no_time_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials.Tuner, "_inside_cost", lambda *_: 1.0)
    tried: list[StepPlan] = []
    own = trials.Tuner._run_under
    monkeypatch.setattr(trials.Tuner, "_run_under", lambda self, *a: (tried.append(a[0]), own(self, *a))[1])
    tuned(INSIDE)
    assert tried and not any(plan.inside for plan in tried)
    assert candidates.cost_in_runs(8, "medium", inside=True) > candidates.cost_in_runs(8, "medium") + 1


def test_what_cannot_act_inside_is_refused_before_any_run(calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials.Tuner, "profile", lambda *_: pytest.fail("it ran"))
    for wrong in (AdaCacheConfig(), "budget", UniCPConfig(stack=BudgetConfig())):
        with pytest.raises(UnicpError, match="inside must be a UniCPConfig without a stack"):
            tuned(wrong)
    with pytest.raises(UnicpError, match='effort="low" tries no plans with UniCP inside; take "medium"'):
        tuned(INSIDE, effort="low")
    other = FAMILIES["ltx"]
    with pytest.raises(UnicpError, match="the profile was made on a WanTransformer3DModel"):
        other.run(other.build(), lambda run, **call: unicp.tune(run, None, **call), inside=str(calibrated))


def test_an_unfinished_tuning_with_it_does_not_go_on_without(tmp_path: Path) -> None:
    whole, inside = (
        trials.Tuner(WAN.build(), {}, [None], {}, 0, candidates.EFFORTS["low"], config, tmp_path / "part")
        for config in (None, INSIDE)
    )
    whole.checkpoint.save({})
    with pytest.raises(UnicpError, match="unfinished tuning of another model, prompts or arguments"):
        inside.checkpoint.load()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--inside", "none.safetensors"], "there is no profile none.safetensors"),
        (["--inside", "adacache"], "inside must be a UniCPConfig without a stack"),
        (["--inside", "unicp", "--effort", "low"], 'effort="low" tries no plans with UniCP inside'),
    ],
)
def test_the_command_line_says_so_before_anything_is_loaded(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measuring, "load", lambda *_: pytest.fail("it loads"))
    assert cli.main(["tune", "a red ball", "-o", "plans.safetensors", *arguments]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
