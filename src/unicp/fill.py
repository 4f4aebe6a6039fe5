"""What stands in for a value that was not computed. Pure tensor functions, no state of a model.

Extrapolation runs along sigma, not along the step index: sigmas are unevenly spaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

ORDERS = {"reuse": 0, "linear": 1, "quadratic": 2}
"""Polynomial degree of each fill by name; a fill of degree n looks at the last n + 1 computed values."""

DAMPING = 0.85
"""Of linear forecasts, per further skipped step: what did best on the demo model."""

LEAST_WEIGHT = 0.2
"""A computed step whose output weighs less than this in the solver, relative to the skipped ones before it, is not
given their correction: it would have to be too large."""


def carries(weight: float, skipped: Iterable[float]) -> bool:
    """Whether a computed step's output can carry the correction of the skipped ones before it, by the solver's weights.

    >>> carries(0.1, [0.3, -0.4]), carries(0.01, [0.3, -0.4])
    (True, False)
    """
    return bool(abs(weight) >= LEAST_WEIGHT * max(map(abs, skipped)))


def weights(sigmas: Sequence[float], sigma: float, damping: float = 1.0) -> list[float]:
    """Weights of the last computed values in the extrapolation to ``sigma``.

    The Lagrange polynomial through the points ``sigmas`` (newest first), shrunk towards plain reuse of the newest:
    ``w = damping * lagrange + (1 - damping) * (1, 0, ...)``. The weights always sum to one.

    Args:
        sigmas: noise levels of the computed values, newest first, all different; 1 to 3 of them.
        sigma: noise level to extrapolate to.
        damping: 1 is the full polynomial, 0 plain reuse.

    >>> weights([0.8, 0.9], 0.7)
    [2.0, -1.0]
    >>> weights([0.8], 0.7)
    [1.0]
    """
    result = []
    for j, node in enumerate(sigmas):
        weight = 1.0
        for k, other in enumerate(sigmas):
            if k != j:
                weight *= (sigma - other) / (node - other)
        result.append(round(damping * weight + (1.0 - damping) * (j == 0), 12))
    return result


def extrapolate(values: Sequence[Any], factors: Sequence[float]) -> Any:
    """``sum_j factors[j] * values[j]``, accumulated in float32 (or wider) and returned in the values' dtype.

    A single value with weight one is returned as it is, so that plain reuse is exact and costs nothing.
    """
    if len(values) == 1 and factors[0] == 1.0:
        return values[0]
    wide = torch.promote_types(values[0].dtype, torch.float32)
    total = values[0].to(wide) * factors[0]
    for value, factor in zip(values[1:], factors[1:], strict=True):
        total = total.add_(value.to(wide), alpha=factor)
    return total.to(values[0].dtype)
