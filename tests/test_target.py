"""UniCP for a speed: what is left is shared out, and the speed comes out as asked."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import unicp
from tests.tiny import FAMILIES
from unicp.engine.fills.kept import Kept
from unicp.errors import UnicpError
from unicp.policies import Decision, Step
from unicp.policies.plans import step_plan
from unicp.policies.unicp import UniCPConfig, UniCPPolicy
from unicp.policies.unit_errors import UnitErrors
from unicp.policies.windows import Place, Target, Window

KINDS = {"attention": "self_attention", "mlp": "mlp"}
SAVED = 0.9
"""Share of a call's operations that filling both units saves."""


def played(config: UniCPConfig, steps: int, seed: int = 0, errors: UnitErrors | None = None) -> tuple[str, float]:
    """The plan of a run whose measured errors are random, and the share of its operations that ran."""
    draw = random.Random(seed)
    policy = UniCPPolicy(config)
    policy.attach(KINDS, (), errors)
    done, last, ran = "", 0, 0.0
    for index in range(steps):
        step = Step(index=index, count=steps, position=index, sigma=1 - index / steps)
        if index:
            policy.price({"attention": SAVED / 2, "mlp": SAVED / 2}, ran / index)
        units = policy.decide(step).units
        filled = units.get("mlp", "compute") == config.fill
        assert set(units.values()) <= {config.fill if filled else "compute"}
        done += "~" if filled else "#"
        ran += 1 - SAVED if filled else 1
        if not filled:
            change = draw.uniform(0.01, 0.3)
            policy.observe_units(step, dict.fromkeys(KINDS, (index - last, change if index else None)))
            last = index
    assert policy.notes() == [note for note in policy.notes() if "target_speedup" not in note]
    return done, ran / steps


@pytest.mark.parametrize("fill", ["forecast", "reuse"])
@pytest.mark.parametrize("steps", [20, 30, 50])
@pytest.mark.parametrize("speed", [1.3, 1.6667, 2.0, 2.5])
def test_the_speed_comes_out_as_asked_whatever_is_measured(fill: str, steps: int, speed: float) -> None:
    for seed in range(5):
        done, ran = played(UniCPConfig(target_speedup=speed, fill=fill), steps, seed)
        assert 1 / speed - 1.5 * SAVED / steps <= ran <= 1 / speed + 1e-6, done


def test_a_profile_gives_the_speed_without_measuring() -> None:
    table = [[0.05 * k * (3 if t < 6 else 1) for k in range(1, 7)] for t in range(30)]
    errors = UnitErrors(sigmas=[1 - i / 30 for i in range(30)], steps=30, cache=dict.fromkeys(KINDS, table))
    config = UniCPConfig(target_speedup=2.0, profile="some.safetensors", pcas=False)
    done, ran = played(config, 30, errors=errors)
    assert 0.5 - 1.5 * SAVED / 30 <= ran <= 0.5 + 1e-6
    assert done[:8].count("~") / 8 < done[8:].count("~") / 22  # where errors are thrice as large, less is filled
    other, _ = played(config, 30, seed=1, errors=errors)
    assert other == done


def test_a_target_that_cannot_be_met_is_said() -> None:
    policy = UniCPPolicy(UniCPConfig(target_speedup=4.0, delta_mlp=0))
    policy.attach({"attention": "self_attention"}, (), None)
    for index in range(20):
        step = Step(index=index, count=20, position=index, sigma=1 - index / 20)
        if index:
            policy.price({"attention": 0.4}, 1.0)
        policy.decide(step)
        policy.observe_units(step, {"attention": (1, 0.1 if index else None)})
    assert any(note.startswith("target_speedup=4: no more than 1.") for note in policy.notes())


def test_a_plan_needs_no_measurement_but_the_number_of_steps() -> None:
    policy = UniCPPolicy(UniCPConfig(target_speedup=2.0))
    assert not policy.needs().unit_changes
    policy.attach({"attention": "self_attention"}, (), None)
    for index in range(20):
        step = Step(index=index, count=None, position=index, sigma=1 - index / 20)
        assert policy.decide(step).action == "compute"
    assert any(note.startswith("nothing tells how many steps") for note in policy.notes())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"windows": "unit"}, "windows must be 'shared', got 'unit'"),
        ({"stack": unicp.AdaCacheConfig()}, "stack must be None"),
    ],
)
def test_a_target_refuses_what_decides_otherwise(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UnicpError, match=said):
        UniCPConfig(target_speedup=2, **fields)


