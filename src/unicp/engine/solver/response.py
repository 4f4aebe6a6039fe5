"""What a scheduler makes of the outputs it is given: its own weight for each of them, without running a model."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import types
from collections.abc import Callable
from typing import Any

import torch

ARGUMENTS_OF_A_STEP = ("sample", "model_output", "generator")
"""Arguments of ``step`` that are not the run's own when it is played on a few numbers."""


class InPlace:
    """What stands on a scheduler in place of its ``step``. A copy of the scheduler gets the plain one of its class.

    Args:
        scheduler: whose ``step`` it is.
        act: is called instead.
    """

    def __init__(self, scheduler: Any, act: Callable[..., Any]) -> None:
        self._scheduler, self._act = scheduler, act
        self.__signature__ = inspect.signature(_plain(scheduler))  # diffusers looks at it to decide what to pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._act(*args, **kwargs)

    def __reduce__(self) -> Any:
        return _plain, (self._scheduler,)


def _plain(scheduler: Any) -> Any:
    return types.MethodType(type(scheduler).step, scheduler)


class Solver:
    """A scheduler as it was before its first step, and what it was called with at each.

    Args:
        scheduler: with its timesteps set, nothing stepped.
        step: its own ``step``.
    """

    def __init__(self, scheduler: Any, step: Any) -> None:
        self._fresh = copy.deepcopy(scheduler)
        self._fresh.__dict__.pop("step", None)  # a watched one would be the original's
        self._signature = inspect.signature(step)
        self._calls: list[dict[str, Any]] = []
        self._shapes: list[torch.Size] = []

    def called(self, *args: Any, **kwargs: Any) -> None:
        """Remember a call of ``step``; its samples are not kept."""
        named = dict(self._signature.bind(*args, **kwargs).arguments)
        sample = named.get("sample")
        self._shapes.append(sample.shape if isinstance(sample, torch.Tensor) else torch.Size())
        self._calls.append({name: value for name, value in named.items() if name not in ARGUMENTS_OF_A_STEP})

    def response(self) -> list[float] | None:
        """How much of each output is in the latents at the end, all other outputs being as they are.

        The samplers of diffusion models are linear in what the model returns. So one run of the sampler tells it, on
        latents of as many numbers as there are steps, which start at zero and get a one at their own step.

        Returns:
            One weight a step; for Euler on flow matching the difference of neighbouring sigmas. ``None`` if the
            scheduler cannot be run so: it asks for more than the latents, or is not linear.
        """
        count = len(self._calls)
        # Two samples: ones and twos, to see whether it is linear.
        shape = (2,) + (1,) * (len(self._shapes[0]) - 2) + (count,)
        scales = torch.tensor([1.0, 2.0]).reshape(2, *(1,) * (len(shape) - 2))
        scheduler = copy.deepcopy(self._fresh)
        sample = torch.zeros(shape)
        try:
            with torch.random.fork_rng(devices=[]):  # a sampler that draws noise must not draw the run's
                for place, call in enumerate(self._calls):
                    if any(isinstance(v, torch.Tensor) and v.shape == self._shapes[0] for v in call.values()):
                        return None
                    output = torch.zeros(shape)
                    output[..., place] = scales
                    result = scheduler.step(**{**call, "model_output": output, "sample": sample})
                    sample = result[0] if isinstance(result, tuple) else result.prev_sample
            once, twice = (sample.double() / scales[..., None]).reshape(2, count)
        except Exception:  # whatever a scheduler makes of latents so small: it is not needed for this
            return None
        linear = bool(once.isfinite().all()) and torch.allclose(once, twice, rtol=1e-3, atol=1e-6)
        return [float(value) for value in once] if linear and bool((once != 0).any()) else None


def planned_response(scheduler: Any) -> tuple[float, ...] | None:
    """:meth:`Solver.response` of a run that is about to begin, called as pipelines do.

    What was found is kept: as long as nothing about the scheduler changes, it is the same at every generation.

    Returns:
        ``None`` if the scheduler wants to be called otherwise, is not linear, draws noise, or is under way.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or getattr(scheduler, "step_index", None) is not None:
        return None  # it is under way: the denoiser runs in another pipeline than this one
    bare = copy.copy(scheduler)
    bare.__dict__.pop("step", None)  # a watched one would be the original's
    state = io.BytesIO()
    try:
        _ByValue(state).dump(bare)
        return _known_response(type(bare), state.getvalue())  # type: ignore[arg-type]  # classes can be hashed
    except Exception:  # it holds something that cannot be pickled
        return _response(bare)


class _ByValue(pickle.Pickler):
    """Equal tensors are equal bytes: torch's own way has addresses in it."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return functools.partial(torch.tensor, value.tolist(), dtype=value.dtype), ()
        return NotImplemented


@functools.lru_cache(maxsize=8)
def _known_response(kind: type, state: bytes) -> tuple[float, ...] | None:
    """:func:`_response` of a scheduler of this class (a name may come to mean another one) in this state.

    All of the state counts, not the config alone: whatever is changed about a scheduler, its weights are new.
    """
    return _response(pickle.loads(state))


def _response(scheduler: Any) -> tuple[float, ...] | None:
    sample = torch.zeros(1, 1, 1, 1, 2)
    solver = Solver(scheduler, scheduler.step)
    try:
        for t in scheduler.timesteps:
            solver.called(sample, t, sample, return_dict=False)
    except TypeError:
        return None
    found = solver.response()
    return None if found is None else tuple(found)
