"""The weights that schedulers give to model outputs: against what is known of them, and against real runs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
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
from unicp.engine.solver.response import Solver, _known_response, planned_response
from unicp.offline.replay import Player

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
        assert "step" not in vars(pipe.scheduler)
        pipe.scheduler.step = others = functools.partial(pipe.scheduler.step)
        again = Player(pipe, {}).run({**call, "generator": torch.Generator().manual_seed(0)})
        assert torch.equal(again.latents, takes[0].latents)
        assert pipe.scheduler.step is others

    family.run(family.build(), check)


def other_sigmas(scheduler: Any) -> None:
    scheduler.sigmas = scheduler.sigmas**2


class Halved(UniPCMultistepScheduler):
    """Of the same config and state as its parent."""

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        return super().step(model_output / 2, timestep, sample, return_dict)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda scheduler: None,
    "steps": lambda scheduler: scheduler.set_timesteps(7),
    "timesteps": lambda scheduler: scheduler.set_timesteps(sigmas=np.linspace(0.9, 0.1, 9)),
    "sigmas": other_sigmas,
    "config": lambda scheduler: scheduler.register_to_config(solver_order=1),
    "attribute": lambda scheduler: setattr(scheduler, "disable_corrector", list(range(9))),
    "shift": lambda scheduler: unipc(flow_shift=5.0),
    "order": lambda scheduler: unipc(solver_order=3),
    "class": lambda scheduler: unipc(Halved),
    "scheduler": lambda scheduler: FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def unipc(kind: Any = UniPCMultistepScheduler, **config: Any) -> Any:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return kind(**{**flow, **config})


@pytest.mark.parametrize("change", CHANGES)
def test_weights_are_kept_for_the_same_sampler_only(change: str) -> None:
    """Whatever is changed about a scheduler, what was known before is not its weights."""
    before = unipc()
    before.set_timesteps(9)
    known = planned_response(before)
    asked = _known_response.cache_info().misses
    scheduler = unipc()
    scheduler.set_timesteps(9)
    if (another := CHANGES[change](scheduler)) is not None:
        scheduler = another
        scheduler.set_timesteps(9)
    found = planned_response(scheduler)
    assert found == pytest.approx(solver_of(scheduler).response(), rel=1e-6)
    assert (found == known) == (change == "nothing")
    assert (_known_response.cache_info().misses == asked) == (change == "nothing")


def test_a_class_that_is_defined_anew_is_another_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook whose cell is run again."""
    found = []
    for factor in (1, 2):

        def step(self: Any, model_output: Any, timestep: Any, sample: Any, return_dict: bool, by: int = factor) -> Any:
            return UniPCMultistepScheduler.step(self, model_output * by, timestep, sample, return_dict)

        kind = type("Again", (UniPCMultistepScheduler,), {"step": step, "__module__": __name__})
        monkeypatch.setattr(sys.modules[__name__], "Again", kind, raising=False)
        scheduler = unipc(kind)
        scheduler.set_timesteps(9)
        found.append(planned_response(scheduler))
    assert found[0] is not None
    assert found[1] == pytest.approx([2 * weight for weight in found[0]], rel=1e-5)


def test_a_scheduler_that_cannot_be_pickled_has_weights_too() -> None:
    scheduler = unipc()
    scheduler.set_timesteps(9)
    known = planned_response(scheduler)
    scheduler.told = lambda: None
    assert known is not None
    assert planned_response(scheduler) == known
