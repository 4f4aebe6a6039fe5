"""What is known of the errors of caching and slicing single units: plain numbers, from a profile."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Rows = Sequence[Sequence[float]]
"""Errors ``[t][k - 1]`` at step t + k, of what was kept at step t."""


def shared_error(limit: float, errors: Iterable[tuple[float, float]]) -> float:
    """The mean of errors, each given after its own limit, as it compares with ``limit``.

    >>> shared_error(0.1, [(0.1, 0.05), (0.2, 0.3)])
    0.1
    """
    scaled = [error if own == limit else error * (limit / own) for own, error in errors]
    return sum(scaled) / len(scaled)


@dataclass(frozen=True, kw_only=True)
class UnitErrors:
    """What a profile says of the errors on one denoiser: plain numbers.

    Attributes:
        sigmas: noise levels of the denoiser's steps in the calibration, falling.
        steps: number of denoising steps of that run; more than ``sigmas`` where two denoisers shared it.
        cache: by unit, ``rows[t][k - 1]``: error of what is filled in at step t + k from the output of step t, or from
            those of t - 1 and t.
        sliced: by unit, the relative change of the output that its slicing causes. Units without one are not sliced.
    """

    sigmas: Sequence[float]
    steps: int
    cache: Mapping[str, Rows] = field(default_factory=dict)
    sliced: Mapping[str, float] = field(default_factory=dict)

    def place(self, index: int, count: int | None, sigma: float) -> float:
        """Where a step of a run of ``count`` lies among the calibration's, as a fractional index.

        By its noise level, as step counts may differ.
        """
        sigmas = self.sigmas
        if count == len(sigmas) and math.isclose(sigmas[index], sigma, rel_tol=1e-3, abs_tol=1e-4):
            return float(index)
        after = bisect.bisect_left([-s for s in sigmas], -sigma)
        if after == 0:
            return 0.0
        if after == len(sigmas):
            return float(len(sigmas) - 1)
        high, low = sigmas[after - 1], sigmas[after]
        return round(after - 1 + (high - sigma) / (high - low), 6)

    def together(self, limits: Mapping[str, float]) -> Rows | None:
        """One table for units that share a window: the mean of their errors, each as a share of its own limit, as it
        compares with the first one's.

        >>> errors = UnitErrors(sigmas=[1.0], steps=1, cache={"a": [[0.1, 0.2]], "b": [[0.3, 0.4]]})
        >>> [[round(error, 3) for error in row] for row in errors.together({"a": 0.1, "b": 0.2})]
        [[0.125, 0.2]]
        """
        found = [unit for unit in limits if unit in self.cache]
        own = [limits[unit] for unit in found]
        if len(found) < 2:
            return self.cache[found[0]] if found else None

        def mean(rows: Sequence[Sequence[float]]) -> list[float]:
            return [shared_error(own[0], zip(own, errors, strict=True)) for errors in zip(*rows, strict=True)]

        return [mean(rows) for rows in zip(*(self.cache[unit] for unit in found), strict=True)]


def error_after(rows: Rows, anchor: float, now: float, spacing: float | None = None) -> float:
    """Calibrated error of using at ``now`` what was computed at ``anchor`` (fractional indices).

    Args:
        rows: of the unit, or of several together.
        spacing: of a forecast: how far before the anchor the other output lies that it goes by. Calibration measures
            forecasts from neighbouring steps; the remainder of a line through nodes at 0 and -h is, at a distance d,
            proportional to d (d + h).
    """
    row = rows[min(max(round(anchor), 0), len(rows) - 1)]
    gap = now - anchor
    below = math.floor(gap)
    if gap <= 0:
        return 0.0
    if math.ceil(gap) > len(row):
        return math.inf
    low = row[below - 1] if below else 0.0
    error = low if gap == below else low + (row[below] - low) * (gap - below)
    return error if spacing is None else error * (gap + spacing) / (gap + 1)
