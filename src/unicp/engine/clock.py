"""The clock finds out to which generation, denoising step and guidance branch a call belongs.

It has four sources, best first: where the call's timestep lies in the tensor of timesteps it was taken from; the
scheduler's own step index; what the pipeline says through ``cache_context``; the order and the timesteps of the calls.
Only the last one is read from the device. What none of them tells stays unknown, and the report says so.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UnicpError
from ..policies.base import Step
from ..specs import TIMESTEPS, ModelSpec
from ..tensors.extrapolation import levels_at
from ..tensors.host import Point, listed
from .solver.levels import noise_levels
from .solver.response import response_and_noise

LEFT_OUT = {"LTXI2VLongMultiPromptPipeline": 1}
"""Pipelines whose loop leaves out timesteps at the end, and how many they leave out."""

TRAINING_STEPS = 1000.0
"""Largest timestep where no scheduler gives the number of training steps."""

MAX_TIMESTEPS = 10_000
"""Most timesteps of a run: a storage with more elements holds something else, too."""

WINDOWS_NOTE = (
    "the denoiser is called several times at a step under the name {name!r}, and nothing tells the calls apart "
    "(context windows?): everything was computed; give each window a name of its own in cache_context"
)
LEFT_OUT_NOTE = (
    "the loop left out timesteps of this run, or another one went on where it broke off: the call after each gap was "
    "computed, and forecasts began anew; pass timesteps from a tensor of those that are taken"
)
FOREIGN_TIMESTEPS_NOTE = (
    "the timesteps of this run are not those of the pipeline's scheduler (a copy of the pipeline with one of its "
    "own?): everything was computed; accelerate the pipeline that is called"
)


@dataclass(frozen=True)
class Tick:
    """The place of one denoiser call in a run.

    Attributes:
        step: the denoising step.
        branch: the guidance branch.
        new_generation: whether the call begins a video.
        new_step: whether it is the first call of its step.
        unknown: why this call has to be computed; empty if its step and window are known.
        stray: whether it belongs to an earlier video that was interrupted by the present one; nothing is kept of it.
    """

    step: Step
    branch: str
    new_generation: bool
    new_step: bool
    unknown: str = ""
    stray: bool = False


@dataclass(frozen=True)
class Grid:
    """The timesteps of a run, found from a call's timestep.

    Attributes:
        levels: all timesteps.
        point: place of the timestep from which they were found.
        held: a tensor that keeps their storage from being reused.
    """

    levels: tuple[float, ...]
    point: Point
    held: Any = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.levels)

    def tolist(self) -> list[float]:
        return list(self.levels)

    def holds(self, point: Point) -> bool:
        """Whether a timestep at this place is one of the grid's."""
        return dataclasses.replace(point, offset=self.point.offset) == self.point

    @classmethod
    def around(cls, timestep: Any, point: Point) -> Grid | None:
        """Read the timesteps around one, once a run. ``None`` if they neither fall nor rise, as those of a run do."""
        if point.count > MAX_TIMESTEPS:
            return None
        whole = torch.empty(0, dtype=timestep.dtype, device=timestep.device)
        levels = whole.set_(timestep.untyped_storage(), 0, (point.count,), (1,)).tolist()
        ordered = levels in (sorted(levels), sorted(levels, reverse=True)) and levels[0] != levels[-1]
        return cls(tuple(map(float, levels)), point, timestep.detach()) if ordered else None


def _same_run(one: Any, other: Any) -> bool:
    """Whether two runs have the same tensor of timesteps; ``set_timesteps`` makes a new one each time."""
    both = isinstance(one, Grid) and isinstance(other, Grid)
    return one is other or (both and one.holds(other.point))


