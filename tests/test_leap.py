"""Longer solver steps: what a budget leaps over is what a run of fewer, longer steps would be."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import unicp
from tests.contract import quietly
from tests.tiny import FAMILIES
from unicp import BudgetConfig
from unicp.engine.solver.leap import leaps
from unicp.policies import Step
from unicp.policies.budget import BudgetPolicy, PlanBook, Priced
from unicp.policies.plans.step_plan import growing

WAN = FAMILIES["wan"]
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SOLVERS = {
    "unipc": UniPCMultistepScheduler(**FLOW),
    "unipc-3": UniPCMultistepScheduler(solver_order=3, **FLOW),
    "dpm": DPMSolverMultistepScheduler(**FLOW),
    "dpm-3": DPMSolverMultistepScheduler(solver_order=3, **FLOW),
}
NO_SIGNAL = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
ALL = BudgetConfig(target_speedup=2.0, warmup_steps=2, leap=1.0)


def wan(scheduler: Any) -> Any:
    pipe = WAN.build()
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    return pipe


def computed(session: unicp.Session) -> list[int]:
    return sorted({record.index for record in session.report().steps if record.action == "compute"})


def only(scheduler: Any, steps: list[int]) -> Any:
    """The scheduler, so that a run has none but these of its steps."""

    class Fewer(type(scheduler)):  # type: ignore[misc]
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            self.sigmas = self.sigmas[[*steps, len(self.timesteps)]]
            self.timesteps = self.timesteps[steps]
            self.num_inference_steps = len(steps)

    return Fewer.from_config(scheduler.config)


@pytest.mark.parametrize("name", SOLVERS)
def test_leaping_everywhere_is_the_run_that_has_only_the_computed_steps(name: str) -> None:
    pipe = wan(SOLVERS[name])
    with unicp.accelerate(pipe, ALL) as session:
        leapt = WAN.generate(pipe)
        steps = computed(session)
        actions = {record.action for record in session.report().steps}
    assert actions == {"compute", "leap"}
    assert 2 < len(steps) < 8
    fewer = wan(SOLVERS[name])
    fewer.scheduler = only(SOLVERS[name], steps)
    assert torch.equal(leapt, WAN.generate(fewer))


@pytest.mark.parametrize("name", SOLVERS)
def test_afterwards_the_scheduler_is_as_it_was(name: str) -> None:
    pipe = wan(SOLVERS[name])
    before = WAN.generate(pipe)
    session = unicp.accelerate(pipe, ALL)
    once, again = WAN.generate(pipe), WAN.generate(pipe)
    assert torch.equal(once, again) and not torch.equal(once, before)
    assert "step" not in vars(pipe.scheduler)
    session.restore()
    assert torch.equal(WAN.generate(pipe), before)


def test_leaping_is_for_the_beginning_and_for_long_gaps_and_forecasts_for_the_rest() -> None:
    pipe = wan(SOLVERS["unipc"])
    with unicp.accelerate(pipe, ALL.replace(leap=0.5)) as session:
        quietly(lambda: WAN.generate(pipe, steps=40))
        actions = {record.index: record.action for record in session.report().steps}
        timeline = str(session.report())
    computed = [index for index, action in actions.items() if action == "compute"]
    found = set()
    for here, there in itertools.pairwise(computed):
        early, long = there <= 20, there - here > 2
        if there > here + 1:
            found.add((early, long))
            filled = {actions[index] for index in range(here + 1, there)}
            assert filled == {"leap" if early or long else "forecast"}
    assert {(True, False), (False, True), (False, False)} <= found
    assert "-" in timeline and "leapt over" in timeline


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(solver_order=1, **FLOW),
        DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **FLOW),
    ],
    ids=["euler", "first order", "sde"],
)
def test_other_schedulers_get_forecasts(scheduler: Any) -> None:
    pipe = wan(scheduler)
    with unicp.accelerate(pipe, ALL) as session:
        WAN.generate(pipe)
        assert "step" not in vars(pipe.scheduler)
        assert "leap" not in {record.action for record in session.report().steps}


def test_two_denoisers_of_which_nobody_knows_when_the_second_takes_over_get_forecasts() -> None:
    family = FAMILIES["wan2.2"]
    pipe = family.build()
    pipe.register_to_config(boundary_ratio=None)
    with unicp.accelerate(pipe, BudgetConfig(target_speedup=2, leap=1.0)) as session:
        pipe.register_to_config(boundary_ratio=0.875)
        family.generate(pipe, steps=12)
        assert "leap" not in {record.action for record in session.report().steps}


@pytest.mark.parametrize("name", SOLVERS)
def test_from_one_denoiser_to_the_other_the_solver_leaps_as_it_would_with_one(name: str) -> None:
    """It leaps over the first step of the second one, whose output is ignored."""
    family = FAMILIES["wan2.2"]
    pipe = family.build()
    pipe.scheduler = type(SOLVERS[name]).from_config(SOLVERS[name].config)
    pipe.scheduler.set_timesteps(12)
    pipe.register_to_config(boundary_ratio=float(pipe.scheduler.timesteps[4:6].double().mean()) / 1000)
    with unicp.accelerate(pipe, BudgetConfig(target_speedup=3)) as session:
        leapt = family.generate(pipe, steps=12)
        report = session.report()
    steps = computed(session)
    assert {record.action for record in report.steps} == {"compute", "leap"}
    second = [record.index for record in report.steps if record.denoiser == "transformer_2"]
    assert min(second) == 5 and steps == [0, 3, 6, 9]
    assert report.computed_fraction == pytest.approx(4 / 12)
    pipe.scheduler = only(SOLVERS[name], steps)
    assert torch.equal(leapt, family.generate(pipe, steps=12))


def test_a_module_alone_gets_forecasts() -> None:
    pipe = wan(SOLVERS["unipc"])
    with unicp.accelerate(pipe.transformer, ALL) as session:
        WAN.generate(pipe)
        assert "leap" not in {record.action for record in session.report().steps}


@pytest.mark.parametrize(
    ("scheduler", "steps", "fewer"),
    [
        *((kind, *of) for kind in (CogVideoXDDIMScheduler, DDIMScheduler) for of in ((10, 5), (20, 8), (9, 3))),
        *((CogVideoXDPMScheduler, *of) for of in ((8, 5), (8, 4), (9, 3), (16, 4))),
    ],
)
def test_of_solvers_that_go_by_timestep_leaps_all_the_way_are_fewer_steps(
    scheduler: Any, steps: int, fewer: int
) -> None:
    """Their levels, and those between them. What draws noise draws as much of it as fewer steps do."""
    family = FAMILIES["cogvideox"]
    pipe = family.build()
    pipe.scheduler = scheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False)
    before, wanted = family.generate(pipe, steps=steps), family.generate(pipe, steps=fewer)
    with unicp.accelerate(pipe, BudgetConfig(target_speedup=steps / fewer)) as session:
        for _ in range(2):
            made = family.generate(pipe, steps=steps)
            assert session.report().computed_steps == fewer
            # Where timesteps do not divide, fewer steps go a whole number of them that misses the next one.
            assert torch.equal(made, wanted) or (steps == 9 and (made - wanted).norm() < 5e-3 * wanted.norm())
        assert "step" not in vars(pipe.scheduler) and pipe.scheduler.num_inference_steps == steps
    assert torch.equal(family.generate(pipe, steps=steps), before)


@pytest.mark.parametrize(
    ("scheduler", "more"),
    [
        *((kind, {}) for kind in (UniPCMultistepScheduler, DPMSolverMultistepScheduler, DEISMultistepScheduler)),
        *((kind, NO_SIGNAL) for kind in (UniPCMultistepScheduler, DPMSolverMultistepScheduler)),
    ],
)
def test_of_multistep_solvers_on_other_schedules_than_flow_matchings_leaps_are_fewer_steps(
    scheduler: Any, more: Any
) -> None:
    """Short starts and growing gaps lost them up to 8 dB to as many even steps (Latte)."""
    family = FAMILIES["latte"]
    pipe = family.build()
    pipe.scheduler = scheduler(timestep_spacing="trailing", **more)
    for fewer, speed in ((10, 2.0), (13, 1.5)):
        wanted = family.generate(pipe, steps=fewer)
        with unicp.accelerate(pipe, BudgetConfig(target_speedup=speed)) as session:
            made = family.generate(pipe, steps=20)
            report = session.report()
        assert report.computed_steps == fewer and {record.action for record in report.steps} == {"compute", "leap"}
        assert (made - wanted).norm() < 1e-5 * wanted.norm()
    with unicp.accelerate(pipe, BudgetConfig(target_speedup=2)) as session:
        family.generate(pipe, steps=44)
        assert {record.action for record in session.report().steps} == {"compute", "forecast"}


@pytest.mark.parametrize("speed", [1.5, 3.0])
@pytest.mark.parametrize(
    ("scheduler", "action"), [(CogVideoXDDIMScheduler, "forecast"), (CogVideoXDPMScheduler, "reuse")]
)
def test_where_ddim_computes_many_steps_it_has_forecasts_and_a_solver_that_draws_noise_repeats_outputs(
    scheduler: Any, action: str, speed: float
) -> None:
    """It draws the noise that the unaccelerated run draws: longer steps would draw other noise."""
    family = FAMILIES["cogvideox"]
    pipe = family.build()
    pipe.scheduler = scheduler()
    with unicp.accelerate(pipe, BudgetConfig(target_speedup=speed)) as session:
        family.generate(pipe, steps=45)
        assert {record.action for record in session.report().steps} == {"compute", action}
        assert any("draws noise" in note for note in session.report().notes) == (action == "reuse")


def test_a_solver_with_another_one_inside_does_not_leap() -> None:
    """The other would not be shown the longer steps."""
    pipe = wan(SOLVERS["unipc"])
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, solver_p=SOLVERS["dpm"])
    with unicp.accelerate(pipe, ALL) as session:
        WAN.generate(pipe)
        assert "leap" not in {record.action for record in session.report().steps}


class Loop:
    """DDIM on CogVideoX's transformer, in a loop of one's own: it keeps no state, so its timesteps are set once."""

    def __init__(self, steps: int = 16) -> None:
        self.pipe = FAMILIES["cogvideox"].build()
        self.scheduler = self.pipe.scheduler = CogVideoXDDIMScheduler()
        self.scheduler.set_timesteps(steps)
        config = self.pipe.transformer.config
        self.text = torch.randn(
            1, config.max_text_seq_length, config.text_embed_dim, generator=torch.Generator().manual_seed(1)
        )
        self.shape = (1, 2, config.in_channels, config.sample_height, config.sample_width)

    @torch.no_grad()
    def __call__(self, seed: int, stop: int | None = None, count: int = 1, apart: bool = False) -> Any:
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn((count, *self.shape[1:]), generator=generator)
        text = self.text.expand(count, -1, -1)
        for index, t in enumerate(self.scheduler.timesteps):
            if index == stop:
                break
            output = self.pipe.transformer(latents, text, t.expand(count), return_dict=False)[0]
            parts = list(zip(output.split(1), latents.split(1), strict=True)) if apart else [(output, latents)]
            latents = torch.cat([self.scheduler.step(a, t, b, return_dict=False)[0] for a, b in parts])
        return latents


@pytest.mark.parametrize("stop", [4, 7])
def test_a_loop_that_broke_off_and_begins_again_with_the_same_timesteps_is_as_new(stop: int) -> None:
    loop = Loop()
    before = loop(1)
    session = unicp.accelerate(loop.pipe, BudgetConfig(target_speedup=2))
    fresh = loop(1)
    assert session.report().computed_steps == 8 and "leap" in {record.action for record in session.report().steps}
    loop(2, stop=stop)
    assert torch.equal(loop(1), fresh)
    loop(2, stop=stop)
    session.restore()
    assert torch.equal(loop(1), before)
    assert "step" not in vars(loop.scheduler)


def test_a_step_that_is_taken_for_each_video_of_a_batch_is_one_step() -> None:
    loop = Loop()
    assert torch.equal(loop(1, count=2), loop(1, count=2, apart=True))
    with unicp.accelerate(loop.pipe, BudgetConfig(target_speedup=2)) as session:
        together = loop(1, count=2)
        for _ in range(2):
            assert torch.equal(loop(1, count=2, apart=True), together)
            assert session.report().computed_steps == 8
    assert "step" not in vars(loop.scheduler)


@pytest.mark.parametrize("restored", [True, False])
def test_a_run_that_breaks_off_leaves_nothing_behind(restored: bool) -> None:
    pipe = wan(SOLVERS["unipc"])
    before = WAN.generate(pipe)
    session = unicp.accelerate(pipe, ALL)
    whole = WAN.generate(pipe)

    def stop(_: Any, index: int, *__: Any) -> dict[str, Any]:
        if index == 3:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        WAN.generate(pipe, callback=stop)
    if restored:
        session.restore()
        assert torch.equal(WAN.generate(pipe), before)
        assert "step" not in vars(pipe.scheduler)
    else:
        # Another pipeline with the same scheduler, while ours has yet to hear that its run is over.
        other = wan(SOLVERS["unipc"])
        other.scheduler = pipe.scheduler
        assert torch.equal(WAN.generate(other), before)
        assert torch.equal(WAN.generate(pipe), whole)


def test_restored_while_it_leaps_a_run_computes_the_rest() -> None:
    pipe = wan(SOLVERS["unipc"])
    with unicp.accelerate(pipe, ALL) as session:
        WAN.generate(pipe)
        steps = computed(session)
    here = next(a for a, b in itertools.pairwise(steps) if b > a + 1)
    there = steps[steps.index(here) + 1]
    session = unicp.accelerate(pipe, ALL)

    def stop(_: Any, index: int, *__: Any) -> dict[str, Any]:
        if index == here:
            session.restore()
        return {}

    rest = WAN.generate(pipe, callback=stop)
    assert "step" not in vars(pipe.scheduler)
    fewer = wan(SOLVERS["unipc"])
    fewer.scheduler = only(SOLVERS["unipc"], [*range(here + 1), *range(there, 10)])
    assert torch.equal(rest, WAN.generate(fewer))


def test_a_run_under_way_is_not_made_to_leap() -> None:
    pipe = wan(SOLVERS["unipc"])
    before = WAN.generate(pipe)
    sessions: list[unicp.Session] = []

    def start(each: Any, index: int, *_: Any) -> dict[str, Any]:
        if index == 2:
            sessions.append(unicp.accelerate(each, ALL.replace(warmup_steps=1)))
        return {}

    WAN.generate(pipe, callback=start)
    assert "leap" not in {record.action for record in sessions[0].report().steps}
    sessions[0].restore()
    assert torch.equal(WAN.generate(pipe), before)


def test_a_copy_of_the_scheduler_in_the_middle_of_a_run_steps_by_itself() -> None:
    # LTX-2 copies its scheduler for the sound, diffusion forcing one for each frame.
    pipe = wan(SOLVERS["unipc"])
    copies: list[Any] = []

    def after(each: Any, index: int, *_: Any) -> dict[str, Any]:
        copies.append(copy.deepcopy(each.scheduler))
        copies.append(pickle.loads(pickle.dumps(each.scheduler)))
        return {}

    with unicp.accelerate(pipe, ALL):
        WAN.generate(pipe, callback=after)
    assert all(each.step.__self__ is each for each in copies)
    assert all(each.step.__func__ is UniPCMultistepScheduler.step for each in copies)


def test_a_step_of_somebody_elses_on_the_scheduler_stays() -> None:
    pipe = wan(SOLVERS["unipc"])
    own, called = pipe.scheduler.step, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        called.append(1)
        return own(*args, **kwargs)

    pipe.scheduler.step = watched
    with unicp.accelerate(pipe, ALL) as session:
        WAN.generate(pipe)
        assert len(called) == len(computed(session))
    assert pipe.scheduler.step is watched


def test_without_leaps_a_budget_is_as_before_and_a_run_without_skips_is_plain() -> None:
    pipe = wan(SOLVERS["unipc"])
    before = WAN.generate(pipe)
    with unicp.accelerate(pipe, ALL.replace(leap=0.0)) as session:
        WAN.generate(pipe)
        assert {record.action for record in session.report().steps} == {"compute", "forecast"}
    with unicp.accelerate(pipe, ALL.replace(target_speedup=1.0)), pytest.warns(unicp.UnicpWarning):
        assert torch.equal(WAN.generate(pipe), before)


def test_which_solvers_leap() -> None:
    for scheduler in SOLVERS.values():
        scheduler.set_timesteps(6)
        assert leaps(scheduler)
    assert not leaps(None)


@pytest.mark.parametrize(("error", "share"), [(0.02, 1.0), (0.5, 0.5), (float("nan"), 0.0)])
def test_behind_a_leap_that_raises_doubts_the_next_one_is_shorter(error: float, share: float) -> None:
    plan = growing(40, 14, 4)
    expected = {step: (0.02, 0.002) for step in plan.compute}
    sigmas = tuple(1 - index / 40 for index in range(40))
    policy = BudgetPolicy(BudgetConfig(target_speedup=2, override_reserve=0.1, leap=1.0))
    policy.attach({}, (), PlanBook(sigmas=sigmas, plans=(Priced(plan=plan, speedup=3, expected=expected),)))
    here, there, beyond = plan.compute[5:8]
    assert there > here + 2 and beyond > there + 2
    going: dict[int, float | None] = {}
    actions = []
    for index in range(beyond + 1):
        step = Step(index=index, count=40, position=index, sigma=sigmas[index], sigmas=sigmas, leaps=True)
        decided = policy.decide(step)
        actions.append(decided.action)
        going[index] = decided.until
        if decided.action == "compute":
            policy.observe(step, error if index == here else 0.02, None)
    until = there + max(1, int(share * (beyond - there)))
    assert going[here] == there and going[there] in ((until,) if share else (None,))
    end = until if share else there
    assert actions[here : end + 1] == [
        "compute" if index in (here, there, until) else "leap" for index in range(here, end + 1)
    ]
    assert share or actions[there + 1] == "forecast"


def test_where_the_solver_cannot_leap_nothing_is_leapt_over() -> None:
    policy = BudgetPolicy(BudgetConfig(target_speedup=4, leap=1.0))
    for index in range(30):
        decided = policy.decide(Step(index=index, count=30, position=index, sigma=1 - index / 30))
        assert decided.action != "leap" and decided.until is None


def test_a_step_that_the_scheduler_did_not_leap_over_is_computed() -> None:
    """Whatever stands between the denoiser and the scheduler: what it is not told, it cannot do."""
    pipe = wan(SOLVERS["unipc"])
    session = unicp.accelerate(pipe, ALL)
    session._hooked[0].leaper.go = lambda *_: None  # type: ignore[method-assign]
    WAN.generate(pipe)
    assert {record.action for record in session.report().steps} == {"compute"}


changes = st.one_of(st.floats(0, 2), st.just(float("nan")), st.none())


@settings(max_examples=100, deadline=None)
@given(st.lists(changes, min_size=30, max_size=30), st.floats(1, 5), st.floats(0, 1), st.floats(0, 1))
def test_a_budget_keeps_to_its_leaps(measured: list[Any], speedup: float, leap: float, reserve: float) -> None:
    policy = BudgetPolicy(BudgetConfig(target_speedup=speedup, leap=leap, override_reserve=reserve))
    until = 0
    for index in range(30):
        step = Step(index=index, count=30, position=index, sigma=1 - index / 30, leaps=True)
        decided = policy.decide(step)
        assert (index < until) == (decided.action == "leap")
        if decided.action == "compute":
            policy.observe(step, measured[index], None)
        if index >= until:
            until = index + 1 if decided.until is None else int(decided.until)
            assert index < until <= 30
            assert until == index + 1 or until <= leap * 30 or 20 * (until - index) > 30
            assert decided.action == "compute" or decided.until is None


def test_a_pipeline_that_steps_with_copies_of_its_scheduler_gets_forecasts_instead() -> None:
    family = FAMILIES["skyreels-forcing"]  # a copy for each frame
    pipe = family.build()
    with unicp.accelerate(pipe, unicp.BudgetConfig(target_speedup=2)) as session:
        family.generate(pipe)
        report = session.report()
    actions = [record.action for record in report.steps if record.branch == "cond"]
    assert "leap" not in actions and actions.count("compute") == 5
    assert any("copies of its scheduler" in note for note in report.notes)
    assert vars(pipe.scheduler).get("step") is None
