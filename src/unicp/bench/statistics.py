"""Means with the confidence that the number of prompts allows. Pure functions over lists of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure over prompts.

    Attributes:
        value: mean (of speed-ups the median).
        low, high: 95% confidence interval, by resampling the prompts; ``None`` for fewer than three of them.
        worst, best: of single prompts.
        count: number of prompts.
    """

    value: float
    low: float | None
    high: float | None
    worst: float
    best: float
    count: int

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)


def estimate(values: Sequence[float], *, higher: bool | None = True, middle: str = "mean") -> Estimate | None:
    """The mean or median of one value per prompt, with its confidence interval.

    Args:
        values: one for each prompt; infinite ones have to be replaced before.
        higher: more is better; ``None``: one is best.
        middle: ``"mean"`` or ``"median"``.

    >>> estimate([1.0, 2.0]).value
    1.5
    >>> estimate([]) is None
    True
    """
    import numpy as np

    if not values:
        return None
    data = np.asarray(values, dtype=np.float64)
    low = high = None
    if len(data) >= 3:
        # The draws are the same every time, so a report that is made twice gives the same figures.
        drawn = np.random.default_rng(0).integers(0, len(data), (RESAMPLES, len(data)))
        means = (np.mean if middle == "mean" else np.median)(data[drawn], axis=1)
        tail = (1 - CONFIDENCE) / 2
        low, high = (float(q) for q in np.quantile(means, (tail, 1 - tail)))
    value = float(data.mean() if middle == "mean" else np.median(data))
    if higher is None:
        ordered = sorted((float(v) for v in data), key=lambda v: abs(math.log(v)) if 0 < v < math.inf else math.inf)
    else:
        ordered = sorted((float(v) for v in data), reverse=higher)
    return Estimate(value, low, high, ordered[-1], ordered[0], len(data))


def at_speed(points: Sequence[tuple[float, float]], speed: float) -> float | None:
    """A curve of (speed-up, figure) points read at a speed; ``None`` beyond its fastest point.

    Where its slowest point is faster than that, it counts as it is.

    >>> at_speed([(1.5, 40.0), (2.0, 30.0)], 1.0), at_speed([(1.5, 40.0), (2.0, 30.0)], 3.0)
    (40.0, None)
    """
    slowest = min(points, default=None)
    return slowest[1] if slowest is not None and slowest[0] > speed else interpolate(points, speed)


def speedups(baseline: Sequence[Sequence[float]], method: Sequence[Sequence[float]]) -> list[float]:
    """One speed-up per prompt: the median over repeats of the ratio of two runs that were made in the same round.

    >>> speedups([[2.0, 4.0, 6.0]], [[1.0, 1.0, 1.0]])
    [4.0]
    """
    return [
        median(slow / fast for slow, fast in zip(*pair, strict=True))
        for pair in zip(baseline, method, strict=True)
        if pair[0] and pair[1]
    ]


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """The value at ``x`` of the line through (x, y) points; ``None`` outside their range.

    >>> interpolate([(1.0, 10.0), (3.0, 20.0)], 2.0)
    15.0
    """
    ordered = sorted(points)
    for (x0, y0), (x1, y1) in pairwise(ordered):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None
