"""Longer solver steps: from one computed step straight to the next.

A multistep solver can take fewer, longer steps; that is what a run of fewer steps does from end to end. Here it does so
between two steps of a run that otherwise goes on as planned. The solver is shown the noise levels of the steps it
really takes, and its own code does the rest. At the steps in between neither the denoiser nor the solver acts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from inspect import BoundArguments
from typing import Any, Protocol

import torch

from ...policies.base import Decision
from ...tensors import private
from ...tensors.extrapolation import levels_at
from ...tensors.host import Point, listed
from .levels import Training, diffuses
from .response import InPlace

SOLVERS = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler")
"""Schedulers whose steps look at nothing but noise levels, the step's number and the outputs they were given. Solvers
of first order are left out: a forecast is better than one long step of Euler's method."""

VARIANCE_PRESERVING = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDIMScheduler")
"""Schedulers whose steps are told their timesteps. For these a longer step differs from repeating an output: it holds
the clean sample constant, which follows from the output and the latents. CogVideoX's DPM-Solver++ draws noise at every
step, so longer steps draw other noise than the run would, as fewer steps do: they are for plans that have nothing
better (``Step.noisy``)."""

SOLVERS_WITH_A_SHORT_START = ("UniPCMultistepScheduler", "DEISMultistepScheduler")
"""Schedulers whose long steps gain from a short one before them. DPM-Solver++ loses more by it than it gains
(benchmarks/promise.py)."""

MAX_ORDER_AT_UNEVEN_DISTANCES = 2
"""Order of a multistep solver up to which it can do with long steps beside short ones. At order 3 UniPC lost up to 5 dB
to as many even ones, and never gained as much (benchmarks/promise.py)."""


def leaps(scheduler: Any) -> bool:
    """Whether a scheduler, its timesteps set, can take longer steps that are worth it."""
    config: Any = getattr(scheduler, "config", None)
    if type(scheduler).__name__ in VARIANCE_PRESERVING:
        return len(scheduler.timesteps) == scheduler.num_inference_steps  # else the list is somebody's own
    if type(scheduler).__name__ not in SOLVERS:
        return False
    if "sde" in str(config.get("algorithm_type", "")) or getattr(scheduler, "solver_p", None) is not None:
        return False  # it draws noise; another scheduler predicts for it, which would not be shown the longer steps
    return config.get("solver_order", 1) > 1 and len(scheduler.sigmas) == len(scheduler.timesteps) + 1


