"""Searches for plans of least predicted error at every cost. Arrays go in, plans come out; ours, not a paper's.

A run has ``N`` denoising steps with outputs ``v_s`` (velocity or noise) at noise levels ``sigma_s``. A skipped step
uses a forecast ``f_s = sum_j b_j v_{k_j}`` from the last computed steps. After the skipped steps between two computed
ones, the error of the solver's state is, to first order, the vector

    d = sum_s (sigma_{s+1} - sigma_s) (f_s - v_s)

in which errors of neighbouring steps cancel or add up with their signs. It is linear in the outputs, ``d = sum_n c_n
v_n``, so its length follows from inner products alone: ``|d|^2 = c^T G c`` with the Gram matrix ``G`` of one
unaccelerated run. Every segment of every plan is scored without running the model again.

The difference of sigmas is the weight that Euler's method gives an output. Multistep solvers give other weights: UniPC
at 12 steps gives a third of it to one step and twice as much to the next. The weights of the deployed solver are used
in its place (:class:`unicp.engine.solver.response.Solver`).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ..policies.plans.step_plan import DAMPING, Segment, StepPlan, nearest
from ..tensors import extrapolation

Array = NDArray[np.float64]

TRANSIENT_SHARE = 0.2
"""Share of a deviation that remains after its correction, because the latents were off in the meantime."""

FILLS: tuple[tuple[int, float], ...] = ((0, 1.0), (1, DAMPING))
"""Candidates of a segment's forecast: polynomial degree in sigma, and damping per spacing of its nodes. A larger choice
(other dampings, second order) promised less error and made more, in real runs of the demo model."""


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """Unaccelerated runs, reduced to inner products.

    Attributes:
        sigmas: (N + 1,) noise levels; the last one is that of the end of the run.
        grams: (P, N, N) inner products of the outputs of each of P runs, divided by the mean square of that run's
            outputs.
        gains: (P, N), or (N,) for all runs: how much an error at a step is amplified by the end of the run. It differs
            by more than a factor of ten between prompts.
        weights: (N,) the solver's weight of each output; by default the differences of the sigmas.
    """

    sigmas: Array
    grams: Array
    gains: Array = field(default_factory=lambda: np.ones(0))
    weights: Array = field(default_factory=lambda: np.ones(0))

    def __post_init__(self) -> None:
        if not len(self.weights):
            object.__setattr__(self, "weights", np.diff(self.sigmas))
        gains = self.gains if len(self.gains) else np.ones(self.steps)
        object.__setattr__(self, "gains", np.broadcast_to(gains, (len(self.grams), self.steps)))

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


def gram(outputs: Array) -> Array:
    """Gram matrix of one run's outputs (N, D), divided by their mean square.

    >>> gram(np.array([[2.0, 0.0], [0.0, 2.0]])).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    products = outputs @ outputs.T
    return np.asarray(products / max(float(np.trace(products)) / len(products), 1e-30))


def gain_curve(measured: Sequence[Sequence[Sequence[float]]], steps: int) -> Array:
    """Gains (N,) of all steps from those at some steps: the geometric mean over runs, interpolated between steps.

    Args:
        measured: (step, gain) pairs of each run, steps rising; a run without pairs does not count.
        steps: N, number of denoising steps.

    >>> gain_curve([[(0, 1.0), (2, 4.0)], [(1, 2.0)]], 3).round(3).tolist()
    [1.414, 2.0, 2.828]
    """
    curves = []
    for points in measured:
        if len(points):
            at, gain = np.array(points).T
            curves.append(np.interp(np.arange(steps), at, np.log(np.maximum(gain, 1e-6))))
    return np.exp(np.mean(curves, axis=0)) if curves else np.ones(steps)


def corrects(trajectories: Trajectories, after: int, until: int) -> bool:
    """Whether the computed step ``until`` can correct for the errors of the steps skipped since ``after``."""
    if until >= trajectories.steps:
        return False
    return extrapolation.carries(trajectories.weights[until], trajectories.weights[after + 1 : until])


def remainder(trajectories: Trajectories, nodes: Sequence[int], until: int) -> Array:
    """Coefficients (N,) of the rest of ``d`` after the step ``until`` has corrected it.

    The skipped outputs are then those of the polynomial through the outputs at ``until`` and the last two nodes.
    """
    return _deviation(trajectories, [until, *nodes[:2]], range(nodes[0] + 1, until), 1.0)


def deviation(trajectories: Trajectories, nodes: Sequence[int], until: int, damping: float) -> Array:
    """Coefficients (N,) of ``d`` for the steps skipped between ``nodes[0]`` and ``until``.

    Args:
        trajectories: only its sigmas and weights are used.
        nodes: computed steps that the forecast uses, newest first, 1 to 3 of them.
        until: next computed step.
        damping: weight of the extrapolation per spacing of the nodes.
    """
    return _deviation(trajectories, nodes, range(nodes[0] + 1, until), damping)


