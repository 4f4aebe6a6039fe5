"""Noise levels of schedulers whose sigmas are ratios of noise to signal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...tensors.host import listed


def diffuses(scheduler: Any) -> bool:
    """Whether a scheduler's sigmas are ratios of noise to signal on a variance preserving schedule."""
    config = getattr(scheduler, "config", None)
    others = ("prediction_type", "flow_prediction"), ("timestep_type", "continuous")
    return hasattr(scheduler, "alphas_cumprod") and not any(getattr(config, key, None) == kind for key, kind in others)


class Training:
    """The ratios of noise to signal at a scheduler's training timesteps.

    Args:
        scheduler: one that :func:`diffuses`.
    """

    def __init__(self, scheduler: Any) -> None:
        signal = np.array(listed(torch.as_tensor(scheduler.alphas_cumprod)), dtype=np.float64)
        self._logs = 0.5 * np.log((1 - signal) / np.maximum(signal, 1e-12))
        self._timesteps = np.arange(len(signal), dtype=np.float64)

    def shares(self, sigmas: Sequence[float]) -> list[float]:
        """The timestep of each ratio, as a share of the training steps, 0 to 1; not rounded, as schedulers do."""
        places = np.interp(np.log(np.maximum(sigmas, 1e-12)), self._logs, self._timesteps)
        return [float(place) / len(self._timesteps) for place in places]

    def ratio(self, timestep: float) -> float:
        """The ratio of noise to signal at a timestep."""
        return float(np.exp(np.interp(timestep, self._timesteps, self._logs)))


def noise_levels(scheduler: Any, sigmas: Sequence[float]) -> list[float]:
    """What falls evenly with what a model makes of the noise: the axis of forecasts.

    For flow matching that is sigma, the share of noise. On a variance preserving schedule it is the timestep, as a
    share: outputs change evenly along it, while the sigmas of such a schedule begin at 150 or at 4,000 and fall by a
    third from each step to the next. Along these, forecasts are worse.

    Args:
        scheduler: whose sigmas they are.
        sigmas: of all steps of a run (N,), falling.
    """
    if not diffuses(scheduler):
        return list(sigmas)
    found = Training(scheduler).shares(sigmas)
    return found if len(set(found)) == len(set(sigmas)) else list(sigmas)  # beyond the schedule they would be equal
