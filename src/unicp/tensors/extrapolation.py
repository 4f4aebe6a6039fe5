"""Forecasts of values that were not computed, and their corrections. Pure tensor functions, no state of a model.

Extrapolation runs along sigma, not along the step index, because sigmas are unevenly spaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

ORDERS = {"reuse": 0, "linear": 1, "quadratic": 2}
"""Polynomial degree of each fill by name; a fill of degree n looks at the last n + 1 computed values."""


MIN_WEIGHT = 0.2
"""A computed step whose output weighs less than this in the solver, relative to the heaviest skipped one before it,
gets no correction: the correction would have to be too large."""


def carries(weight: float, skipped: Iterable[float]) -> bool:
    """Whether a computed step's output can carry the correction of the skipped ones before it, by the solver's weights.

    >>> carries(0.1, [0.3, -0.4]), carries(0.01, [0.3, -0.4])
    (True, False)
    """
    return bool(abs(weight) >= MIN_WEIGHT * max(map(abs, skipped)))


def reach(sigmas: Sequence[float], sigma: float) -> float:
    """How far beyond the newest node a noise level lies, in spacings of the two newest nodes; 0 for a single node.

    >>> round(reach([0.8, 0.9], 0.5), 6), reach([0.8], 0.5)
    (3.0, 0.0)
    """
    return abs(sigma - sigmas[0]) / abs(sigmas[0] - sigmas[1]) if len(sigmas) > 1 else 0.0


def weights(sigmas: Sequence[float], sigma: float, damping: float = 1.0) -> list[float]:
    """Weights of the last computed values in the extrapolation to ``sigma``.

    They are those of the Lagrange polynomial through the points ``sigmas`` (newest first), shrunk towards plain reuse
    of the newest value beyond one spacing of the nodes: ``w = c * lagrange + (1 - c) * (1, 0, ...)`` with
    ``c = damping ** (n * (r - 1))`` for a polynomial of degree ``n`` at a distance of ``r > 1`` spacings
    (:func:`reach`). So, with a damping below 1, weights are bounded however large the distance is: at 0.85 those of a
    linear forecast are at most 2.7. The weights always sum to one.

    Args:
        sigmas: noise levels of the computed values, newest first, all different; 1 to 3 of them.
        sigma: noise level to extrapolate to.
        damping: 1 is the full polynomial, 0 plain reuse beyond one spacing.

    >>> weights([0.8, 0.9], 0.7)
    [2.0, -1.0]
    >>> weights([0.8, 0.9], 0.6, damping=0.5)
    [2.0, -1.0]
    >>> weights([0.8], 0.7)
    [1.0]
    """
    kept = damping ** ((len(sigmas) - 1) * max(0.0, reach(sigmas, sigma) - 1.0))
    result = []
    for j, node in enumerate(sigmas):
        weight = 1.0
        for k, other in enumerate(sigmas):
            if k != j:
                weight *= (sigma - other) / (node - other)
        result.append(round(kept * weight + (1.0 - kept) * (j == 0), 12))
    return result


def steadiness(newest: Any, before: Any, oldest: Any) -> Any:
    """How steadily the outputs change: a tensor (B, 1, ...), from 0 to 1, with one value per sample.

    It is twice the cosine between the last change and the one before, cut to [0, 1]: 1 where the outputs go on as they
    went, 0 where they turn at a right angle or go back, as they do where steps are long. It is computed on the device,
    and nothing is read from there. Forecasts (:func:`share`) and corrections are multiplied by it.

    Args:
        newest, before, oldest: the last three computed outputs, (B, ...).
    """
    shape = (len(newest), *(1,) * (newest.ndim - 1)) if newest.ndim else ()
    last = (newest.float() - before.float()).reshape(shape[:1] + (-1,))
    previous = (before.float() - oldest.float()).reshape(shape[:1] + (-1,))
    sizes = last.norm(dim=-1) * previous.norm(dim=-1)
    cosine = (last * previous).sum(dim=-1) / sizes.clamp_min(torch.finfo(torch.float32).tiny)
    return (2 * cosine).nan_to_num(0.0).clamp(0, 1).reshape(shape)


def share(steady: Any) -> Any:
    """Share of a forecast's change that is applied: 0.5 where outputs turn at every step, 1 where they are steady."""
    return 0.5 + 0.5 * steady


