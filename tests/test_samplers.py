"""Samplers that draw noise at every step: what they draw is theirs, and is the same with unicp as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

import unicp
from tests.contract import case, quietly
from tests.tiny import FAMILIES

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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampler", SAMPLERS)
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
