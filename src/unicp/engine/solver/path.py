"""How a solver is shown the noise levels of the steps it really takes: its own code does the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from inspect import BoundArguments
from typing import Any, Protocol

import torch

from ...tensors.extrapolation import levels_at


class Path(Protocol):
    """One run of a scheduler, whose timesteps are set. Calls are those of its ``step``."""

    @property
    def under_way(self) -> bool:
        """Whether the run has had steps already that were not seen here and that count."""

    def index(self, call: BoundArguments) -> int:
        """Which step of the run is to be taken."""

    def stay(self, call: BoundArguments) -> Any:
        """What ``step`` returns where the solver has gone beyond this step: the latents as they are."""

    def step(
        self, own: Callable[..., Any], call: BoundArguments, taken: Sequence[float], ahead: Sequence[float]
    ) -> Any:
        """The solver's own step.

        Args:
            own: its ``step``.
            call: what the pipeline calls it with.
            taken: places of the steps that were taken, and of this one; they count in steps of the run.
            ahead: places of those that follow; the end of the run, if there are none.
        """


class ByIndex:
    """A multistep solver: it counts its steps, and finds noise levels by their number."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._grid = [levels.double().tolist() for levels in (scheduler.sigmas, scheduler.timesteps)]
        self._kind: Any = tuple  # of what ``step`` returns

    @property
    def under_way(self) -> bool:
        return self._scheduler.step_index is not None

    def index(self, call: BoundArguments) -> int:
        if self._scheduler.step_index is None:  # the first step; where it is, only the solver can tell
            self._scheduler._init_step_index(call.arguments["timestep"])
        return int(self._scheduler.step_index)

    def stay(self, call: BoundArguments) -> Any:
        self._scheduler._step_index += 1
        sample = call.arguments["sample"]
        return (sample,) if self._kind is tuple else self._kind(prev_sample=sample)

    def step(
        self, own: Callable[..., Any], call: BoundArguments, taken: Sequence[float], ahead: Sequence[float]
    ) -> Any:
        """It is shown nothing before this step but those that it took, and those ahead behind it."""
        scheduler = self._scheduler
        known = scheduler.sigmas, scheduler.timesteps, scheduler.num_inference_steps, scheduler.step_index
        path = [*taken, *(place for place in ahead if place < len(known[1]))]
        try:
            if path != list(range(int(path[0]), len(known[1]))):
                sigmas, timesteps = (levels_at(levels, path) for levels in self._grid)
                scheduler.sigmas = torch.cat([known[0].new_tensor(sigmas), known[0][len(known[1]) :]])
                scheduler.timesteps = torch.tensor(timesteps, device=known[1].device).to(known[1].dtype)
                scheduler.num_inference_steps, scheduler._step_index = len(path), len(taken) - 1
            result = own(*call.args, **call.kwargs)
        finally:
            scheduler.sigmas, scheduler.timesteps, scheduler.num_inference_steps, scheduler._step_index = known
        scheduler._step_index = known[-1] + 1
        self._kind = type(result)
        return result


class ByTimestep:
    """A solver that is told its timestep at each step and keeps nothing: DDIM, and CogVideoX's DPM-Solver++.

    It goes ``num_train_timesteps // num_inference_steps`` timesteps on. CogVideoX's DPM-Solver++ is told the timestep
    before, too, and the clean sample it made of the output there.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        timesteps = scheduler.timesteps.tolist()
        last = timesteps[-1] - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        self._grid = [*timesteps, last]
        self._next: int | None = None
        self._kind: Any = tuple

    under_way = False  # what came before does not matter to it

    def index(self, call: BoundArguments) -> int:
        if self._next is None:
            now = float(call.arguments["timestep"])
            self._next = min(range(len(self._grid) - 1), key=lambda index: abs(self._grid[index] - now))
        return self._next

    def stay(self, call: BoundArguments) -> Any:
        assert self._next is not None
        self._next += 1
        sample, clean = call.arguments["sample"], call.arguments.get("old_pred_original_sample")
        return (sample, clean) if self._kind is tuple else self._kind(prev_sample=sample, pred_original_sample=clean)

    def step(
        self, own: Callable[..., Any], call: BoundArguments, taken: Sequence[float], ahead: Sequence[float]
    ) -> Any:
        """It is told the timesteps of this step and the one before, and a number of steps with which it goes so far."""
        assert self._next is not None
        index, scheduler, known = self._next, self._scheduler, self._scheduler.num_inference_steps
        path = [*taken[-2:], *ahead, len(self._grid) - 1][: len(taken[-2:]) + 1]
        try:
            if path[-2:] != [index, index + 1] or (len(path) > 2 and path[0] != index - 1):
                *before, here, there = [round(level) for level in levels_at(self._grid, path)]
                like = call.arguments["timestep"]
                call.arguments["timestep"] = torch.full_like(like, here) if isinstance(like, torch.Tensor) else here
                if before and call.arguments.get("timestep_back") is not None:
                    call.arguments["timestep_back"] = before[0]
                # Of whole numbers, the quotient would go as far for a few lengths of steps only.
                scheduler.num_inference_steps = Fraction(scheduler.config.num_train_timesteps, here - there)
            result = own(*call.args, **call.kwargs)
        finally:
            scheduler.num_inference_steps = known
        self._next = index + 1
        self._kind = type(result)
        return result
