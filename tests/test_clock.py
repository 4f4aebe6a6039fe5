"""The clock: which generation, step and branch a call belongs to, from what little is said."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    UniPCMultistepScheduler,
)

from unicp.engine.clock import Clock, Tick
from unicp.errors import UnicpError

try:
    from diffusers.hooks.hooks import CacheContext
except ImportError:  # diffusers 0.40, where a context is a bare name

    def CacheContext(name: str, **said: Any) -> Any:
        return SimpleNamespace(name=name, **said)


SHAPE = (1, 4, 3, 4, 4)


class Pipe:
    """All that the clock looks at."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler


def _call(timestep: Any, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    timestep = timestep if isinstance(timestep, torch.Tensor) else torch.tensor([float(timestep)])
    return {"hidden_states": torch.zeros(shape, dtype=dtype), "timestep": timestep}


def _said(tick: Tick) -> tuple[int, str, bool, bool]:
    return tick.step.index, tick.branch, tick.new_generation, tick.new_step


def _context(name: str, index: int, sigma: float = 0.5, count: int = 10) -> CacheContext:
    return CacheContext(name, step_index=index, sigma=sigma, num_inference_steps=count)


def test_a_rising_timestep_is_falling_noise() -> None:
    """Mochi: timesteps go up. A new video begins where they go down; without ``rising``, at every step."""
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(5)
    times = scheduler.timesteps.tolist()
    assert times == sorted(times)
    for pipe in (Pipe(scheduler), None):
        ticks = [
            tick for clock in [Clock(pipe, rising=True)] for t in times * 2 for tick in [clock.tick(None, _call(t))]
        ]
        assert [tick.step.index for tick in ticks] == [0, 1, 2, 3, 4] * 2
        assert [tick.new_generation for tick in ticks] == [True, False, False, False, False] * 2
        sigmas = [tick.step.sigma for tick in ticks[:5]]
        assert sigmas == sorted(sigmas, reverse=True)
    clock = Clock(Pipe(scheduler))
    assert all(clock.tick(None, _call(t)).new_generation for t in times)


# --- branches ---------------------------------------------------------------------------------------------------------


def test_contexts_name_branches_and_steps() -> None:
    clock = Clock()
    said = [
        _said(clock.tick(_context(name, index, 1 - index / 10), _call(999 - index)))
        for index in (0, 1, 2)
        for name in ("cond", "uncond")
    ]
    assert said == [
        (0, "cond", True, True),
        (0, "uncond", False, False),
        (1, "cond", False, True),
        (1, "uncond", False, False),
        (2, "cond", False, True),
        (2, "uncond", False, False),
    ]
    assert clock.step is not None
    assert (clock.step.count, clock.step.sigma, clock.step.position) == (10, 0.8, 2)
    assert clock.branches == ["cond", "uncond"]


def test_bare_names_as_in_diffusers_0_40() -> None:
    """There, the context is the name and nothing else; steps follow from the timesteps."""
    clock = Clock()
    said = [_said(clock.tick(name, _call(t))) for t in (900, 600, 300) for name in ("cond", "uncond")]
    assert said == [
        (0, "cond", True, True),
        (0, "uncond", False, False),
        (1, "cond", False, True),
        (1, "uncond", False, False),
        (2, "cond", False, True),
        (2, "uncond", False, False),
    ]
    assert clock.step is not None
    assert clock.step.sigma == pytest.approx(0.3)
    assert clock.step.count is None


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_without_contexts_the_order_of_calls_tells(calls: int) -> None:
    clock = Clock()
    for index, t in enumerate((900, 600, 300)):
        for n in range(calls):
            tick = clock.tick(None, _call(t))
            assert _said(tick) == (index, f"call {n + 1}", index == n == 0, n == 0)


def test_any_names_in_any_number() -> None:
    clock = Clock()
    names = ["cond_uncond", "uncond_stg", "uncond_modality"]
    said = [_said(clock.tick(CacheContext(name), _call(t))) for t in (900, 600) for name in names]
    assert [branch for _, branch, _, _ in said] == names * 2
    assert [index for index, *_ in said] == [0] * 3 + [1] * 3


# --- new generations --------------------------------------------------------------------------------------------------


def _after(clock: Clock, context: Any = None) -> None:
    for t in (900, 600):
        clock.tick(context, _call(t))


@pytest.mark.parametrize("context", [None, "cond", CacheContext("cond")])
def test_noise_going_up_begins_a_generation(context: Any) -> None:
    clock = Clock()
    _after(clock, context)
    assert _said(clock.tick(context, _call(700)))[2:] == (True, True)
    assert clock.step is not None
    assert (clock.step.index, clock.step.position) == (0, 0)


def test_the_step_index_going_back_begins_a_generation() -> None:
    clock = Clock()
    for index in (0, 1, 2):
        clock.tick(_context("cond", index), _call(1))
    assert _said(clock.tick(_context("cond", 1), _call(1)))[2:] == (True, True)


@pytest.mark.parametrize(("first", "second"), [("cond", "cond"), (_context("cond", 0), _context("cond", 0))])
def test_a_branch_twice_at_a_step_begins_a_generation(first: Any, second: Any) -> None:
    """A run that broke off in its first step, and the next one."""
    clock = Clock()
    clock.tick(first, _call(900))
    assert _said(clock.tick(second, _call(900))) == (0, "cond", True, True)


@pytest.mark.parametrize("other", [{"shape": (2, 4, 3, 4, 4)}, {"shape": (1, 4, 2, 4, 4)}, {"dtype": torch.float64}])
@pytest.mark.parametrize("context", [None, _context("cond", 2)])
def test_another_input_begins_a_generation_where_nothing_tells_the_step(context: Any, other: dict[str, Any]) -> None:
    """Who says that this is the third step says that it is the same video: guidance may have been switched off."""
    clock = Clock()
    clock.tick(None if context is None else _context("cond", 0), _call(900))
    clock.tick(None if context is None else _context("cond", 1), _call(600))
    assert clock.tick(context, _call(300, **other)).new_generation == (context is None)


def test_branches_may_differ_in_shape() -> None:
    clock = Clock()
    for t in (900, 600):
        assert clock.tick("cond", _call(t)).new_generation == (t == 900)
        assert not clock.tick("uncond", _call(t, shape=(2, 4, 3, 4, 4))).new_generation


def test_new_timesteps_begin_a_generation() -> None:
    """Broken off at step 1, then begun with fewer steps, at a noise level below the last one seen."""
    pipe = Pipe(DDIMScheduler())
    clock = Clock(pipe)
    pipe.scheduler.set_timesteps(10)
    first = pipe.scheduler.timesteps
    for t in first[:2]:
        clock.tick(None, _call(t))
    pipe.scheduler.set_timesteps(3)
    tick = clock.tick(None, _call(pipe.scheduler.timesteps[0]))
    assert float(pipe.scheduler.timesteps[0]) < float(first[1])
    assert _said(tick) == (0, "call 1", True, True)
    assert tick.step.count == 3


def test_reset_begins_a_generation() -> None:
    clock = Clock()
    _after(clock)
    clock.reset()
    assert clock.step is None
    assert _said(clock.tick(None, _call(300))) == (0, "call 1", True, True)


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)])
def test_the_scheduler_tells_index_count_and_sigma(scheduler: Any) -> None:
    pipe = Pipe(scheduler)
    scheduler.set_timesteps(8)
    clock = Clock(pipe)
    ticks = [clock.tick(None, _call(t)) for t in scheduler.timesteps]
    assert [t.step.index for t in ticks] == list(range(8))
    assert {t.step.count for t in ticks} == {8}
    sigmas = getattr(scheduler, "sigmas", scheduler.timesteps / 1000)
    assert [t.step.sigma for t in ticks] == pytest.approx(sigmas[:8].tolist())
    assert [t.step.is_last(2) for t in ticks] == [False] * 6 + [True] * 2


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.mark.parametrize(
    "scheduler",
    [
        DPMSolverMultistepScheduler(timestep_spacing="trailing"),
        UniPCMultistepScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
        EulerDiscreteScheduler(),
        DPMSolverMultistepScheduler(**FLOW),
    ],
    ids=lambda scheduler: f"{type(scheduler).__name__}-{scheduler.config.prediction_type}",
)
def test_noise_levels_are_those_that_the_model_is_told(scheduler: Any) -> None:
    """Also where a solver goes by ratios of noise to signal, of up to 4,000, along which forecasts are bad."""
    pipe = Pipe(scheduler)
    scheduler.set_timesteps(8)
    clock = Clock(pipe)
    steps = [clock.tick(None, _call(t)).step for t in scheduler.timesteps]
    shares = (scheduler.timesteps / 1000).tolist()
    assert [step.sigma for step in steps] == pytest.approx(shares, abs=1e-3)
    assert steps[0].sigmas == pytest.approx(shares, abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "asked", "steps"),
    [
        (UniPCMultistepScheduler, "use_beta_sigmas", 50),
        (DPMSolverMultistepScheduler, "use_exponential_sigmas", 50),
        (DEISMultistepScheduler, "use_karras_sigmas", 150),
        (KDPM2DiscreteScheduler, "", 20),
        (HeunDiscreteScheduler, "", 20),
    ],
)
def test_noise_levels_are_equal_where_sigmas_are(kind: Any, asked: str, steps: int) -> None:
    """Timesteps are not: some schedulers round them, others put one between two visits of a level."""
    if asked == "use_beta_sigmas":
        pytest.importorskip("scipy")
    scheduler = kind(**{asked: True} if asked else {})
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas[: len(scheduler.timesteps)].tolist()
    pipe = Pipe(scheduler)
    step = Clock(pipe).tick(None, _call(scheduler.timesteps[0])).step
    assert step.sigmas is not None and step.sigmas[0] <= 1
    pairs = zip(pairwise(sigmas), pairwise(step.sigmas), strict=True)
    assert all((a > b) == (here > there) and here >= there for (a, b), (here, there) in pairs)