class Clock:
    """Keeps track of the generation, step and branch of one denoiser.

    A new generation begins when there are new timesteps, when the step index or the noise level goes back, or when a
    branch is called twice at the first step. Where nothing tells the index, it also begins when a branch is called
    twice at one step, or when the input's shape, dtype or device changes.

    Where frames have timesteps of their own and are denoised one after another (diffusion forcing), a step is one
    iteration of the pipeline's loop, and its noise level is the mean over the frames.

    Args:
        pipe: the pipeline, if there is one; only a weak reference is kept.
        timestep: name of the denoiser's timestep argument.
        hidden: name of its argument with the latents.
        rising: the timestep rises as the noise falls.
        weigh: steps are to hold the solver's weights.
        forecasts: steps are to say whether the sampler draws noise.

    Attributes:
        beside: the clocks of the pipeline's other denoisers.
    """

    def __init__(
        self,
        pipe: Any = None,
        timestep: str = "timestep",
        hidden: str = "hidden_states",
        rising: bool = False,
        weigh: bool = False,
        forecasts: bool = False,
    ) -> None:
        self._pipe = weakref.ref(pipe) if pipe is not None else None
        self._timestep = timestep
        self._hidden = hidden
        self._forecasts = forecasts
        self._weigh = weigh
        self._rising = rising
        self.beside: Sequence[Clock] = ()
        # Timesteps of videos that another one interrupted, and the step they had come to.
        self._unfinished: deque[tuple[Any, int]] = deque(maxlen=4)
        self.reset()

    @classmethod
    def of(cls, pipe: Any, spec: ModelSpec | None, weigh: bool = False, forecasts: bool = False) -> Clock:
        """A clock for a denoiser with this spec."""
        if spec is None:
            return cls(pipe, weigh=weigh, forecasts=forecasts)
        return cls(pipe, spec.timestep, spec.hidden, spec.rising_timestep, weigh, forecasts)

    def reset(self) -> None:
        """Forget everything: the next call begins a generation."""
        self.step: Step | None = None
        self._solver: dict[str, bool] = {}  # what the solver of this run can do, as steps have it
        self._noise: float | None = None
        self._mean: float | None = None
        self._wave = False  # frames are denoised one after another: their mean tells how far the video is
        self._branches: list[str] = []
        self._signatures: dict[str, tuple[Any, ...]] = {}
        self._timesteps: Any = None  # the scheduler's, or a Grid
        self._disowned: Any = None  # the scheduler's, where they are not this run's
        self._noise_levels: list[float] | None = None
        self._run_sigmas: tuple[float, ...] | None = None
        self._weights: tuple[float, ...] | None = None
        self._began = 0
        self._noisy = False
        self._unknown = ""
        self._dtype: Any = None  # of timesteps
        self._scale: tuple[bool, float] | None = None  # how calls' timesteps relate to the scheduler's: (turned, scale)
        self._turned = False  # calls' timesteps rise as the scheduler's fall

    @property
    def in_waves(self) -> bool:
        """Whether frames are denoised one after another, each with a scheduler of its own."""
        return self._wave

    @property
    def branches(self) -> list[str]:
        """Branches called so far at the current step."""
        return self._branches

    @property
    def steps_known(self) -> bool:
        """Whether the number of steps of this run is known."""
        return self.step is not None and self.step.count is not None

    @property
    def follows_scheduler(self) -> bool:
        """Whether this run's timesteps are those of the pipeline's scheduler."""
        return self._timesteps is not None and self._timesteps is getattr(self.scheduler(), "timesteps", None)

    def tick(self, context: Any, call: Mapping[str, Any]) -> Tick:
        """Find the place of a call.

        Args:
            context: diffusers' cache context: since diffusers 0.41 an object with ``name`` and the step's
                ``step_index``, ``sigma`` and ``num_inference_steps``; before that a bare name; or ``None``.
            call: the denoiser's arguments by name.

        Raises:
            UnicpError: the call has no timestep, and nothing else tells which step it is.
        """
        name = getattr(context, "name", context)
        told = getattr(context, "step_index", None)
        sigma = getattr(context, "sigma", None)
        count = getattr(context, "num_inference_steps", None)
        scheduler = self.scheduler()
        timesteps, index = self._located(scheduler, call)
        index = told if index is None else index
        if self._is_stray(timesteps, index):
            assert self.step is not None
            return Tick(self.step, name or self._nth(1), False, False, stray=True)

        fresh = self.step is None or not _same_run(timesteps, self._timesteps)
        noise = mean = None
        if index is None or (timesteps is None and sigma is None):
            noise, mean = self._noise_level(call)
        again = name in self._branches
        if not fresh and self.step is not None:
            if index is not None:
                moved = index != self.step.index
                # At its second step a run may turn out to have begun elsewhere than its first timestep seemed to say.
                late = moved and self.step.position == 0 and self._noise is not None and index > self.step.index + 1
                fresh = index < self.step.index or (late and not self.beside)
            else:
                fell = again and noise == self._noise and mean != self._mean
                moved = noise != self._noise or fell or (again and self._comes_again(noise))
                fresh = self._went_back(noise, self._noise) or (fell and self._went_back(mean, self._mean))
                self._wave |= fell
                signature = self._signature(call)
                branch = name or self._nth(1 if moved else len(self._branches) + 1)
                fresh = fresh or (not moved and again)
                fresh = fresh or self._signatures.get(branch, signature) != signature
            if not moved and again and not fresh:
                name = self._window(name, call)
                if name in self._branches and self.step.position == 0:
                    fresh = True
                elif name in self._branches:
                    self._unknown = WINDOWS_NOTE.format(name=name)
        unknown = ""
        if fresh:
            self._leave(timesteps)
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
            if index is None:
                index = self._index_of(noise, scheduler)
            if timesteps is not None and self._timesteps is not None:
                count = self._iterations(call, len(timesteps))
                self._wave |= count > len(timesteps)
                count -= self._left_out()
            elif self._timesteps is None and timesteps is not None:
                count = None
            position = 0 if fresh or self.step is None else self.step.position + 1
            if position > 0 and not self._wave and index > self._reached() + 1:
                unknown = LEFT_OUT_NOTE
            if position == 0:
                self._began = next((other._began for other in self._of_this_run(self._timesteps)), index)
            sigmas = self._sigmas(scheduler)
            if sigmas is not None and index < len(sigmas) and (sigma is None or self.follows_scheduler):
                sigma = sigmas[index]
            elif sigma is None:
                sigma = self._share(scheduler, mean if self._wave else noise)
            if fresh and (self._weigh or self._forecasts):
                able = self.follows_scheduler and not self._wave
                weights, self._noisy = response_and_noise(scheduler) if able else (None, False)
                self._weights = (weights or self._shared_weights(self._timesteps)) if self._weigh else None
            self.step = Step(
                index=index,
                count=count,
                position=position,
                began=self._began,
                sigma=float(sigma),
                sigmas=sigmas if count is None or sigmas is None else sigmas[:count],
                weights=self._weights,
                noisy=self._noisy,
                switch=self._switch(),
                **self._solver,
            )
        assert self.step is not None
        return Tick(self.step, branch, fresh, moved, self._unknown or unknown)

    def _switch(self) -> int | None:
        """The first step of the pipeline's second denoiser, if it has two."""
        if not self.beside or not self.follows_scheduler:
            return None
        share = takeover(self._pipe() if self._pipe is not None else None)
        if share is None:
            return None
        boundary = share * (getattr(self.scheduler().config, "num_train_timesteps", None) or TRAINING_STEPS)
        # At the first step it takes over from nobody.
        return next((index for index, level in enumerate(self._levels()) if level < boundary), 0) or None

    def _reached(self) -> int:
        """Index of the last step of this run that was called here or on another denoiser of the pipeline."""
        steps = [clock.step for clock in (self, *self._of_this_run(self._timesteps))]
        return max(step.index for step in steps if step is not None)

    def _located(self, scheduler: Any, call: Mapping[str, Any]) -> tuple[Any, int | None]:
        """The timesteps of this call's run, the scheduler's or a :class:`Grid`, and the call's index, if known."""
        own = getattr(scheduler, "timesteps", None)
        if own is self._disowned or not isinstance(own, torch.Tensor) or own.ndim != 1 or not len(own):
            own = None
        if own is not None and getattr(scheduler, "num_inference_steps", None) is None:
            own = None  # it was never told how many
        counts = self._counts(scheduler)
        index = scheduler.step_index if own is not None and counts else None
        timestep: Any = call.get(self._name(call))
        point = Point.of(timestep)
        place = point.index_in(own) if own is not None and point is not None else None
        if place is not None:
            return own, place
        if own is not None and index is not None and index >= len(own):
            own = index = None  # its run is over: it is another one's turn
        grid = self._grid(timestep, point) if point is not None else None
        if grid is not None and point is not None:
            begin = getattr(scheduler, "begin_index", None)
            place = next((i for i in (index, begin) if i is not None), point.offset)
            level = grid.levels[point.offset]
            if own is None or place >= len(own) or not _near(self._read(own)[place], level, timestep.dtype):
                return grid, point.offset
            return own, place
        first = self.step is None or (self.step.position == 0 and own is self._timesteps)
        if own is not None and index is None and counts and first:  # it has not stepped yet
            index = scheduler.begin_index if hasattr(type(scheduler), "begin_index") else None
        return own, index

    def _grid(self, timestep: Any, point: Point) -> Grid | None:
        """The timesteps around a call's, read once."""
        if isinstance(self._timesteps, Grid) and self._timesteps.holds(point):
            return self._timesteps
        known = next((g for g, _ in self._unfinished if isinstance(g, Grid) and g.holds(point)), None)
        return known or Grid.around(timestep, point)

    def _read(self, timesteps: Any) -> list[float]:
        """The noise levels of timesteps, read once a run."""
        if timesteps is self._timesteps:
            return self._levels()
        return [float(t) for t in listed(timesteps)]

    def _is_stray(self, timesteps: Any, index: int | None) -> bool:
        """Whether a call continues a video that was interrupted by the one in progress."""
        if timesteps is None or index is None or self.step is None or _same_run(timesteps, self._timesteps):
            return False
        return any(_same_run(timesteps, left) and index >= at for left, at in self._unfinished)

    def _leave(self, timesteps: Any) -> None:
        """Remember the video in progress, if it is not over, as another one begins: its calls may still come."""
        kept = [(left, at) for left, at in self._unfinished if not _same_run(left, timesteps)]
        step = self.step
        going_on = step is not None and self._timesteps is not None and not step.is_last(1)
        if step is not None and going_on and not _same_run(timesteps, self._timesteps):
            kept.append((self._timesteps, step.index))
        self._unfinished = deque(kept, maxlen=self._unfinished.maxlen)

    def _name(self, call: Mapping[str, Any]) -> str:
        """Name of the timestep argument in this call."""
        return self._timestep if self._timestep in call else next((n for n in TIMESTEPS if n in call), self._timestep)

    def _window(self, name: str, call: Mapping[str, Any]) -> str:
        """The name of a branch that is called again at a step, with the place of its window if that is known."""
        place = window_of(call.get(self._hidden))
        return name if place is None else f"{name} at {place}"

    def _left_out(self) -> int:
        """Number of timesteps at the end of the run that the pipeline leaves out."""
        return LEFT_OUT.get(type(self._pipe() if self._pipe is not None else None).__name__, 0)

    def allow_leaps(self, **solver: bool) -> Step:
        """Note that the solver of the run that has just begun can take longer steps; returns the step that says so.

        Args:
            **solver: what else it can do, and what is worth it; see :class:`Step`.
        """
        self._solver = {"leaps": True, **solver}
        assert self.step is not None
        self.step = dataclasses.replace(self.step, **self._solver)  # type: ignore[arg-type]
        return self.step

    def forbid_leaps(self) -> Step:
        """Note that the solver cannot take longer steps after all; returns the step that says so."""
        assert self.step is not None
        self.step = dataclasses.replace(self.step, **dict.fromkeys(self._solver, False))  # type: ignore[arg-type]
        self._solver = {}
        return self.step

    def can_move_timestep(self, call: Mapping[str, Any]) -> bool:
        """Whether the denoiser can be called at other noise levels than the pipeline's by changing its timestep alone.

        That is so if it takes one timestep for all tokens, equal to the scheduler's or to a fixed share of it.
        """
        timestep = call.get(self._timestep)
        if self._rising or self._wave or self._timesteps is None or getattr(timestep, "ndim", 2) > 1:
            return False
        assert self.step is not None
        point = Point.of(timestep)
        if point is not None and self.follows_scheduler and point.index_in(self._timesteps) == self.step.index:
            return True  # it is the scheduler's own
        level, (own, _) = self._levels()[self.step.index], self._noise_level(call)
        return own is not None and any(_near(level, own * scale, self._dtype) for scale in (1.0, 1000.0))

    def move_timestep(
        self, index: int, place: float, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call's arguments with the timestep changed from that of step ``index`` to that of another place.

        Args:
            index: step of the call.
            place: on the run's grid, in steps; may lie between two steps.
            names: of the denoiser's arguments, in order.
            args, kwargs: arguments of the call.
        """
        here, there = levels_at(self._levels(), [index, place])

        def move(timestep: Any) -> Any:
            moved = timestep * (there / here)  # right for any fixed share of the scheduler's timestep
            return moved if timestep.is_floating_point() else moved.round().to(timestep.dtype)

        if self._timestep in kwargs:
            return args, {**kwargs, self._timestep: move(kwargs[self._timestep])}
        where = names.index(self._timestep)
        return (*args[:where], move(args[where]), *args[where + 1 :]), kwargs

    def _shared_weights(self, timesteps: Any) -> tuple[float, ...] | None:
        """The solver's weights as another denoiser's clock found them; they can only be found before the first step."""
        return next((other._weights for other in self._of_this_run(timesteps)), None)

    def _of_this_run(self, timesteps: Any) -> list[Clock]:
        """Clocks of other denoisers that were called earlier in this run."""
        return [other for other in self.beside if timesteps is not None and _same_run(other._timesteps, timesteps)]

    def _went_back(self, now: float | None, before: float | None) -> bool:
        if now is None or before is None:
            return False
        return now < before if self._rising or self._turned else now > before

    def _iterations(self, call: Mapping[str, Any], steps: int) -> int:
        """Iterations of the pipeline's loop: more than the scheduler's steps where frames are denoised by turns."""
        if getattr(call.get(self._timestep), "ndim", 0) < 2:
            return steps
        pipe = self._pipe() if self._pipe is not None else None
        return max(steps, getattr(pipe, "num_timesteps", None) or 0)

    @staticmethod
    def _nth(number: int) -> str:
        return f"call {number}"

    def scheduler(self) -> Any:
        """The pipeline's scheduler, if there is one."""
        pipe = self._pipe() if self._pipe is not None else None
        return getattr(pipe, "scheduler", None)

    def _signature(self, call: Mapping[str, Any]) -> tuple[Any, ...]:
        hidden = call.get(self._hidden)
        return () if hidden is None else (tuple(hidden.shape), hidden.dtype, hidden.device)

    def _noise_level(self, call: Mapping[str, Any]) -> tuple[float | None, float | None]:
        """The largest and the mean timestep of a call; ``None`` if it has none and the scheduler counts its steps."""
        timestep = call.get(self._name(call))
        if timestep is None:
            if self._counts(self.scheduler()):
                return None, None
            raise UnicpError(
                f"the denoiser was called without a {self._timestep!r} argument, and no cache_context says which step "
                "this is; name the right argument in the model's spec"
            )
        self._dtype = getattr(timestep, "dtype", None)
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
            self._noise_levels = [] if self._timesteps is None else [float(t) for t in listed(self._timesteps)]
        return self._noise_levels

    def _matches(self, level: float, noise: float) -> bool:
        """Whether a timestep equals this one of the scheduler's, or the share of it that earlier calls were given."""
        for turned, scale in ((False, 1.0), (False, TRAINING_STEPS), (True, 1.0), (True, TRAINING_STEPS)):
            if self._scale in (None, (turned, scale)):
                given = TRAINING_STEPS - noise * scale if turned else noise * scale
                if _near(level, given, self._dtype):
                    self._scale, self._turned = (turned, scale), turned
                    return True
        return False

    def _comes_again(self, noise: float | None) -> bool:
        """Whether the next step has the same timestep: second-order schedulers visit each twice."""
        ahead = self._levels_ahead()
        return bool(ahead) and noise is not None and not self._wave and self._matches(ahead[0][1], noise)

    def _index_of(self, noise: float | None, scheduler: Any) -> int:
        if noise is not None and not self._wave and self._timesteps is not None:
            for index, level in self._levels_ahead():
                if self._matches(level, noise):
                    return index
            if self.step is not None or not self._counts(scheduler):
                # Not the scheduler of this run. At the first step nothing rests on it yet, so there is nothing to say.
                self._unknown = FOREIGN_TIMESTEPS_NOTE if self.step is not None else ""
                self._disowned, self._timesteps, self._run_sigmas = self._timesteps, None, None
        return 0 if self.step is None else self.step.index + 1

    @staticmethod
    def _counts(scheduler: Any) -> bool:
        """Whether a scheduler counts its steps."""
        return hasattr(type(scheduler), "step_index")

    def _sigmas(self, scheduler: Any) -> tuple[float, ...] | None:
        """The noise levels of the whole run, read from the scheduler once a generation."""
        if self._run_sigmas is None and not self._wave and self._timesteps is not None:
            steps, sigmas = len(self._timesteps), getattr(scheduler, "sigmas", None)
            if self.follows_scheduler and sigmas is not None and len(sigmas) > steps:
                levels = noise_levels(scheduler, [float(sigma) for sigma in listed(torch.as_tensor(sigmas))[:steps]])
                self._run_sigmas = tuple([1.0 - sigma if self._rising else sigma for sigma in levels])
            else:
                shares = max(self._levels()) <= 1.0  # timesteps are shares already
                levels = [TRAINING_STEPS * level if shares else level for level in self._levels()]
                self._run_sigmas = tuple([self._share(None if shares else scheduler, level) for level in levels])
        return self._run_sigmas

    def _share(self, scheduler: Any, noise: float | None) -> float:
        """The timestep as a share of the training steps, 0 to 1; it stands in for sigma."""
        levels = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None) or TRAINING_STEPS
        sigma = (noise or 0.0) / levels
        return 1.0 - sigma if self._rising else sigma


def _near(level: float, noise: float, dtype: Any) -> bool:
    """Whether two timesteps are equal, up to the precision of this dtype."""
    floats = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    return abs(level - noise) <= max(1e-3, torch.finfo(dtype).eps if floats else 0.0) * max(1.0, abs(noise))


def takeover(pipe: Any) -> float | None:
    """The timestep below which a pipeline's second denoiser takes over, as a share of all; ``None`` if none does.

    Pipelines of Wan 2.2 have it in their configuration.
    """
    share = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
    return float(share) if isinstance(share, (int, float)) else None


def window_of(hidden: Any) -> int | None:
    """Offset in elements of latents within a larger tensor; ``None`` if they are not a part of one."""
    if not isinstance(hidden, torch.Tensor):
        return None
    try:
        whole = hidden.untyped_storage().nbytes() // hidden.element_size()
    except (NotImplementedError, RuntimeError):
        return None
    return int(hidden.storage_offset()) if whole > hidden.numel() else None
