"""Plans of a run: which denoising steps to compute, and what fills the others. Ours, not a paper's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np

DAMPING = 0.85
"""Of forecasts, per spacing of the outputs they are made from; what did best on the demo model."""

DEFAULT_COOLDOWN_STEPS = 3
"""Steps at the end of a run that the default plan computes, but for high speeds."""

END_GAP_RATIO = 0.25
"""Of growing gaps, the one at an end of the run as a share of the widest; what did best on the demo model."""

LATE_STEPS_PER_ROOT = 2.08
"""How many steps the default plan computes behind the first ones, by the root of the steps; found there, too."""


LONG_RUN_STEPS = 25
"""Steps from which on the default plan forecasts and leaps as it was found to on runs of 30 and 50 steps."""

SHORT_RUN_STEPS = 16
"""Steps below which a solver that leaps takes all of them evenly, however many are computed."""

MIN_COMPUTED_FOR_FORECASTS = 12
"""Computed steps from which on forecasts between them are better than longer steps of DDIM's; measured on the proving
ground's CogVideoX, at 20, 30 and 50 steps."""

MIN_COMPUTED_FOR_GROWING = 8
"""Computed steps below which the default plan spaces them evenly, as fewer steps would be."""

LONG_FIRST_STEP_RATIO = 0.5
"""Length in sigma of the first of few long steps, as a share of their mean, from which on a short one before it is
worth its cost under UniPC and DEIS. At shift 1 it is; from 3 on it depends on the guidance and the order."""

UNEVEN_LENGTHS_RATIO = 3.0
"""Ratio of neighbouring steps' lengths in sigma from which on a plan goes by sigma and not by the steps' number."""

NEGLIGIBLE_LAST_LENGTH_RATIO = 0.1
"""Length of a last step, as a share of the one before it, below which its output is worth nothing."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The skipped steps between two computed ones.

    Attributes:
        after: computed step before them.
        until: computed step behind them.
        order: degree of the extrapolation, 0 or 1.
        damping: weight of the extrapolation per spacing of the outputs it is made from.
    """

    after: int
    until: int
    order: int
    damping: float


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """Steps to compute, and what fills the others.

    Attributes:
        steps: number of denoising steps.
        compute: the computed ones, rising.
        segments: one for every run of skipped steps.
        conditional: those of ``compute`` at which only the conditional guidance branch runs, and the unconditional
            output is a forecast. Pipelines that call the branches together compute both.
        inside: those of ``compute`` at which UniCP acts inside; at the others it leaves everything whole.
        inside_cost: what such a step costs, as a share of a whole one.
        correct: computed steps make good what the forecasts before them were off by.
        predicted: predicted error at the end of the run, relative to the size of the outputs.
        places: where on the grid of the run each computed step is evaluated, in steps, and where the solver goes from
            one to the next; empty where each stands at its own index.
    """

    steps: int
    compute: tuple[int, ...]
    segments: tuple[Segment, ...] = ()
    conditional: tuple[int, ...] = ()
    inside: tuple[int, ...] = ()
    inside_cost: float = 1.0
    correct: bool = True
    predicted: float = 0.0
    places: tuple[float, ...] = ()

    @property
    def cost(self) -> float:
        """Share of the steps that is computed; the conditional branch alone counts half."""
        saved = len(self.conditional) / 2 + len(self.inside) * (1 - self.inside_cost)
        return (len(self.compute) - saved) / self.steps


def nearest(found: Mapping[int, StepPlan], computed: float) -> StepPlan:
    """Of plans by their cost in steps the one that is nearest to a cost, and not dearer where there is one."""
    fewer = [number for number in found if number <= computed + 0.5]
    return found[max(fewer)] if fewer else found[min(found)]


def computing(steps: int, compute: Iterable[int], order: int = 1) -> StepPlan:
    """The plan that computes these steps and forecasts all others, by polynomials of at most this degree.

    >>> [(s.after, s.until, s.order) for s in computing(8, {0, 2, 5}).segments]
    [(0, 2, 0), (2, 5, 1), (5, 8, 1)]
    """
    ordered = tuple(sorted(compute))
    segments = tuple(
        Segment(after=a, until=b, order=min(order, i), damping=DAMPING)
        for i, (a, b) in enumerate(zip(ordered, (*ordered[1:], steps), strict=True))
        if b > a + 1
    )
    return StepPlan(steps=steps, compute=ordered, segments=segments)


