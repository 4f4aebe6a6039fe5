"""Plans: what they compute, and what becomes of them at other noise levels."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from unicp.policies.plans.step_plan import (
    LATE_STEPS_PER_ROOT,
    computing,
    default,
    growing,
    halved,
    resampled,
)


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
    plan = computing(steps, {0, *inner}, order=2)
    after = data.draw(st.sampled_from(plan.compute))
    changed = halved(plan, after)
    if after + 1 in plan.compute or after + 1 == steps:
        assert changed is plan
        return
    (middle,) = set(changed.compute) - set(plan.compute)
    assert set(plan.compute) < set(changed.compute)
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