def test_a_scheduler_whose_configuration_is_any_object() -> None:
    scheduler = SimpleNamespace(
        sigmas=torch.tensor([1.0, 0.75, 0.0]),
        timesteps=torch.tensor([1000.0, 500.0]),
        num_inference_steps=2,
        config=SimpleNamespace(num_train_timesteps=1000),
    )
    pipe = Pipe(scheduler)
    assert Clock(pipe).tick(None, _call(scheduler.timesteps[0])).step.sigmas == (1.0, 0.75)


def test_a_run_that_begins_late() -> None:
    """Video to video starts in the middle of the timesteps; the index says where, the position counts from there."""
    pipe = Pipe(DDIMScheduler())
    pipe.scheduler.set_timesteps(10)
    clock = Clock(pipe)
    ticks = [clock.tick(None, _call(t)) for t in pipe.scheduler.timesteps[4:]]
    assert [t.step.index for t in ticks] == list(range(4, 10))
    assert [t.step.position for t in ticks] == list(range(6))


def test_a_second_order_scheduler_visits_timesteps_twice() -> None:
    pipe = Pipe(FlowMatchHeunDiscreteScheduler())
    pipe.scheduler.set_timesteps(5)
    timesteps = pipe.scheduler.timesteps
    assert len(set(timesteps.tolist())) < len(timesteps) == 9
    clock = Clock(pipe)
    ticks = [clock.tick(CacheContext("cond_uncond"), _call(t)) for t in timesteps]
    assert [t.new_generation for t in ticks] == [True] + [False] * 8
    assert [t.step.index for t in ticks] == list(range(9))


