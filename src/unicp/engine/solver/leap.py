"""Longer solver steps: from one computed step straight to the next.

A multistep solver can take fewer, longer steps; that is what "fewer steps" does for a whole run. Here it does so
between two steps of a run that goes on as planned elsewhere. The solver is shown the noise levels of the steps it
really takes, and its own code does the rest; at the steps in between neither the denoiser nor the solver acts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...policies.base import Decision
from ...tensors.extrapolation import levels_at
from .response import InPlace

SOLVERS = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler")
"""Their steps look at nothing but noise levels, the step's number and what they were given. Solvers of first order gain
nothing: a forecast is better than one long step of Euler's."""

STARTING = ("UniPCMultistepScheduler", "DEISMultistepScheduler")
"""Those whose long steps gain from a short one before them; DPM-Solver++ loses more than that (benchmarks/promise.py).
"""


def leaps(scheduler: Any) -> bool:
    """Whether a scheduler, its timesteps set, can take longer steps that are worth it."""
    if type(scheduler).__name__ not in SOLVERS:
        return False
    config = scheduler.config
    noisy = "sde" in str(config.get("algorithm_type", ""))
    sigmas, timesteps = scheduler.sigmas, scheduler.timesteps
    return config.get("solver_order", 1) > 1 and not noisy and len(sigmas) == len(timesteps) + 1


class Leaper:
    """Stands before a scheduler's ``step``, on the instance, for the length of one run.

    Where a run goes on after ``restore``, it stays until the last step if there was a leap: what was leapt over stays
    so, and the solver has to see its path.

    Args:
        scheduler: gives the pipeline's scheduler, if there is one.
        wanted: whether the method takes longer steps at all.

    Attributes:
        alone: the pipeline has no other denoiser, whose turn might begin within a longer step.
    """

    def __init__(self, scheduler: Callable[[], Any], wanted: bool = True) -> None:
        self._find, self._wanted = scheduler, wanted
        self.alone = False
        self._scheduler: Any = None
        self._timesteps: Any = None  # of the run; set_timesteps makes new ones for every video
        self._forget()

    def _forget(self) -> None:
        self._kind: Any = tuple  # of what ``step`` returns
        self._until = 0
        self._next = 0.0  # place of the next step that the solver takes
        self._taken: list[float] = []
        self._leapt = False
        self._told: tuple[int, tuple[float, ...]] | None = None

    def go(self, index: int, decision: Decision) -> None:
        """Where the solver is to go from a computed step."""
        self._told = None if decision.until is None else (index, (decision.until, *decision.further))

    def begin(self) -> None:
        """A run begins; its timesteps are set. Schedulers that cannot leap, or are under way, are left alone."""
        scheduler = self._find()
        if scheduler is not None and scheduler is self._scheduler and scheduler.timesteps is self._timesteps:
            return  # it is still that run
        self._leave()
        able = self.alone and self._wanted and leaps(scheduler)
        if not able or scheduler.step_index is not None:
            return
        self._scheduler, self._timesteps = scheduler, scheduler.timesteps
        self._grid = [levels.double().tolist() for levels in (scheduler.sigmas, scheduler.timesteps)]
        self._before = vars(scheduler).get("step")  # somebody else's, on the instance too
        self._own = scheduler.step
        scheduler.step = self._placed = InPlace(scheduler, self.step)
        self._signature = self._placed.__signature__

    def end(self) -> None:
        """The run is over, or goes on without us."""
        if not self._leapt:
            self._leave()

    def _leave(self) -> None:
        """The scheduler is as it was."""
        scheduler, self._scheduler = self._scheduler, None
        self._forget()
        if scheduler is not None and vars(scheduler).get("step") is self._placed:
            del scheduler.step
            if self._before is not None:
                scheduler.step = self._before

    @property
    def active(self) -> bool:
        """Whether the solver of this run can be shown longer steps."""
        return self._scheduler is not None

    @property
    def starts(self) -> bool:
        """Whether a short first step before the long ones is worth its cost."""
        return type(self._scheduler).__name__ in STARTING

    def over(self, index: int) -> bool:
        """Whether the solver has gone beyond this step already."""
        return index < self._until

    def step(self, *args: Any, **kwargs: Any) -> Any:
        scheduler = self._scheduler
        if scheduler is None or scheduler.timesteps is not self._timesteps:
            self._leave()  # another run, of which we know nothing
            return self._own(*args, **kwargs)
        if scheduler.step_index is None:  # the first step; where it is, only the solver can tell
            scheduler._init_step_index(self._signature.bind(*args, **kwargs).arguments["timestep"])
        index = scheduler.step_index
        if not self._taken:
            self._next = float(index)
        if self.over(index):
            scheduler._step_index = index + 1
            sample = self._signature.bind(*args, **kwargs).arguments["sample"]
            return (sample,) if self._kind is tuple else self._kind(prev_sample=sample)
        self._taken.append(self._next)
        steps = len(self._timesteps)
        if self._told is not None and self._told[0] == index:
            ahead, self._leapt = self._told[1], True
        else:
            ahead = tuple(map(float, range(index + 1, steps))) or (float(steps),)
        self._next = ahead[0]
        self._until = int(self._next)
        result = self._shown(ahead, args, kwargs)
        scheduler._step_index = index + 1
        self._kind = type(result)
        if scheduler.step_index >= len(self._timesteps):
            self._leave()
        return result

    def _shown(self, ahead: tuple[float, ...], args: Any, kwargs: Any) -> Any:
        """The solver's own step, with nothing before it but the steps it took, and those ahead behind it."""
        scheduler = self._scheduler
        known = scheduler.sigmas, scheduler.timesteps, scheduler.num_inference_steps, scheduler.step_index
        path = [*self._taken, *(place for place in ahead if place < len(known[1]))]
        try:
            if path != list(range(int(path[0]), len(known[1]))):
                sigmas, timesteps = (levels_at(levels, path) for levels in self._grid)
                scheduler.sigmas = torch.cat([known[0].new_tensor(sigmas), known[0][len(known[1]) :]])
                scheduler.timesteps = torch.tensor(timesteps, device=known[1].device).to(known[1].dtype)
                scheduler.num_inference_steps, scheduler._step_index = len(path), len(self._taken) - 1
            return self._own(*args, **kwargs)
        finally:
            scheduler.sigmas, scheduler.timesteps, scheduler.num_inference_steps, scheduler._step_index = known
