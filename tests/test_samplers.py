"""Samplers that draw noise at every step: what they draw is theirs, and is the same with unicp as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)

import unicp
from tests.contract import case, covering, quietly
from tests.tiny import FAMILIES
from unicp.engine.solver.response import draws_noise

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SAMPLERS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "ancestral": ("latte", EulerAncestralDiscreteScheduler(), {}),
    "sde": ("latte", DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), {}),
    "eta": ("latte", DDIMScheduler(), {"eta": 1.0}),
    # Wan hands its scheduler no generator: the noise is torch's own.
    "flow-sde": ("wan", DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **FLOW), {}),
    "flow-stochastic": ("wan", FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), {}),
}
NAMES = ("adacache-residual", "adacache-forecast", "schedule-linear", "budget-default", "unicp-online", "unicp-switch")


@pytest.mark.parametrize(("sampler", "name"), covering(SAMPLERS, NAMES))
def test_the_noise_of_a_sampler_is_not_touched(sampler: str, name: str, tmp_path: Path) -> None:
    family, scheduler, more = SAMPLERS[sampler]
    chosen = FAMILIES[family]
    pipe = chosen.build()
    pipe.scheduler = type(scheduler).from_config(scheduler.config)

    def run() -> tuple[torch.Tensor, list[bytes]]:
        """Latents, and the states of both sources of noise after each step."""
        states: list[bytes] = []
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)

        def after(*_: Any) -> dict[str, Any]:
            states.append(generator.get_state().numpy().tobytes() + torch.get_rng_state().numpy().tobytes())
            return {}

        latents: torch.Tensor = chosen.run(
            pipe,
            lambda each, **call: each(**call, **more).frames,
            generator=generator,
            callback_on_step_end=after,
        )
        return latents, states

    config = case(name).config
    if case(name).profiled:  # a profile is one of its scheduler too
        profile = chosen.run(
            pipe,
            lambda each, **call: unicp.calibrate(each, None, config=config, progress=False, **call),
        )
        profile.save(tmp_path / "profile.safetensors")
        config = config.replace(profile=str(tmp_path / "profile.safetensors"))
    plain, drawn = run()
    assert len(set(drawn)) >= 9  # noise is drawn at each step, or each but the last
    session = unicp.accelerate(pipe, config)
    latents, same = run()
    assert same == drawn
    assert not torch.equal(latents, plain)
    report = session.report()
    assert report.count == 10
    assert {r.action for r in report.steps} & {"reuse", "forecast", "partial"}
    again, _ = run()
    assert torch.equal(again, latents)
    unicp.accelerate(pipe, case(name).always_compute)
    everything, same = quietly(run)
    assert same == drawn
    assert torch.equal(everything, plain)


PLAYED = {
    "ancestral": (EulerAncestralDiscreteScheduler(), True),
    "lcm": (LCMScheduler(), True),
    "sde": (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), True),
    "flow-stochastic": (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), True),
    "sa-solver": (SASolverScheduler(), True),  # at timesteps from 200 to 800 only
    "cogvideox-dpm": (CogVideoXDPMScheduler(), True),  # its step has arguments of its own
    "flow": (FlowMatchEulerDiscreteScheduler(), False),
    "unipc": (UniPCMultistepScheduler(**FLOW), False),
    "ddim": (DDIMScheduler(), False),
}


@pytest.mark.parametrize(("scheduler", "draws"), PLAYED.values(), ids=PLAYED)
def test_a_sampler_that_draws_noise_is_known_without_drawing_the_runs(scheduler: Any, draws: bool) -> None:
    scheduler.set_timesteps(8)
    before = torch.get_rng_state()
    assert draws_noise(scheduler) == draws
    assert torch.equal(torch.get_rng_state(), before) and getattr(scheduler, "step_index", None) is None


@pytest.mark.parametrize("name", ["schedule-linear", "adacache-forecast", "budget-default"])
@pytest.mark.parametrize("sampler", ["ancestral", "flow-sde"])
def test_where_noise_is_drawn_outputs_are_repeated(sampler: str, name: str) -> None:
    family, scheduler, _ = SAMPLERS[sampler]
    pipe = FAMILIES[family].build()
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    session = unicp.accelerate(pipe, case(name).config)
    quietly(lambda: FAMILIES[family].generate(pipe))
    report = session.report()
    assert {r.action for r in report.steps} == {"compute", "reuse"}
    assert any("draws noise" in note for note in report.notes)


def test_noise_that_only_the_call_asks_for_is_not_leapt_over() -> None:
    """DDIM draws noise where a pipeline is called with ``eta``; the scheduler itself does not say so."""
    family = FAMILIES["latte"]

    def run(pipe: Any) -> bytes:
        generator = torch.Generator().manual_seed(0)
        family.run(pipe, lambda each, **call: each(**call, eta=1.0).frames, generator=generator, steps=20)
        return generator.get_state().numpy().tobytes()

    drawn, pipe = run(family.build()), family.build()
    session = unicp.accelerate(pipe, unicp.BudgetConfig(target_speedup=2))
    assert run(pipe) == drawn
    report = session.report()
    assert {r.action for r in report.steps} == {"compute", "reuse"} and report.computed_steps == 10
    assert any("draws noise" in note for note in report.notes)
    family.generate(pipe, steps=20)
    assert "leap" in {r.action for r in session.report().steps}, "the next run draws none"


def test_leaps_say_what_latents_in_mid_run_are() -> None:
    family = FAMILIES["wan"]
    pipe = family.build()
    for leap in (0.6, 0.0):
        session = unicp.accelerate(pipe, unicp.BudgetConfig(target_speedup=2, leap=leap))
        quietly(lambda: family.generate(pipe, steps=20))
        said = [note for note in session.report().notes if "longer steps" in note]
        assert len(said) == (leap > 0) == any(r.action == "leap" for r in session.report().steps)
