"""Which generation, denoising step and guidance branch is this call?

Three sources, best first: what the pipeline says through ``cache_context``; the pipeline's scheduler; the order and
the timesteps of the calls themselves.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UnicpError
from ..policies.base import Step
from ..specs import ModelSpec
from ..tensors.extrapolation import levels_at
from .solver.response import planned_response


@dataclass(frozen=True)
class Tick:
    """One denoiser call, placed."""

    step: Step
    branch: str
    new_generation: bool
    new_step: bool


class Clock:
    """Tells the time of one denoiser.

    A new generation begins when the scheduler gets new timesteps, when the step index or the noise level goes back,
    when a branch is called twice at one step, or when the input's shape, dtype or device changes.

    Where frames have timesteps of their own and fall one after another (diffusion forcing), a step is a round of the
    pipeline, and the noise level is the frames' mean.

    Attributes:
        beside: those of the pipeline's other denoisers.
    """

    def __init__(
        self,
        pipe: Any = None,
        timestep: str = "timestep",
        hidden: str = "hidden_states",
        rising: bool = False,
        weigh: bool = False,
    ) -> None:
        self._pipe = weakref.ref(pipe) if pipe is not None else None
        self._timestep = timestep
        self._hidden = hidden
        self._weigh = weigh  # steps are to know what the solver makes of them
        self._rising = rising  # the timestep rises as the noise falls
        self.beside: Sequence[Clock] = ()
        self.reset()

    @classmethod
    def of(cls, pipe: Any, spec: ModelSpec | None, weigh: bool = False) -> Clock:
        """For a denoiser with this spec."""
        if spec is None:
            return cls(pipe, weigh=weigh)
        return cls(pipe, spec.timestep, spec.hidden, spec.rising_timestep, weigh)

    def reset(self) -> None:
        """Forget everything: the next call begins a generation."""
        self.step: Step | None = None
        self._leaps = self._free = self._starts = self._throughout = False  # what the solver of this run can do
        self._noise: float | None = None
        self._mean: float | None = None
        self._wave = False  # frames fall one after another: their mean tells how far the video is
        self._branches: list[str] = []
        self._signatures: dict[str, tuple[Any, ...]] = {}
        self._timesteps: Any = None
        self._noise_levels: list[float] | None = None
        self._run: tuple[float, ...] | None = None
        self._weights: tuple[float, ...] | None = None
        self._began = 0

    @property
    def branches(self) -> list[str]:
        """Branches called so far at the current step."""
        return self._branches

    def tick(self, context: Any, call: Mapping[str, Any]) -> Tick:
        """Place a call.

        Args:
            context: diffusers' cache context: an object with ``name`` and, since diffusers 0.41, the step's
                ``step_index``, ``sigma`` and ``num_inference_steps``; a bare name before; or ``None``.
            call: the denoiser's arguments by name.
        """
        name = getattr(context, "name", context)
        index = getattr(context, "step_index", None)
        sigma = getattr(context, "sigma", None)
        count = getattr(context, "num_inference_steps", None)
        scheduler = self.scheduler()
        timesteps = getattr(scheduler, "timesteps", None)

        # The very object is compared: set_timesteps makes a new one for every video.
        fresh = self.step is None or (timesteps is not None and timesteps is not self._timesteps)
        noise = mean = None
        if index is None or sigma is None:
            noise, mean = self._noise_level(call)
        if not fresh and self.step is not None:
            if index is not None:
                moved = index != self.step.index
                fresh = index < self.step.index
            else:
                again = name in self._branches
                fell = again and noise == self._noise and mean != self._mean
                moved = noise != self._noise or fell or (again and self._comes_again(noise))
                fresh = self._went_back(noise, self._noise) or (fell and self._went_back(mean, self._mean))
                self._wave |= fell
            branch = name or self._nth(1 if moved else len(self._branches) + 1)
            fresh = fresh or (not moved and branch in self._branches)
            signature = self._signature(call)
            fresh = fresh or self._signatures.get(branch, signature) != signature
        if fresh:
            self.reset()
            self._timesteps = timesteps
            moved = True
        if moved:
            self._branches = []
        branch = name or self._nth(len(self._branches) + 1)
        self._branches.append(branch)
        self._signatures[branch] = self._signature(call)
        if moved or self.step is None:
            self._noise, self._mean = noise, mean
            if count is None and timesteps is not None:
                count = self._iterations(call, len(timesteps))
                self._wave |= count > len(timesteps)
            if index is None:
                index = self._index_of(noise)
            if sigma is None:
                sigma = self._sigma_of(scheduler, index, mean if self._wave else noise)
            if self._weigh and fresh:
                self._weights = None if self._wave else planned_response(scheduler) or self._told(timesteps)
            position = 0 if fresh or self.step is None else self.step.position + 1
            if position == 0:
                self._began = next((other._began for other in self._of_this_run(timesteps)), index)
            self.step = Step(
                index=index,
                count=count,
                position=position,
                began=self._began,
                sigma=float(sigma),
                sigmas=self._sigmas(scheduler),
                weights=self._weights,
                leaps=self._leaps,
                free=self._free,
                starts=self._starts,
                throughout=self._throughout,
            )
        return Tick(self.step, branch, fresh, moved)

    def leaps(self, free: bool, starts: bool, throughout: bool) -> Step:
        """The solver of the run that has just begun can take longer steps; see :class:`Step` for what else it can."""
        self._leaps, self._free, self._starts, self._throughout = True, free, starts, throughout
        assert self.step is not None
        self.step = dataclasses.replace(self.step, leaps=True, free=free, starts=starts, throughout=throughout)
        return self.step

    def movable(self, call: Mapping[str, Any]) -> bool:
        """Whether the denoiser can be called at other noise levels than the pipeline's, by its timestep alone.

        It takes one timestep for all tokens, and that is the scheduler's, or a fixed share of it.
        """
        timestep = call.get(self._timestep)
        if self._rising or self._wave or self._timesteps is None or getattr(timestep, "ndim", 2) > 1:
            return False
        assert self.step is not None
        level, (own, _) = self._levels()[self.step.index], self._noise_level(call)
        return any(self._same(level, own * scale) for scale in (1.0, 1000.0))

    def moved(
        self, index: int, place: float, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call's arguments with the timestep of a place of the grid in place of that of step ``index``."""
        here, there = levels_at(self._levels(), [index, place])

        def move(timestep: Any) -> Any:
            moved = timestep * (there / here)  # whatever share of the scheduler's it is
            return moved if timestep.is_floating_point() else moved.round().to(timestep.dtype)

        if self._timestep in kwargs:
            return args, {**kwargs, self._timestep: move(kwargs[self._timestep])}
        where = names.index(self._timestep)
        return (*args[:where], move(args[where]), *args[where + 1 :]), kwargs

    def sigma_at(self, place: float) -> float:
        """The noise level at a place of the grid."""
        sigmas = self._sigmas(self.scheduler())
        assert sigmas is not None
        return levels_at([*sigmas, 0.0], [place])[0]

    def _told(self, timesteps: Any) -> tuple[float, ...] | None:
        """The solver's weights, if another denoiser's clock was asked when the run began: they are told before that."""
        return next((other._weights for other in self._of_this_run(timesteps)), None)

    def _of_this_run(self, timesteps: Any) -> list[Clock]:
        """Other denoisers' clocks that were asked in this run before."""
        return [other for other in self.beside if timesteps is not None and other._timesteps is timesteps]

    def _went_back(self, now: float | None, before: float | None) -> bool:
        if now is None or before is None:
            return False
        return now < before if self._rising else now > before

    def _iterations(self, call: Mapping[str, Any], steps: int) -> int:
        """How often the pipeline goes round: more often than the scheduler has steps where frames take turns."""
        if getattr(call.get(self._timestep), "ndim", 0) < 2:
            return steps
        pipe = self._pipe() if self._pipe is not None else None
        return max(steps, getattr(pipe, "num_timesteps", None) or 0)

    @staticmethod
    def _nth(number: int) -> str:
        return f"call {number}"

    def scheduler(self) -> Any:
        """The pipeline's, if there is one."""
        pipe = self._pipe() if self._pipe is not None else None
        return getattr(pipe, "scheduler", None)

    def _signature(self, call: Mapping[str, Any]) -> tuple[Any, ...]:
        hidden = call.get(self._hidden)
        return () if hidden is None else (tuple(hidden.shape), hidden.dtype, hidden.device)

    def _noise_level(self, call: Mapping[str, Any]) -> tuple[float, float]:
        """The largest timestep of a call and their mean."""
        timestep = call.get(self._timestep)
        if timestep is None:
            raise UnicpError(
                f"the denoiser was called without a {self._timestep!r} argument, and no cache_context says which step "
                "this is; name the right argument in the model's spec"
            )
        if getattr(timestep, "ndim", 0) < 2:
            level = float(timestep.max()) if hasattr(timestep, "max") else float(timestep)
            return level, level
        # With one timestep a token, conditioning frames have 0: the largest is the step's. One transfer.
        largest, mean = torch.stack([timestep.max().float(), timestep.float().mean()]).tolist()
        return largest, mean

    def _levels_ahead(self) -> list[tuple[int, float]]:
        """The scheduler's timesteps after the current step, with their indices."""
        start = self.step.index + 1 if self.step is not None else 0
        return list(enumerate(self._levels()))[start:]

    def _levels(self) -> list[float]:
        """The scheduler's timesteps, read once a run."""
        if self._noise_levels is None:
            self._noise_levels = [] if self._timesteps is None else [float(t) for t in self._timesteps.tolist()]
        return self._noise_levels

    @staticmethod
    def _same(level: float, noise: float) -> bool:
        return abs(level - noise) <= 1e-3 * max(1.0, abs(noise))

    def _comes_again(self, noise: float | None) -> bool:
        """Whether the next step has the same timestep: second-order schedulers visit each twice."""
        ahead = self._levels_ahead()
        return bool(ahead) and noise is not None and self._same(ahead[0][1], noise)

    def _index_of(self, noise: float | None) -> int:
        if noise is not None and not self._wave:
            for index, level in self._levels_ahead():
                if self._same(level, noise):
                    return index
        return 0 if self.step is None else self.step.index + 1

    def _sigmas(self, scheduler: Any) -> tuple[float, ...] | None:
        """The noise levels of the whole run, read from the scheduler once a generation."""
        if self._run is None:
            if self._wave or self._timesteps is None:
                return None
            self._run = tuple(self._sigma_of(scheduler, index, level) for index, level in enumerate(self._levels()))
        return self._run

    def _sigma_of(self, scheduler: Any, index: int, noise: float | None) -> float:
        sigmas = getattr(scheduler, "sigmas", None)
        steps = 0 if self._wave or self._timesteps is None else len(self._timesteps)
        if sigmas is not None and len(sigmas) > steps > index:
            sigma = float(sigmas[index])
        else:  # the timestep, as a share of all, stands in for it
            levels = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None) or 1000
            sigma = (noise or 0.0) / levels
        return 1.0 - sigma if self._rising else sigma