def _deviation(trajectories: Trajectories, nodes: Sequence[int], skipped: range, damping: float) -> Array:
    """Coefficients (N,) of the error of a solver's state if skipped outputs come from the polynomial through nodes."""
    sigmas = trajectories.sigmas
    c = np.zeros(trajectories.steps)
    for s in skipped:
        width = trajectories.weights[s]
        factors = extrapolation.weights([float(sigmas[n]) for n in nodes], float(sigmas[s]), damping)
        for node, factor in zip(nodes, factors, strict=True):
            c[node] += width * factor
        c[s] -= width
    return c


def forecast_errors(grams: Array, sigmas: Array, compute: Sequence[int]) -> dict[int, tuple[float, float]]:
    """Relative error of a linear forecast at each computed step: (mean, standard deviation) over runs.

    Args:
        grams: (P, N, N) inner products of the outputs of each of P runs.
        sigmas: (N,) noise levels, or more.
        compute: computed steps, rising; the first one cannot be forecast and is left out.

    >>> forecast_errors(np.array([np.outer([2.0, 3.0, 5.0], [2.0, 3.0, 5.0])]), np.array([3.0, 2.0, 1.0]), (0, 1, 2))
    {1: (0.333..., 0.0), 2: (0.2, 0.0)}
    """
    found = {}
    for place, step in enumerate(compute[1:], 1):
        nodes = compute[max(0, place - 2) : place][::-1]
        c = np.zeros(grams.shape[1])
        c[step] = -1.0
        c[list(nodes)] += extrapolation.weights([float(sigmas[n]) for n in nodes], float(sigmas[step]))
        squares = np.maximum(np.einsum("i,pij,j->p", c, grams, c), 0.0) / np.maximum(grams[:, step, step], 1e-30)
        found[step] = (float(np.sqrt(squares).mean()), float(np.sqrt(squares).std()))
    return found


def power_mean(lengths: Array, power: float) -> float:
    """The power mean of the errors of several prompts.

    With power 0 it is the geometric mean, which corresponds to the mean PSNR; large powers approach the worst error.
    """
    if power == 0:
        return float(np.exp(np.mean(np.log(np.maximum(lengths, 1e-30))))) if lengths.any() else 0.0
    return float(np.mean(lengths**power) ** (1 / power))


def _squares(trajectories: Trajectories, c: Array) -> Array:
    """``c^T G c`` for every run (P,)."""
    used = np.flatnonzero(c)
    grams = trajectories.grams[:, used[:, None], used[None, :]]
    return np.maximum(np.einsum("i,pij,j->p", c[used], grams, c[used]), 0.0)


def _gain(trajectories: Trajectories, after: int, until: int) -> Array:
    """Gain (P,) of an error that arises between two computed steps."""
    return np.asarray(trajectories.gains[:, after + 1 : until].mean(1))


def errors(trajectories: Trajectories, plan: StepPlan) -> Array:
    """Predicted error of a whole plan for every run (P,): the vector sum of its segments' amplified deviations."""
    total = np.zeros((len(trajectories.grams), trajectories.steps))
    for segment in plan.segments:
        c = deviation(trajectories, _nodes(plan.compute, segment), segment.until, segment.damping)
        if plan.correct and corrects(trajectories, segment.after, segment.until):
            before = [step for step in plan.compute if step <= segment.after][::-1]
            c = TRANSIENT_SHARE * c + remainder(trajectories, before, segment.until)
        total += _gain(trajectories, segment.after, segment.until)[:, None] * c
    return np.asarray(np.sqrt(np.maximum(np.einsum("pi,pij,pj->p", total, trajectories.grams, total), 0.0)))