class Leaper:
    """Replaces a scheduler's ``step``, on the instance, for the length of one run.

    If a run with a leap goes on after ``restore``, the replacement stays until the last step: steps that were leapt
    over cannot be taken any more, and the solver has to see its path.

    Args:
        scheduler: returns the pipeline's scheduler, if there is one.
        wanted: whether the method takes longer steps at all.

    Attributes:
        allowed: whether no other denoiser's turn might begin within a longer step, unnoticed by policies.
        noisy: whether ``step`` was told to draw noise (``eta``); then no longer steps are taken, which would draw less.
    """

    def __init__(self, scheduler: Callable[[], Any], wanted: bool = True) -> None:
        self._find, self._wanted = scheduler, wanted
        self.allowed = False
        self._scheduler: Any = None
        self._timesteps: Any = None  # of the run; set_timesteps makes new ones for every video
        self._forget()

    def _forget(self) -> None:
        self._next = 0.0  # place of the next step that the solver takes
        self._taken: list[float] = []
        self._leapt = False
        self._last = -1  # index of the last step
        self._ahead: tuple[float, ...] = ()  # where the solver went from there; nowhere, if it had been beyond it
        self._left_alone = False  # the run was ended, but had leapt
        self._asked = False  # for a step of this run
        self.noisy = False
        self._told: tuple[int, tuple[float, ...]] | None = None

    def go(self, index: int, decision: Decision) -> None:
        """Note where the solver is to go from the computed step ``index``."""
        self._told = None if decision.until is None else (index, (decision.until, *decision.further))

    def begin(self, index: int) -> None:
        """Begin a run, whose timesteps are set. A scheduler that cannot leap, or is under way, is left alone.

        Args:
            index: of the step with which it begins.
        """
        scheduler = self._find()
        same = scheduler is not None and scheduler is self._scheduler and scheduler.timesteps is self._timesteps
        if same and index > self._last:
            return  # it is still that run
        self._leave()
        able = self.allowed and self._wanted and leaps(scheduler)
        if not able:
            return
        path = ByTimestep if type(scheduler).__name__ in VARIANCE_PRESERVING else ByIndex
        self._path = path(scheduler)
        if self._path.under_way:
            return
        self._scheduler, self._timesteps = scheduler, scheduler.timesteps
        self._before = vars(scheduler).get("step")  # somebody else's, on the instance too
        self._own = scheduler.step
        scheduler.step = self._placed = InPlace(scheduler, self.step)
        self._signature = self._placed.__signature__

    def end(self) -> None:
        """End the run, or let it go on without us."""
        self._left_alone = self._leapt
        if not self._leapt:
            self._leave()

    def _leave(self) -> None:
        """Put the scheduler's own ``step`` back."""
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

    def is_passed_by(self) -> bool:
        """Whether a step is over that the solver was not asked for: the pipeline takes its steps with copies of it.

        Then the solver is left alone.
        """
        passed = self.active and not self._asked
        if passed:
            self._leave()
        return passed

    @property
    def worth(self) -> dict[str, bool]:
        """Which plans of longer steps are worth it with the solver of this run; see :class:`Step`.

        A multistep solver on another schedule than flow matching's gains by them only what fewer steps would: on the
        proving ground's Latte, uneven ones lost to as many even ones.
        """
        name, config = type(self._scheduler).__name__, getattr(self._scheduler, "config", {})
        others = name in SOLVERS and diffuses(self._scheduler)
        evenly = others or int(config.get("solver_order", 2)) > MAX_ORDER_AT_UNEVEN_DISTANCES
        return {
            "starts": name in SOLVERS_WITH_A_SHORT_START and not evenly,
            "throughout": others or name in VARIANCE_PRESERVING,
            "evenly": evenly,
        }

    def over(self, index: int) -> bool:
        """Whether the solver has gone beyond this step already."""
        return index < int(self._next)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces the scheduler's ``step``."""
        scheduler = self._scheduler
        if scheduler is None or scheduler.timesteps is not self._timesteps:
            self._leave()  # another run, of which we know nothing
            return self._own(*args, **kwargs)
        self._asked = True
        call = self._signature.bind(*args, **kwargs)
        path, index = self._path, self._path.index(call)
        if index < self._last:
            self._leave()  # another run with the same timesteps
            return self._own(*args, **kwargs)
        if index > self._last:  # not the same step for another video of the batch
            self._ahead = () if self.over(index) else self._take(index, call)
            self._last = index
        result = path.step(self._own, call, self._taken, self._ahead) if self._ahead else path.stay(call)
        if index + 1 >= len(self._timesteps):
            self._leapt = False
            if self._left_alone or not path.repeats:
                self._leave()
        return result

    def _take(self, index: int, call: BoundArguments) -> tuple[float, ...]:
        """Places where the solver goes from the step of the run that was just computed."""
        self._taken.append(self._next if self._taken else float(index))
        steps = len(self._timesteps)
        self.noisy |= bool(call.arguments.get("eta"))
        if self._told is not None and self._told[0] == index and not self.noisy:
            ahead, self._leapt = self._told[1], True
        else:
            ahead = tuple(map(float, range(index + 1, steps))) or (float(steps),)
        self._next = ahead[0]
        return ahead


# --- how a solver is shown the noise levels of the steps it really takes ---------------------------------------------


class Path(Protocol):
    """One run of a scheduler whose timesteps are set. A ``call`` is one of its ``step``.

    Attributes:
        repeats: whether a step may be taken more than once, for one video after another.
    """

    repeats: bool

    @property
    def under_way(self) -> bool:
        """Whether the run has taken steps that were not seen here and that its later steps depend on."""

    def index(self, call: BoundArguments) -> int:
        """Index of the step of the run that is to be taken."""

    def stay(self, call: BoundArguments) -> Any:
        """The result of ``step`` where the solver has gone beyond this step: the latents as they are."""

    def step(
        self, own: Callable[..., Any], call: BoundArguments, taken: Sequence[float], ahead: Sequence[float]
    ) -> Any:
        """Call the solver's own ``step``, showing it the path that it really takes.

        Args:
            own: the solver's ``step``.
            call: the arguments that the pipeline passes.
            taken: places of the steps that were taken, and of this one, in steps of the run.
            ahead: places of the steps that follow; the end of the run, if there are none.
        """


