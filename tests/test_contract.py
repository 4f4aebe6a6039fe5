"""The contract of ``tests/contract.py``: every config on every family."""

from __future__ import annotations

import json

import pytest
import torch

from tests.contract import (
    CASES,
    FEW_STEPS,
    FEWER,
    PAIRS,
    SLOW_PAIRS,
    actions,
    calibrated,
    case,
    computed,
    plain,
    profile_of,
    runs,
)
from tests.tiny import FAMILIES, denoisers
from unicp import BudgetConfig, Profile
from unicp.policies import config_from_dict, config_types
from unicp.specs import known_specs

NO_FRAMES = ("helios", "framepack", "ltx-condition")
"""Families whose tokens are no grid of frames: no motion is measured."""


def windows(name: str) -> bool:
    """Whether anything is kept under this case: its thresholds admit it."""
    return bool(getattr(case(name).config, "delta", 1) > 1e-3)


def perturbs(family: str) -> bool:
    """Whether a branch of guidance leaves units, and queries, out (LTX-2): then values are what is counted."""
    return FAMILIES[family].query == "to_v"


pairs = pytest.mark.parametrize(
    ("family", "name"),
    [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW_PAIRS)],
    ids=[f"{f}-{n}" for f, n in [*PAIRS, *SLOW_PAIRS]],
    scope="module",  # all tests of a pair in a row
)


@pytest.mark.parametrize("method", config_types())
def test_every_config_type_is_under_the_contract(method: str) -> None:
    assert CASES.get(method), f"config type {method!r} has no entry in CASES of tests/contract.py"
    assert {type(c.config) for c in CASES[method].values()} == {config_types()[method]}


def test_every_built_in_spec_is_under_the_contract() -> None:
    tried = {type(f.build().transformer).__name__ for f in FAMILIES.values()}
    missing = {spec.family for name, spec in known_specs().items() if name not in tried}
    missing -= {spec.family for name, spec in known_specs().items() if name in tried}
    assert not missing, f"no tiny pipeline in tests/tiny.py for: {sorted(missing)}"


@pairs
def test_computing_everything_changes_no_bit(family: str, name: str) -> None:
    done = runs(family, name)
    assert torch.equal(done.always, plain(family, steps=FEW_STEPS))
    assert {r.action for r in done.always_report.steps} == {"compute"}
    assert done.always_report.computed_fraction == 1


@pairs
def test_restore_gives_back_every_bit_and_leaves_nothing(family: str, name: str) -> None:
    done = runs(family, name)
    assert torch.equal(done.restored, plain(family, steps=FEW_STEPS))
    assert done.after == done.before


@pairs
def test_two_runs_agree(family: str, name: str) -> None:
    done = runs(family, name)
    assert torch.equal(done.first, done.second)
    assert len(done.reports) == 2
    assert actions(done.reports[0]) == actions(done.reports[1])


@pairs
def test_reuse_shows_in_the_result(family: str, name: str) -> None:
    done = runs(family, name)
    assert bool(done.first.isfinite().all())
    assert not torch.equal(done.first, plain(family))


@pairs
def test_what_is_skipped_did_not_run(family: str, name: str) -> None:
    done = runs(family, name)
    report = done.reports[0]
    calls = len(done.family.branches) * 10
    assert len(report.steps) == calls
    assert not done.acting_warnings
    for denoiser in done.family.denoisers:
        mine = [r for r in report.steps if r.denoiser == denoiser]
        ran = computed(report, denoiser)
        acted = len(ran)
        if done.case.fills == "units":
            twice = "delta" in name  # where it is computed in full it runs sliced as well
            runs_too = {"slice", "blend", "delta"} | ({"map"} if perturbs(family) else set())  # maps want new values
            for unit, calls in done.blocks[denoiser].items():
                here = [r.units.get(unit, "compute") for r in ran]
                assert calls == here.count("compute") * (1 + twice) + sum(a in runs_too for a in here)
            assert sum(done.blocks[denoiser].values()) < len(mine) * len(done.blocks[denoiser]) or not windows(name)
            continue
        assert 0 < acted < len(mine)
        assert set(done.blocks[denoiser].values()) == {acted}
        assert done.entrance[denoiser] == (acted if done.case.fills == "output" else len(mine))


