"""The weight that a scheduler gives to each output in the final latents, found without running a model."""

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

from ...tensors.host import listed

ARGUMENTS_OF_A_STEP = ("sample", "model_output", "generator")
"""Arguments of ``step`` that are replaced when a run is simulated on a few numbers."""


class InPlace:
    """Replaces the ``step`` of a scheduler instance. A copy of the scheduler gets the plain ``step`` of its class.

    Args:
        scheduler: the scheduler whose ``step`` it replaces.
        act: called instead.
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
    """A copy of a scheduler from before its first step, and the arguments of its calls.

    Args:
        scheduler: its timesteps are set, and no step was taken.
        step: its own ``step``.
    """

    def __init__(self, scheduler: Any, step: Any) -> None:
        self._fresh = copy.deepcopy(scheduler)
        self._fresh.__dict__.pop("step", None)  # a replaced one would act on the original
        self._signature = inspect.signature(step)
        self._calls: list[dict[str, Any]] = []
        self._shapes: list[torch.Size] = []

    def called(self, *args: Any, **kwargs: Any) -> None:
        """Remember the arguments of a call of ``step``, except its samples."""
        named = dict(self._signature.bind(*args, **kwargs).arguments)
        sample = named.get("sample")
        self._shapes.append(sample.shape if isinstance(sample, torch.Tensor) else torch.Size())
        self._calls.append({name: value for name, value in named.items() if name not in ARGUMENTS_OF_A_STEP})

    def response(self) -> list[float] | None:
        """The weight of each output in the final latents.

        The samplers of diffusion models are linear in what the model returns. So one run of the sampler yields all
        weights: its latents are as many numbers as there are steps, they start at zero, and at each step the output is
        one for that step's own number.

        Returns:
            One weight per step; for Euler on flow matching the difference of neighbouring sigmas. ``None`` if the
            scheduler cannot be run like this, because it needs more than the latents or is not linear.
        """
        count = len(self._calls)
        # Two samples: ones and twos, to see whether it is linear.
        shape = (2,) + (1,) * (len(self._shapes[0]) - 2) + (count,)
        scales = torch.tensor([1.0, 2.0], dtype=torch.float32).reshape(2, *(1,) * (len(shape) - 2))
        scheduler = copy.deepcopy(self._fresh)
        sample = torch.zeros(shape, dtype=torch.float32)  # whatever the default is
        try:
            with torch.random.fork_rng(devices=[]):  # a sampler that draws noise must not draw the run's
                for place, call in enumerate(self._calls):
                    if any(isinstance(v, torch.Tensor) and v.shape == self._shapes[0] for v in call.values()):
                        return None
                    output = torch.zeros(shape, dtype=torch.float32)
                    output[..., place] = scales
                    result = scheduler.step(**{**call, "model_output": output, "sample": sample})
                    sample = result[0] if isinstance(result, tuple) else result.prev_sample
            once, twice = (sample.double() / scales[..., None]).reshape(2, count)
        except Exception:  # schedulers may fail in any way on latents this small; weights are optional
            return None
        linear = bool(once.isfinite().all()) and torch.allclose(once, twice, rtol=1e-3, atol=1e-6)
        return [float(value) for value in once] if linear and bool((once != 0).any()) else None


def planned_response(scheduler: Any) -> tuple[float, ...] | None:
    """:meth:`Solver.response` of a run that is about to begin, with ``step`` called as pipelines call it.

    The result is cached: as long as nothing about the scheduler changes, it is the same at every generation.

    Returns:
        One weight per step, or ``None`` if the scheduler needs other arguments, is not linear, draws noise, or is under
        way.
    """
    return response_and_noise(scheduler)[0]


def draws_noise(scheduler: Any) -> bool:
    """Whether a run that is about to begin draws noise at its steps: simulated twice, it gives different results.

    ``False`` if the scheduler needs arguments of its own.
    """
    return response_and_noise(scheduler)[1]


def response_and_noise(scheduler: Any) -> tuple[tuple[float, ...] | None, bool]:
    """The results of :func:`planned_response` and :func:`draws_noise`, from one look at the scheduler."""
    timesteps = getattr(scheduler, "timesteps", None)
    index = getattr(scheduler, "step_index", None)
    if timesteps is None or (index is not None and index > 0):
        return None, False  # it is under way: the denoiser runs in another pipeline than this one
    bare = copy.copy(scheduler)
    bare.__dict__.pop("step", None)  # a replaced one would act on the original
    state = io.BytesIO()
    try:
        _ByValue(state).dump(bare)
        weights, noisy = _known_response(type(bare), state.getvalue())  # type: ignore[arg-type]  # classes can be hashed
    except Exception:  # it holds something that cannot be pickled
        weights, noisy = _response(bare), _noisy(bare)
    return (weights if index is None else None), noisy  # a scheduler that has its index already also scales samples


class _ByValue(pickle.Pickler):
    """Pickles equal tensors to equal bytes; torch's own pickles contain addresses."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return functools.partial(torch.tensor, listed(value), dtype=value.dtype), ()
        return NotImplemented


@functools.lru_cache(maxsize=8)
def _known_response(kind: type, state: bytes) -> tuple[tuple[float, ...] | None, bool]:
    """:func:`_response` and :func:`_noisy` of a scheduler of this class and state.

    The key is the class itself, as its name may refer to another class later, and the whole state, not only the config:
    whatever is changed about a scheduler, its weights are computed anew.
    """
    return _response(pickle.loads(state)), _noisy(pickle.loads(state))


def _noisy(scheduler: Any) -> bool:
    try:
        with torch.random.fork_rng(devices=[]):
            found = []
            for seed in (0, 1):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed means all devices
                found.append(_played(copy.deepcopy(scheduler)))
    except Exception:  # it needs more than we can give it
        return False
    return not torch.equal(*found)


def _played(scheduler: Any) -> Any:
    """The latents after every step of a run: some samplers draw noise at some of their steps only."""
    takes = inspect.signature(scheduler.step).parameters
    sample = torch.full((1, 4, 1, 2, 2), 0.5, dtype=torch.float32)
    latents, clean, before, path = sample, None, None, []
    for t in scheduler.timesteps:
        # CogVideoX's DPM-Solver++ asks for these two.
        others: dict[str, Any] = {"old_pred_original_sample": clean, "timestep_back": before}
        given = {name: value for name, value in others.items() if name in takes}
        result = scheduler.step(model_output=0.1 * sample, timestep=t, sample=latents, **given, return_dict=False)
        (latents, *_), clean, before = result, result[-1], t
        path.append(latents)
    return torch.stack(path)


def _response(scheduler: Any) -> tuple[float, ...] | None:
    sample = torch.zeros(1, 1, 1, 1, 2, dtype=torch.float32)
    solver = Solver(scheduler, scheduler.step)
    try:
        for t in scheduler.timesteps:
            solver.called(sample, t, sample, return_dict=False)
    except TypeError:
        return None
    found = solver.response()
    return None if found is None else tuple(found)
