"""Plans: the search against brute force, errors against vectors, forecasts against series they must be exact on."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unicp.offline import search
from unicp.offline.search import Limits, Trajectories
from unicp.policies.plans.step_plan import (
    LATE_STEPS_PER_ROOT,
    Segment,
    StepPlan,
    computing,
    default,
    growing,
    halved,
    resampled,
)
from unicp.tensors import extrapolation


def sigmas_of(steps: int, rng: np.random.Generator) -> Any:
    return np.concatenate([np.sort(rng.uniform(0.05, 1.0, steps))[::-1], [0.0]])


def trajectories(steps: int, seed: int, prompts: int = 2, size: int = 12) -> tuple[Trajectories, list[Any]]:
    """Random smooth runs: outputs that are polynomials in sigma with some noise."""
    rng = np.random.default_rng(seed)
    sigmas = sigmas_of(steps, rng)
    runs = []
    for _ in range(prompts):
        powers = np.stack([sigmas[:-1] ** p for p in range(4)], 1)
        runs.append(powers @ rng.normal(size=(4, size)) + 0.05 * rng.normal(size=(steps, size)))
    gains = rng.uniform(0.5, 3.0, steps)
    return Trajectories(sigmas=sigmas, grams=np.stack([search.gram(v) for v in runs]), gains=gains), runs


def every_plan(steps: int, limits: Limits) -> list[tuple[int, ...]]:
    forced = set(range(limits.warmup)) | set(range(steps - limits.cooldown, steps))
    free = [s for s in range(steps) if s not in forced]
    found = []
    for chosen in itertools.product((False, True), repeat=len(free)):
        compute = sorted(forced | {s for s, wanted in zip(free, chosen, strict=True) if wanted})
        gaps = [b - a - 1 for a, b in itertools.pairwise([*compute, steps])]
        if max(gaps) <= limits.gap:
            found.append(tuple(compute))
    return found


def additive(t: Trajectories, compute: tuple[int, ...]) -> float:
    """What the search minimises, summed up the long way: each segment with the fill that is best for it."""
    total = 0.0
    for place, (a, b) in enumerate(itertools.pairwise([*compute, t.steps])):
        if b == a + 1:
            continue
        best, corrected = np.inf, None
        if search.corrects(t, a, b):
            left = search.remainder(t, list(compute[: place + 1])[::-1], b)
            corrected = np.array([left @ g @ left for g in t.grams])
        for order, damping in search.FILLS:
            if order > place:
                continue
            nodes = list(compute[: place + 1])[::-1][: order + 1]
            c = search.deviation(t, nodes, b, damping)
            squares = np.maximum([c @ g @ c for g in t.grams], 0)
            if corrected is not None:
                squares = search.TRANSIENT_SHARE**2 * squares + corrected
            best = min(best, float(np.sum(t.gains[:, a + 1 : b].mean(1) ** 2 * squares)))
        total += best
    return float(total)


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 9), st.integers(0, 10**6), st.integers(1, 3), st.integers(0, 1))
def test_the_search_equals_brute_force(steps: int, seed: int, warmup: int, cooldown: int) -> None:
    t, _ = trajectories(steps, seed)
    # A path that the sum ranks low may have the smaller whole error: keep one, so that only the sum decides.
    limits = Limits(warmup=warmup, cooldown=cooldown, gap=3, power=2, tempering=1, keep=1)
    found = search.plans(t, limits)
    by_number: dict[int, float] = {}
    for compute in every_plan(steps, limits):
        value = additive(t, compute)
        by_number[len(compute)] = min(value, by_number.get(len(compute), np.inf))
    assert set(found) <= set(by_number)
    for number, plan in found.items():
        assert additive(t, plan.compute) == pytest.approx(by_number[number], rel=1e-9, abs=1e-12)
        assert len(plan.compute) == number


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 14), st.integers(0, 10**6))
def test_more_budget_never_costs_predicted_error(steps: int, seed: int) -> None:
    t, _ = trajectories(steps, seed)
    found = search.plans(t)
    errors = [found[number].predicted for number in sorted(found)]
    assert errors == sorted(errors, reverse=True)
    assert found[steps].predicted == 0
    for plan in found.values():
        assert plan.compute[:2] == (0, 1) and plan.compute[-1] == steps - 1
        skipped = {s for segment in plan.segments for s in range(segment.after + 1, segment.until)}
        assert skipped == set(range(steps)) - set(plan.compute)


@settings(max_examples=50, deadline=None)
@given(st.integers(4, 12), st.integers(0, 10**6))
def test_the_gram_error_is_that_of_the_vectors(steps: int, seed: int) -> None:
    t, runs = trajectories(steps, seed)
    rng = np.random.default_rng(seed)
    a = int(rng.integers(1, steps - 2))
    b = int(rng.integers(a + 2, steps + 1))
    nodes = [a, *sorted(rng.choice(a, size=min(a, int(rng.integers(0, 3))), replace=False), reverse=True)]
    damping = float(rng.uniform(0, 1))
    c = search.deviation(t, nodes, b, damping)
    for outputs, products in zip(runs, t.grams, strict=True):
        d = np.zeros(outputs.shape[1])
        for s in range(a + 1, b):
            factors = extrapolation.weights([t.sigmas[n] for n in nodes], t.sigmas[s], damping)
            forecast = sum(f * outputs[n] for f, n in zip(factors, nodes, strict=True))
            d += (t.sigmas[s + 1] - t.sigmas[s]) * (forecast - outputs[s])
        scale = np.mean([v @ v for v in outputs])
        assert c @ products @ c == pytest.approx(d @ d / scale, rel=1e-6, abs=1e-12)


def test_linear_forecasts_are_exact_on_linear_series_and_have_the_right_sign() -> None:
    sigmas = np.array([1.0, 0.9, 0.6, 0.5, 0.2, 0.0])
    outputs = np.stack([3 + 2 * sigmas[:-1], 1 - sigmas[:-1]], 1)
    t = Trajectories(sigmas=sigmas, grams=search.gram(outputs)[None])
    exact = StepPlan(steps=5, compute=(0, 1, 4), segments=(Segment(after=1, until=4, order=1, damping=1.0),))
    assert search.errors(t, exact) == pytest.approx(0, abs=1e-7)
    c = search.deviation(t, [1], 3, 1.0)  # step 2 repeats step 1
    # Sigma falls, so the width is negative; the first output grows with sigma, so the repeated one is too large.
    assert (c @ outputs)[0] == pytest.approx((0.5 - 0.6) * (outputs[1, 0] - outputs[2, 0]))
    assert (c @ outputs)[0] < 0


def test_a_correction_is_exact_on_what_the_polynomial_can_follow() -> None:
    sigmas = np.array([1.0, 0.9, 0.6, 0.5, 0.3, 0.2, 0.0])
    s = sigmas[:-1]
    outputs = np.stack([3 + 2 * s - s**2, 1 - s + 4 * s**2], 1)
    weights = np.array([-0.1, -0.4, -0.05, -0.3, -0.1, -0.2])  # not the differences of the sigmas
    t = Trajectories(sigmas=sigmas, grams=search.gram(outputs)[None], weights=weights)
    assert search.corrects(t, 1, 5)
    left = search.remainder(t, [1, 0], 5)
    assert left @ outputs == pytest.approx(0, abs=1e-12)
    skipped = (Segment(after=1, until=5, order=1, damping=1.0),)
    plan = StepPlan(steps=6, compute=(0, 1, 5), segments=skipped)
    alone = StepPlan(steps=6, compute=(0, 1, 5), segments=skipped, correct=False)
    corrected, plain = search.errors(t, plan)[0], search.errors(t, alone)[0]
    assert corrected == pytest.approx(search.TRANSIENT_SHARE * plain, rel=1e-6) and plain > 0.01
    # Where the computed step weighs next to nothing, its output cannot carry the correction.
    light = Trajectories(sigmas=sigmas, grams=t.grams, weights=np.array([-0.1, -0.4, -0.05, -0.3, -0.1, -0.01]))
    assert not search.corrects(light, 1, 5)
    assert not search.corrects(t, 1, 6)  # nothing is computed behind the end


@settings(max_examples=20, deadline=None)
@given(st.integers(6, 10), st.integers(0, 10**6))
def test_the_mean_of_the_prompts_can_be_what_counts_or_the_worst(steps: int, seed: int) -> None:
    t, _ = trajectories(steps, seed, prompts=4)
    gains = np.array([10.0, 1, 1, 1])[:, None] * np.ones(steps)
    t = Trajectories(sigmas=t.sigmas, grams=t.grams, gains=gains)
    mean, worst = (search.plans(t, Limits(power=power, tempering=1)) for power in (0.0, 8.0))
    for number in mean.keys() & worst.keys():
        by_mean, by_worst = (search.errors(t, found[number]) for found in (mean, worst))
        assert mean[number].predicted == pytest.approx(search.power_mean(by_mean, 0))
        assert worst[number].predicted == pytest.approx(search.power_mean(by_worst, 8))


@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 8), st.integers(0, 6))
def test_of_few_skipped_steps_the_default_plan_skips_no_neighbours(
    steps: int, skipped: int, warmup: int, cooldown: int
) -> None:
    computed = max(steps - skipped, min(steps, warmup + cooldown))
    plan = default(steps, computed, warmup, cooldown)
    assert len(plan.compute) == computed and plan.compute[0] == 0
    gaps = [segment.until - segment.after - 1 for segment in plan.segments]
    assert sum(gaps) == steps - computed
    first = max(warmup, computed - round(LATE_STEPS_PER_ROOT * steps**0.5))
    if max(warmup, first - 2) + 2 * (steps - computed) - 1 + max(cooldown, 3) <= steps:
        assert set(gaps) <= {1}
        assert set(range(max(warmup, first - 2))) <= set(plan.compute)
        assert set(range(steps - max(cooldown, 3), steps)) <= set(plan.compute)
    else:
        assert plan == growing(steps, computed, first, max(cooldown, min(3, first - warmup)))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 8), st.integers(0, 3))
def test_growing_gaps_leave_as_many_computed_as_asked(steps: int, computed: int, warmup: int, cooldown: int) -> None:
    warmup, cooldown = min(warmup, steps), min(cooldown, steps)
    plan = growing(steps, computed, warmup, min(cooldown, steps - warmup))
    assert set(range(warmup)) <= set(plan.compute)
    assert len(plan.compute) == min(steps, max(computed, min(steps, warmup + min(cooldown, steps - warmup))))
    skipped = {s for segment in plan.segments for s in range(segment.after + 1, segment.until)}
    assert skipped == set(range(steps)) - set(plan.compute)
    gaps = [b - a for a, b in itertools.pairwise((*plan.compute, steps))]
    widest = gaps.index(max(gaps))
    between = gaps[warmup - 1 : len(gaps) - cooldown]
    assert min(between, default=2) >= 2 or sum(between) < 2 * len(between)
    assert gaps[:widest] == sorted(gaps[:widest])
    assert gaps[widest:] == sorted(gaps[widest:], reverse=True)


@settings(max_examples=50, deadline=None)
@given(st.integers(6, 30), st.integers(6, 60), st.integers(0, 10**6))
def test_a_plan_for_other_sigmas_keeps_its_share_and_its_first_steps(old: int, new: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    plan = growing(old, max(4, old // 2), 3)
    sigmas, others = np.linspace(1, 1 / old, old), np.linspace(1, 1 / new, new)
    moved = resampled(plan, sigmas, others)
    assert moved.steps == new
    assert moved.compute[0] == 0
    assert moved.compute[-1] == new - 1
    assert len(moved.compute) == max(3, round(len(plan.compute) * new / old))
    assert resampled(plan, sigmas, sigmas) is plan
    skipped = {s for segment in moved.segments for s in range(segment.after + 1, segment.until)}
    assert skipped == set(range(new)) - set(moved.compute)
    for segment in moved.segments:
        assert segment.order <= moved.compute.index(segment.after)
    assert rng is not None


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(4, 40))
def test_a_halved_gap_costs_one_step_more_in_its_middle(data: st.DataObject, steps: int) -> None:
    inner = data.draw(st.sets(st.integers(1, steps - 1)))
    plan = replace(computing(steps, {0, *inner}, order=2), conditional=tuple(sorted(inner)[::2]))
    after = data.draw(st.sampled_from(plan.compute))
    changed = halved(plan, after)
    if after + 1 in plan.compute or after + 1 == steps:
        assert changed is plan
        return
    (middle,) = set(changed.compute) - set(plan.compute)
    assert set(plan.compute) < set(changed.compute) and changed.conditional == plan.conditional
    until = next((step for step in plan.compute if step > after), steps)
    assert after < middle < until and 0 <= (until - middle) - (middle - after) <= 1
    skipped = [s for segment in changed.segments for s in range(segment.after + 1, segment.until)]
    assert sorted(skipped) == sorted(set(range(steps)) - set(changed.compute))
    for segment in changed.segments:
        assert segment.after in changed.compute and segment.order <= changed.compute.index(segment.after)


def test_a_run_shorter_than_its_warm_up_and_cool_down_is_computed() -> None:
    for warmup, cooldown in ((2, 20), (20, 2), (2, 10**30), (10**30, 10**30), (3, 3)):
        assert growing(6, 3, warmup, cooldown).compute == tuple(range(6))
    assert growing(6, 3, 1, 1).compute[0] == 0