def growing(steps: int, computed: int, warmup: int, cooldown: int = 1) -> StepPlan:
    """A plan for a model that was never measured: the first steps in full, then gaps that grow, and shrink again.

    The change from step to step is largest at both ends of a run, so the first steps are computed and the gaps at the
    start and the end of what remains are the shorter ones. No gap is shorter than one nearer to its end of the run:
    a step computed between wider gaps does not bring what it would elsewhere. Linear forecasts, damped by 0.85 per
    spacing.

    >>> growing(20, 9, 3).compute
    (0, 1, 2, 4, 7, 10, 14, 17, 19)
    """
    warmup = min(warmup, steps)
    cooldown = min(cooldown, steps - warmup)  # of a short run it may be all
    computed = max(min(computed, steps), warmup + cooldown)
    first, last = warmup - 1, steps - cooldown  # between them lies what can be skipped
    inner = accumulate(_gaps(last - first, computed - warmup - cooldown + 1)[:-1], initial=first)
    return computing(steps, {*range(warmup), *inner, *range(last, steps)})


def _gaps(total: int, count: int) -> list[int]:
    """Whole distances of computed steps, 1 or more, that add up to ``total``.

    They are as near as can be to half a sine over :data:`END_GAP_RATIO`: they rise and then fall, as largest remainders
    keep the order of what they round. None is 1 where all can be 2: a
    step computed right after another one would stand with the first ones.

    >>> _gaps(26, 8)
    [2, 3, 4, 4, 4, 4, 3, 2]
    """
    shape = [END_GAP_RATIO + (1 - END_GAP_RATIO) * math.sin(math.pi * (i + 0.5) / count) for i in range(count)]
    scale = total / sum(shape)
    wanted = [round(scale * value, 9) for value in shape]  # rounded, as equal ones must tie everywhere
    gaps = [1 if total < 2 * count else 2] * count
    for _ in range(total - sum(gaps)):
        short = max(range(count), key=lambda i: (wanted[i] - gaps[i], i))  # of equals the later one
        gaps[short] += 1
    return gaps


def default(steps: int, computed: int, warmup: int = 2, cooldown: int = 1) -> StepPlan:
    """The plan of long runs under a solver that leaps (:func:`untuned`).

    Of the computed steps all but :data:`LATE_STEPS_PER_ROOT` times the root of the steps stand at the beginning,
    ``warmup`` at the least. Behind them gaps grow (:func:`growing`). Of few skipped steps no two are neighbours: it is
    every second one, as late in the run as can be, but for the last :data:`DEFAULT_COOLDOWN_STEPS`, where that skips
    two of those first steps at most. It was found on the demo model.

    >>> default(20, 15).compute
    (0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 15, 17, 18, 19)
    >>> default(50, 16).compute[:6]
    (0, 1, 3, 5, 8, 12)
    >>> default(50, 22).compute[:12]
    (0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20)
    """
    first = max(warmup, computed - round(LATE_STEPS_PER_ROOT * math.sqrt(steps)))
    first_of_last, skipped = steps - max(cooldown, DEFAULT_COOLDOWN_STEPS), steps - computed
    if max(warmup, first - 2) <= first_of_last + 1 - 2 * skipped:
        return computing(steps, set(range(steps)) - _every_second(first_of_last, skipped))
    return growing(steps, computed, first, max(cooldown, min(DEFAULT_COOLDOWN_STEPS, first - warmup)))


def affordable(steps: int, speedup: float) -> int:
    """How many of the steps can be computed for a speed-up, two at least.

    As many as leave it at what was asked for; one more where that would be faster by a fifth, and one more misses it
    by an eighth at most: where steps are few, a step less is worth more than that.

    >>> affordable(50, 2.0), affordable(8, 3.0), affordable(4, 3.0)
    (25, 3, 2)
    """
    computed = math.floor(steps / speedup + 1e-9)
    if computed and steps / computed >= 1.2 * speedup and steps / (computed + 1) >= 0.875 * speedup:
        computed += 1
    return min(max(computed, 2), steps)