def test_a_timestep_for_every_token() -> None:
    """Wan 2.2 TI2V: tokens of the conditioning frame have timestep 0."""
    clock = Clock()
    for index, t in enumerate((900.0, 600.0)):
        timestep = torch.full((1, 12), t)
        timestep[:, :4] = 0
        for n in (1, 2):
            assert _said(clock.tick(None, _call(timestep)))[:2] == (index, f"call {n}")


@pytest.mark.parametrize("timestep", [torch.tensor(5), torch.tensor([5, 5]), 5, 5.0])
def test_timesteps_of_any_kind(timestep: Any) -> None:
    clock = Clock()
    tick = clock.tick(None, {"hidden_states": torch.zeros(SHAPE), "timestep": timestep})
    assert tick.step.sigma == pytest.approx(0.005)


def test_other_argument_names() -> None:
    clock = Clock(timestep="t", hidden="x")
    assert clock.tick(None, {"x": torch.zeros(2, 3), "t": 10}).step.sigma == pytest.approx(0.01)
    assert clock.tick(None, {"x": torch.zeros(2, 4), "t": 5}).new_generation


def test_no_timestep_at_all() -> None:
    with pytest.raises(UnicpError, match="'timestep'"):
        Clock().tick("cond", {"hidden_states": torch.zeros(SHAPE)})
    tick = Clock().tick(_context("cond", 3), {"hidden_states": torch.zeros(SHAPE)})
    assert tick.step.index == 3  # the context says all there is to know


def test_the_pipeline_is_not_kept_alive() -> None:
    pipe = Pipe(SimpleNamespace())
    clock = Clock(pipe)
    del pipe
    assert clock.scheduler() is None
