"""What a scheduler makes of the outputs it is given: its own weight for each of them, without running a model."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch

OWN = ("sample", "model_output", "generator")
"""Arguments of ``step`` that are not the run's own when it is played on a few numbers."""


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
        self._calls.append({name: value for name, value in named.items() if name not in OWN})

    def response(self) -> list[float] | None:
        """How much of each output is in the latents at the end, all other outputs being as they are.

        The samplers of diffusion models are linear in what the model returns. So one run of the sampler tells it, on
        latents of as many numbers as there are steps, which start at zero and get a one at their own step.

        Returns:
            One weight a step; for Euler on flow matching the difference of neighbouring sigmas. ``None`` if the
            scheduler cannot be run so: it asks for more than the latents, or is not linear.
        """
        count = len(self._calls)
        found = []
        shape = (1,) * (len(self._shapes[0]) - 1) + (count,)
        try:
            with torch.random.fork_rng(devices=[]):  # a sampler that draws noise must not draw the run's
                for scale in (1.0, 2.0):
                    scheduler = copy.deepcopy(self._fresh)
                    sample = torch.zeros(shape)
                    for place, call in enumerate(self._calls):
                        if any(isinstance(v, torch.Tensor) and v.shape == self._shapes[0] for v in call.values()):
                            return None
                        output = torch.zeros(shape)
                        output[..., place] = scale
                        result = scheduler.step(**{**call, "model_output": output, "sample": sample})
                        sample = result[0] if isinstance(result, tuple) else result.prev_sample
                    found.append(sample.flatten().double() / scale)
        except Exception:  # whatever a scheduler makes of latents so small: it is not needed for this
            return None
        once, twice = found
        linear = bool(once.isfinite().all()) and torch.allclose(once, twice, rtol=1e-3, atol=1e-6)
        return [float(value) for value in once] if linear and bool((once != 0).any()) else None


def planned_response(scheduler: Any) -> tuple[float, ...] | None:
    """:meth:`Solver.response` of a run that is about to begin, called as pipelines do.

    ``None`` if the scheduler wants to be called otherwise, is not linear, or draws noise.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or getattr(scheduler, "step_index", None) is not None:
        return None  # it is under way: the denoiser runs in another pipeline than this one
    sample = torch.zeros(1, 1, 1, 1, 2)
    solver = Solver(scheduler, scheduler.step)
    try:
        for t in timesteps:
            solver.called(sample, t, sample, return_dict=False)
    except TypeError:
        return None
    found = solver.response()
    return None if found is None else tuple(found)