def untuned(
    sigmas: Sequence[float],
    computed: int,
    *,
    leaps: bool = False,
    free: bool = False,
    starts: bool = False,
    throughout: bool = False,
    corrects: bool = True,
    stays: bool = False,
    trapezoid: bool = False,
    warmup: int | None = None,
    cooldown: int | None = None,
) -> StepPlan:
    """The plan for a run without a profile, by its noise levels and by what its solver can do.

    A multistep solver that can leap and has few steps is given just what fewer steps would be, evenly along the run,
    and so is DDIM below :data:`MIN_COMPUTED_FOR_FORECASTS` computed steps; from there on those in between are forecast.
    Where a solver gains from a short first step, it gets one from :data:`MIN_COMPUTED_FOR_GROWING` computed steps on,
    if the long one in its place would be long in sigma, too: the first of its long steps is then taken from two outputs
    in place of one. In a run of :data:`LONG_RUN_STEPS` steps
    or more it is :func:`default`.
    Where the solver takes every step and few are computed, they are spaced evenly and their outputs repeated, which for
    solvers of first order is what longer steps are; else skipped ones are forecasts, behind first steps in full and in
    gaps that grow (:func:`growing`). Of ``K`` computed steps of ``N`` those first ones are ``K^2 / 2N``. A last step
    too short to matter is skipped, a noise level that is visited twice is computed once before one is visited again,
    and where lengths of steps jump, the plan goes by them.

    Args:
        sigmas: noise levels of the run (N,), falling to 0 after the last.
        computed: how many steps to compute, 1 to N.
        leaps: the solver can take longer steps.
        free: and to noise levels between those of the run.
        starts: and a short first step before the long ones is worth its cost.
        throughout: longer steps are worth it only where few are taken all the way.
        corrects: forecasts can be corrected; without it they are no match for longer steps of such solvers.
        stays: the solver makes nothing of the last output, as it goes to the last level and not to zero noise (DEIS).
        trapezoid: each output is half of the step behind it and half of the one before it (Heun's method).
        warmup, cooldown: first and last steps that are to be computed, if the plan is not to choose.

    >>> untuned([1 - i / 12 for i in range(12)], 6, leaps=True).compute
    (0, 2, 4, 6, 8, 10)
    >>> untuned([1 - i / 20 for i in range(20)], 9, leaps=True, free=True, starts=True).places[:3]
    (0.0, 1.0, 3.375)
    >>> untuned([1 - i / 20 for i in range(20)], 9).compute
    (0, 1, 3, 5, 8, 11, 14, 17, 19)
    """
    steps = len(sigmas)
    if computed >= steps:
        return computing(steps, range(steps))
    visits = [i for i in range(steps) if i == 0 or sigmas[i] != sigmas[i - 1]]  # the first one of each level
    if len(visits) < steps:
        return _twice(sigmas, visits, computed, warmup, cooldown)
    lengths = [a - b for a, b in pairwise((*sigmas, 0.0))]
    if trapezoid:
        lengths = [(before + behind) / 2 for before, behind in pairwise((0.0, *lengths))]
    body = steps - (steps > 2 and (stays or lengths[-1] < NEGLIGIBLE_LAST_LENGTH_RATIO * lengths[-2]))
    if computed >= body:
        return computing(steps, range(body))
    if warmup is not None or cooldown is not None:
        first, last = 2 if warmup is None else warmup, 1 if cooldown is None else cooldown
        found = default if leaps and not throughout else growing
        return found(steps, computed, first, last)
    jumps = any(a > UNEVEN_LENGTHS_RATIO * b or b > UNEVEN_LENGTHS_RATIO * a for a, b in pairwise(lengths[:-1]))
    if jumps or (steps > 1 and lengths[-1] > UNEVEN_LENGTHS_RATIO * lengths[-2]):  # a short last step is no jump
        return computing(steps, _by_length(sigmas[:body], lengths[:body], computed))
    leaps &= not throughout or not corrects or computed < MIN_COMPUTED_FOR_FORECASTS
    if leaps and throughout:
        places = [body * i / computed for i in range(computed)]
        places = places if free else [float(int(place)) for place in places]
        return replace(computing(steps, {int(place) for place in places}), places=tuple(places))
    if leaps and steps >= LONG_RUN_STEPS:
        return default(steps, computed)
    if leaps:
        starts &= computed >= MIN_COMPUTED_FOR_GROWING
        if starts and computed > 0.55 * steps and steps >= SHORT_RUN_STEPS:
            return default(steps, computed)
        places = [body * i / computed for i in range(computed)]
        first_length = sigmas[0] - float(np.interp(body / computed, range(steps), sigmas))
        if starts and first_length > LONG_FIRST_STEP_RATIO * sigmas[0] / computed:
            places = [0.0] + [1 + (body - 1) * i / (computed - 1) for i in range(computed - 1)]
        if not free:
            places = [float(int(place)) for place in places]
        even = computing(steps, {int(place) for place in places})
        return replace(even, places=tuple(places)) if any(place % 1 for place in places) else even
    if computed < MIN_COMPUTED_FOR_GROWING:
        return computing(steps, {round(body * i / computed) for i in range(computed)}, order=0)
    # With a last step that is skipped, forecasts reach the end anyway: then every second one of the last is worth less
    # than more first steps in full (demo model, 12 to 30 Euler steps; at 50, where the last is computed, it is not).
    first, skipped = max(1, round(computed**2 / (2 * steps))), body - computed
    if not trapezoid and body < steps and first <= body - 2 * skipped:
        return computing(steps, set(range(body)) - _every_second(body - 1, skipped))
    return computing(steps, growing(body, computed, first).compute)


