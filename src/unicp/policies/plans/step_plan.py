"""Plans of a run say which denoising steps to compute, and what fills the others. They are ours, not a paper's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np

DAMPING = 0.85
"""Damping of forecasts, per spacing of the outputs they are made from; this did best on the demo model."""

DEFAULT_COOLDOWN_STEPS = 3
"""Steps at the end of a run that the default plan computes, except at high speeds."""

END_GAP_RATIO = 0.25
"""Of growing gaps, the width at an end of the run as a share of the widest; this did best on the demo model."""

LATE_STEPS_PER_ROOT = 2.08
"""Steps that the default plan computes after the first ones, per square root of the number of steps; found likewise."""

LONG_RUN_STEPS = 25
"""Steps of a run from which on the default plan is the one that was found on runs of 30 and 50 steps."""

SHORT_RUN_STEPS = 16
"""Steps of a run below which a solver that leaps takes even steps all the way, however many are computed; and below
which, under others, no two neighbours are skipped where that can be. Measured on the proving ground's HunyuanVideo,
LTX and Latte with 8 and 12 Euler steps: up to 12 dB nearer than even steps; with 20 and 30 steps it was 2 to 4 behind.
"""

MIN_COMPUTED_FOR_FORECASTS = 7
"""Computed steps from which on forecasts over growing gaps are better than even steps, which fewer steps would be.
Measured under Euler on the demo model and the proving ground's HunyuanVideo, LTX and Open-Sora
(``benchmarks/few_steps.py``)."""

MIN_COMPUTED_FOR_FORECASTS_OF_HEUN = 8
"""The same of levels that are visited twice, as Heun's method does; measured on the demo model at 8 steps."""

MIN_COMPUTED_FOR_FORECASTS_OF_DDIM = 9
"""The same where even steps are longer steps of DDIM; measured on the proving ground's CogVideoX and Latte."""

MIN_COMPUTED_FOR_FORECASTS_OF_TWO = 16
"""The same where a second denoiser takes over, whose forecasts begin anew; measured on the proving ground's Wan 2.2. Of
13 to 15 they had more in the mean over eight captions, and less over three others."""

MIN_COMPUTED_FOR_FORECASTS_OF_MULTISTEP = 20
"""The same of multistep solvers on other schedules than flow matching's, if at least half of the steps are computed;
measured under DPM-Solver++ and UniPC on the proving ground's Latte and CogVideoX, at 20, 30 and 50 steps."""

MIN_COMPUTED_BESIDE_NOISE, MIN_STEPS_BESIDE_NOISE = 5, 10
"""Computed steps, and steps of a run, from which on repeated outputs are better than longer steps of a solver that
draws noise. Longer steps draw less of it, and so make another video; measured with CogVideoX's DPM-Solver++ on the
proving ground's CogVideoX, at 8, 12 and 20 steps."""

MIN_COMPUTED_FOR_SHORT_START = 8
"""Computed steps from which on a solver that gains from a short first step gets one (demo model)."""

SHORT_EARLY_STEPS_RATIO = 0.3
"""Length in sigma of the first of as many even steps as are computed, as a share of their mean, below which the first
steps of a run are too short to be computed in full: at shifts of 5 and 8, and in lists that fall ever faster."""

MAX_EVEN_STEPS = 20
"""Computed steps from which on they are computed in full all the same. Measured at shifts of 5 to 8, with 20, 30 and 50
Euler steps: on the demo model even steps are ahead of growing gaps, which fall below fewer steps there; on the proving
ground's HunyuanVideo they are behind by 1 to 6 dB in the mean, and never below fewer steps."""

LONG_FIRST_STEP_RATIO = 0.5
"""Length in sigma of the first of few long steps, as a share of their mean, from which on a short step before it is
worth its cost under UniPC and DEIS. With shift 1 it is; with 3 or more it depends on guidance and order."""

FIRST_STEPS_RATIO = 0.3
"""Share of the computed steps that a long run begins with, at least, if its steps are equally long in sigma; if the
first ones are shorter it is smaller, and if they are longer it is the same (``benchmarks/long_runs.py``)."""

SHORT_FIRST_LEAP_RATIO = 0.018
"""Length in sigma of a step over the first two of a long run, as a share of the first level, below which a short step
before it is not worth its cost: with 50 steps from shift 3 on, with 30 from 5 on (``benchmarks/long_runs.py``)."""