def firmness(weight: float, left: float, newest: float) -> float:
    """Share of a correction that is safe, judged by the solver's weights and steps alone.

    A correction removes an error ``e`` of the latents at the end of a step. If the output does not depend on the error,
    it shows the forecasts' fault as it is, and ``-e`` is the right correction. If the output depends on the error in
    full (``dv/dx = 1/sigma``, as for errors off the data, which the denoiser pulls back), the step itself shrinks ``e``
    by ``left'/left``, and the output shows the fault too large, by ``1 + newest/left``. The share
    ``(left + left') / (2 left + newest)`` makes the larger of the two remainders smallest. It is 1 for short steps, and
    the remainder is never more than ``e``, so errors cannot grow through later forecasts.

    Args:
        weight: absolute value of the solver's weight of this step's output.
        left: sum of the absolute values of the solver's weights from this step on; for Euler on flow matching, sigma.
        newest: absolute value of the weight of this step's output in the correction.

    >>> firmness(0.02, 0.9, 0.02), firmness(0.2, 0.4, 0.4)
    (0.978021978022, 0.5)
    """
    return round((2 * left - weight) / (2 * left + newest), 12)


def extrapolate(values: Sequence[Any], factors: Sequence[float], part: Any = None) -> Any:
    """``sum_j factors[j] * values[j]``, accumulated in float32 (or wider) and returned in the values' dtype.

    A single value with weight one is returned as it is, so plain reuse is exact and costs nothing. A line through two
    values is one kernel without wide copies: at video sizes memory traffic is what forecasts of units cost.

    Args:
        values: tensors of one shape (B, ...).
        factors: one number for each.
        part: share of the way from the first value to the sum, a tensor (B, 1, ...); ``None`` means 1.
    """
    if len(values) == 1 and factors[0] == 1.0:
        return values[0]
    if part is None and len(values) == len(factors) == 2 and abs(factors[0] + factors[1] - 1.0) < 1e-9:
        return torch.lerp(values[1], values[0], factors[0])  # which accumulates in float32 by itself
    wide = torch.promote_types(values[0].dtype, torch.float32)
    total = values[0].to(wide) * factors[0]
    for value, factor in zip(values[1:], factors[1:], strict=True):
        total = total.add_(value.to(wide), alpha=factor)
    if part is not None:
        total = torch.lerp(values[0].to(wide), total, part.to(wide))
    return total.to(values[0].dtype)


def levels_at(levels: Sequence[float], places: Iterable[float]) -> list[float]:
    """Noise levels at places on the grid of a run, given in steps; a place may lie between two steps.

    Between two steps the level is the cubic through the four nearest ones, kept between its two neighbours. For the
    grids in use it agrees to a thousandth with what the scheduler would have made of fewer steps.

    Args:
        levels: noise levels of all steps of the run, falling.
        places: from 0 to that of the last level.

    >>> levels_at([1.0, 0.75, 0.5, 0.25, 0.0], [0, 1.5])
    [1.0, 0.625]
    """
    found = []
    for place in places:
        low = int(place)
        if low == place:
            found.append(levels[low])
            continue
        first = min(max(low - 1, 0), max(len(levels) - 4, 0))
        nodes = range(first, min(first + 4, len(levels)))
        value = sum(w * levels[n] for w, n in zip(weights(nodes, place), nodes, strict=True))
        ends = sorted(levels[low : low + 2])
        found.append(min(max(value, ends[0]), ends[-1]))
    return found