def _nodes(compute: Sequence[int], segment: Segment) -> list[int]:
    before = [step for step in compute if step <= segment.after]
    return before[::-1][: segment.order + 1]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits that every plan of a search keeps to.

    Attributes:
        warmup, cooldown: numbers of first and last steps that are always computed; at least 1 and 0.
        tempering: exponent of the gains, 0 to 1. On the demo model gains differ tenfold between prompts, and plans made
            for their full values did worse in real runs than plans made without gains.
        gap: most skipped steps in a row.
        power: power of the mean over prompts (:func:`power_mean`).
        keep: number of best paths whose whole errors are compared, for each number of computed steps.
    """

    warmup: int = 3
    cooldown: int = 1
    tempering: float = 0.0
    gap: int = 7
    power: float = 0.0
    keep: int = 24


def plans(trajectories: Trajectories, limits: Limits | None = None) -> dict[int, StepPlan]:
    """The best plan for every possible number of computed steps.

    The search minimises the power mean of the runs' errors (:func:`power_mean`). This is not a sum over segments, but
    its majorant is: the weighted sum of squares, with weights ``error ** (power - 2)``. The weights come from the plans
    of the round before, so that runs in which errors grow most do not decide alone.

    Returns:
        By number of computed steps, rising; more steps never have a larger predicted error.
    """
    limits = limits or Limits()
    trajectories = replace(trajectories, gains=trajectories.gains**limits.tempering)
    shares = np.ones(len(trajectories.grams))
    memory: Memory = {}
    for last in (False, False, True):
        found = _search(trajectories, limits if last else replace(limits, keep=min(limits.keep, 4)), shares, memory)
        if last or limits.power == 2:
            break
        reached = errors(trajectories, nearest(found, 0.45 * trajectories.steps))
        shares = np.maximum(reached, 1e-12) ** (limits.power - 2)
        shares /= shares.mean()
    # A plan that costs more and is predicted to be worse is dropped: the cheaper one serves instead.
    result: dict[int, StepPlan] = {}
    for number, plan in found.items():
        if not result or plan.predicted <= min(p.predicted for p in result.values()):
            result[number] = plan
    return result


Memory = dict[tuple[int, ...], list[tuple[Array, Segment]]]
"""Squared errors (P,) of a segment with each fill, by the last steps of the path and the end of the segment."""


def _search(trajectories: Trajectories, limits: Limits, shares: Array, memory: Memory) -> dict[int, StepPlan]:
    """The plans of least weighted sum of squares.

    Dynamic programming over (the computed step before the last, the last computed step, how many so far): exact for
    costs that are a sum over segments, where a segment's error depends on the two last computed steps (a second-order
    forecast looks at a third; it is scored with the third of the best path so far). The ``keep`` best paths of every
    number are then scored as a whole (:func:`errors`), and the best of those is taken.
    """
    count = trajectories.steps
    start = min(limits.warmup, count) - 1
    first_of_last = count - limits.cooldown
    # by state (the computed step before the last, the last one): the best few (cost, path, segments)
    Path = tuple[float, tuple[int, ...], tuple[Segment, ...]]
    level: dict[tuple[int, int], list[Path]] = {(start - 1, start): [(0.0, tuple(range(start + 1)), ())]}
    finished: dict[int, list[Path]] = {}
    computed = start + 1
    while level:
        for paths in level.values():
            for cost, path, segments in paths:
                ended = _edge(trajectories, shares, path, count, memory)
                if path[-1] >= first_of_last or limits.cooldown == 0:
                    if path[-1] == count - 1:
                        finished.setdefault(computed, []).append((cost, path, segments))
                    elif limits.cooldown == 0 and count - path[-1] - 1 <= limits.gap:
                        extra, segment = ended
                        more = segments + ((segment,) if segment else ())
                        finished.setdefault(computed, []).append((cost + extra, path, more))
        following: dict[tuple[int, int], list[Path]] = {}
        for (_, last), paths in level.items():
            furthest = min(last + 1 + limits.gap, count - 1, max(first_of_last, last + 1))
            for until in range(last + 1, furthest + 1):
                bucket = following.setdefault((last, until), [])
                for cost, path, segments in paths:
                    extra, segment = _edge(trajectories, shares, path, until, memory)
                    bucket.append((cost + extra, (*path, until), segments + ((segment,) if segment else ())))
        level = {state: heapq.nsmallest(limits.keep, paths, key=lambda p: p[0]) for state, paths in following.items()}
        computed += 1
    best: dict[int, StepPlan] = {}
    for number in sorted(finished):
        candidates = []
        for _, path, segments in heapq.nsmallest(limits.keep, finished[number], key=lambda p: p[0]):
            plan = StepPlan(steps=count, compute=path, segments=segments)
            candidates.append(replace(plan, predicted=power_mean(errors(trajectories, plan), limits.power)))
        best[number] = min(candidates, key=lambda plan: plan.predicted)
    return best


def _edge(
    trajectories: Trajectories, shares: Array, path: tuple[int, ...], until: int, memory: Memory
) -> tuple[float, Segment | None]:
    """Cost of skipping from the end of a path to ``until``, with the forecast that is best there."""
    last = path[-1]
    if until == last + 1:
        return 0.0, None
    key = (*path[-3:], -until)
    if key not in memory:
        memory[key] = []
        gains = _gain(trajectories, last, until)
        corrected = None
        if corrects(trajectories, last, until):
            corrected = _squares(trajectories, remainder(trajectories, path[::-1], until))
        for order, damping in FILLS:
            if order < len(path):
                c = deviation(trajectories, path[::-1][: order + 1], until, damping)
                segment = Segment(after=last, until=until, order=order, damping=damping)
                squares = _squares(trajectories, c)
                if corrected is not None:
                    squares = TRANSIENT_SHARE**2 * squares + corrected
                memory[key].append((gains**2 * squares, segment))
    costs = [float(shares @ squares) for squares, _ in memory[key]]
    place = int(np.argmin(costs))
    return costs[place], memory[key][place][1]