@pairs
def test_the_report_tells_what_was_done(family: str, name: str) -> None:
    done = runs(family, name)
    report = done.reports[0]
    assert report.method == done.case.config.method
    assert [r.branch for r in report.steps] == list(done.family.branches) * 10
    assert [r.index for r in report.steps] == [i for i in range(10) for _ in done.family.branches]
    sigmas = [r.sigma for r in report.steps]
    assert sigmas == sorted(sigmas, reverse=True)
    assert len(set(sigmas)) == 10
    share = len(computed(report)) / len(report.steps)
    if done.case.fills == "output":
        assert report.computed_fraction == pytest.approx(share)
    elif done.case.fills == "units":
        assert report.computed_fraction < 1 or not windows(name)
        assert all(r.units for r in report.steps if r.action == "partial")
    else:
        assert share < report.computed_fraction < 1
    assert report.count == 10
    assert report.computed_steps == len({r.index for r in computed(report)})
    assert report.seconds > 0
    assert json.loads(json.dumps(report.to_dict()))["steps"][0]["action"] == "compute"
    assert set(report.timeline()) == set(done.family.branches)


@pairs
def test_operations_are_those_that_torch_counts(family: str, name: str) -> None:
    done = runs(family, name)
    first, second = done.reports
    assert first.operations == second.operations == done.operations
    whole = done.always_report
    assert whole.operations == whole.all_operations
    assert whole.all_operations * first.count == first.all_operations * whole.count
    assert first.computed_fraction == first.operations / first.all_operations


@pairs
def test_branches_decide_together_unless_asked_otherwise(family: str, name: str) -> None:
    done = runs(family, name)
    guidance = getattr(getattr(done.case.config, "stack", None) or done.case.config, "guidance", None)
    if isinstance(done.case.config, BudgetConfig):
        guidance = "shared"  # the check of forecasts is a measurement too
    measuring = {"separate": len(done.family.branches), "shared": 1, None: 0}[guidance]
    first_steps = {next(r.index for r in done.reports[0].steps if r.denoiser == d) for d in done.family.denoisers}
    for index in range(10):
        records = [r for r in done.reports[0].steps if r.index == index]
        if guidance != "separate":
            # Where the only unit that is reused is one that a branch leaves out, that branch computes; attention that
            # it leaves out has no map.
            alike = {"partial": "compute", "map": "compute"} if perturbs(family) else {}
            assert len({alike.get(r.action, r.action) for r in records}) == 1
            for unit in {unit for r in records for unit in r.units}:  # a branch may leave one out (LTX-2's sound)
                assert len({alike.get(r.units[unit], r.units[unit]) for r in records if unit in r.units}) == 1
        measured = [r.action in ("compute", "partial") and index not in first_steps for r in records]
        assert [r.metric is not None for r in records] == [m and i < measuring for i, m in enumerate(measured)]


@pytest.mark.parametrize("name", [f"{method}-{name}" for method, cases in CASES.items() for name in cases])
def test_config_round_trip(name: str) -> None:
    for config in (case(name).config, case(name).always_compute):
        assert config_from_dict(json.loads(config.to_json())) == config


@pytest.mark.parametrize("family", FEWER)
def test_calibration_leaves_the_pipeline_as_it_was(family: str) -> None:
    chosen, profile = FAMILIES[family], Profile.load(profile_of(family))
    pipe, fresh = calibrated(family), chosen.build()
    assert torch.equal(chosen.generate(pipe), plain(family))
    for denoiser, other in zip(denoisers(chosen, pipe), denoisers(chosen, fresh), strict=True):
        weights = other.state_dict()
        assert all(torch.equal(p, weights[n]) for n, p in denoiser.state_dict().items())
    for name in chosen.denoisers:
        part = profile.of(name)
        assert part.units
        assert any(part.moments(unit) is not None for unit in part.units) == chosen.slices
        assert len(part.sigmas) >= 4
        assert bool(profile.tensors[f"{name}/stack/cache_mean"][0, 0].isfinite())
        assert bool(profile.tensors[f"{name}/metric"][1:].isfinite().all())
        motion = profile.tensors.get(f"{name}/motion")
        assert (motion is None) == (family in NO_FRAMES)
        assert motion is None or bool((motion > 0).all())
