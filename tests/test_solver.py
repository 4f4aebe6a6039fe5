"""The weights that schedulers give to model outputs: against what is known of them, and against real runs."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from tests.tiny import FAMILIES
from unicp.engine.replay import Player
from unicp.engine.solver import Solver

SHAPE = (1, 4, 2, 3, 3)
LINEAR = {
    "flow-euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow-unipc": lambda: UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "euler": lambda: EulerDiscreteScheduler(),
    "dpm++": lambda: DPMSolverMultistepScheduler(),
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "cogvideox": lambda: CogVideoXDDIMScheduler(),
}


def run(scheduler: Any, outputs: list[torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        sample = scheduler.step(output, t, sample, return_dict=False)[0]
    return sample


def solver_of(scheduler: Any) -> Solver:
    solver = Solver(scheduler, scheduler.step)
    for t in scheduler.timesteps:
        solver.called(torch.zeros(SHAPE), t, torch.zeros(SHAPE), return_dict=False)
    return solver


@pytest.mark.parametrize("name", LINEAR)
def test_the_latents_move_by_the_weights(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scheduler = LINEAR[name]()
    scheduler.set_timesteps(9)
    weights = solver_of(scheduler).response()
    assert weights is not None
    outputs = [torch.randn(SHAPE, generator=generator) for _ in range(9)]
    moved = [torch.randn(SHAPE, generator=generator) for _ in range(9)]
    start = torch.randn(SHAPE, generator=generator)
    ends = []
    for given in (outputs, [a + b for a, b in zip(outputs, moved, strict=True)]):
        scheduler = LINEAR[name]()
        scheduler.set_timesteps(9)
        ends.append(run(scheduler, given, start))
    expected = sum(w * m for w, m in zip(weights, moved, strict=True))
    torch.testing.assert_close(ends[1] - ends[0], expected, rtol=1e-3, atol=1e-4)


def test_eulers_weights_are_the_differences_of_sigmas() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(9)
    assert solver_of(scheduler).response() == pytest.approx(scheduler.sigmas.diff().tolist(), rel=1e-5)


def test_a_sampler_that_is_not_linear_has_no_weights() -> None:
    clipping = DDIMScheduler(clip_sample=True)
    clipping.set_timesteps(9)
    assert solver_of(clipping).response() is None
    asking = CogVideoXDPMScheduler()  # it wants its own last prediction, too
    asking.set_timesteps(9)
    solver = Solver(asking, asking.step)
    for t in asking.timesteps:
        solver.called(torch.zeros(SHAPE), torch.zeros(SHAPE), t, t, torch.zeros(SHAPE), return_dict=False)
    assert solver.response() is None


def test_the_pipelines_own_run_is_not_touched() -> None:
    family = FAMILIES["wan"]

    def check(pipe: Any, **call: Any) -> None:
        takes = [
            Player(pipe, {"transformer": pipe.transformer}).run(
                {**call, "generator": torch.Generator().manual_seed(0)}, record=record
            )
            for record in (True, False)
        ]
        assert torch.equal(takes[0].latents, takes[1].latents)
        assert takes[0].weights is not None and len(takes[0].weights) == len(takes[0].sigmas) - 1
        assert takes[1].weights is None
        assert "step" not in vars(pipe.scheduler)
        pipe.scheduler.step = others = functools.partial(pipe.scheduler.step)
        again = Player(pipe, {}).run({**call, "generator": torch.Generator().manual_seed(0)})
        assert torch.equal(again.latents, takes[0].latents)
        assert pipe.scheduler.step is others

    family.run(family.build(), check)