MANY_COMPUTED_SHARE = 0.6
"""Share of computed steps from which on the first ones are not more under Euler's method than elsewhere. Below it, at
1.75x to 2.5x of 50 steps, the rule of multistep solvers was ahead on the demo model, HunyuanVideo, LTX and Open-Sora;
at 1.5x it was so on one of four, and under DDIM it lost (``benchmarks/first_steps.py``)."""

UNEVEN_LENGTHS_RATIO = 3.0
"""Ratio of neighbouring steps' lengths in sigma above which a plan goes by sigma and not by the index of steps."""

NEGLIGIBLE_LAST_LENGTH_RATIO = 0.1
"""Length of a last step, as a share of the one before it, below which its output is worth nothing."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The skipped steps between two computed ones.

    Attributes:
        after: the computed step before them.
        until: the computed step after them, or the number of steps.
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
        compute: the computed steps, rising.
        segments: one for every run of skipped steps.
        places: place on the run's grid where each computed step is evaluated, in steps; the solver goes from one place
            to the next. Empty if each step is evaluated at its own index.
        default: whether it is what :func:`untuned` makes for its run, and is to be made anew for another one.
    """

    steps: int
    compute: tuple[int, ...]
    segments: tuple[Segment, ...] = ()
    places: tuple[float, ...] = ()
    default: bool = False

    @property
    def cost(self) -> float:
        """Share of the steps that is computed, 0 to 1."""
        return len(self.compute) / self.steps