@pytest.mark.parametrize("fields", [{"refresh_from_sliced": True}, {"dws": "off"}])
def test_no_forecast_is_made_from_what_was_sliced(fields: dict[str, Any]) -> None:
    with pytest.raises(UnicpError, match="windows begin at sliced outputs"):
        UniCPConfig(**fields)
    assert UniCPConfig(fill="reuse", **fields).refreshes


def test_a_pipeline_takes_the_operations_that_were_asked_for() -> None:
    family = FAMILIES["wan"]
    pipe = family.build()
    whole = unicp.accelerate(pipe, UniCPConfig(delta=1e9))
    family.generate(pipe)
    least = whole.report().computed_fraction
    unicp.restore(pipe)
    share = 0.4 * least + 0.6
    session = unicp.accelerate(pipe, UniCPConfig(target_speedup=1 / share))
    family.generate(pipe)
    assert share - 0.11 <= session.report().computed_fraction <= share + 1e-6


def recomputes(target: Target, steps: int, first: int = 0) -> list[int]:
    """The steps that a target without a profile computes, of a window that two steps have filled."""
    window = Window(members=("a",), limit=1.0, forecasts=True)
    found, at = [first, first + 1], first + 2
    while at < steps:
        here = Place(index=at, level=-float(at))
        target.spent = (at - first) * (1 - target.saved) + len(found) * target.saved
        at = target.due(window, here, steps, first, ())
        found += [at] * (at < steps)
        at += 1
    return found


def test_without_a_profile_a_target_follows_a_plan() -> None:
    target = Target(speedup=2.0, max_window=6, cooldown=1, saved=1.0)
    assert recomputes(target, 50) == list(step_plan.fronted(50, 25).compute)
    assert target.reachable is None
    later = Target(speedup=2.0, max_window=6, cooldown=1, saved=1.0)  # the second of two denoisers
    assert recomputes(later, 50, 20) == [20 + step for step in step_plan.fronted(30, 15).compute]


@given(steps=st.integers(4, 100), speedup=st.floats(1.05, 6.0), max_window=st.integers(1, 8), saved=st.floats(0.3, 1.0))
def test_a_plan_keeps_to_the_speed_or_says_what_can_be_had(
    steps: int, speedup: float, max_window: int, saved: float
) -> None:
    target = Target(speedup=speedup, max_window=max_window, cooldown=1, saved=saved)
    found = recomputes(target, steps)
    cost = len(found) * saved + steps * (1 - saved)
    assert max(b - a for a, b in pairwise(found)) <= max_window + 1
    assert found[-1] == steps - 1
    assert steps / cost >= (target.reachable or speedup) - 1e-6


def test_outputs_computed_from_fills_are_made_good_as_filled_ones_are() -> None:
    def kept() -> Kept:
        held = Kept(order=1, steadiness=True)
        for index in range(3):
            held.keep(step(index), [torch.full((1, 4), float(index**2)) + torch.arange(4.0)])
        return held

    def step(index: int) -> Step:
        return Step(index=index, count=6, position=index, sigma=1 - index / 6, weights=(-1 / 6,) * 6)

    plain, passing = kept(), kept()
    forecast = plain.fill(step(3), Decision(action="forecast"), step(3).weight)
    passing.passes(step(3), forecast, step(3).weight)
    assert len(passing.tensors()) == 3 and len(passing.values) == 2
    new = [torch.full((1, 4), 16.0) + torch.arange(4.0)]
    corrected, alike = plain.keep(step(4), new)[0], passing.keep(step(4), new)[0]
    assert not torch.equal(corrected, new[0])
    torch.testing.assert_close(alike, corrected)
    assert not passing.passed and not passing.forecasts


def test_nothing_is_told_late_that_decides() -> None:
    budget = unicp.BudgetConfig(target_speedup=2)
    inside = {"pcas": False, "edcw": "off"}
    assert UniCPPolicy(UniCPConfig(stack=budget, **inside)).needs().late
    for more in ({"map_level": True}, {"edcw": "online"}, {"stack": budget.replace(override_reserve=0.1)}):
        assert not UniCPPolicy(UniCPConfig(**{"stack": budget, **inside, **more})).needs().late