def _every_second(before: int, skipped: int) -> set[int]:
    """Steps to skip where they are few: no two are neighbours, and they stand as late as can be before a step.

    >>> sorted(_every_second(10, 3))
    [5, 7, 9]
    """
    return {before - 1 - 2 * i for i in range(skipped)}


def _twice(
    sigmas: Sequence[float], visits: list[int], computed: int, warmup: int | None, cooldown: int | None
) -> StepPlan:
    """The plan where a solver of second order visits noise levels twice: the second visit repeats the first one.

    The levels are planned as steps of their own; what is left over goes to second visits, from the beginning on.
    """
    levels = [sigmas[i] for i in visits]
    plan = untuned(levels, min(computed, len(levels)), trapezoid=True, warmup=warmup, cooldown=cooldown)
    compute = {visits[i] for i in plan.compute}
    again = [i for i in range(len(sigmas)) if i not in visits]
    order = max([segment.order for segment in plan.segments], default=0)
    return computing(len(sigmas), {*compute, *again[: computed - len(compute)]}, order)


def _by_length(sigmas: Sequence[float], lengths: Sequence[float], computed: int) -> tuple[int, ...]:
    """The steps to compute, the first one among them, from which the others are least far away along sigma.

    The least sum, over skipped steps, of their length times their distance from the computed one before them: what
    latents are off by if outputs are repeated that change steadily along sigma. By dynamic programming.
    """
    steps = len(sigmas)
    cost = [[0.0] * (steps + 1) for _ in range(steps)]
    for a in range(steps):
        for b in range(a + 1, steps + 1):
            cost[a][b] = sum(lengths[s] * (sigmas[a] - sigmas[s]) for s in range(a + 1, b))
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for _ in range(computed - 1):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for last, (spent, path) in best.items():
            for b in range(last + 1, steps):
                found = (spent + cost[last][b], (*path, b))
                longer[b] = min(longer.get(b, found), found)
        best = longer
    return min((spent + cost[last][steps], path) for last, (spent, path) in best.items())[1]


def alternating(
    steps: int, computed: int, warmup: int, cooldown: int = 1, inside_cost: float | None = None
) -> StepPlan:
    """A plan that computes more steps for the same cost: at every second one the conditional branch alone.

    Args:
        steps, warmup, cooldown: as for :func:`growing`.
        computed: the cost, in whole steps.
        inside_cost: every second one is instead a step with UniCP inside, which costs so much of a whole one, 0 to 1.

    >>> plan = alternating(20, 9, 3)
    >>> plan.compute, plan.conditional, 20 * plan.cost
    ((0, 1, 2, 4, 6, 8, 10, 13, 15, 17, 19), (4, 8, 13, 17), 9.0)
    """
    ends = min(warmup + cooldown, steps)
    pair = 1 + (0.5 if inside_cost is None else inside_cost)  # what two steps cost
    plan = growing(steps, ends + round(2 * max(computed - ends, 0) / pair), warmup, cooldown)
    cheap = tuple([step for step in plan.compute if warmup <= step < steps - cooldown][::2])
    if inside_cost is None:
        return replace(plan, conditional=cheap)
    return replace(plan, inside=cheap, inside_cost=inside_cost)