class ByIndex:
    """The path of a multistep solver, which counts its steps and finds noise levels by their number."""

    repeats = False

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._grid = [[float(level) for level in listed(levels)] for levels in (scheduler.sigmas, scheduler.timesteps)]
        self._training = Training(scheduler) if diffuses(scheduler) else None
        self._kind: Any = tuple  # of what ``step`` returns

    @property
    def under_way(self) -> bool:
        return self._scheduler.step_index is not None

    def index(self, call: BoundArguments) -> int:
        if self._scheduler.step_index is None:  # the first step; where it is, only the solver can tell
            private.find_first_step(self._scheduler, call.arguments["timestep"])
        return int(self._scheduler.step_index)

    def stay(self, call: BoundArguments) -> Any:
        private.set_step(self._scheduler, self._scheduler.step_index + 1)
        sample = call.arguments["sample"]
        return (sample,) if self._kind is tuple else self._kind(prev_sample=sample)

    def step(
        self, own: Callable[..., Any], call: BoundArguments, taken: Sequence[float], ahead: Sequence[float]
    ) -> Any:
        """Show the solver only the noise levels of the steps it took and of those ahead."""
        scheduler = self._scheduler
        known = scheduler.sigmas, scheduler.timesteps, scheduler.num_inference_steps, scheduler.step_index
        count = len(known[1])  # of a tensor, which is slow to ask
        path = [*taken, *(place for place in ahead if place < count)]
        try:
            if path != list(range(int(path[0]), count)):
                sigmas, timesteps = self._levels(path)
                scheduler.sigmas = torch.cat([known[0].new_tensor(sigmas), known[0][count:]])
                scheduler.timesteps = torch.tensor(timesteps, device=known[1].device).to(known[1].dtype)
                scheduler.num_inference_steps = len(path)
                private.set_step(scheduler, len(taken) - 1)
            result = own(*call.args, **call.kwargs)
        finally:
            scheduler.sigmas, scheduler.timesteps, scheduler.num_inference_steps, index = known
            private.set_step(scheduler, index)
        private.set_step(scheduler, index + 1)
        self._kind = type(result)
        return result

    def _levels(self, path: Sequence[float]) -> tuple[list[float], list[float]]:
        """Sigmas and timesteps at places of the run's grid.

        Ratios of noise to signal between two steps are those of the timestep there, which schedulers of such schedules
        round: the model is told what the solver goes by.
        """
        sigmas, timesteps = (levels_at(levels, path) for levels in self._grid)
        if self._training is not None:
            for i, place in enumerate(path):
                if place % 1:
                    before, behind = self._grid[0][int(place) : int(place) + 2]
                    timesteps[i] = float(round(timesteps[i]))
                    sigmas[i] = min(max(self._training.ratio(timesteps[i]), behind), before)
        return sigmas, timesteps


class ByTimestep:
    """The path of a solver that is given its timestep at each step and keeps nothing: DDIM, CogVideoX's DPM-Solver++.

    Such a solver moves on by ``num_train_timesteps // num_inference_steps`` timesteps. The latter is given the timestep
    and the clean sample of the step before, too.
    """

    repeats = True

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        timesteps = listed(scheduler.timesteps)
        last = timesteps[-1] - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        self._grid = [*timesteps, last]
        self._kind: Any = tuple

    under_way = False  # what came before does not matter to it

    def index(self, call: BoundArguments) -> int:
        timestep = call.arguments["timestep"]
        point = Point.of(timestep)
        place = point.index_in(self._scheduler.timesteps) if point is not None else None
        if place is None:
            now = float(timestep)
            place = min(range(len(self._grid) - 1), key=lambda index: abs(self._grid[index] - now))
        return place

    def stay(self, call: BoundArguments) -> Any:
        sample, clean = call.arguments["sample"], call.arguments.get("old_pred_original_sample")
        return (sample, clean) if self._kind is tuple else self._kind(prev_sample=sample, pred_original_sample=clean)

    def step(
        self, own: Callable[..., Any], call: BoundArguments, taken: Sequence[float], ahead: Sequence[float]
    ) -> Any:
        """Give it the timestep of this step, and a number of steps that makes it go far enough."""
        scheduler, known = self._scheduler, self._scheduler.num_inference_steps
        path = [*taken[-2:], ahead[0]]
        *before, here, there = [round(level) for level in levels_at(self._grid, path)]
        moved: dict[str, int] = {}
        try:
            if not _is_next(*path[-2:]):
                moved["timestep"] = here
                # With a whole number of steps, the quotient would be right for a few lengths of steps only.
                scheduler.num_inference_steps = Fraction(scheduler.config.num_train_timesteps, here - there)
            if before and not _is_next(*path[:2]):
                moved["timestep_back"] = before[0]
            for name, level in moved.items():
                like = call.arguments.get(name)
                if like is not None:
                    call.arguments[name] = torch.full_like(like, level) if isinstance(like, torch.Tensor) else level
            result = own(*call.args, **call.kwargs)
        finally:
            scheduler.num_inference_steps = known
        self._kind = type(result)
        return result


def _is_next(place: float, other: float) -> bool:
    """Whether a step of the run itself goes from one place to the other."""
    return place % 1 == 0 and other == place + 1