def nearest(found: Mapping[int, StepPlan], computed: float) -> StepPlan:
    """Of plans by their cost in steps, the most expensive one up to ``computed``, or else the cheapest one."""
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
    """A plan for a model that was never measured: the first steps are computed, then gaps grow, and shrink again.

    The change from step to step is largest at both ends of a run, so the first steps are computed, and of the remaining
    gaps those at the start and the end are shorter. No gap is shorter than one nearer to its end of the run: a step
    computed between wider gaps gains less than it would elsewhere. Skipped steps are forecast linearly, damped by 0.85
    per spacing.

    Args:
        steps: number of denoising steps.
        computed: how many of them to compute.
        warmup, cooldown: first and last steps that are computed.

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
    """Whole distances between computed steps, ``count`` of them, 1 or more, that add up to ``total``.

    They are as close as can be to half a sine above :data:`END_GAP_RATIO`. They rise and then fall, because rounding by
    largest remainders preserves the order. None is 1 where all can be 2: a step computed right after another one would
    serve better among the first ones.

    >>> _gaps(26, 8)
    [2, 3, 4, 4, 4, 4, 3, 2]
    """
    shape = [END_GAP_RATIO + (1 - END_GAP_RATIO) * math.sin(math.pi * (i + 0.5) / count) for i in range(count)]
    scale = total / sum(shape)
    wanted = [round(scale * value, 9) for value in shape]  # rounded, so that equal values tie on every machine
    gaps = [1 if total < 2 * count else 2] * count
    for _ in range(total - sum(gaps)):
        short = max(range(count), key=lambda i: (wanted[i] - gaps[i], i))  # of equal ones, the later one
        gaps[short] += 1
    return gaps


def default(steps: int, computed: int, warmup: int = 2, cooldown: int = 1) -> StepPlan:
    """The plan of long runs under a solver that leaps, unless their first steps are long or short (:func:`untuned`).

    The first steps are computed (:func:`first_steps`), at least ``warmup``. After them gaps grow (:func:`growing`). If
    few steps are skipped, no two of them are neighbours: every second step is skipped, as late in the run as possible
    but not among the last :data:`DEFAULT_COOLDOWN_STEPS`, provided that this skips at most two of those first steps.
    The rule was found on the demo model.

    >>> default(20, 15).compute
    (0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 15, 17, 18, 19)
    >>> default(50, 16).compute[:6]
    (0, 1, 3, 5, 8, 12)
    >>> default(50, 22).compute[:12]
    (0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20)
    """
    first = first_steps(steps, computed, warmup)
    first_of_last, skipped = steps - max(cooldown, DEFAULT_COOLDOWN_STEPS), steps - computed
    if max(warmup, first - 2) <= first_of_last + 1 - 2 * skipped:
        return computing(steps, set(range(steps)) - _every_second(first_of_last, skipped))
    return growing(steps, computed, first, max(cooldown, min(DEFAULT_COOLDOWN_STEPS, first - warmup)))


def _of_long_run(sigmas: Sequence[float], computed: int) -> StepPlan:
    """The plan of a long run under a solver that leaps: :func:`default`, with first steps by their length in sigma.

    Where a run begins with long steps, more of them are computed. Where few steps are computed and the first ones are
    short, as at high shifts, the solver leaps from the first one, and a fifth of the computed ones, up to three, are
    the last ones.
    """
    steps, last = len(sigmas), max(1, min(DEFAULT_COOLDOWN_STEPS, computed // 5))
    first = first_steps(steps, computed, 2)
    more = round(FIRST_STEPS_RATIO * computed * min(1.0, _first_length(sigmas, steps, computed)))
    if more > first:
        return growing(steps, computed, more, last)
    short = sigmas[0] - sigmas[2] < SHORT_FIRST_LEAP_RATIO * sigmas[0]
    return growing(steps, computed, 1, last) if short and first == 2 else default(steps, computed)


def first_steps(steps: int, computed: int, warmup: int) -> int:
    """All computed steps but :data:`LATE_STEPS_PER_ROOT` times the square root of the number of steps."""
    return max(warmup, computed - round(LATE_STEPS_PER_ROOT * math.sqrt(steps)))


def fronted(steps: int, computed: int, cooldown: int = 1) -> StepPlan:
    """The plan of a window that units share (UniCP): as many first steps as in :func:`default`, then growing gaps.

    >>> fronted(50, 24).compute[:12]
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14)
    """
    return growing(steps, computed, first_steps(steps, computed, 2), cooldown)


def affordable(steps: int, speedup: float) -> int:
    """How many of the steps can be computed for a speed-up, at least two.

    It is the largest number that reaches the speed-up. It is one more if that number would be a fifth faster than asked
    for, and one more would miss the target by at most an eighth: where steps are few, one step is worth more than that.

    >>> affordable(50, 2.0), affordable(8, 3.0), affordable(4, 3.0)
    (25, 3, 2)
    """
    computed = math.floor(steps / speedup + 1e-9)
    if computed and steps / computed >= 1.2 * speedup and steps / (computed + 1) >= 0.875 * speedup:
        computed += 1
    return min(max(computed, 2), steps)


def on_target(steps: int, computed: int, speedup: float) -> bool:
    """Whether so many computed steps give about the speed-up that is asked for.

    >>> on_target(50, 25, 2.0), on_target(4, 2, 3.0)
    (True, False)
    """
    return 0.9 <= steps / computed / speedup <= 1.15


def untuned(
    sigmas: Sequence[float],
    computed: int,
    *,
    leaps: bool = False,
    free: bool = False,
    starts: bool = False,
    throughout: bool = False,
    evenly: bool = False,
    corrects: bool = True,
    stays: bool = False,
    switches: bool = False,
    draws: bool = False,
    cut: bool = False,
    trapezoid: bool = False,
    euler: bool = False,
    warmup: int | None = None,
    cooldown: int | None = None,
) -> StepPlan:
    """The plan for a run without a profile, made from its noise levels and from what its solver can do.

    A multistep solver that can leap and has few steps takes the steps that a run of fewer steps would take, evenly
    along the run. So do DDIM, and multistep solvers on other schedules than flow matching's, if few are computed; else
    skipped steps are forecast (``throughout``). A solver that gains from a short first step gets one if
    :data:`MIN_COMPUTED_FOR_SHORT_START` or more are computed and the first long step would be long in sigma
    (:data:`LONG_FIRST_STEP_RATIO`): the first of its long steps then uses two outputs instead of one. In a run of
    :data:`LONG_RUN_STEPS` steps or more, the plan of a multistep solver is :func:`default`, with more first steps where
    these are long in sigma; where they are short and few steps are computed, the second one is skipped.

    If the solver takes every step of a run of fewer than :data:`SHORT_RUN_STEPS` and fewer than half of them are
    skipped, every second of the last ones is. If few are computed (:data:`MIN_COMPUTED_FOR_FORECASTS`), these are
    spaced evenly and their outputs repeated, which for solvers of first order equals longer steps; so are fewer
    than :data:`MAX_EVEN_STEPS` in a run whose first steps are short in sigma (:data:`SHORT_EARLY_STEPS_RATIO`). If
    more are computed, the first ``K^2 / 2N`` of ``N`` steps are, for ``K`` computed ones, then gaps grow
    (:func:`growing`), and skipped steps are forecast. Under Euler's method, below :data:`MANY_COMPUTED_SHARE`, as
    many first steps are computed as under a multistep solver (:func:`default`) where these are more, and of the
    last ones three fewer, one to three. If the last step is skipped and few others are, it is every second one of
    the last steps instead.

    A last step that is too short to matter is skipped, but not in long runs of multistep solvers. Noise levels that are
    visited twice are all computed once before any is computed again. Where lengths of steps jump, the plan goes by
    these lengths.

    Args:
        sigmas: noise levels of the run (N,), falling to 0 after the last.
        computed: how many steps to compute, 1 to N.
        leaps: whether the solver can take longer steps.
        free: whether it can go to noise levels between those of the run.
        starts: whether a short first step before the long ones is worth its cost.
        throughout: whether longer steps are worth it only where few steps are computed and all of them are long.
        evenly: whether longer steps are worth it only at even distances. With both, forecasts need more computed steps
            (:data:`MIN_COMPUTED_FOR_FORECASTS_OF_MULTISTEP`).
        corrects: whether forecasts can be corrected; without correction they are worse than longer steps of such
            solvers.
        stays: whether the solver ignores the last output, because it ends at the last level and not at zero noise
            (DEIS).
        switches: whether another denoiser takes over in the run; then longer steps are as with ``throughout``.
        draws: whether the solver draws noise at its steps; then longer ones are worth it in the shortest runs only.
        cut: whether the loop leaves out timesteps at its end, so that no run of fewer steps is like this one; then the
            last step is computed.
        trapezoid: whether each output counts half for the step after it and half for the one before it (Heun's method).
        euler: whether the solver's weights are the lengths of its steps in sigma (Euler's method on flow matching).
        warmup, cooldown: first and last steps that are computed; ``None`` leaves them to the plan.

    >>> untuned([1 - i / 12 for i in range(12)], 6, leaps=True).compute
    (0, 2, 4, 6, 8, 10)
    >>> untuned([1 - i / 20 for i in range(20)], 9, leaps=True, free=True, starts=True).places[:3]
    (0.0, 1.0, 3.375)
    >>> untuned([1 - i / 20 for i in range(20)], 9).compute
    (0, 1, 3, 5, 8, 11, 14, 17, 19)
    """
    steps, throughout = len(sigmas), throughout or switches
    if computed >= steps:
        return computing(steps, range(steps))
    visits = [i for i in range(steps) if i == 0 or sigmas[i] != sigmas[i - 1]]  # the first visit of each level
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
        return computing(steps, _by_length(lengths[:body], computed))
    early = _first_length(sigmas, steps, computed) < SHORT_EARLY_STEPS_RATIO and computed < MAX_EVEN_STEPS
    first, skipped = max(1, round(computed**2 / (2 * steps))), body - computed
    singly = body == steps < SHORT_RUN_STEPS and not trapezoid and not early and 2 * skipped <= body - 2
    if draws:
        leaps &= computed < MIN_COMPUTED_BESIDE_NOISE or steps < MIN_STEPS_BESIDE_NOISE
    else:
        if switches:
            few = computed < MIN_COMPUTED_FOR_FORECASTS_OF_TWO
        elif evenly:
            few = computed < MIN_COMPUTED_FOR_FORECASTS_OF_MULTISTEP or 2 * computed < steps
        else:
            few = computed < MIN_COMPUTED_FOR_FORECASTS_OF_DDIM and not singly
        leaps &= not throughout or not corrects or few
    if leaps and throughout:
        places = [body * i / computed for i in range(computed)]
        places = places if free else [float(int(place)) for place in places]
        return replace(computing(steps, {int(place) for place in places}), places=tuple(places))
    if leaps and steps >= LONG_RUN_STEPS and not evenly:
        return _of_long_run(sigmas, computed)
    if leaps:
        starts &= computed >= MIN_COMPUTED_FOR_SHORT_START
        if starts and computed > 0.55 * steps and steps >= SHORT_RUN_STEPS:
            return default(steps, computed)
        places = [body * i / computed for i in range(computed)]
        if starts and _first_length(sigmas, body, computed) > LONG_FIRST_STEP_RATIO:
            places = [0.0] + [1 + (body - 1) * i / (computed - 1) for i in range(computed - 1)]
        if not free:
            places = [float(int(place)) for place in places]
        even = computing(steps, {int(place) for place in places})
        return replace(even, places=tuple(places)) if any(place % 1 for place in places) else even
    if singly:
        return computing(steps, set(range(body)) - _every_second(body - 1, skipped))
    if computed < (MIN_COMPUTED_FOR_FORECASTS_OF_HEUN if trapezoid else MIN_COMPUTED_FOR_FORECASTS):
        if body == steps and not cut and skipped > 1:
            # Between two steps the earlier one is nearer (benchmarks/few_steps.py); a single skipped one would be last.
            return computing(steps, {steps * i // computed for i in range(computed)}, order=0)
        between = (steps - 1) / (computed - 1) if cut and computed > 1 else body / computed
        return computing(steps, {round(between * i) for i in range(computed)}, order=0)
    if early:
        # A last step that is longer than their mean is one of them.
        between = (steps - 1) / (computed - 1) if lengths[-1] > sigmas[0] / computed else steps / computed
        nearest_to = int if between < 2 else round  # of single skipped steps, none is the second of the run
        return computing(steps, {nearest_to(between * i) for i in range(computed)}, order=0)
    # If the last step is skipped, forecasts reach the end anyway. Then it is best to skip every second of the last
    # steps, which leaves more first steps computed (demo model, 12 to 30 Euler steps; not at 50, where the last is
    # computed).
    if not trapezoid and body < steps and first <= body - 2 * skipped:
        return computing(steps, set(range(body)) - _every_second(body - 1, skipped))
    more = first_steps(steps, computed, first)
    if euler and more > first and computed < MANY_COMPUTED_SHARE * steps:
        last = max(1, min(DEFAULT_COOLDOWN_STEPS, more - DEFAULT_COOLDOWN_STEPS))
        return computing(steps, growing(body, computed, more, last).compute)
    return computing(steps, growing(body, computed, first).compute)


def _first_length(sigmas: Sequence[float], body: int, computed: int) -> float:
    """Length in sigma of the first of so many even steps over the first ``body`` ones, as a share of their mean."""
    return (sigmas[0] - float(np.interp(body / computed, range(len(sigmas)), sigmas))) * computed / sigmas[0]


def _every_second(before: int, skipped: int) -> set[int]:
    """Steps to skip where there are few: no two are neighbours, and they come as late as possible before a step.

    >>> sorted(_every_second(10, 3))
    [5, 7, 9]
    """
    return {before - 1 - 2 * i for i in range(skipped)}


def _twice(
    sigmas: Sequence[float], visits: list[int], computed: int, warmup: int | None, cooldown: int | None
) -> StepPlan:
    """The plan for a solver of second order, which visits noise levels twice: the second visit repeats the first one.

    The levels are planned like steps; computed steps that are left over go to second visits, from the beginning on.
    """
    levels = [sigmas[i] for i in visits]
    plan = untuned(levels, min(computed, len(levels)), trapezoid=True, warmup=warmup, cooldown=cooldown)
    compute = {visits[i] for i in plan.compute}
    again = [i for i in range(len(sigmas)) if i not in visits]
    order = max([segment.order for segment in plan.segments], default=0)
    return computing(len(sigmas), {*compute, *again[: computed - len(compute)]}, order)


def _by_length(lengths: Sequence[float], computed: int) -> tuple[int, ...]:
    """The steps to compute, including the first one, if steps differ much in length.

    They minimise the sum, over skipped steps, of their length times the number of steps since the computed one before
    them. That is the error of the latents if outputs are repeated and change about as much from any level to the next,
    which is how such lists are chosen. Found by dynamic programming.
    """
    steps = len(lengths)
    cost = [[0.0] * (steps + 1) for _ in range(steps)]
    for a in range(steps):
        for b in range(a + 1, steps + 1):
            cost[a][b] = sum(lengths[s] * (s - a) for s in range(a + 1, b))
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for _ in range(computed - 1):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for last, (spent, path) in best.items():
            for b in range(last + 1, steps):
                found = (spent + cost[last][b], (*path, b))
                longer[b] = min(longer.get(b, found), found)
        best = longer
    return min((spent + cost[last][steps], path) for last, (spent, path) in best.items())[1]


def resampled(plan: StepPlan, sigmas: Sequence[float], others: Sequence[float]) -> StepPlan:
    """The plan for a run with other noise levels: it computes the same share of steps, as densely along sigma.

    It computes at least three steps, among them the first one and, if the plan has it, the last one.

    Args:
        plan: a plan made at ``sigmas``.
        sigmas, others: falling noise levels of the old and the new run, (N,) and (M,).
    """
    old, new = np.asarray(sigmas), np.asarray(others)
    if len(old) == len(new) and np.allclose(old, new, rtol=1e-3, atol=1e-4):
        return plan
    count = len(plan.compute)
    places = np.interp(-new, -old, np.arange(len(old)))  # where each new step lies among the old ones
    last = [len(new) - 1] if plan.compute[-1] == len(old) - 1 and len(new) > 1 else []
    numbers = np.linspace(0, count - 1, max(min(3, len(new)), round(count * len(new) / len(old))))
    free = np.ones(len(new), dtype=bool)
    free[[0, *last]] = False
    compute = {0, *last}
    for number in numbers[1 : len(numbers) - len(last)]:
        wanted = np.interp(number, np.arange(count), plan.compute)
        step = int(np.argmin(np.where(free, np.abs(places - wanted), np.inf)))
        free[step] = False
        compute.add(step)
    return _refilled(replace(plan, steps=len(new), compute=tuple(sorted(compute)), places=()), places)


def later(plan: StepPlan, first: int) -> StepPlan:
    """The plan of a run as part of a longer run whose ``first`` steps are left out.

    >>> later(default(10, 5), 10).compute
    (10, 11, 13, 17, 19)
    """
    segments = tuple([replace(s, after=s.after + first, until=s.until + first) for s in plan.segments])
    compute = tuple([step + first for step in plan.compute])
    places = tuple([place + first for place in plan.places])
    return replace(plan, steps=plan.steps + first, compute=compute, segments=segments, places=places)


def beginning(plan: StepPlan, first: int) -> StepPlan:
    """The plan for a denoiser that begins at step ``first`` with nothing to forecast from, as the second of two does.

    That step and the next one are computed. From there on as many steps are computed as the plan has, at least three,
    with growing gaps (:func:`growing`).

    >>> default(20, 8).compute, beginning(default(20, 8), 8).compute
    ((0, 1, 3, 6, 10, 14, 17, 19), (0, 1, 3, 6, 8, 9, 14, 19))
    """
    start = {first, min(first + 1, plan.steps - 1)}
    if start <= set(plan.compute):
        return plan
    rest = [step for step in plan.compute if step >= first]
    ends = sum(step - plan.steps == i - len(rest) for i, step in enumerate(rest))  # computed one after another
    anew = growing(plan.steps - first, len(rest), 2, ends)
    compute = {*(set(plan.compute) - set(rest)), *(step + first for step in anew.compute)}
    return _refilled(replace(plan, compute=tuple(sorted(compute)), places=()), range(plan.steps))


def halved(plan: StepPlan, after: int) -> StepPlan:
    """The plan with one more step computed, in the middle of the skipped steps after step ``after``, if there are any.

    >>> halved(computing(12, {0, 1, 5, 11}), 1).compute
    (0, 1, 3, 5, 11)
    """
    segment = next((segment for segment in plan.segments if segment.after == after), None)
    if segment is None:
        return plan
    compute = sorted({*plan.compute, (segment.after + segment.until) // 2})
    return _refilled(replace(plan, compute=tuple(compute), places=()), range(plan.steps))


def _refilled(plan: StepPlan, places: Sequence[float]) -> StepPlan:
    """The plan with new segments between its computed steps, each filled like the nearest old one.

    Args:
        plan: a plan whose segments still belong to other computed steps.
        places: where each of its steps lies among the steps that these segments belong to.
    """
    segments = []
    for number, (a, b) in enumerate(zip(plan.compute, (*plan.compute[1:], plan.steps), strict=True)):
        if b > a + 1:
            middle = (places[a] + places[b - 1]) / 2
            source = min(plan.segments, key=lambda s: max(s.after - middle, middle - s.until))
            segments.append(replace(source, after=a, until=b, order=min(source.order, number)))
    return replace(plan, segments=tuple(segments))
