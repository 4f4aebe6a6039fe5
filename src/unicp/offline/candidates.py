"""The shapes of plans that ``unicp.tune`` compares, by effort, and how it ranks them. They are ours, not a paper's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..policies.plans.step_plan import StepPlan, growing

MEASURED_SPEEDUPS = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0)
"""Costs at which plans are run for real, as one over the share of computed steps; between them, tune interpolates."""
CHOICE_SPEEDUPS = (1.5, 2.0, 3.0, 4.0)
"""Costs at which shapes of plans are compared by real runs; at other costs the nearest one's choice holds."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A kind of plan: how many steps are computed at both ends of the run; between them gaps grow, and shrink again.

    Attributes:
        first: first steps, as a share of all computed ones, 0 to 1; two at least.
        last: number of last steps, 1 or more.
    """

    first: float
    last: int

    @property
    def name(self) -> str:
        """
        >>> Shape(first=0.4, last=3).name
        'first 40%, last 3'
        """
        return f"first {self.first:.0%}, last {self.last}"

    def plans(self, steps: int) -> dict[int, StepPlan]:
        """Plans by their cost in steps, for a run of so many.

        >>> Shape(first=0.4, last=3).plans(20)[10].compute
        (0, 1, 2, 3, 6, 10, 14, 17, 18, 19)
        """
        found = {n: max(2, round(self.first * n)) for n in range(2, steps)}
        return {n: growing(steps, n, first, self.last) for n, first in found.items() if first + self.last <= n}


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How many runs a tuning may make.

    Attributes:
        shapes: what is compared with the default plan.
        speeds: entries of :data:`MEASURED_SPEEDUPS` at which plans are run.
    """

    shapes: tuple[Shape, ...]
    speeds: tuple[float, ...]


def _every(first: tuple[float, ...], last: tuple[int, ...]) -> tuple[Shape, ...]:
    return tuple([Shape(first=share, last=count) for share, count in itertools.product(first, last)])


EFFORTS = {
    "low": Effort(shapes=_every((0.0, 0.4), (1, 3)), speeds=CHOICE_SPEEDUPS),
    "medium": Effort(shapes=_every((0.0, 0.2, 0.4), (1, 3)), speeds=MEASURED_SPEEDUPS),
    "high": Effort(shapes=_every((0.0, 0.1, 0.2, 0.3, 0.4, 0.5), (1, 3, 5)), speeds=MEASURED_SPEEDUPS),
}


def choosing(prompts: int, min_psnr: bool) -> int:
    """How many of the prompts choose plans; the others judge the chosen ones.

    A promise (``min_psnr``) takes half of them; elsewhere a quarter is enough.

    >>> choosing(4, False), choosing(16, True), choosing(1, False)
    (3, 8, 1)
    """
    return prompts - min(max(1, prompts // (2 if min_psnr else 4)), prompts - 1)


def remaining(kinds: int, prompts: int) -> list[int]:
    """How many kinds of plans are run on each prompt that chooses: the better half goes on, two at least.

    >>> remaining(7, 4)
    [7, 4, 2, 2]
    """
    found = [kinds]
    while len(found) < prompts:
        found.append(max(min(2, kinds), -(-found[-1] // 2)))
    return found[:prompts]


def cost_in_runs(prompts: int, effort: str, min_psnr: bool = False) -> float:
    """About how many runs of the pipeline a tuning takes at most; with ``min_psnr`` perhaps a few more, for its plan.

    Args:
        prompts: number of prompts.
        effort: a key of :data:`EFFORTS`.
        min_psnr: whether the profile is to promise a quality.
    """
    work, choose = EFFORTS[effort], choosing(prompts, min_psnr)
    kinds = 1 + len(work.shapes)  # one is the default plan
    chosen = sum(remaining(kinds, choose)) * sum(1 / speed for speed in CHOICE_SPEEDUPS)
    # The chosen plans are measured on the other prompts, or, where the default plan is kept everywhere, on all.
    measured = prompts * sum(1 / speed for speed in work.speeds)
    usual = 0.5  # the run that shows what the default plan is
    return usual + prompts + chosen + measured - (choose * sum(1 / speed for speed in CHOICE_SPEEDUPS))


DEFAULT_KIND = "default"
"""Name of the kind that is the default plan."""


STUDENTS_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Quantiles of Student's t at 97.5%, for 1 to 10 degrees of freedom."""
MANY_DEGREES_T = 2.1
"""The same for more of them, nearly."""


def doubt(differences: Sequence[float] | NDArray[np.float64]) -> float:
    """What the mean of these has to be above for the true mean to be above 0; a single one says nothing.

    >>> round(doubt([1.0, 3.0]), 1), round(doubt([1.0, 2.0, 3.0]), 1), doubt([1.0])
    (12.7, 2.5, inf)
    """
    count = len(differences)
    if count < 2:
        return math.inf
    quantile = STUDENTS_T[count - 2] if count - 2 < len(STUDENTS_T) else MANY_DEGREES_T
    return quantile * float(np.std(differences, ddof=1)) / count**0.5


def ranked(scores: dict[str, list[float]]) -> list[str]:
    """Kinds of plans, best first.

    On one prompt a plan may be ten dB ahead of another, and on the next as far behind. So only a kind that is surely
    better ranks before the default plan, by Student's t-test of the prompts' differences at 97.5%: the best of many is
    easily just the luckiest. (By two standard errors of three prompts, one was chosen on the proving ground's Open-Sora
    that lost on others.)

    Args:
        scores: loss of every prompt under each kind; smaller is better.
    """
    usual = scores.get(DEFAULT_KIND)

    def key(name: str) -> tuple[int, float]:
        mean = float(np.mean(scores[name]))
        if usual is None or name == DEFAULT_KIND:
            return 1, mean
        ahead = np.subtract(usual, scores[name])
        return 0 if ahead.mean() > doubt(ahead) else 2, mean

    return sorted(scores, key=key)
