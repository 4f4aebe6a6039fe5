"""The policies as pure state machines: what they decide for every series of measurements."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import unicp
from unicp import policies
from unicp.policies import Config, Decision, Needs, Policy, Step, config_from_dict, make_policy, register
from unicp.policies import config as policy_config
from unicp.policies.adacache import CODEBOOKS, AdaCachePolicy, rescale

quick = settings(max_examples=60, deadline=None)
measured = st.one_of(st.floats(0, 2), st.floats(0, allow_infinity=True), st.just(math.nan))
series = st.lists(measured, min_size=80, max_size=80)


@st.composite
def codebooks(draw: st.DrawFn, falling: bool = False) -> tuple[tuple[float, int], ...]:
    thresholds = sorted(draw(st.lists(st.floats(1e-3, 1), min_size=1, max_size=5, unique=True)))
    rates = draw(st.lists(st.integers(1, 8), min_size=len(thresholds), max_size=len(thresholds)))
    return tuple(zip(thresholds, sorted(rates, reverse=True) if falling else rates, strict=True))


@st.composite
def adacaches(draw: st.DrawFn) -> unicp.AdaCacheConfig:
    low, high = sorted((draw(st.floats(0, 1)), draw(st.floats(0, 1))))
    return unicp.AdaCacheConfig(
        codebook=draw(st.one_of(st.sampled_from(sorted(CODEBOOKS)), codebooks())),
        rescale=draw(st.booleans()),
        moreg=draw(st.booleans()),
        moreg_form=draw(st.sampled_from(["reference", "paper"])),
        moreg_scale=draw(st.floats(1e-9, 10)),
        moreg_power=draw(st.floats(1e-9, 1e3)),
        moreg_gradient=draw(st.floats(0, 1e3)),
        moreg_window=(low, high),
        moreg_strides=tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))),
        metric_location=draw(st.sampled_from(["start", "mid", "end", "all"])),
        metric_kind=draw(st.sampled_from(["self_attention", "cross_attention", "mlp", "block"])),
        guidance=draw(st.sampled_from(["shared", "separate"])),
        fill=draw(st.sampled_from(["residual", "forecast"])),
        damping=draw(st.floats(0, 1)),
        warmup_steps=draw(st.integers(1, 5)),
        cooldown_steps=draw(st.integers(0, 5)),
    )


@st.composite
def schedules(draw: st.DrawFn) -> unicp.ScheduleConfig:
    steps = tuple(sorted(draw(st.sets(st.integers(0, 60), min_size=1))))
    fill = draw(st.sampled_from(["reuse", "linear", "quadratic"]))
    which: dict[str, Any] = draw(st.sampled_from([{"interval": draw(st.integers(1, 9))}, {"compute": steps}]))
    return unicp.ScheduleConfig(
        **which,
        warmup_steps=draw(st.integers(1, 5)),
        fill=fill,
        damping=draw(st.floats(0, 1)),
        unit="output" if fill != "reuse" else draw(st.sampled_from(["output", "stack"])),
    )


configs = st.one_of(adacaches(), schedules())


def play(
    config: Config,
    count: int,
    changes: list[float] | float = 0.1,
    motions: list[float] | None = None,
    known: bool = True,
) -> list[Decision]:
    """The plans of one generation, with the measurements an engine would hand over."""
    policy, plans = make_policy(config), []
    seen = False
    for i in range(count):
        step = Step(index=i, count=count if known else None, position=i, sigma=1 - i / count)
        plan = policy.decide(step)
        plans.append(plan)
        if plan.action == "compute":
            change = changes if isinstance(changes, float) else changes[i]
            policy.observe(step, change if seen else None, motions[i] if motions else None)
            seen = True
    return plans


def computed(plans: list[Decision]) -> list[int]:
    return [i for i, plan in enumerate(plans) if plan.action == "compute"]


# --- what every policy keeps to -------------------------------------------------------------------------------------


@quick
@given(config=configs, count=st.integers(1, 80), changes=series, motions=series)
@example(  # overflows
    config=unicp.AdaCacheConfig(moreg=True, moreg_scale=1e-9, moreg_power=1e3),
    count=50,
    changes=[0.1] * 80,
    motions=[0.5] * 80,
)
def test_plans_are_well_formed(config: Config, count: int, changes: list[float], motions: list[float]) -> None:
    needs = make_policy(config).needs()
    plans = play(config, count, changes, motions if needs.strides else None)
    for i, plan in enumerate(plans):
        assert plan.action in {"compute", "forecast" if needs.order else "reuse"}
        if i < config.warmup_steps or i >= count - getattr(config, "cooldown_steps", 0):
            assert plan.action == "compute"
        if plan.action == "forecast":
            assert plan.damping == config.damping
    assert make_policy(config).why_idle()


@quick
@given(config=configs, count=st.integers(1, 80), changes=series)
def test_decisions_are_replayed(config: Config, count: int, changes: list[float]) -> None:
    assert play(config, count, changes) == play(config, count, changes)


@quick
@given(config=configs)
def test_json_round_trip(config: Config) -> None:
    again = config_from_dict(json.loads(config.to_json()))
    assert again == config
    assert hash(again) == hash(config)
    assert type(again) is type(config)


# --- AdaCache -------------------------------------------------------------------------------------------------------


@quick
@given(codebook=codebooks(), count=st.integers(1, 80), changes=series)
def test_no_gap_exceeds_the_largest_rate(codebook: Any, count: int, changes: list[float]) -> None:
    steps = computed(play(unicp.AdaCacheConfig(codebook=codebook), count, changes))
    assert steps[0] == 0
    assert steps[-1] == count - 1
    assert all(1 <= b - a <= max(rate for _, rate in codebook) for a, b in itertools.pairwise(steps))


@quick
@given(config=adacaches(), count=st.integers(10, 80), change=st.sampled_from([math.nan, math.inf]))
def test_not_a_number_is_no_reason_to_reuse(config: unicp.AdaCacheConfig, count: int, change: float) -> None:
    assert computed(play(config, count, change, [math.nan] * 80)) == list(range(count))
    config = config.replace(moreg=True, moreg_window=(0.0, 1.0))
    assert computed(play(config, count, 0.01, [change] * 80)) == list(range(count))


@quick
@given(config=adacaches(), count=st.integers(1, 80), changes=series)
def test_the_codebook_of_rate_one_computes_everything(
    config: unicp.AdaCacheConfig, count: int, changes: list[float]
) -> None:
    plans = play(config.replace(codebook=((1.0, 1),)), count, changes, changes)
    assert computed(plans) == list(range(count))


@quick
@given(codebook=codebooks(falling=True), factor=st.floats(0.01, 1), change=st.floats(0, 3), count=st.integers(1, 60))
def test_smaller_thresholds_never_compute_less(codebook: Any, factor: float, change: float, count: int) -> None:
    smaller = tuple((threshold * factor, rate) for threshold, rate in codebook)
    assume(len({threshold for threshold, _ in smaller}) == len(smaller))
    wide = computed(play(unicp.AdaCacheConfig(codebook=codebook), count, change))
    narrow = computed(play(unicp.AdaCacheConfig(codebook=smaller), count, change))
    assert len(narrow) >= len(wide)


@quick
@given(codebook=codebooks(falling=True), change=st.floats(0, 3), factor=st.floats(1, 50), count=st.integers(1, 60))
def test_more_change_never_computes_less(codebook: Any, change: float, factor: float, count: int) -> None:
    config = unicp.AdaCacheConfig(codebook=codebook)
    assert len(computed(play(config, count, change * factor))) >= len(computed(play(config, count, change)))


def test_the_rule_step_by_step() -> None:
    """Worked out by hand: thresholds, division by the last rate, forced steps."""
    config = unicp.AdaCacheConfig(codebook=((0.1, 4), (0.2, 2), (1.0, 1)))
    changes = [9.0] * 20
    changes[1] = 0.15  # / 1 -> rate 2: next 3
    changes[3] = 0.18  # / 2 = 0.09 -> rate 4: next 7
    changes[7] = 0.84  # / 4 = 0.21 -> rate 1: next 8
    changes[8] = 0.1  # / 1, not below 0.1 -> rate 2: next 10
    changes[10] = 0.0  # -> rate 4: next 14
    changes[14] = 0.39  # / 4 -> rate 4: next 18, which is forced anyway
    assert computed(play(config, 20, changes)) == [0, 1, 3, 7, 8, 10, 14, 18, 19]


def test_forced_steps_of_two_denoisers_count_from_their_own_first() -> None:
    policy = AdaCachePolicy(unicp.AdaCacheConfig(codebook=((1e6, 9),)))
    actions = []
    for position, index in enumerate(range(12, 20)):
        step = Step(index=index, count=20, position=position, sigma=0.5)
        actions.append(policy.decide(step).action)
        if actions[-1] == "compute":
            policy.observe(step, 0.1 if position else None, None)
    assert actions == ["compute"] * 2 + ["reuse"] * 4 + ["compute"] * 2


def test_an_unknown_number_of_steps_has_no_last_ones() -> None:
    config = unicp.AdaCacheConfig(codebook=((1e6, 3),), moreg=True, moreg_scale=1e-3)
    plans = play(config, 20, 0.1, [0.9] * 20, known=False)
    assert computed(plans) == [0, 1, 4, 7, 10, 13, 16, 19]


# --- codebooks ------------------------------------------------------------------------------------------------------


@quick
@given(codebook=codebooks(), made_for=st.integers(1, 200), steps=st.integers(1, 200))
def test_rescaled_codebooks(codebook: Any, made_for: int, steps: int) -> None:
    scaled = rescale(codebook, made_for, steps)
    assert len(scaled) == len(codebook)
    for (threshold, rate), (new_threshold, new_rate) in zip(codebook, scaled, strict=True):
        assert new_threshold * steps == pytest.approx(threshold * made_for)
        assert isinstance(new_rate, int)
        assert new_rate == max(1, math.floor(rate * steps / made_for + 0.5))
    assert [t for t, _ in scaled] == sorted(t for t, _ in scaled)
    assert rescale(codebook, made_for, made_for) == codebook


def test_named_codebooks() -> None:
    """The three published ones, to the digit (methods, section 1)."""
    published = {
        "opensora-30-fast": (30, ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2), (1.00, 1))),
        "opensora-30-slow": (30, ((0.08, 3), (0.16, 2), (0.24, 1), (0.32, 1), (0.40, 1), (1.00, 1))),
        "opensora-100-fast": (100, ((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.00, 3))),
    }
    for name, (steps, entries) in published.items():
        assert (CODEBOOKS[name].steps, CODEBOOKS[name].entries) == (steps, entries)
    assert [name for name, book in CODEBOOKS.items() if "published" in book.source] == list(published)
    for name, book in CODEBOOKS.items():
        policy = AdaCachePolicy(unicp.AdaCacheConfig(codebook=name))
        assert policy.entries(book.steps) == policy.entries(None) == book.entries
        assert policy.entries(2 * book.steps) == rescale(book.entries, book.steps, 2 * book.steps) != book.entries
        fixed = AdaCachePolicy(unicp.AdaCacheConfig(codebook=name, rescale=False))
        assert fixed.entries(2 * book.steps) == book.entries
        unicp.AdaCacheConfig(codebook=book.entries)


# --- Motion Regularization ------------------------------------------------------------------------------------------


def moreg_factors(
    motions: list[float | None], rates: list[int], steps: list[int], count: int, config: unicp.AdaCacheConfig
) -> list[float]:
    """Methods, section 1, written down once more: the factor at each computed step after the first."""
    factors, m = [], [1.0]
    for n, step in enumerate(steps):
        raw = motions[n]
        inside = config.moreg_window[0] * count <= step <= config.moreg_window[1] * count
        m.append((raw / config.moreg_scale) ** config.moreg_power if inside and raw is not None else 1.0)
        g = config.moreg_gradient * (m[-1] - m[-2]) / rates[n]
        factors.append(m[-1] + {"reference": abs(g), "paper": g}[config.moreg_form])
    return factors


@quick
@given(
    form=st.sampled_from(["reference", "paper"]),
    motions=st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=40, max_size=40),
    changes=st.lists(st.floats(1e-3, 1), min_size=40, max_size=40),
    codebook=codebooks(),
    window=st.sampled_from([(0.1, 0.9), (0.0, 1.0), (0.25, 0.5), (0.5, 0.5)]),
    power=st.sampled_from([1.0, 2.0, 8.0]),
)
def test_moreg_follows_the_formula(
    form: str, motions: list[float | None], changes: list[float], codebook: Any, window: Any, power: float
) -> None:
    config = unicp.AdaCacheConfig(
        codebook=codebook, moreg=True, moreg_form=form, moreg_window=window, moreg_power=power, moreg_gradient=3.0
    )
    policy = AdaCachePolicy(config)
    steps, rates, seen = [], [], []
    for i in range(40):
        step = Step(index=i, count=40, position=i, sigma=1.0)
        if policy.decide(step).action != "compute":
            continue
        before = policy.rate
        policy.observe(step, changes[i] if i else None, motions[i])
        if i == 0:
            continue
        steps.append(i)
        rates.append(before)
        seen.append(motions[i])
        c = changes[i] / before * moreg_factors(seen, rates, steps, 40, config)[-1]
        expected = next((rate for threshold, rate in codebook if threshold > c), codebook[-1][1])
        assert policy.rate == expected


def test_moreg_computes_more_where_more_moves() -> None:
    config = unicp.AdaCacheConfig(codebook=((0.1, 4), (0.5, 2), (1.0, 1)), moreg=True, moreg_scale=0.4, moreg_power=2)
    still, medium, wild = (len(computed(play(config, 50, 0.2, [m] * 50))) for m in (0.1, 0.4, 1.0))
    assert still < medium < wild
    off = config.replace(moreg=False)
    assert play(off, 50, 0.2, [0.1] * 50) == play(off, 50, 0.2, [1.0] * 50)


def test_moreg_needs_motion_and_nothing_else_does() -> None:
    assert make_policy(unicp.AdaCacheConfig()).needs().strides == ()
    assert make_policy(unicp.AdaCacheConfig(moreg=True, moreg_strides=(1, 3))).needs().strides == (1, 3)


# --- schedules ------------------------------------------------------------------------------------------------------


@quick
@given(config=schedules(), count=st.integers(1, 80))
def test_schedules_compute_what_they_say(config: unicp.ScheduleConfig, count: int) -> None:
    wanted = set(range(0, count, config.interval)) if config.interval else set(config.compute or ())
    wanted |= set(range(config.warmup_steps))
    assert computed(play(config, count)) == sorted(wanted & set(range(count)))


# --- the registry ---------------------------------------------------------------------------------------------------


def test_a_config_without_a_policy() -> None:
    class Lost(Config):
        method = "lost"

    with pytest.raises(unicp.UnicpError, match=r"'Lost'; known: .*AdaCacheConfig"):
        make_policy(Lost())


def test_a_policy_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_config, "_REGISTRY", dict(policy_config._REGISTRY))

    class Mine(Config):
        method = "mine"

    @register(Mine)
    class MyPolicy(Policy):
        def __init__(self, config: Mine) -> None:
            pass

        def needs(self) -> Needs:
            return Needs(keep="output")

        def decide(self, step: Step) -> Decision:
            return Decision(action="compute")

        def why_idle(self) -> str:
            return "it never reuses"

    assert policies.config_types()["mine"] is Mine
    assert isinstance(make_policy(Mine()), MyPolicy)