def resampled(plan: StepPlan, sigmas: Sequence[float], others: Sequence[float]) -> StepPlan:
    """The plan for a run with other noise levels: the same share of steps computed, as densely along sigma.

    Three steps at least, and the first one and, if the plan has it, the last one.

    Args:
        plan: made at ``sigmas`` (N,).
        sigmas, others: falling noise levels of the old and the new run, (N,) and (M,).
    """
    old, new = np.asarray(sigmas), np.asarray(others)
    if len(old) == len(new) and np.allclose(old, new, rtol=1e-3, atol=1e-4):
        return plan
    count = len(plan.compute)
    if replace(default(len(old), count), predicted=plan.predicted) == plan:
        return default(len(new), round(count * len(new) / len(old)))
    places = np.interp(-new, -old, np.arange(len(old)))  # where each new step lies among the old ones
    last = [len(new) - 1] if plan.compute[-1] == len(old) - 1 and len(new) > 1 else []
    numbers = np.linspace(0, count - 1, max(min(3, len(new)), round(count * len(new) / len(old))))
    free = np.ones(len(new), dtype=bool)
    free[[0, *last]] = False
    like: dict[int, int] = {0: plan.compute[0], **dict.fromkeys(last, plan.compute[-1])}  # the old step each stands for
    for number in numbers[1 : len(numbers) - len(last)]:
        wanted = np.interp(number, np.arange(count), plan.compute)
        step = int(np.argmin(np.where(free, np.abs(places - wanted), np.inf)))
        free[step] = False
        like[step] = plan.compute[round(number)]
    conditional, inside = (
        tuple(sorted(step for step, old in like.items() if old in cheap)) for cheap in (plan.conditional, plan.inside)
    )
    moved = replace(plan, steps=len(new), compute=tuple(sorted(like)), conditional=conditional, inside=inside)
    return _refilled(moved, places)


def later(plan: StepPlan, first: int) -> StepPlan:
    """The plan of a run as that of a longer one, of which so many steps at the beginning are not run.

    >>> later(default(10, 5), 10).compute
    (10, 11, 13, 17, 19)
    """
    segments = tuple([replace(s, after=s.after + first, until=s.until + first) for s in plan.segments])
    compute = tuple([step + first for step in plan.compute])
    places = tuple([place + first for place in plan.places])
    return replace(plan, steps=plan.steps + first, compute=compute, segments=segments, places=places)


def beginning(plan: StepPlan, first: int) -> StepPlan:
    """The plan for a denoiser that begins at a step with nothing to forecast from, as the second of two does.

    That step and the next one are computed. From there on it is as many steps as the plan has, three at least, with
    growing gaps (:func:`growing`); but where the plan has cheaper steps those two come on top.

    >>> default(20, 8).compute, beginning(default(20, 8), 8).compute
    ((0, 1, 3, 6, 10, 14, 17, 19), (0, 1, 3, 6, 8, 9, 14, 19))
    """
    start = {first, min(first + 1, plan.steps - 1)}
    if start <= set(plan.compute):
        return plan
    compute = {*plan.compute, *start}
    if not plan.conditional and not plan.inside:
        rest = [step for step in plan.compute if step >= first]
        ends = sum(step - plan.steps == i - len(rest) for i, step in enumerate(rest))  # computed one after another
        anew = growing(plan.steps - first, len(rest), 2, ends)
        compute = {*(set(plan.compute) - set(rest)), *(step + first for step in anew.compute)}
    conditional, inside = (tuple([s for s in cheap if s not in start]) for cheap in (plan.conditional, plan.inside))
    changed = replace(plan, compute=tuple(sorted(compute)), conditional=conditional, inside=inside, places=())
    return _refilled(changed, range(plan.steps))


def halved(plan: StepPlan, after: int) -> StepPlan:
    """The plan with one step more computed, in the middle of the skipped ones behind a computed step; if any are.

    >>> halved(computing(12, {0, 1, 5, 11}), 1).compute
    (0, 1, 3, 5, 11)
    """
    segment = next((segment for segment in plan.segments if segment.after == after), None)
    if segment is None:
        return plan
    compute = sorted({*plan.compute, (segment.after + segment.until) // 2})
    return _refilled(replace(plan, compute=tuple(compute), places=()), range(plan.steps))


def _refilled(plan: StepPlan, places: Sequence[float]) -> StepPlan:
    """The plan with segments between its computed steps, each filled like the nearest one it had.

    Args:
        plan: its segments are those of a plan with other computed steps.
        places: where each of its steps lies among that plan's steps.
    """
    segments = []
    for number, (a, b) in enumerate(zip(plan.compute, (*plan.compute[1:], plan.steps), strict=True)):
        if b > a + 1:
            middle = (places[a] + places[b - 1]) / 2
            source = min(plan.segments, key=lambda s: max(s.after - middle, middle - s.until))
            segments.append(replace(source, after=a, until=b, order=min(source.order, number)))
    return replace(plan, segments=tuple(segments))
