"""Which generation, denoising step and guidance branch is this call?

Four sources, best first: where the call's timestep lies in the tensor of timesteps it was taken from; the scheduler's
own step index; what the pipeline says through ``cache_context``; the order and the timesteps of the calls. Only the
last one is read from the device. What none of them tells stays unknown, and is said.
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
from .solver.response import played

LEFT_OUT = {"LTXI2VLongMultiPromptPipeline": 1}
"""Pipelines whose loop leaves out timesteps at the end, and how many."""

TRAINED = 1000.0
"""Steps of training that timesteps count, where no scheduler says."""

LONGEST_GRID = 10_000
"""Timesteps of a run are no more than this: a larger storage holds something else, too."""

WINDOWS = (
    "the denoiser is called several times at a step under the name {name!r}, and nothing tells the calls apart "
    "(context windows?): everything was computed; give each window a name of its own in cache_context"
)
FOREIGN = (
    "the timesteps of this run are not those of the pipeline's scheduler (a copy of the pipeline with one of its "
    "own?): everything was computed; accelerate the pipeline that is called"
)


@dataclass(frozen=True)
class Tick:
    """One denoiser call, placed.

    Attributes:
        unknown: why this call has to be computed: which step or window of the video it is cannot be told.
        stray: it belongs to a video that was left before another one began: nothing is known of it any more.
    """

    step: Step
    branch: str
    new_generation: bool
    new_step: bool
    unknown: str = ""
    stray: bool = False


@dataclass(frozen=True)
class Point:
    """Where a timestep lies in the tensor it was taken from: as loops do, ``t.expand(batch)`` of ``timesteps[i]``.

    Attributes:
        storage: address of that tensor's storage.
        version: its version counter, which writing in place moves; ``None`` in inference mode.
        offset: of the timestep, in elements.
        count: elements in the storage.
    """

    storage: int
    version: int | None
    offset: int
    count: int

    @classmethod
    def of(cls, timestep: Any) -> Point | None:
        """``None`` for what is a tensor of its own, or of several elements. Nothing is read from the device."""
        if not isinstance(timestep, torch.Tensor) or not timestep.numel():
            return None
        if any(stride and size > 1 for size, stride in zip(timestep.shape, timestep.stride(), strict=True)):
            return None
        try:
            storage = timestep.untyped_storage()
            count, address = storage.nbytes() // timestep.element_size(), storage.data_ptr()
        except (NotImplementedError, RuntimeError):  # a tensor without storage
            return None
        return cls(address, version_of(timestep), int(timestep.storage_offset()), count) if count > 1 else None


def version_of(tensor: Any) -> int | None:
    """The version counter of a tensor, or ``None``: inference tensors have none."""
    return None if tensor.is_inference() else int(tensor._version)


@dataclass(frozen=True)
class Grid:
    """The timesteps of a run, as its calls show them.

    Attributes:
        levels: all of them.
        point: of the call that showed them.
        held: keeps their storage from being given to another tensor.
    """

    levels: tuple[float, ...]
    point: Point
    held: Any = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.levels)

    def tolist(self) -> list[float]:
        return list(self.levels)

    def holds(self, point: Point) -> bool:
        return dataclasses.replace(point, offset=self.point.offset) == self.point

    @classmethod
    def around(cls, timestep: Any, point: Point) -> Grid | None:
        """Reads them, once a run. ``None`` if they neither fall nor rise: these are no timesteps of a run."""
        if point.count > LONGEST_GRID:
            return None
        whole = torch.empty(0, dtype=timestep.dtype, device=timestep.device)
        levels = whole.set_(timestep.untyped_storage(), 0, (point.count,), (1,)).tolist()
        ordered = levels in (sorted(levels), sorted(levels, reverse=True)) and levels[0] != levels[-1]
        return cls(tuple(map(float, levels)), point, timestep.detach()) if ordered else None


def _same_run(one: Any, other: Any) -> bool:
    """Whether two runs have the same timesteps: the very tensor, as ``set_timesteps`` makes a new one each time."""
    both = isinstance(one, Grid) and isinstance(other, Grid)
    return one is other or (both and one.holds(other.point))


class Clock:
    """Tells the time of one denoiser.

    A new generation begins when there are new timesteps, when the step index or the noise level goes back, or when a
    branch is called twice at the first step; where nothing tells the index, also when a branch is called twice at one
    step, or when the input's shape, dtype or device changes.

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
        forecasts: bool = False,
    ) -> None:
        self._pipe = weakref.ref(pipe) if pipe is not None else None
        self._timestep = timestep
        self._hidden = hidden
        self._forecasts = forecasts  # steps are to know whether the sampler draws noise
        self._weigh = weigh  # steps are to know what the solver makes of them
        self._rising = rising  # the timestep rises as the noise falls
        self.beside: Sequence[Clock] = ()
        self._left: deque[tuple[Any, int]] = deque(maxlen=4)  # timesteps of videos that were left, and where
        self.reset()

    @classmethod
    def of(cls, pipe: Any, spec: ModelSpec | None, weigh: bool = False, forecasts: bool = False) -> Clock:
        """For a denoiser with this spec."""
        if spec is None:
            return cls(pipe, weigh=weigh, forecasts=forecasts)
        return cls(pipe, spec.timestep, spec.hidden, spec.rising_timestep, weigh, forecasts)

    def reset(self) -> None:
        """Forget everything: the next call begins a generation."""
        self.step: Step | None = None
        self._leaps = self._free = self._starts = self._throughout = False  # what the solver of this run can do
        self._noise: float | None = None
        self._mean: float | None = None
        self._wave = False  # frames fall one after another: their mean tells how far the video is
        self._branches: list[str] = []
        self._signatures: dict[str, tuple[Any, ...]] = {}
        self._timesteps: Any = None  # the scheduler's, or a Grid
        self._disowned: Any = None  # the scheduler's, where they are not this run's
        self._noise_levels: list[float] | None = None
        self._run: tuple[float, ...] | None = None
        self._weights: tuple[float, ...] | None = None
        self._began = 0
        self._noisy = False
        self._unknown = ""
        self._dtype: Any = None  # of timesteps
        self._scale: tuple[bool, float] | None = None  # what share of the scheduler's timesteps calls are given
        self._turned = False  # it rises as the scheduler's falls

    @property
    def in_waves(self) -> bool:
        """Whether frames fall one after another, each with a scheduler of its own."""
        return self._wave

    @property
    def branches(self) -> list[str]:
        """Branches called so far at the current step."""
        return self._branches

    @property
    def steps_known(self) -> bool:
        """Whether the number of steps of this run is."""
        return self.step is not None and self.step.count is not None

    @property
    def follows_scheduler(self) -> bool:
        """Whether this run's timesteps are those of the pipeline's scheduler."""
        return self._timesteps is not None and self._timesteps is getattr(self.scheduler(), "timesteps", None)

    def tick(self, context: Any, call: Mapping[str, Any]) -> Tick:
        """Place a call.

        Args:
            context: diffusers' cache context: an object with ``name`` and, since diffusers 0.41, the step's
                ``step_index``, ``sigma`` and ``num_inference_steps``; a bare name before; or ``None``.
            call: the denoiser's arguments by name.
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
                    self._unknown = WINDOWS.format(name=name)
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
            if position == 0:
                self._began = next((other._began for other in self._of_this_run(self._timesteps)), index)
            sigmas = self._sigmas(scheduler)
            if sigmas is not None and index < len(sigmas) and (sigma is None or self.follows_scheduler):
                sigma = sigmas[index]
            elif sigma is None:
                sigma = self._share(scheduler, mean if self._wave else noise)
            if fresh and (self._weigh or self._forecasts):
                able = self.follows_scheduler and not self._wave
                weights, self._noisy = played(scheduler) if able else (None, False)
                self._weights = (weights or self._told(self._timesteps)) if self._weigh else None
            self.step = Step(
                index=index,
                count=count,
                position=position,
                began=self._began,
                sigma=float(sigma),
                sigmas=sigmas if count is None or sigmas is None else sigmas[:count],
                weights=self._weights,
                leaps=self._leaps,
                free=self._free,
                starts=self._starts,
                throughout=self._throughout,
                noisy=self._noisy,
            )
        assert self.step is not None
        return Tick(self.step, branch, fresh, moved, self._unknown)

    def _located(self, scheduler: Any, call: Mapping[str, Any]) -> tuple[Any, int | None]:
        """The timesteps of this call's run, the scheduler's or a :class:`Grid`, and the index among them, if told."""
        own = getattr(scheduler, "timesteps", None)
        if own is self._disowned or not isinstance(own, torch.Tensor) or own.ndim != 1 or not len(own):
            own = None
        if own is not None and getattr(scheduler, "num_inference_steps", None) is None:
            own = None  # it was never told how many
        counts = self._counts(scheduler)
        index = scheduler.step_index if own is not None and counts else None
        timestep: Any = call.get(self._name(call))
        point = Point.of(timestep)
        if own is not None and point is not None and point.storage == own.untyped_storage().data_ptr():
            place = point.offset - int(own.storage_offset())
            if 0 <= place < len(own):
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
        known = next((g for g, _ in self._left if isinstance(g, Grid) and g.holds(point)), None)
        return known or Grid.around(timestep, point)

    def _read(self, timesteps: Any) -> list[float]:
        """The noise levels of timesteps, read once a run."""
        if timesteps is self._timesteps:
            return self._levels()
        return [float(t) for t in timesteps.tolist()]

    def _is_stray(self, timesteps: Any, index: int | None) -> bool:
        """Whether a call goes on with a video that was left for the one in progress."""
        if timesteps is None or index is None or self.step is None or _same_run(timesteps, self._timesteps):
            return False
        return any(_same_run(timesteps, left) and index >= at for left, at in self._left)

    def _leave(self, timesteps: Any) -> None:
        """Another video begins: calls of this one may still come, if it is not over."""
        kept = [(left, at) for left, at in self._left if not _same_run(left, timesteps)]
        step = self.step
        going_on = step is not None and self._timesteps is not None and not step.is_last(1)
        if step is not None and going_on and not _same_run(timesteps, self._timesteps):
            kept.append((self._timesteps, step.index))
        self._left = deque(kept, maxlen=self._left.maxlen)

    def _name(self, call: Mapping[str, Any]) -> str:
        """What the timestep is called."""
        return self._timestep if self._timestep in call else next((n for n in TIMESTEPS if n in call), self._timestep)

    def _window(self, name: str, call: Mapping[str, Any]) -> str:
        """The name of a branch that is called again at a step, with the place of its window if it can be told."""
        place = window_of(call.get(self._hidden))
        return name if place is None else f"{name} at {place}"

    def _left_out(self) -> int:
        """How many timesteps at the end of the run the pipeline leaves out."""
        return LEFT_OUT.get(type(self._pipe() if self._pipe is not None else None).__name__, 0)

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
        return own is not None and any(_near(level, own * scale, self._dtype) for scale in (1.0, 1000.0))

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
        return [other for other in self.beside if timesteps is not None and _same_run(other._timesteps, timesteps)]

    def _went_back(self, now: float | None, before: float | None) -> bool:
        if now is None or before is None:
            return False
        return now < before if self._rising or self._turned else now > before

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

    def _noise_level(self, call: Mapping[str, Any]) -> tuple[float | None, float | None]:
        """The largest timestep of a call and their mean; ``None`` where the scheduler has to do without."""
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
            self._noise_levels = [] if self._timesteps is None else [float(t) for t in self._timesteps.tolist()]
        return self._noise_levels

    def _matches(self, level: float, noise: float) -> bool:
        """Whether a timestep is this one of the scheduler's, or the same share of it as those before."""
        for turned, scale in ((False, 1.0), (False, TRAINED), (True, 1.0), (True, TRAINED)):
            if self._scale in (None, (turned, scale)):
                given = TRAINED - noise * scale if turned else noise * scale
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
                # Not the scheduler of this run. Had it told when it began, nothing rests on it yet.
                self._unknown = FOREIGN if self.step is not None else ""
                self._disowned, self._timesteps, self._run = self._timesteps, None, None
        return 0 if self.step is None else self.step.index + 1

    @staticmethod
    def _counts(scheduler: Any) -> bool:
        """Whether a scheduler counts its steps."""
        return hasattr(type(scheduler), "step_index")

    def _sigmas(self, scheduler: Any) -> tuple[float, ...] | None:
        """The noise levels of the whole run, read from the scheduler once a generation."""
        if self._run is None and not self._wave and self._timesteps is not None:
            steps, sigmas = len(self._timesteps), getattr(scheduler, "sigmas", None)
            if self.follows_scheduler and sigmas is not None and len(sigmas) > steps:
                levels = [float(sigma) for sigma in torch.as_tensor(sigmas)[:steps].tolist()]
                self._run = tuple([1.0 - sigma if self._rising else sigma for sigma in levels])
            else:
                shares = max(self._levels()) <= 1.0  # already
                levels = [TRAINED * level if shares else level for level in self._levels()]
                self._run = tuple([self._share(None if shares else scheduler, level) for level in levels])
        return self._run

    def _share(self, scheduler: Any, noise: float | None) -> float:
        """The timestep as a share of all: it stands in for sigma."""
        levels = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None) or TRAINED
        sigma = (noise or 0.0) / levels
        return 1.0 - sigma if self._rising else sigma


def _near(level: float, noise: float, dtype: Any) -> bool:
    """Whether they are one timestep, as far as numbers of this type can tell."""
    floats = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    return abs(level - noise) <= max(1e-3, torch.finfo(dtype).eps if floats else 0.0) * max(1.0, abs(noise))


def window_of(hidden: Any) -> int | None:
    """Where latents lie in a larger tensor that they are a part of, in elements; ``None`` if they are none."""
    if not isinstance(hidden, torch.Tensor):
        return None
    try:
        whole = hidden.untyped_storage().nbytes() // hidden.element_size()
    except (NotImplementedError, RuntimeError):
        return None
    return int(hidden.storage_offset()) if whole > hidden.numel() else None
