"""UniCP with one window for all units of a denoiser (``windows="shared"``)."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.unicp_literal import profiled_plan
from unicp.policies import Step
from unicp.policies.unicp import UniCPConfig, UniCPPolicy, planned
from unicp.policies.unit_errors import UnitErrors

KINDS = {"attention": "self_attention", "text": "cross_attention", "mlp": "mlp"}
LIMITS = {"attention": 0.2, "text": 0.1, "mlp": 0.3}
STEPS, WINDOW = 12, 4
CONFIG = UniCPConfig(
    fill="reuse", windows="shared", max_window=WINDOW, pcas=True,
    delta=LIMITS["attention"], delta_cross=LIMITS["text"], delta_mlp=LIMITS["mlp"],
)  # fmt: skip

table = st.lists(st.lists(st.floats(0, 0.5), min_size=WINDOW, max_size=WINDOW), min_size=STEPS, max_size=STEPS)
three_tables = st.fixed_dictionaries(dict.fromkeys(KINDS, table))


def errors_of(cache: dict[str, Any], sliced: dict[str, float]) -> UnitErrors:
    return UnitErrors(sigmas=[1 - i / STEPS for i in range(STEPS)], steps=STEPS, cache=cache, sliced=sliced)


def share(cache: dict[str, Any], anchor: int, gap: int) -> float:
    """The shared error: the mean of each unit's share of its own limit."""
    return sum(cache[unit][anchor][gap - 1] / LIMITS[unit] for unit in KINDS) / len(KINDS)


@settings(max_examples=200, deadline=None)
@given(three_tables)
def test_all_units_follow_the_literal_plan_of_the_mean_error(cache: dict[str, Any]) -> None:
    mean = [[share(cache, anchor, gap) for gap in range(1, WINDOW + 1)] for anchor in range(STEPS)]
    near = any(math.isclose(error, 1, rel_tol=1e-9) for row in mean for error in row)
    literal = profiled_plan(mean, delta=1, max_window=WINDOW, warmup=2, cooldown=1)
    plans = planned(CONFIG, errors_of(cache, {}), KINDS)
    assert all(len(set(plan.values())) == 1 for plan in plans)
    assert near or [plan["attention"] for plan in plans] == literal


@settings(max_examples=200, deadline=None)
@given(three_tables, st.sampled_from(["switch", "off"]), st.booleans())
def test_what_is_reused_is_never_older_than_the_window_admits(cache: dict[str, Any], dws: str, refresh: bool) -> None:
    config = CONFIG.replace(dws=dws, refresh_from_sliced=refresh, delta_prune=0.2)
    kept = dict.fromkeys(KINDS, 0)
    for step, plan in enumerate(planned(config, errors_of(cache, {"attention": 0.1}), KINDS)):
        for unit, action in plan.items():
            if action == "compute" or (config.refreshes and action != "reuse"):
                kept[unit] = step
            elif action == "reuse":
                assert share(cache, kept[unit], step - kept[unit]) <= 1 + 1e-9
        assert "reuse" not in plan.values() or len(set(kept.values())) == 1


def test_what_is_sliced_opens_no_window_for_the_others() -> None:
    policy = UniCPPolicy(CONFIG.replace(edcw="online", warmup_steps=3))
    policy.attach(KINDS, (), errors_of({}, {"attention": 0.1}))
    done = []
    for index in range(7):
        step = Step(index=index, count=STEPS, position=index, sigma=1 - index / STEPS)
        done.append(policy.decide(step).units.get("attention", "compute"))
        if done[-1] == "compute":  # what was kept would have been far off
            policy.observe_units(step, {unit: (1, 9.0 if index else None) for unit in KINDS})
        else:
            policy.observe_units(step, {"text": (1, 0.0), "mlp": (1, 0.0)})  # what was computed in full
    # Attention is measured again behind every step at which it was sliced.
    assert done == ["compute", "compute", "compute", "slice", "compute", "slice", "compute"]


@pytest.mark.parametrize(
    ("shares", "signs"),
    [
        ((0.5, 2.0, 0.5), "############"),  # one a step: no window, though two of the units would have one
        (
            (0.1, 1.1, 0.1),
            "##.#.#.#.#.#",
        ),  # less than half: two steps, though the text's own would admit none
        ((0.2, 0.2, 0.2), "##.#..#...##"),
        ((None, 0.0, 0.0), "############"),
        ((math.nan, 0.0, 0.0), "############"),
        ((0.0, math.inf, 0.0), "############"),
    ],
)
def test_the_online_window_is_that_of_the_mean_share(shares: tuple[float | None, ...], signs: str) -> None:
    policy = UniCPPolicy(CONFIG.replace(edcw="online", warmup_steps=1, max_window=WINDOW - 1))
    policy.attach(KINDS, (), None)
    played, last = "", 0
    for index in range(STEPS):
        step = Step(index=index, count=STEPS, position=index, sigma=1 - index / STEPS)
        plan = policy.decide(step)
        actions = {plan.units.get(unit, "compute") for unit in KINDS}
        assert len(actions) == 1
        played += {"compute": "#", "reuse": "."}[actions.pop()]
        if played[-1] == "#":
            age = index - last
            measured = {
                unit: (age, None if index == 0 or each is None else each * LIMITS[unit] * age)
                for unit, each in zip(KINDS, shares, strict=True)
            }
            policy.observe_units(step, measured)
            last = index
    assert played == signs


def test_units_whose_limit_is_zero_and_protected_ones_take_no_part() -> None:
    cache = {unit: [[0.05] * WINDOW] * STEPS for unit in KINDS} | {"text": [[9.0] * WINDOW] * STEPS}
    policy = UniCPPolicy(CONFIG.replace(delta_mlp=0.0))
    policy.attach(KINDS, ("text",), errors_of(cache, {}))
    plans = [
        policy.decide(Step(index=i, count=STEPS, position=i, sigma=1 - i / STEPS)).units for i in range(STEPS)
    ]  # fmt: skip
    assert {plan.get("attention", "compute") for plan in plans} == {"compute", "reuse"}
    assert {plan.get(unit, "compute") for plan in plans for unit in ("text", "mlp")} == {"compute"}
